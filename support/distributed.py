"""
Several processes, one run: each takes its share of every batch, and gradients, products and losses are added up over all of them.

    torchrun --standalone --nproc_per_node=2 train.py --config=small.py

With --fsdp=True each process keeps its share of the frozen weights only, and gets a block, the embeddings or the head whole for as long as it computes
them (FSDP2).
torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without them there is one process, and nothing here does anything. A loss is weighted by its rows'
share of the labels in the whole batch (data.parts), so that the sum over the processes is what one process would have computed.
"""

import atexit
import contextlib
import ctypes
import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

RANK, LOCAL_RANK, WORLD_SIZE = (
    int(os.environ.get(name, default))
    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)


def start(device):
    """Join the other processes, once; returns this one's device. NCCL between GPUs, gloo between CPUs. Raises ValueError."""
    if WORLD_SIZE == 1:
        return device
    if (
        os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):
        # torchrun would keep one store over all restarts, where the new processes find the addresses of the dead ones, and wait for these.
        raise ValueError(
            "torchrun --max-restarts needs a fresh store for each restart: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ..."
        )
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=30)
        )
        atexit.register(
            dist.destroy_process_group
        )  # else a thread of gloo's may outlive it, and the interpreter aborts at its end
    return f"cuda:{LOCAL_RANK}" if device == "cuda" else device


def add_up(tensors):
    """Each tensor of a list, added up over the processes; in one message."""
    if WORLD_SIZE == 1:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    return [
        part.view_as(tensor)
        for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors)
    ]


def same_everywhere(tensors):
    """Overwrite tensors by those of the first process."""
    if WORLD_SIZE > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def give_memory_back():
    """
    Have the system get freed tensors' memory back at once, for a process that is to hold its share only; from before the model is loaded.

    glibc would keep the blocks' memory among the activations', and what measuring the weights' norms took: on two processes SmolLM2 in fp32
    came to 1.3 GB, and with M_MMAP_THRESHOLD at 1 MB to 0.7.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(-3, 1 << 20)


def shard(model, device):
    """
    Keep of a Transformer's frozen weights this process's share, on its device; its blocks, embeddings and head fetch the others' when they are called.

    Adapters stay whole in each process: they are small, and so all that is said here about gradients and checkpoints stays true. A second
    derivative would find the weights gone that the first backward pass gave back.
    """
    from torch.distributed.device_mesh import (
        init_device_mesh,  # here, since they take a second, and few runs need them
    )
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.partition(":")[0], (WORLD_SIZE,))
    ends = [model.model.embed_tokens, model.lm_head]
    tied = (
        ends[0].weight is ends[1].weight
    )  # then one share serves both, fetched at the embeddings and kept until the head is done
    trained = {p for p in model.parameters() if p.requires_grad}
    for part in [
        *model.model.layers,
        *([ends] if tied else ends),
        model,
    ]:  # the last one: what is left, a norm
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    for name in ("score", "totals"):
        register_fsdp_forward_method(model, name)  # called as forward is, from outside
    for tensor in [*model.parameters(), *model.buffers()]:
        if not hasattr(tensor, "to_local"):  # not shared out
            tensor.data = tensor.data.to(device)


def local_bytes(model):
    """Bytes of a model's frozen parameters that this process holds; a matrix that is shared counts once."""
    return sum(
        (p.to_local() if hasattr(p, "to_local") else p).nbytes
        for p in set(model.parameters())
        if not p.requires_grad
    )


def from_first(function, device="cpu"):
    """
    What a function returns, called by the first process alone, for all of them: anything that JSON can hold.

    A ValueError or OSError of its is raised by all of them, so that none waits for one that has gone.
    """
    if WORLD_SIZE == 1:
        return function()
    message = torch.zeros(1, dtype=torch.int64, device=device)
    if RANK == 0:
        try:
            content = {"value": function()}
        except (ValueError, OSError) as error:
            content = {
                "error": str(error),
                "kind": "ValueError" if isinstance(error, ValueError) else "OSError",
            }
        content_bytes = torch.tensor(
            list(json.dumps(content).encode()), dtype=torch.uint8, device=device
        )
        message[0] = len(content_bytes)
    dist.broadcast(message, 0)
    if RANK != 0:
        content_bytes = torch.zeros(message.item(), dtype=torch.uint8, device=device)
    dist.broadcast(content_bytes, 0)
    content = json.loads(bytes(content_bytes.tolist()))
    if "error" in content:
        raise {"ValueError": ValueError, "OSError": OSError}[content["kind"]](content["error"])
    return content["value"]


def wait():
    """Until all processes are here."""
    if WORLD_SIZE > 1:
        dist.barrier()
