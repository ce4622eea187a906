"""
Several processes, one run: each computes its share of every batch, and gradients, second-derivative
products and losses are summed over all processes.

    torchrun --standalone --nproc_per_node=2 train.py --config=small.py

torchrun sets RANK and WORLD_SIZE, and per machine LOCAL_RANK and LOCAL_WORLD_SIZE; without them
these functions do nothing. Each loss is weighted by its share of the batch's labels, so their sum
equals the loss of one process. With --fsdp=True (FSDP2) the frozen weights are shared out, too.
"""

import atexit
import contextlib
import ctypes
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def start(device):
    """
    Join the other processes, once. Returns this process's device. device: 'cpu', 'cuda' or, for a
    single process, one GPU such as 'cuda:1'. Raises ValueError if a process has no GPU of its own.
    """
    if WORLD_SIZE > 1 and device.startswith("cuda"):
        if device != "cuda":
            each = f"device={device} is one GPU, and each process needs its own"
            raise ValueError(f"{each}: use device=cuda, and choose by CUDA_VISIBLE_DEVICES")
        if LOCAL_WORLD_SIZE > (count := torch.cuda.device_count()):
            need = f"{LOCAL_WORLD_SIZE} processes on a machine need a GPU each, and it has {count}"
            raise ValueError(f"{need}: use torchrun --nproc_per_node={count}, or device=cpu")
        device = f"cuda:{LOCAL_RANK}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # pinned memory, for one, belongs to the current GPU
    if WORLD_SIZE == 1:
        return device

    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # In a store that restarts share, the new processes wait forever for the old addresses.
        fresh = "torchrun --max-restarts needs a fresh store for each restart"
        raise ValueError(f"{fresh}: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ...")

    if not dist.is_initialized():
        gpu = torch.device(device) if device.startswith("cuda") else None
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=gpu)
        atexit.register(dist.destroy_process_group)
    return device


def leave(status):
    """End this process. If there are others, _exit ends it: gloo's threads may outlive Python."""
    if not dist.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 0:  # after a failure, wait for no other process
        dist.destroy_process_group()
    os._exit(status)


def add_up(tensors):
    """Each tensor of a list, summed over the processes in one message."""
    if WORLD_SIZE == 1:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    sums = flat.split([tensor.numel() for tensor in tensors])
    return [total.view_as(tensor) for total, tensor in zip(sums, tensors)]


def highest(number):
    """The highest of the processes' integers. CPUs exchange it, so that no GPU has to wait."""
    if WORLD_SIZE == 1:
        return number
    result = torch.tensor(number)
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result.item()


def gather(items):
    """The processes' lists joined, in every process."""
    if WORLD_SIZE == 1:
        return items
    lists = [None] * WORLD_SIZE
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def same_everywhere(tensors):
    """Overwrite tensors with the first process's."""
    if WORLD_SIZE > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def give_memory_back():
    """Make glibc return freed memory at once: sharded models then load in half the memory."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(-3, 1 << 20)


def shard(model, device, twice=False):
    """
    Keep only this process's share of a Transformer's frozen weights, on its device. Blocks,
    embeddings and head collect the other shares when they are called. Adapters stay whole.

    twice: whether second derivatives will be taken. They need the collected weights again after a
    backward pass, so blocks must be recomputed (kept_whole), and the head stays whole in between.
    """
    # These modules take a second to load, and few runs need them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.partition(":")[0], (WORLD_SIZE,))
    whole = {p for p in model.parameters() if p.requires_grad} | set(model.model.norm.parameters())

    # Tied embeddings and head are one unit: collected at the embeddings, kept until the head ends.
    ends = [model.model.embed_tokens, model.lm_head]
    tied = ends[0].weight is ends[1].weight
    units = [*model.model.layers, *([ends] if tied else ends)]
    for unit in [*units, model]:  # the model itself last: its call begins and ends a pass
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.lm_head.set_reshard_after_backward(not twice)
    for name in ("score", "totals"):
        register_fsdp_forward_method(model, name)  # others call it, like forward

    for tensor in [*model.parameters(), *model.buffers()]:
        if not hasattr(tensor, "to_local"):  # whole in each process
            tensor.data = tensor.data.to(device)


@contextlib.contextmanager
def kept_whole(unit):
    """A context in which a sharded module keeps its weights after a backward pass."""
    if not hasattr(unit, "set_reshard_after_backward"):
        yield
        return
    unit.set_reshard_after_backward(False)
    try:
        yield
    finally:
        unit.set_reshard_after_backward(True)
        unit.reshard()


def local_bytes(model):
    """Bytes of the frozen parameters in this process. A shared matrix counts once."""
    frozen = [p for p in set(model.parameters()) if not p.requires_grad]
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in frozen)


def from_first(function):
    """The first process's function(), in all processes: its result, ValueError or OSError."""
    if WORLD_SIZE == 1:
        return function()

    message = [None, None]  # the result, the error
    if RANK == 0:
        try:
            message[0] = function()
        except (ValueError, OSError) as error:
            plain = ValueError if isinstance(error, ValueError) else OSError
            message[1] = plain(str(error))  # every process can unpack it
    dist.broadcast_object_list(message)
    if message[1]:
        raise message[1]
    return message[0]


def wait():
    """Wait for all processes."""
    if WORLD_SIZE > 1:
        dist.barrier()
