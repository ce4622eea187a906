"""BiDoRA's published program and research.published, against Betty 0.2.1 and formulas."""

import copy
import email
import importlib
import json
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
import sample
import train
from bilevel import create_bilevel_optimizer
from hypergrad import identity
from research import published
from support.run import hardware
from support.run.files import cache_dir, fetch, read_json
from support.tasks.any_model import AnyWithHead

# The last version that takes Betty 0.1.1's requirement "numpy>=1.9.*"
PIP = "wheel 2 ba0d021a166865d2265246961bec0152ff124de910c5cc39f1156ce3fa7c69dc pip==24.0"
BETTY = {  # {release: the SHA-256 of its wheel}
    "0.1.1": "19be8d052eee6815213d1b922afeabe5d7c3ae45a39d8369d1df71b90735840b",
    "0.2.1": "a7ff0c961df2ad0ac233244ce3af8775859bfa9d62d577f4b542022b58411055",
}
FROZEN = ["0.weight", "2.weight"]  # of Curved


def wheel_of(release):
    """Betty's wheel, as pip takes it for Python 3.9: 0.2.1 refuses 3.11 and later."""
    name, sha256 = f"betty_ml-{release}-py3-none-any.whl", BETTY[release]
    path = cache_dir() / "downloads" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pinned = path.with_suffix(".txt")
        pinned.write_text(f"betty-ml=={release} --hash=sha256:{sha256}\n")
        command = [sys.executable, f"{fetch(PIP)}/pip", "download", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version=3.9", "--require-hashes"]
        command += ["-r", str(pinned), "-d", str(path.parent)]
        subprocess.run(command, check=True, timeout=300)
    return fetch(f"wheel 0.041 {sha256} betty-ml=={release}")


@pytest.fixture
def betty(request, tmp_path):
    """A release of Betty, importable during the test; by default 0.2.1."""
    release = getattr(request, "param", "0.2.1")
    with zipfile.ZipFile(wheel_of(release)) as archive:
        archive.extractall(tmp_path / "betty")
    sys.path.insert(0, str(tmp_path / "betty"))
    importlib.invalidate_caches()
    yield release
    sys.path.remove(str(tmp_path / "betty"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "betty"]:
        del sys.modules[name]


def by_betty(release, problem, lower_lr, frozen=(), group_lr=None):
    """
    The hypergradient of an iteration of Betty, with gradient descent, on a Curved problem, as a
    list, and {name: lower parameter or weight in `frozen`} after it. frozen: names of weights in
    the lower problem's module, but not in its optimizer, whose group has group_lr, if given.
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
    options = dict(config=Config(type="darts", retain_graph=True))
    options |= {"device": torch.device("cpu")} if release == "0.1.1" else {}
    group = {"params": adapters, "lr": lower_lr if group_lr is None else group_lr}
    inner = Inner("inner", module=lower, optimizer=torch.optim.SGD([group], lr=lower_lr),
                  train_data_loader=[problem.train], **options)  # fmt: skip
    outer = Outer("outer", module=upper, optimizer=torch.optim.SGD(upper.parameters(), lr=1.0),
                  train_data_loader=[problem.val], **options)  # fmt: skip
    links = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
    engine = EngineConfig(train_iters=1, valid_step=100)
    if release != "0.1.1":
        engine.strategy = "cpu"
    Engine(config=engine, problems=[outer, inner], dependencies=links).run()

    h = [s - p.detach() for s, p in zip(start, upper.chosen)]
    return h, {name: p.detach() for name, p in zip(names, lower.chosen)}


def after_a_step(problem, lr, frozen=()):
    """The problem after a step of gradient descent of its lower level, and of weights in frozen."""
    moved = copy.deepcopy(problem)
    for name in frozen:
        moved.model.get_parameter(name).requires_grad_()
    moved.lower = bidora.lower_parameters(moved.model)
    gradients = torch.autograd.grad(moved.loss(moved.model, moved.train), moved.lower)
    with torch.no_grad():
        for p, g in zip(moved.lower, gradients):
            p -= lr * g
    return moved


def test_pip_takes_betty_0_2_1_on_the_program_s_python_and_an_older_one_on_ours():
    """environment.yml names no version: pip takes the newest release for the interpreter."""
    from packaging.specifiers import SpecifierSet

    def admits(release, python):
        with zipfile.ZipFile(wheel_of(release)) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
            about = email.message_from_bytes(archive.read(name))
        return SpecifierSet(about["Requires-Python"]).contains(python)

    assert all(admits("0.2.1", python) for python in ("3.7.10", "3.8.20", "3.9.25", "3.10.19"))
    assert not admits("0.2.1", "3.11.0") and admits("0.1.1", "3.11.0")


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
    found, _ = by_betty(betty, c, 0.05)
    arguments = after_a_step(c, 0.05).arguments()
    ours = identity(*arguments, mode="finite_difference", radius=0.01)
    torch.testing.assert_close(ours, found, rtol=1e-9, atol=1e-12)
    finer = identity(*arguments, mode="finite_difference", radius=1e-4)
    torch.testing.assert_close(identity(*arguments), finer, rtol=0, atol=1e-4)


def test_betty_s_product_is_over_every_weight_of_the_module(betty):
    """Within 1e-9; over A and B alone, the hypergradient differs by more than 1 %."""
    c = Curved()
    found, _ = by_betty(betty, c, 0.05, FROZEN)
    here = after_a_step(c, 0.05, FROZEN)
    options = dict(mode="finite_difference", radius=0.01)
    torch.testing.assert_close(identity(*here.arguments(), **options), found, rtol=1e-9, atol=1e-12)
    here.lower = [p for n, p in here.model.named_parameters() if "lora_A" in n or "lora_B" in n]
    other = torch.cat(identity(*here.arguments(), **options))
    assert (other - torch.cat(found)).norm() > 0.01 * other.norm()


def test_betty_trains_every_weight_of_the_module_at_the_optimizer_s_default_rate(betty):
    """Its patch_optimizer drops the groups: 0.5 is nobody's rate. Rounding: 1e-12."""
    c = Curved()
    _, moved = by_betty(betty, c, 0.05, FROZEN, group_lr=0.5)
    expected = dict(after_a_step(c, 0.05, FROZEN).model.named_parameters())
    for name, p in moved.items():
        torch.testing.assert_close(p, expected[name].detach(), rtol=0, atol=1e-12)
    assert any((moved[n] - dict(c.model.named_parameters())[n]).norm() > 1e-3 for n in FROZEN)


@pytest.mark.parametrize("betty", ["0.1.1"], indirect=True)
def test_betty_0_1_1_leaves_every_weight_a_step_down_the_val_loss(betty):
    """Of length 0.01, along -∂F/∂θ of all parameters of the lower problem, frozen ones included."""
    c = Curved()
    _, moved = by_betty(betty, c, 0.05, FROZEN)
    here = after_a_step(c, 0.05)
    values = {n: p.requires_grad_() for n, p in here.model.named_parameters() if n in moved}
    v = torch.autograd.grad(here.loss(here.model, here.val), [values[n] for n in moved])
    norm = sum((x * x).sum() for x in v) ** 0.5
    for name, x in zip(moved, v):
        expected = values[name].detach() - 0.01 * x / norm
        torch.testing.assert_close(moved[name], expected, rtol=1e-9, atol=1e-12)


def observed(problem, rate=1e-12, base=None, **settings):
    """An ObservedOptimizer of a Curved problem, whose lower steps are next to nothing."""
    config = published.Published(hypergradient="identity_difference", **settings)
    base = published.base_weights(problem.model) if base is None else base
    options = dict(weight_decay=0.0, hypergradient=config.hypergradient, base=base)
    return published.ObservedOptimizer(problem.model, rate, 1e-3, published=config, **options)


@pytest.mark.parametrize("network", [False, True])
def test_our_hypergradient_over_all_weights_is_betty_s(network, betty):
    """Within 1e-8, whether they train or not: our lower step is no exact zero."""
    c = Curved()
    expected, _ = by_betty(betty, copy.deepcopy(c), 0.0, [*FROZEN, "0.bias", "2.bias"])
    optimizer = observed(c, all_weights=True, network=network)
    optimizer.bilevel_step(c.loss, c.train, c.val)
    torch.testing.assert_close(optimizer.parts[1], expected, rtol=1e-8, atol=1e-10)
    assert all(p.requires_grad == network for p in optimizer.frozen)


def test_a_product_over_the_adapters_stays_so_while_the_network_trains():
    c = Curved()
    expected = identity(*c.arguments(), mode="finite_difference")
    optimizer = observed(c, network=True)
    optimizer.bilevel_step(c.loss, c.train, c.val)
    torch.testing.assert_close(optimizer.parts[1], expected, rtol=1e-8, atol=1e-10)


def test_the_network_trains_and_retraining_begins_at_its_original_weights():
    c = Curved()
    base = published.base_weights(c.model)
    observed(c, 1e-2, base, network=True).bilevel_step(c.loss, c.train, c.val)
    assert not any(torch.equal(p, value) for p, value in base)

    bidora.start_retrain(c.model)
    optimizer = observed(c, 1e-2, base, network=True)
    assert all(torch.equal(p, value) for p, value in base)
    assert {id(p) for p, _ in base} < {id(p) for p in optimizer.lower}
    assert not {id(m) for m in c.upper} & {id(p) for p in optimizer.lower}


def test_dropout_is_where_transformers_has_it(tmp_path):
    """Of the rates that config.json names; none of an adapter's own."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=2, hidden_dropout_prob=0.3, num_labels=2,
                        attention_probs_dropout_prob=0.2)  # fmt: skip
    peer = BertForSequenceClassification(config)
    peer.save_pretrained(tmp_path)
    ours = AnyWithHead.from_pretrained(tmp_path, "classification", 2)
    bidora.replace_linear_with_bidora(ours, 2, target_modules=["query"])
    published.add_dropout(ours)

    def rates(model):
        return {n: x.p for n, x in model.named_modules() if isinstance(x, nn.Dropout) and x.p}

    assert rates(ours) == rates(peer) and len(rates(peer)) == 8
    ids = torch.arange(20)[None]
    assert not torch.equal(ours.train()(ids), ours(ids))
    assert torch.equal(ours.eval()(ids), ours(ids))


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
    bidora.replace_linear_with_bidora(base, 2, 2.0, target_modules=["0"], init="normal_b")
    published.transpose(base)
    layer, x = base[0], torch.randn(3, 6, dtype=torch.float64)
    assert (layer.lora_A == 0).all() and layer.lora_B.std() > 0.3
    m = layer.lora_magnitude_vector
    torch.testing.assert_close(m.data, weight.norm(dim=0), rtol=1e-12, atol=0)
    with torch.no_grad():
        layer.lora_A.normal_()
        m.mul_(1.5)
    expected = published_layer(x, weight, bias, layer.lora_B.T, layer.lora_A.T, m)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


RUN = ["--train_size=20", "--test_size=20", "--search_steps=3", "--retrain_steps=2"]
RUN += ["--eval_before=False", "--overwrite"]
TOY = [*RUN, "--model=tiny-random", "--data=toy-sentiment"]
ENCODER = [*RUN, "--model=minilm", "--data=movie-sentiment", "--target_modules=query,value"]
ENCODER += ["--dtype=float32", "--block_size=16", "--trace"]


def trained(*arguments):
    """The summary of a run of research.published."""
    return published.train(published.read_config([*arguments, "--out_dir=out"]))


def logged(folder):
    """The log of a run without its times."""
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_tracing_changes_no_result(elsewhere):
    plain = train.train(train.read_config([*TOY, "--out_dir=plain"]))
    traced = trained(*TOY, "--trace")
    assert traced["after"] == plain["after"] and logged("out") == logged("plain")
    assert read_json("out/summary.json")["trace"] == traced["trace"]
    assert len(traced["trace"]["moved"]) == 3 and traced["trace"]["moved"][-1] > 0


@pytest.mark.parametrize(
    "settings, most",
    [
        (["--hypergradient=neumann", "--hypergradient_lr=1e-12"], 1e-6),
        (["--hypergradient=unrolled", "--hypergradient_lr=1e-12"], 1e-6),
        (["--hypergradient=first_order"], 1e-5),
    ],
)
def test_there_is_no_indirect_part_at_a_rate_of_0_or_with_first_order(settings, most, elsewhere):
    """Both parts are taken at the same V, neumann's before the last kept step; fp32 rounds."""
    trace = trained(*TOY, "--trace", *settings)["trace"]
    assert max(trace["indirect"]) < most
    assert all(abs(cosine) <= 1.001 for cosine in trace["cosine"])  # NaN is not


def test_the_network_trains_in_float32_where_bfloat16_is_faster(elsewhere, monkeypatch):
    """In bfloat16, small updates of a weight round to nothing."""
    monkeypatch.setattr(hardware, "fast_dtype", lambda device: (torch.bfloat16, "measured"))
    for more, dtype in (([], "bfloat16"), (["--network"], "float32")):
        assert trained(*TOY, *more)["dtype"] == dtype


def test_dropout_makes_the_difference_random_and_the_trace_is_of_one_draw(elsewhere):
    """With first order there is no indirect part: the direct one is taken under the same masks."""
    first = trained(*ENCODER, "--noise", "--hypergradient=first_order")
    assert max(first["trace"]["indirect"]) < 1e-4

    difference = [*ENCODER, "--hypergradient=identity_difference", "--lower_lr=1e-9"]
    noisy, still = trained(*difference, "--noise"), trained(*difference)
    assert noisy["trace"]["indirect"][0] > 2 * still["trace"]["indirect"][0]


def test_a_run_of_the_program_keeps_its_scores_but_no_adapter(elsewhere, capsys):
    effects = ["--network", "--all_weights", "--noise", "--transposed", "--gram_weight=1e-5"]
    effects += ["--hypergradient=identity_difference", "--out_dir=out"]
    assert published.main([*ENCODER, *effects]) == 0
    said = capsys.readouterr().out
    assert "no adapter was saved" in said and not list(Path("out").glob("adapter*"))
    assert len(read_json("out/summary.json")["trace"]["moved"]) == 3


def test_an_interrupted_run_of_the_program_is_not_resumed_nor_sampled_by_others(elsewhere, capsys):
    class Stops(published.PublishedTask):
        def lower_loss(self, model, micro_batch):
            if Path("out/checkpoints/000002.json").exists():
                raise KeyboardInterrupt
            return super().lower_loss(model, micro_batch)

    toy = [*TOY, "--out_dir=out", "--checkpoint_every=1"]
    with pytest.raises(KeyboardInterrupt):
        train.train(published.read_config([*toy, "--transposed", "--target_modules=q_proj"]), Stops)
    assert train.main([*toy, "--resume", "--target_modules=q_proj"]) == 2
    assert sample.main(["--adapter=out", "--prompt=a"]) == 2
    errors = capsys.readouterr().err.splitlines()
    said = "error: out is the run of another program, with transposed=True: use that one"
    assert [line for line in errors if line.startswith("error")] == [said, said]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--transposed", "--target_modules=up_proj"], "is not square"),
        (["--network", "--resume=True"], "resume"),
        (["--network", "--method=ft"], "ft"),
        (["--network", "--method=dora"], "which method=dora lacks"),
        (["--network", "--dtype=bfloat16"], "use dtype=float32"),
        (["--all_weights"], "needs hypergradient=identity_difference"),
        (["--noise"], "--noise is of the dropout of BERT"),
        (["--networks"], "unknown setting"),
        (["--network=perhaps"], "not True or False"),
    ],
)
def test_effects_that_do_not_fit_are_refused(arguments, said, elsewhere, capsys):
    assert published.main([*TOY, *arguments]) == 2 and said in capsys.readouterr().err


def test_unshuffled_batches_come_in_one_order_for_all_epochs():
    from data import Batches

    rows = list(range(10))
    stream = Batches(rows, 5, seed=0, shuffle=False)
    epochs = [stream[k] + stream[k + 1] for k in (0, 2, 4)]
    assert epochs[0] == epochs[1] == epochs[2] != rows and sorted(epochs[0]) == rows
    assert Batches(rows, 5, seed=0)[0] == epochs[0][:5]


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
