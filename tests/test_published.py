"""
What docs/results.md says of BiDoRA's published program, checked against Betty 0.1.1 and against
formulas of its own; and tools.published, which does the same.
"""

import copy
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_hypergrad import Curved, Quadratic

import bidora
import train
from hypergrad import create_bilevel_optimizer, identity
from support import hardware
from support.files import cache_dir, fetch, read_json
from tools import published

PIP = dict(  # the last version that takes Betty's requirement "numpy>=1.9.*"
    requirement="pip==24.0",
    filename="pip-24.0-py3-none-any.whl",
    size="2 MB",
    sha256="ba0d021a166865d2265246961bec0152ff124de910c5cc39f1156ce3fa7c69dc",
)
BETTY = "betty_ml-0.1.1-py3-none-any.whl"
BETTY_SHA256 = "19be8d052eee6815213d1b922afeabe5d7c3ae45a39d8369d1df71b90735840b"


@pytest.fixture(scope="module")
def betty(tmp_path_factory):
    """Betty 0.1.1's engine, as installed by an old pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("betty")
    wheel = cache_dir() / "downloads" / BETTY
    if not wheel.exists():
        (folder / "pinned.txt").write_text(f"betty-ml==0.1.1 --hash=sha256:{BETTY_SHA256}\n")
        command = [sys.executable, f"{fetch(**PIP)}/pip", "download", "--no-deps"]
        command += ["--require-hashes", "-r", str(folder / "pinned.txt"), "-d", str(wheel.parent)]
        subprocess.run(command, check=True, timeout=300)
    with zipfile.ZipFile(fetch("betty-ml==0.1.1", BETTY, BETTY_SHA256, "41 KB")) as archive:
        archive.extractall(folder)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("betty.engine")
    sys.path.remove(str(folder))


def by_betty(problem, lower_lr, frozen=()):
    """
    One iteration of Betty, with gradient descent, on a Curved problem. Returns the hypergradient
    that it used, and how it moved {name: lower parameter or weight in `frozen`} after the lower
    level's step, as lists.
    """
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    values = dict(problem.model.named_parameters())
    names = [n for n in values if "lora_A" in n or "lora_B" in n] + list(frozen)

    class Parameters(nn.Module):
        def __init__(self, chosen):
            super().__init__()
            self.chosen = nn.ParameterList(values[n].detach().clone() for n in chosen)

        def forward(self):
            return list(self.chosen)

    upper_names = [n for n in values if "magnitude" in n]
    lower, upper = Parameters(names), Parameters(upper_names)

    def loss(lower, upper, batch):
        given = dict(zip(names, lower)) | dict(zip(upper_names, upper))
        return F.mse_loss(torch.func.functional_call(problem.model, given, batch[0]), batch[1])

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            return loss(self.module(), self.outer.module(), batch)

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            return loss(self.inner.module(), self.module(), batch)

    adapters = [p for n, p in zip(names, lower.chosen) if n not in frozen]
    start = [p.detach().clone() for p in upper.chosen]
    options = dict(device=torch.device("cpu"), config=Config(type="darts", retain_graph=True))
    inner = Inner("inner", module=lower, optimizer=torch.optim.SGD(adapters, lr=lower_lr),
                  train_data_loader=[problem.train], **options)  # fmt: skip
    outer = Outer("outer", module=upper, optimizer=torch.optim.SGD(upper.parameters(), lr=1.0),
                  train_data_loader=[problem.val], **options)  # fmt: skip
    links = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
    engine = EngineConfig(train_iters=1, valid_step=100)
    Engine(config=engine, problems=[outer, inner], dependencies=links).run()

    h = [s - p.detach() for s, p in zip(start, upper.chosen)]
    given = [p.detach() for p in lower.chosen]
    return h, dict(zip(names, given))


def after_a_step(problem, lr):
    """The problem after a step of gradient descent of its lower level."""
    moved = copy.deepcopy(problem)
    moved.lower = bidora.lower_parameters(moved.model)
    moved.upper = bidora.upper_parameters(moved.model)
    gradients = torch.autograd.grad(moved.loss(moved.model, moved.train), moved.lower)
    with torch.no_grad():
        for p, g in zip(moved.lower, gradients):
            p -= lr * g
    return moved


def test_identity_is_the_implicit_gradient_with_the_identity_as_inverse_hessian():
    """m + b + Cᵀ·(V - t), within 1e-12 in float64; by differences, which only round, 1e-9."""
    q = Quadratic()
    expected = q.exact(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(identity(*q.arguments)[0], expected, rtol=1e-12, atol=1e-12)
    difference = identity(*q.arguments, mode="finite_difference")[0]
    torch.testing.assert_close(difference, expected, rtol=1e-9, atol=1e-9)


def test_identity_is_what_betty_computes(betty):
    """Within 1e-9 at Betty's radius; at a hundredth of it the exact product, within 1e-4."""
    c = Curved()
    found, _ = by_betty(c, 0.05)
    arguments = after_a_step(c, 0.05).arguments()
    ours = identity(*arguments, mode="finite_difference", radius=0.01)
    torch.testing.assert_close(ours, found, rtol=1e-9, atol=1e-12)
    finer = identity(*arguments, mode="finite_difference", radius=1e-4)
    torch.testing.assert_close(identity(*arguments), finer, rtol=0, atol=1e-4)


