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


def test_no_tensor_holds_all_logits():
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            largest.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    hidden, weight, targets = example(10 * kernels.ROWS, torch.float32)
    with Watch():
        cross_entropy(hidden, weight, targets).backward()
    assert max(largest) == kernels.ROWS * 300
    with Watch():
        F.cross_entropy(F.linear(hidden, weight), targets).backward()
    assert max(largest) == 10 * kernels.ROWS * 300


def test_evaluation_without_gradients_equals_the_one_with():
    hidden, weight, targets = example(300, torch.float32)
    with torch.no_grad():
        value = cross_entropy(hidden, weight, targets)
    assert value == cross_entropy(hidden, weight, targets) and not value.requires_grad
