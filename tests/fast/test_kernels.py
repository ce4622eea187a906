"""The chunked cross-entropy against the plain one, and recomputed blocks against kept ones."""

import functools
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from support.fast import kernels
from support.fast.kernels import cross_entropy


def example(n, dtype, vocab=300):
    torch.manual_seed(0)
    hidden = torch.randn(n, 16, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(vocab, 16, dtype=dtype), torch.randint(vocab, (n,))


@pytest.mark.parametrize("n", [1, kernels.ROWS, 2 * kernels.ROWS + 3])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_value_and_gradient_equal_the_plain_form(n, dtype, tolerance):
    """Up to rounding: 2⁻⁸ for each of the two roundings of a bfloat16 gradient."""
    hidden, weight, targets = example(n, dtype)
    logits = F.linear(hidden, weight).to(torch.promote_types(dtype, torch.float32))
    plain = F.cross_entropy(logits, targets)
    chunked = cross_entropy(hidden, weight, targets)
    assert chunked.dtype == plain.dtype
    rtol = tolerance if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(chunked, plain, rtol=rtol, atol=0)

    (expected,) = torch.autograd.grad(3 * plain, hidden)
    (got,) = torch.autograd.grad(3 * chunked, hidden)
    assert (got - expected).norm() <= tolerance * expected.norm()


def test_second_derivatives_are_right(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS", 2)
    hidden, weight, targets = example(5, torch.float64, vocab=7)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda h: cross_entropy(h, weight, targets), hidden)


def test_second_derivatives_equal_the_plain_form():
    """In float64, up to its rounding, 1e-16, over sums of 300."""
    hidden, weight, targets = example(2 * kernels.ROWS + 3, torch.float64)
    products = []
    for loss in (cross_entropy, lambda h, w, t: F.cross_entropy(F.linear(h, w), t)):
        (g,) = torch.autograd.grad(loss(hidden, weight, targets), hidden, create_graph=True)
        products += torch.autograd.grad(g.square().sum(), hidden)
    assert (products[0] - products[1]).norm() <= 1e-13 * products[1].norm()


def products_of(function, gate, up, g, directions):
    """A function's value and gradient for g, and the gradient of the latter along directions."""
    leaves = [x.clone().requires_grad_() for x in (g, gate, up)]
    y = function(*leaves[1:])
    gradient = torch.autograd.grad(y, leaves[1:], leaves[0], create_graph=True)
    return [y, *gradient, *torch.autograd.grad(gradient, leaves, directions)]


def test_the_gate_and_both_of_its_derivatives_are_the_plain_ones_in_bfloat16_too():
    """In float64 to 1e-12; in bfloat16 no further from it than twice the plain form."""
    exact = [torch.randn(64, 32, dtype=torch.float64).bfloat16().double() for _ in range(5)]
    forms = kernels.swiglu, lambda gate, up: F.silu(gate) * up
    ours, plain = (products_of(form, *exact[:3], exact[3:]) for form in forms)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    low = [x.bfloat16() for x in exact]
    for mine, theirs, true in zip(*(products_of(f, *low[:3], low[3:]) for f in forms), plain):
        assert mine.dtype == torch.bfloat16
        assert (mine - true).norm() <= 2 * (theirs - true).norm() <= 0.04 * true.norm()
    assert torch.autograd.gradgradcheck(kernels.swiglu, [x[:2].requires_grad_() for x in exact[:2]])


class Watched(TorchDispatchMode):
    """Calls note(operation, its arguments, its result) after each operation of torch."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, operation, kinds, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        self.note(operation, arguments, result)
        return result


def made(function):
    """(shape, dtype) of each tensor that an operation returns while a function runs."""
    results = []
    with Watched(lambda operation, arguments, result: results.append(result)):
        function()
    return [(x.shape, x.dtype) for x in results if isinstance(x, torch.Tensor)]


def test_no_tensor_holds_all_logits():
    hidden, weight, targets = example(10 * kernels.ROWS, torch.float32)
    chunked = made(lambda: cross_entropy(hidden, weight, targets).backward())
    plain = made(lambda: F.cross_entropy(F.linear(hidden, weight), targets).backward())
    largest = [max(shape.numel() for shape, _ in tensors) for tensors in (chunked, plain)]
    assert largest == [kernels.ROWS * 300, 10 * kernels.ROWS * 300]


def test_second_derivatives_need_no_integers_as_wide_as_the_vocabulary():
    """One-hot targets would take 8 bytes per logit, twice as much as the logits in fp32."""
    hidden, weight, targets = example(5, torch.float32)

    def twice():
        loss = cross_entropy(hidden, weight, targets)
        (g,) = torch.autograd.grad(loss, hidden, create_graph=True)
        torch.autograd.grad(g.square().sum(), hidden)

    assert {dtype for shape, dtype in made(twice) if shape and shape[-1] == 300} == {torch.float32}


def test_evaluation_without_gradients_equals_the_one_with():
    hidden, weight, targets = example(300, torch.float32)
    with torch.no_grad():
        value = cross_entropy(hidden, weight, targets)
    assert value == cross_entropy(hidden, weight, targets) and not value.requires_grad


def test_recomputed_derivatives_are_right():
    """Both orders, by every argument and parameter, through two blocks."""
    shapes = (3, 4), (3, 4), (4, 4)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def blocks(x, other, weight):
        def block(x, other):
            return torch.tanh(x @ weight) * other.exp() + x.square()

        y = kernels.recompute(block, x, other, parameters=[weight])
        return kernels.recompute(block, y, other, parameters=[weight])

    assert torch.autograd.gradcheck(blocks, inputs)
    assert torch.autograd.gradgradcheck(blocks, inputs)


def chain(run, blocks=12, rows=200):
    """A second derivative through blocks of three layers, each called by run."""
    torch.manual_seed(0)
    layers = nn.ModuleList(
        nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)) for _ in range(blocks)
    ).double()
    x, parameters = torch.randn(rows, 8, dtype=torch.float64), list(layers.parameters())
    for layer in layers:
        x = run(layer, x)
    g = torch.autograd.grad(x.square().mean(), parameters, create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in g), parameters)


def recomputed(layer, x):
    return kernels.recompute(layer, x, parameters=list(layer.parameters()))


def torchs(layer, x):
    return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)


def peak(function):
    """The most bytes that tensors made while a function runs take together."""
    alive, most = {}, 0

    def note(operation, arguments, result):
        nonlocal most
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in alive:
                    alive[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, alive.pop, storage.data_ptr(), None)
        most = max(most, sum(alive.values()))

    with Watched(note):
        function()
    return most


def test_second_derivatives_keep_one_blocks_graph_at_a_time():
    """Twice the blocks add 2 × 8 numbers a row, and sums of as many; torch's keeps 64 a layer."""
    growth = []
    for run in (recomputed, torchs, lambda layer, x: layer(x)):
        few, many = (peak(functools.partial(chain, run, blocks)) for blocks in (12, 24))
        growth.append((many - few) / 12 / 200 / 8)  # numbers a row and block
    assert growth[0] < 45 < 200 < growth[1], growth
    assert growth[1] > 0.8 * growth[2]


def test_recomputed_dropout_and_contexts_are_those_of_the_first_call():
    x = torch.randn(64, 64, requires_grad=True)
    seen, twice = [], []

    def layer(x):
        y = F.dropout(x @ x, 0.5)
        seen.append(y.detach())
        twice.append(kernels.TWICE.get())
        return y.float()

    with torch.autocast("cpu", torch.bfloat16), kernels.second_derivatives():
        y = kernels.recompute(layer, x)
    torch.rand(3)
    before = torch.get_rng_state()
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    g.sum().backward()
    assert twice == [True] * 4 and seen[0].dtype == torch.bfloat16
    assert all(torch.equal(seen[0], again) for again in seen)
    assert torch.equal(before, torch.get_rng_state())  # what is drawn next is not changed
