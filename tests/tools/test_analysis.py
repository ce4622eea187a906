"""ΔM and ΔD against their definitions in float64; recording, fitting, saving and drawing them."""

import shutil
from pathlib import Path

import numpy
import pytest
import scipy.stats
import torch
import torch.nn as nn
from safetensors.torch import save_file
from test_train import TINY

import train
from bidora import ALL_LINEAR, BiDoRALinear
from support.weights.weight_changes import Trajectory, decompose, delta, layer_delta
from tools import analysis
from tools.analysis import fit
from train import Config

pytestmark = pytest.mark.usefixtures("elsewhere")
TINY = TINY | dict(retrain_steps=4)


def definition(weight, base, dim):
    """ΔM and ΔD as the papers write them, in float64."""
    weight, base = weight.double(), base.double()
    cos = torch.nn.functional.cosine_similarity(weight, base, dim=dim)
    return (weight.norm(dim=dim) - base.norm(dim=dim)).abs().mean().item(), (1 - cos).mean().item()


@pytest.mark.parametrize("axis, dim", [("row", 1), ("column", 0)])
def test_decomposition_multiplies_to_the_weight_and_its_directions_are_unit_vectors(axis, dim):
    weight = torch.randn(7, 5)
    magnitude, direction = decompose(weight, axis)
    assert torch.allclose(magnitude * direction, weight)
    assert torch.allclose(direction.norm(dim=dim), torch.ones(weight.size(1 - dim)))


