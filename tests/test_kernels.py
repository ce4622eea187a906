"""The chunked cross-entropy against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from support import kernels
from support.kernels import cross_entropy


def example(n, dtype, vocab=300):
    torch.manual_seed(0)
    return (
        torch.randn(n, 16, dtype=dtype, requires_grad=True),
        torch.randn(vocab, 16, dtype=dtype),
        torch.randint(vocab, (n,)),
    )


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
    assert torch.autograd.gradcheck(lambda h: cross_entropy(h, weight, targets), hidden)
    assert torch.autograd.gradgradcheck(lambda h: cross_entropy(h, weight, targets), hidden)


def test_second_derivatives_equal_the_plain_form():
    """In float64, up to its rounding, 1e-16, over sums of 300."""
    hidden, weight, targets = example(2 * kernels.ROWS + 3, torch.float64)
    products = []
    for loss in (cross_entropy, lambda h, w, t: F.cross_entropy(F.linear(h, w), t)):
        (g,) = torch.autograd.grad(loss(hidden, weight, targets), hidden, create_graph=True)
        products += torch.autograd.grad(g.square().sum(), hidden)
    assert (products[0] - products[1]).norm() <= 1e-13 * products[1].norm()


class Made(TorchDispatchMode):
    """Notes each tensor that an operation returns, as (shape, dtype)."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.tensors.append((result.shape, result.dtype))
        return result


def test_no_tensor_holds_all_logits():
    hidden, weight, targets = example(10 * kernels.ROWS, torch.float32)
    with Made() as chunked:
        cross_entropy(hidden, weight, targets).backward()
    with Made() as plain:
        F.cross_entropy(F.linear(hidden, weight), targets).backward()
    largest = [max(shape.numel() for shape, _ in made.tensors) for made in (chunked, plain)]
    assert largest == [kernels.ROWS * 300, 10 * kernels.ROWS * 300]


def test_second_derivatives_need_no_integers_as_wide_as_the_vocabulary():
    """One-hot targets would take 8 bytes per logit, twice as much as the logits in fp32."""
    hidden, weight, targets = example(5, torch.float32)
    with Made() as made:
        (g,) = torch.autograd.grad(
            cross_entropy(hidden, weight, targets), hidden, create_graph=True
        )
        torch.autograd.grad(g.square().sum(), hidden)
    wide = {dtype for shape, dtype in made.tensors if shape and shape[-1] == 300}
    assert wide == {torch.float32}


def test_evaluation_without_gradients_equals_the_one_with():
    hidden, weight, targets = example(300, torch.float32)
    with torch.no_grad():
        value = cross_entropy(hidden, weight, targets)
    assert value == cross_entropy(hidden, weight, targets) and not value.requires_grad