def test_the_optimizer_s_identity_is_at_the_values_after_the_lower_step():
    c = Curved()
    optimizer = create_bilevel_optimizer(
        c.model, 1e-2, 1e-3, weight_decay=0.0, hypergradient="identity_difference", grad_clip=1e9
    )
    optimizer.lower_step_kept(c.loss, c.train)
    here = copy.deepcopy(c)
    here.lower = bidora.lower_parameters(here.model)
    here.upper = bidora.upper_parameters(here.model)
    expected = identity(*here.arguments(), mode="finite_difference")
    optimizer.upper_step(c.loss, None, c.val)
    for p, q, g in zip(c.upper, here.upper, expected):  # Adam's first step is the sign's
        torch.testing.assert_close(p, q - 1e-3 * g / (g.abs() + 1e-8), rtol=1e-6, atol=1e-9)


def test_betty_leaves_every_weight_a_step_down_the_val_loss(betty):
    """Of length 0.01, along -∂F/∂θ of all parameters of the lower problem, frozen ones included."""
    c = Curved()
    frozen = ["0.weight", "2.weight"]
    _, moved = by_betty(c, 0.05, frozen)
    here = after_a_step(c, 0.05)
    values = {n: p.requires_grad_() for n, p in here.model.named_parameters() if n in moved}
    v = torch.autograd.grad(here.loss(here.model, here.val), [values[n] for n in moved])
    norm = sum((x * x).sum() for x in v) ** 0.5
    for name, x in zip(moved, v):
        expected = values[name].detach() - 0.01 * x / norm
        torch.testing.assert_close(moved[name], expected, rtol=1e-9, atol=1e-12)


def test_our_drift_is_betty_s(betty):
    c = Curved()
    frozen = ["0.weight", "2.weight"]
    _, expected = by_betty(copy.deepcopy(c), 0.0, frozen)
    base = [(p, p.detach().clone()) for n, p in c.model.named_parameters() if n in frozen]
    optimizer = published.ObservedOptimizer(
        c.model, 1e-12, 1e-3, weight_decay=0.0, hypergradient="identity_difference",
        drift=True, trace=None, base=base,
    )  # fmt: skip
    optimizer.bilevel_step(c.loss, c.train, c.val)
    for name, p in c.model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-8, atol=1e-10)


def test_retraining_begins_at_the_weights_from_before_the_drift():
    c = Curved()
    base = [(p, p.detach().clone()) for n, p in c.model.named_parameters() if "weight" in n]
    with torch.no_grad():
        for p, _ in base:
            p += 1
    bidora.start_retrain(c.model)
    published.ObservedOptimizer(c.model, drift=True, trace=None, base=base)
    assert all(torch.equal(p, value) for p, value in base)


def published_layer(x, weight, bias, A, B, m):
    """loralib/bidora.py at e7922af: w_ft and forward, with fan_in_fan_out False."""
    w = weight + B @ A
    return F.linear(x, (m / w.norm(p=2, dim=0, keepdim=True) * w).T, bias)


def test_the_published_layer_computes_x_w_where_the_base_computes_x_w_transposed():
    """At the start, with B = 0 and m the norms of W's columns."""
    layer, x = nn.Linear(6, 6), torch.randn(3, 6)
    A, B = torch.randn(2, 6), torch.zeros(6, 2)
    start = published_layer(x, layer.weight, layer.bias, A, B, layer.weight.norm(dim=0))
    torch.testing.assert_close(start, x @ layer.weight + layer.bias)
    assert not torch.allclose(start, layer(x), atol=0.1)