@pytest.mark.parametrize("axis, dim", [("row", 1), ("column", 0)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_delta_is_the_definition(axis, dim, size):
    base = torch.randn(20, 30)
    weight = base + size * torch.randn(20, 30)
    expected = definition(weight, base, dim)
    assert delta(weight, base, axis) == pytest.approx(expected, rel=1e-8, abs=1e-13)


def test_small_changes_keep_their_precision():
    """Against sin² / (1 + cos) of the changes; the plain definition in float32 loses them."""
    base = torch.randn(50, 40, dtype=torch.float64)
    for size in (1e-4, 1e-7):
        d = size * torch.randn(50, 40, dtype=torch.float64)
        squares, inner, change = base.square().sum(1), (base * d).sum(1), d.square().sum(1)
        sin2 = (squares * change - inner**2) / (squares * (squares + 2 * inner + change))
        exact = (sin2 / (1 + (1 - sin2).sqrt())).mean().item()
        assert delta(base + d, base)[1] == pytest.approx(exact, rel=1e-6)
        naive = 1 - torch.nn.functional.cosine_similarity(base.float(), (base + d).float(), dim=1)
        assert naive.mean().item() != pytest.approx(exact, rel=1e-1)


def test_vectors_that_reverse_or_were_zero_have_values_of_their_own():
    base = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    weight = torch.tensor([[-2.0, 0.0], [0.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    each = [delta(weight[i : i + 1], base[i : i + 1]) for i in range(4)]
    assert each == [(1.0, 2.0), (0.0, 0.0), (3.0, 1.0), (0.0, 0.0)]


@pytest.mark.parametrize("axis, dim", [("row", 1), ("column", 0)])
@pytest.mark.parametrize("own_axis", ["row", "column"])
@pytest.mark.parametrize("method", ["lora", "dora", "bidora", "bilora"])
def test_layers_are_measured_as_the_merged_weight(method, own_axis, axis, dim):
    layer = BiDoRALinear(24, 16, rank=4, method=method, magnitude_axis=own_axis)
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    expected = definition(layer.merged_weight(), layer.weight, dim)
    assert layer_delta(layer, axis) == pytest.approx(expected, rel=1e-4)


def test_a_trained_magnitude_and_lora_along_the_weight_move_no_direction():
    layer = BiDoRALinear(6, 4, rank=1, method="dora")
    layer.lora_magnitude_vector.data += 0.5
    moved, turned = layer_delta(layer)
    assert (moved, turned) == pytest.approx((0.5, 0.0), abs=1e-6)
    layer.lora_B.data += 0.1
    assert layer_delta(layer)[0] == moved and layer_delta(layer)[1] > 1e-3  # m is fixed: exactly
    layer = BiDoRALinear(6, 1, rank=1, lora_alpha=1, method="lora")
    layer.lora_A.data, layer.lora_B.data = layer.weight.data.clone(), torch.tensor([[0.5]])
    assert layer_delta(layer) == pytest.approx((0.5 * layer.weight.norm().item(), 0.0), abs=1e-6)


def line_of(slope, noise, layers=12, snapshots=3):
    rng = numpy.random.default_rng(0)
    x = rng.random((snapshots, layers))
    return Trajectory(
        "row",
        [f"l{i}.q_proj" for i in range(layers)],
        [2.0] * layers,
        [{"phase": "train", "step": t} for t in range(snapshots)],
        (slope * x + noise * rng.standard_normal(x.shape)).tolist(),
        x.tolist(),
    )


def test_fit_is_least_squares_and_scipys_correlations():
    trajectory = line_of(-3.0, 0.5)
    x, y = numpy.ravel(trajectory.delta_d), numpy.ravel(trajectory.delta_m)
    line, slope = fit([trajectory]), numpy.polyfit(x, y, 1)[0]
    assert line["k"][0] == pytest.approx(slope) and line["relative"][0] == pytest.approx(slope / 2)
    assert line["r"][0] == pytest.approx(scipy.stats.pearsonr(x, y)[0])
    assert line["rho"][0] == pytest.approx(scipy.stats.spearmanr(x, y)[0])
    assert all(low < value < high for value, low, high in line.values())


def test_intervals_cover_the_true_slope_and_shrink_with_more_layers():
    few, many = (fit([line_of(-3.0, 0.5, layers=n)])["k"] for n in (8, 200))
    assert few[1] < -3 < few[2] and many[1] < -3 < many[2]
    assert many[2] - many[1] < 0.4 * (few[2] - few[1])


def test_fewer_than_eight_layers_get_no_interval():
    numbers = numpy.array([*fit([line_of(-3.0, 0.5, layers=7)]).values()])
    assert numpy.isfinite(numbers[:, 0]).all() and numpy.isnan(numbers[:, 1:]).all()


def test_a_slope_is_not_a_correlation():
    """The papers' k = -8.042 is no correlation: a slope has the weights' unit, r has none."""
    small, large = line_of(-3.0, 0.5), line_of(-3.0, 0.5)
    large.delta_m, large.magnitude = (10 * numpy.array(large.delta_m)).tolist(), [20.0] * 12
    a, b = ({name: value for name, (value, *_) in fit([t]).items()} for t in (small, large))
    assert b == pytest.approx(a | {"k": 10 * a["k"]})


def test_the_table_says_why_a_number_has_no_interval():
    few, many = line_of(-3.0, 0.5, layers=7), line_of(-3.0, 0.5, layers=8)
    *_, note = analysis.table({"a": few}, ["q_proj"])
    assert "no interval" in note and "fewer than 8" in note
    assert "interval" not in "".join(analysis.table({"a": many}, ["q_proj"]))


@pytest.fixture
def two_layers():
    """The figure of one run over two layers with two phases, drawn."""
    run = line_of(-3.0, 0.5, layers=2, snapshots=8)
    run.snapshots = [{"phase": "search" if t < 4 else "retrain", "step": t} for t in range(8)]
    figure = analysis.plot({"one run": run}, ["q_proj"])
    figure.savefig("drawn.png")
    return figure


def test_the_legend_of_one_run_lies_within_its_picture(two_layers):
    [legend] = two_layers.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= two_layers.bbox.x1


def test_the_colour_bar_of_two_layers_counts_in_whole_layers(two_layers):
    ticks = two_layers.axes[-1].get_yticklabels()
    assert [float(tick.get_text()) for tick in ticks] == [0, 1]


def test_points_of_retrain_are_hollow_and_no_others(two_layers):
    clouds = two_layers.axes[0].collections
    assert [len(cloud.get_facecolors()) == 0 for cloud in clouds] == [False] * 4 + [True] * 4


def test_points_that_do_not_vary_have_no_slope():
    still = line_of(0.0, 0.0)
    still.delta_d = [[0.0] * 12] * 3
    assert all(numpy.isnan(value) for value in fit([still])["k"])


@pytest.mark.parametrize("method", ["bidora", "dora", "lora", "bilora", "ft"])
def test_training_records_every_adapted_matrix_at_equal_intervals_and_at_the_end(method):
    targets = ("q_proj", "v_proj")
    train.train(Config(method=method, out_dir="run", snapshots=2, target_modules=targets, **TINY))
    trajectory = Trajectory.load("run")
    times = [("search", 2), ("search", 4), ("retrain", 6), ("retrain", 8)]
    if method not in ("bidora", "bilora"):
        times = [("train", 4), ("train", 8)]
    assert [(s["phase"], s["step"]) for s in trajectory.snapshots] == times
    assert {name.rpartition(".")[2] for name in trajectory.layers} == {*targets}
    assert numpy.min(trajectory.delta_d) > 0 and numpy.min(trajectory.delta_m) > 0

    end = analysis.of_checkpoints("run")
    for name in ("delta_m", "delta_d"):
        recorded = dict(zip(trajectory.layers, getattr(trajectory, name)[-1]))
        assert recorded == pytest.approx(dict(zip(end.layers, getattr(end, name)[0])), rel=1e-3)


def test_recording_changes_nothing_in_training():
    for folder, snapshots in (("without", 0), ("with", 3)):
        train.train(Config(out_dir=folder, snapshots=snapshots, **TINY))
    one, other = (Path(x, "adapter_model.safetensors").read_bytes() for x in ("without", "with"))
    assert one == other


def test_the_command_line_draws_runs_and_checkpoints(capsys):
    train.train(Config(method="dora", out_dir="dora", snapshots=2, **TINY))
    train.train(Config(method="ft", out_dir="ft", **TINY))
    assert analysis.main(["--tuned=dora,ft", "--targets=q_proj,gate_proj"]) == 0
    out = capsys.readouterr().out
    assert "14 matrices by row, snapshots: 2\n" in out and "snapshots: 1\n" in out
    assert out.count("q_proj") == 2
    shutil.copytree("dora", "elsewhere/dora")
    assert analysis.main(["--tuned=dora,elsewhere/dora"]) == 0  # all that were adapted
    out = capsys.readouterr().out
    assert all(out.count(f", {name} ") == 2 for name in ALL_LINEAR)
    assert Path("dora/analysis.png").read_bytes().startswith(b"\x89PNG")
    assert not Path("analysis.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tuned=nothing-here"], "nothing-here"),
        (["--tuned=dora", "--axis=diagonal"], "there are: row, column"),
        (["--tuned=dora", "--targets=z_proj"], "'z_proj': set --targets to some of down_proj"),
        (["--base=tiny-random"], "nothing to analyse"),
        (["--tuned=torn"], "don't fit together"),
        (["--tuned=damaged"], "damaged/trajectory.safetensors is damaged"),
        (["--tuned=odd"], "odd: trajectory.json"),
    ],
)
def test_wrong_input_gets_one_line(arguments, message, refuses):
    if arguments[0] == "--tuned=dora":
        train.train(Config(method="dora", out_dir="dora", snapshots=1, **TINY))
    Path("torn").mkdir()
    Path("torn/trajectory.json").write_text('{"axis": "row", "layers": ["a"], "snapshots": []}')
    save_file({"magnitude": torch.ones(2)}, "torn/trajectory.safetensors")
    shutil.copytree("torn", "damaged"), shutil.copytree("torn", "odd")
    Path("damaged/trajectory.safetensors").write_bytes(b"half")
    Path("odd/trajectory.json").write_text('{"layers": 5, "snapshots": 3, "axis": 1}')
    refuses(analysis, arguments, message)


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match="shapes"):
        delta(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="row, column"):
        decompose(nn.Linear(2, 2).weight, "diagonal")
