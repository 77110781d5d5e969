"""
Several processes as one: who am I, do all of us hold the same, and how do we all stop together with one line for the person?

torchrun starts the processes and tells each its number; without it there is one. Read next: train.py, the place to see this used.
"""

import contextlib
import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

rank, local_rank, world_size = (
    int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
master = rank == 0
objects = None  # the group over which Python objects go


def start(device_type):
    """Meet the other processes, if there are any."""
    global objects
    sys.excepthook = crashed
    if world_size > 1:
        # Half an hour: the first thing to wait for is that one process per machine has read and hashed all of its shards.
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        objects = dist.new_group(backend="gloo")


def leave(message=None, code=1):
    """Exit at once. torchrun shows at its very end what is in the file it names, so our line is written there as well."""
    if message and os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as f:
            json.dump(
                {
                    "message": {
                        "message": f"error: {message}",
                        "extraInfo": {"timestamp": str(int(time.time()))},
                    }
                },
                f,
            )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process group that others have left would keep us waiting


def end():
    """
    The last line of a program. Of several processes, each leaves here and not through the interpreter's own end: the threads of the process
    groups are still there (DDP, for one, holds its group for good), and one that lets go of a tensor after that end has begun can abort the
    process, which to torchrun is a failed run.
    """
    if world_size > 1:
        dist.destroy_process_group()
        leave(code=0)


def stop(message, everyone=True):
    """The run cannot go on: one line, and exit code 1. everyone: all processes get here, and one of them says it."""
    if master or not everyone:
        print(f"error: {message}", file=sys.stderr)
    leave(message)


def crashed(kind, error, trace):
    """The excepthook: what nobody expected is shown in full, except that another process has left: that one has said why."""
    if kind is KeyboardInterrupt:  # before training begins: from then on it is handled there
        print("\ninterrupted before the first step: nothing was changed", file=sys.stderr)
        leave("interrupted", code=130)
    if world_size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        print(f"process {rank}: lost another process, which has said why", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    leave(f"{kind.__name__}: {error}")


def all_agree(problem):
    """problem: a message, or None. Returns None where all processes have none, else one message to stop with, the same everywhere."""
    problems = [problem]
    if world_size > 1:
        problems = [None] * world_size
        dist.all_gather_object(problems, problem, group=objects)
    for r, message in enumerate(problems):
        if message is not None:
            return message if len(set(problems)) == 1 or r == 0 else f"{message} (process {r})"
    return None


def sums(values, device):
    """Sums of a list of numbers over all processes, a list of floats, bit for bit the same in each."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size > 1:
        dist.all_reduce(values)
    return values.tolist()


def gather(value):
    """[value of process 0, of process 1, ...] on the first process, nothing on the others."""
    if world_size == 1:
        return [value]
    values = [None] * world_size if master else None
    dist.gather_object(value, values, group=objects)
    return values or []


def difference(tensors):
    """
    Compare {name: tensor}, of 4- or 8-byte elements, over all processes, by the sums of their bits. None if they are the same, else
    which process differs from the others (of two: from the first) in what; the same answer everywhere.
    """
    if world_size == 1:
        return None
    bits = [
        t.detach().reshape(-1).view(torch.int32 if t.element_size() == 4 else torch.int64)
        for t in tensors.values()
    ]
    mine = torch.stack([b.sum(dtype=torch.int64) for b in bits])
    everyones = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(everyones, mine)
    everyones = torch.stack(everyones).cpu()
    typical = everyones.mode(0).values if world_size > 2 else everyones[0]
    for r in range(world_size):
        wrong = [name for name, same in zip(tensors, (everyones[r] == typical).tolist()) if not same]
        if wrong:
            return f"process {r} differs in {wrong[0]}" + (
                f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            )
    return None