def test_our_transposed_layer_is_the_published_one():
    """Rows of Wᵀ, B = Aᵀ and A = Bᵀ: 1e-12 in float64."""
    base = nn.Sequential(nn.Linear(6, 6)).double().requires_grad_(False)
    weight, bias = base[0].weight.clone(), base[0].bias.clone()
    model = published.transposed(lambda: base, ["0"])
    bidora.replace_linear_with_bidora(model, 2, 2.0, target_modules=["0"], init="normal_b")
    layer, x = model[0], torch.randn(3, 6, dtype=torch.float64)
    assert (layer.lora_A == 0).all() and layer.lora_B.std() > 0.3
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.magnitude.mul_(1.5)
    found = layer(x)
    expected = published_layer(x, weight, bias, layer.lora_B.T, layer.lora_A.T, layer.magnitude)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))


TOY = ["--model=tiny-random", "--data=toy-sentiment", "--train_size=20", "--test_size=20"]
TOY += ["--search_steps=3", "--retrain_steps=2", "--eval_before=False", "--out_dir=out/toy"]


def test_tracing_changes_no_result(elsewhere):
    plain = train.train(train.read_config([*TOY[:-1], "--out_dir=out/plain"]))
    traced = published.train(published.read_config([*TOY, "--trace"]))
    assert traced["after"] == plain["after"]
    assert read_json("out/toy/summary.json")["trace"] == traced["trace"]
    assert len(traced["trace"]["moved"]) == 3 and traced["trace"]["moved"][-1] > 0


@pytest.mark.parametrize("name", ["neumann", "unrolled"])
def test_an_indirect_part_with_a_rate_of_nothing_is_nothing(name, elsewhere):
    """Both parts are taken at the same V: neumann's is the one before the last kept step."""
    rate = ["--hypergradient_lr=1e-12", f"--hypergradient={name}"]
    found = published.train(published.read_config([*TOY, "--trace", *rate]))
    assert max(found["trace"]["indirect"]) < 1e-6


def test_the_trace_of_the_first_order_hypergradient_has_no_indirect_part(elsewhere):
    """Within 1e-5 of the direct part: fp32."""
    arguments = [*TOY, "--trace", "--hypergradient=first_order"]
    summary = published.train(published.read_config(arguments))
    assert max(summary["trace"]["indirect"]) < 1e-5
    assert all(abs(cosine) <= 1.001 for cosine in summary["trace"]["cosine"])  # NaN is not


def test_the_drift_runs_in_float32_where_bfloat16_is_faster(elsewhere, monkeypatch):
    """A step of 0.01 over all weights is below bfloat16's resolution of nearly each of them."""
    monkeypatch.setattr(hardware, "fast_dtype", lambda device: (torch.bfloat16, "measured"))
    for more, dtype in (([], "bfloat16"), (["--drift"], "float32")):
        summary = published.train(published.read_config([*TOY, *more, "--overwrite"]))
        assert summary["dtype"] == dtype


def test_a_run_with_the_drift_keeps_its_scores_but_no_adapter(elsewhere, capsys):
    assert published.main([*TOY, "--drift", "--trace", "--hypergradient=identity_difference"]) == 0
    said = capsys.readouterr().out
    assert "the adapter was removed" in said and "of 3 upper-level steps" in said
    assert not list(Path("out/toy").glob("adapter*")) and Path("out/toy/summary.json").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--transposed", "--target_modules=up_proj"], "is not square"),
        (["--drift", "--resume=True"], "resume"),
        (["--drift", "--method=ft"], "ft"),
        (["--drift", "--method=dora"], "which method=dora lacks"),
        (["--drift", "--dtype=bfloat16"], "needs dtype=float32"),
        (["--drifted"], "unknown setting"),
        (["--drift=perhaps"], "not True or False"),
    ],
)
def test_effects_that_do_not_fit_are_refused(arguments, said, elsewhere, capsys):
    assert published.main([*TOY, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_unshuffled_batches_come_in_one_order_for_all_epochs():
    from data import batches

    rows = list(range(10))
    stream = batches(rows, 5, list, seed=0, shuffle=False)
    epochs = [next(stream) + next(stream) for _ in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] != rows and sorted(epochs[0]) == rows
    assert next(batches(rows, 5, list, seed=0)) == epochs[0][:5]


def test_the_upper_level_s_weight_decay_is_adamw_s():
    """m shrinks by lr · decay beside Adam's step, which is the same."""
    steps = []
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        c = Curved()
        start = [m.detach().clone() for m in c.upper]
        optimizer = create_bilevel_optimizer(c.model, 1e-2, 1e-3, upper_weight_decay=decay)
        optimizer.bilevel_step(c.loss, c.train, c.val)
        steps.append([m.detach() - s for m, s in zip(c.upper, start)])
    for plain, decayed, s in zip(*steps, start):
        torch.testing.assert_close(decayed, plain - 1e-3 * 0.5 * s, rtol=1e-9, atol=1e-12)
