"""
Autograd functions that trade a plain formula for speed or memory, all twice differentiable:

    cross_entropy   the mean cross-entropy from hidden states and the head's weight, in chunks
    rescale         a magnitude applied in place
    swiglu          the MLP's gate, with few passes over memory in second derivatives
    recompute       a block whose activations are dropped, also in second derivatives;
                    recompute_module calls it for a module
"""

import contextlib
import contextvars
import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.run import distributed

silu_backward = torch.ops.aten.silu_backward
ROWS = 128  # positions at a time, whose logits are computed
QUERIES = 256  # tokens at a time, whose attention scores are computed for second derivatives
TWICE = contextvars.ContextVar("TWICE", default=False)  # whether those will be taken


@contextlib.contextmanager
def second_derivatives():
    """
    A context for passes whose gradients will be differentiated. Attention is not fused, since fused
    attention has no second derivative, and TWICE tells the models.
    """
    token = TWICE.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        TWICE.reset(token)


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, differentiable):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=dtype)
        gradient = torch.empty_like(hidden) if differentiable else None
        rows = min(ROWS, len(targets))
        logits_buffer = hidden.new_empty(rows, len(weight))
        log_p_buffer = hidden.new_empty(rows, len(weight), dtype=dtype)

        for i in range(0, len(targets), rows):
            part, answers = hidden[i : i + rows], targets[i : i + rows, None]
            logits, log_p = logits_buffer[: len(part)], log_p_buffer[: len(part)]  # (rows, vocab)
            torch.mm(part, weight.T, out=logits)
            torch.log_softmax(log_p.copy_(logits), -1, out=log_p)
            loss -= log_p.gather(1, answers).sum()
            if differentiable:  # gradient = (p - 1 at the answer) / positions · weight
                one = torch.full_like(answers, -1, dtype=dtype)
                log_p.exp_().scatter_add_(1, answers, one).div_(len(targets))
                torch.mm(logits.copy_(log_p), weight, out=gradient[i : i + rows])

        ctx.save_for_backward(hidden, weight, targets, gradient)
        return loss / len(targets)

    @staticmethod
    def backward(ctx, g):
        hidden, weight, targets, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives will be taken
            gradient = CrossEntropyGradient.apply(hidden, weight, gradient)
        return g * gradient, None, None, None


class CrossEntropyGradient(torch.autograd.Function):
    """∂loss/∂hidden, (N, hidden_size), which is known already, given a derivative."""

    @staticmethod
    def forward(ctx, hidden, weight, gradient):
        ctx.save_for_backward(hidden, weight)
        return gradient.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, v):
        """∂(v · gradient)/∂hidden = p ⊙ (v̇ - Σ p ⊙ v̇) · weight / N, v̇ = v · weightᵀ."""
        hidden, weight = ctx.saved_tensors
        out, dtype = torch.empty_like(hidden), torch.promote_types(hidden.dtype, torch.float32)
        for part, direction, into in zip(*(t.split(ROWS) for t in (hidden, v, out))):
            p = F.linear(part, weight).to(dtype)  # (rows, vocab)
            torch.softmax(p, -1, out=p)
            change = F.linear(direction, weight).to(dtype).mul_(p)
            change.addcmul_(p, change.sum(1, keepdim=True), value=-1).div_(len(hidden))
            torch.mm(change.to(hidden.dtype), weight, out=into)
        return out, None, None


def cross_entropy(hidden, weight, targets):
    """
    The mean of -log softmax(hidden·weightᵀ)[target] in nats, a scalar in fp32 or finer; twice
    differentiable by hidden, (N, hidden_size), N ≥ 1. weight, (vocab, hidden_size), gets no
    gradient. targets: (N,).

    All logits at once are often a step's largest tensors: 512 positions × 49,152 tokens take 100 MB
    in fp32, several times over. Here chunks share one buffer, and since the head is frozen, the
    forward pass computes the gradient too. On two CPU cores this takes 0.65 of the plain form's
    time in bf16, the same in fp32.
    """
    differentiable = hidden.requires_grad and torch.is_grad_enabled()
    return CrossEntropy.apply(hidden, weight, targets, differentiable)


class Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, change):
        ctx.mark_dirty(y)
        y.addcmul_(y, change.to(y.dtype))
        ctx.save_for_backward(y, change)
        return y

    @staticmethod
    def backward(ctx, g):
        y, change = ctx.saved_tensors
        product = g * y
        # Only a row of zeros has ratio 0. There y is 0, so any divisor will do.
        by_change = product.sum(0) / torch.where(change == -1, 1, 1 + change)
        # The result may overwrite product, unless this gradient will be differentiated.
        out = None if torch.is_grad_enabled() else product
        return torch.addcmul(g, g, change.to(g.dtype), out=out), by_change


def rescale(y, change):
    """
    (1 + change) ⊙ y, written into y. y: (N, out), change: (out,). Autograd would keep y and
    allocate four more tensors of its size. Here a division recovers y from the result: a DoRA step
    took 1.23 instead of 1.30 LoRA steps (SmolLM2, bf16, 8 × 64 tokens, two CPU cores).
    """
    return Rescale.apply(y, change)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, g):
        return SwiGLUGradient.apply(g, *ctx.saved_tensors)


class SwiGLUGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, gate, up):
        ctx.save_for_backward(g, gate, up)
        return silu_backward(g * up, gate), F.silu(gate).mul_(g)

    @staticmethod
    @once_differentiable
    def backward(ctx, a, b):
        """silu'' = p·(1 - p)·(2 + x·(1 - 2p)), p = sigmoid(x)."""
        g, gate, up = ctx.saved_tensors
        by_g = silu_backward(a * up, gate).addcmul_(b, F.silu(gate))
        p = gate.sigmoid()
        bend = gate.mul(1 - 2 * p).add_(2).mul_(p).mul_(1 - p)
        by_gate = silu_backward(b, gate).addcmul_(bend.mul_(a), up).mul_(g)
        return by_g, by_gate, silu_backward(a * g, gate)


def swiglu(gate, up):
    """silu(gate) ⊙ up. Autograd would keep silu(gate), too, and more for second derivatives."""
    return SwiGLU.apply(gate, up)


class Recomputed(torch.autograd.Function):
    """y = function(inputs)."""

    @staticmethod
    def forward(ctx, replay, *inputs):
        ctx.replay = replay
        ctx.save_for_backward(*inputs)
        return replay.function(*inputs[: replay.count])  # torch records nothing here

    @staticmethod
    def backward(ctx, gy):
        return None, *Pullback.apply(ctx.replay, gy, *ctx.saved_tensors)


class Pullback(torch.autograd.Function):
    """g = gy · ∂y/∂inputs."""

    @staticmethod
    def forward(ctx, replay, gy, *inputs):
        ctx.replay = replay
        ctx.save_for_backward(gy, *inputs)
        with torch.enable_grad():
            y, inputs = replay(inputs)
            return torch.autograd.grad(y, inputs, gy)

    @staticmethod
    @once_differentiable
    def backward(ctx, *tangents):
        gy, *inputs = ctx.saved_tensors
        with torch.enable_grad(), second_derivatives(), ctx.replay.twice():
            gy = gy.detach().requires_grad_()
            y, inputs = ctx.replay(inputs)
            g = torch.autograd.grad(y, inputs, gy, create_graph=True)
            return None, *torch.autograd.grad(g, (gy, *inputs), tangents, materialize_grads=True)


class Replay:
    """
    Calls a function again with its first call's random numbers (dropout) and contexts. A GPU's
    backward pass runs in a thread of its own, which would not see them.
    """

    def __init__(self, function, x, count, twice):
        self.function, self.count, self.twice = function, count, twice  # count: of its arguments
        self.gpus = [x.device] if x.is_cuda else []
        self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.gpus)]
        self.context = second_derivatives if TWICE.get() else contextlib.nullcontext
        device = x.device.type
        self.autocast = dict(
            device_type=device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
        )

    def __call__(self, inputs):
        """(the result, the inputs that it depends on: new leaves, and the parameters)."""
        leaves = [x.detach().requires_grad_() for x in inputs[: self.count]]
        with torch.random.fork_rng(self.gpus), torch.autocast(**self.autocast), self.context():
            torch.set_rng_state(self.states[0])
            for gpu, state in zip(self.gpus, self.states[1:]):
                torch.cuda.set_rng_state(state, gpu)
            return self.function(*leaves), [*leaves, *inputs[self.count :]]


def recompute(function, *arguments, parameters=(), twice=contextlib.nullcontext):
    """
    function(*arguments), a tensor, without keeping its activations: each backward pass computes
    them again (gradient checkpointing, arXiv 1604.06174). Only the arguments, all tensors, and the
    result's gradient are kept. parameters: the other leaves that the function reads; twice: makes a
    context for two backward passes through the function.

    Second derivatives drop activations too. In torch's own checkpointing, the graphs of all blocks
    wait for the second backward pass. For blocks x' = f(x, θ) and a direction a of θ, the product
    Σ a · ∂(∂L/∂θ)/∂θ is the gradient of the directional derivative L̇ = Σ a · ∂L/∂θ. Pearlmutter
    (1994, "Fast exact multiplication by the Hessian") computes it in two sweeps:

        upward     ẋ' = ∂f/∂x · ẋ + ∂f/∂θ · a         how x moves when θ moves along a
        downward   p = p' · ∂f/∂x + ∂(q' · ẋ')/∂x      with q = ∂L/∂x and p = ∂L̇/∂x

    Here autograd does both, block by block. The gradient's graph is a chain of Pullback nodes, one
    a block: q = q' · ∂f/∂x. The backward pass through it meets the lowest block first, whose
    derivative by q' is ẋ', and by x the second term of p. The loss turns ẋ into p', and the
    Recomputed nodes lead p' down. So only one block's graph is alive at a time.
    """
    replay = Replay(function, arguments[0], len(arguments), twice)
    return Recomputed.apply(replay, *arguments, *parameters)


def recompute_module(module, x, **options):
    """recompute for a module; sharded weights stay whole between two backward passes."""
    run = functools.partial(module, **options)
    trained = [p for p in module.parameters() if p.requires_grad]
    twice = functools.partial(distributed.kept_whole, module)
    return recompute(run, x, parameters=trained, twice=twice)
