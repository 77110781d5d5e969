"""
What a run stands on, whatever its model: the device and its number format, several processes as one, signals,
log.jsonl and its picture.

torchrun starts the processes and tells each its rank; without it there is one. Read next: train.py, which
uses all of it.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import sys
import time
from copy import deepcopy
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from smol.files import save_picture, write_whole

# -----------------------------------------------------------------------------
# the machine

# Name as PyTorch reports it: (dense half-precision tensor TFLOPS with float32 accumulation, GB of memory).
# From NVIDIA's data sheets, without sparsity. GeForce cards accumulate in float32 at half the rate that is
# usually quoted: a 3060 has 28 SMs * 512 multiply-adds * 1.777 GHz = 51 TFLOPS in float16, 25.5 in float32,
# which is what PyTorch's matmuls do.
CARDS = {
    "T4": (65, 16),
    "V100": (125, 16),
    "P100": (18.7, 16),  # no tensor cores
    "RTX 3060": (25.5, 12),
    "RTX 3090": (71, 24),
    "RTX 4090": (165.2, 24),
    "A10": (125, 24),
    "L4": (121, 24),
    "L40S": (362, 48),
    "A100": (312, 40),
    "H100 PCIe": (756, 80),
    "H100": (989, 80),
    "H200": (989, 141),
}
CPUINFO = Path("/proc/cpuinfo")  # Linux


def pick_device(device):
    """'auto', 'cpu', 'mps', 'cuda' (of several processes each its own) or 'cuda:N' -> device. ValueError."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{local_rank}"
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        return "mps" if mps_works() else "cpu"
    if device == "auto":
        return "cpu"
    if not re.fullmatch(r"cpu|cuda:\d+", device):
        raise ValueError(f"device must be 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N', got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but PyTorch sees no GPU: use --device=cpu")
    if device != "cpu" and int(device[5:]) >= (n := torch.cuda.device_count()):
        raise ValueError(f"device={device!r}, but PyTorch counts {n} GPUs from cuda:0 on")
    return device


@lru_cache
def mps_works():
    """Whether an Apple GPU gives the output and gradients of a KDA layer as the CPU does; a line if not."""
    from kda import KimiDeltaAttention

    try:
        x, found = torch.randn(2, 80, 32), []
        layer = KimiDeltaAttention(32, 2, 16)
        for device in ("cpu", "mps"):
            copy = deepcopy(layer).to(device)
            y, _ = copy(x.to(device))
            y.square().sum().backward()
            found.append(torch.cat([y.flatten(), *(p.grad.flatten() for p in copy.parameters())]).cpu())
        problem = None if torch.allclose(*found, rtol=1e-2, atol=1e-2) else "it computes something else"
    except (RuntimeError, AssertionError, TypeError) as e:  # how PyTorch says that it cannot
        problem = str(e).splitlines()[0]
    if problem:
        print0(f"the Apple GPU cannot be used, the CPU is: {problem}")
    return problem is None


def pick_dtype(dtype, device, training=False):
    """'auto' -> bfloat16, or float16 before capability 8.0; of a CPU float32, or what trains fast."""
    if dtype != "auto":
        return dtype
    if not device.startswith("cuda"):
        return "bfloat16" if training and device == "cpu" and cpu_prefers_bfloat16() else "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def mixed_precision(device, precision):
    """-> (autocast, gradient scaler): the first does nothing in float32, the second except in float16."""
    kind = torch.device(device).type
    scaler = torch.amp.GradScaler(kind, enabled=precision == "float16")
    if precision == "float32":
        return contextlib.nullcontext(), scaler
    return torch.autocast(kind, dtype=getattr(torch, precision)), scaler


@lru_cache
def cpu_prefers_bfloat16():
    """
    Whether the processor multiplies matrices of it faster than those of float32: with AMX, and with
    AVX512-BF16 in AMD's processors. In Intel's without AMX it is half as fast (LOG.md).
    """
    about = CPUINFO.read_text() if CPUINFO.exists() else ""
    return torch.cpu._is_amx_tile_supported() or ("AuthenticAMD" in about and "avx512_bf16" in about)


def start(device, dtype):
    """
    Set PyTorch up for a training and meet the other processes, if there are any. device, dtype: as the
    settings have them -> (device of this process, dtype). ValueError.
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device, training=True)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
    else:
        keep_freed_memory()
    start_processes(device.split(":")[0])
    return device, dtype


def device_name(device):
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device.upper()


def keep_freed_memory():
    """
    Let the C library (glibc) keep what tensors on the CPU have freed, instead of giving it back to the system
    and asking for it again, page by page: a tenth to a third of the time of large steps (LOG.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: blocks of up to 32 MB come from the heap


def peak_flops(card):
    """Peak FLOPs per second of a card by PyTorch's name for it, for MFU; None for one not in the table."""
    found = [known for known in CARDS if re.search(rf"\b{known}\b", card)]
    return CARDS[max(found, key=len)][0] * 1e12 if found else None


def peak_memory(device):
    """Most bytes that this process has held so far: allocated by PyTorch on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device):
    """Bytes that tensors could still take on a GPU; 0 on a CPU, which does not tell."""
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def out_of_memory(error):
    """Whether an exception says that memory ran out, on a GPU or a CPU."""
    of_memory = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, of_memory) or "can't allocate memory" in str(error)


# -----------------------------------------------------------------------------
# several processes as one

rank = int(os.environ.get("RANK", 0))
local_rank = int(os.environ.get("LOCAL_RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
master = rank == 0
object_group = None  # the group over which Python objects go


def start_processes(device_type):
    """Meet the other processes, if there are any."""
    global object_group
    sys.excepthook = crashed
    if world_size > 1:
        # half an hour: first of all one process of each machine verifies all shards
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        object_group = dist.new_group(backend="gloo")


def exit_now(message=None, code=1):
    """
    Exit at once, without waiting for threads or a process group that others have left. torchrun shows at its
    very end what is in the file it names, so our line is written there as well.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if message and report:
        about = {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(report, "w") as f:
            json.dump({"message": about}, f)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_processes():
    """
    The last call of a program. Of several processes each exits here: DDP's threads live on, and one that lets
    go of a tensor after the interpreter has begun to end can abort the process, for torchrun a failed run.
    """
    if world_size > 1:
        dist.destroy_process_group()
        exit_now(code=0)


def stop(message):
    """End the run, in all processes: exit code 1, and a line from rank 0."""
    if master:
        print(f"error: {message}", file=sys.stderr)
    exit_now(message)


def print0(text):
    """A line for people, from rank 0, that does not tear a progress bar."""
    if master:
        tqdm.write(text)


def crashed(kind, error, trace):
    """The excepthook: an exception is shown in full, except where it says that another process has left."""
    if kind is KeyboardInterrupt:  # before the first step: from then on `catch_signals` sees to it
        print("\ninterrupted before the first step: nothing was changed", file=sys.stderr)
        exit_now("interrupted", code=130)
    if out_of_memory(error):
        line = "out of memory: lower batch_size and raise gradient_accumulation_steps, or set recompute=True"
        print(f"error: {line} (process {rank})", file=sys.stderr)
        exit_now(line)
    if world_size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        print(f"process {rank}: lost another process, which has said why", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    exit_now(f"{kind.__name__}: {error}")


def all_agree(problem):
    """problem: a message or None. The first message of any process, the same everywhere; None without."""
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * world_size
        dist.all_gather_object(problems, problem, group=object_group)
    for r, message in enumerate(problems):
        if message is not None:
            return message if r == 0 else f"{message} (process {r})"
    return None


@contextlib.contextmanager
def errors_agree():
    """An OSError or ValueError inside, in any process, ends all of them with one line and exit code 1."""
    problem = None
    try:
        yield
    except (OSError, ValueError) as e:
        problem = str(e)
    problem = all_agree(problem)
    if problem is not None:
        stop(problem)


def sums(values, device):
    """Sums of a list of numbers over all processes: a list of floats, bit for bit the same in each."""
    if world_size == 1:  # an Apple GPU has no float64
        return [float(x) for x in values]
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def gather(value):
    """[value of process 0, of process 1, ...] on rank 0, nothing on the others."""
    if world_size == 1:
        return [value]
    values = [None] * world_size if master else None
    dist.gather_object(value, values, group=object_group)
    return values or []


def difference(tensors):
    """
    Compare {name: tensor}, of 4- or 8-byte elements, over all processes, by the sums of their bits. None if
    they are the same, else a phrase, the same everywhere: which process differs from the first in what.
    """
    words = {4: torch.int32, 8: torch.int64}
    bits = [t.detach().reshape(-1).view(words[t.element_size()]) for t in tensors.values()]
    mine = torch.stack([b.sum(dtype=torch.int64).cpu() for b in bits]).tolist()
    everyones = [None] * world_size
    dist.all_gather_object(everyones, mine, group=object_group)
    for r, theirs in enumerate(everyones):
        wrong = [name for name, a, b in zip(tensors, everyones[0], theirs) if a != b]
        if wrong:
            return f"process {r} differs from process 0 in {wrong[0]}, {len(wrong)} of {len(tensors)} in all"
    return None


# -----------------------------------------------------------------------------
# how a run is ended


def catch_signals():
    """
    From now on Ctrl-C and SIGTERM only append their time to the list that this returns, for the loop to look
    at after each step; one that comes later exits at once.
    """
    interrupted = []

    def on_signal(number, frame):
        # torchrun passes on a signal that the terminal has already sent to everyone: still the first one
        if interrupted and time.monotonic() - interrupted[0] > 2:
            os._exit(128 + number)
        interrupted.append(time.monotonic())

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return interrupted


def release_signals():
    """From now on Ctrl-C and SIGTERM end the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


# -----------------------------------------------------------------------------
# log.jsonl


def append_log(entry, path):
    """Add a line, after a new line where a crash has cut off the last one. Raises OSError."""
    with open(path, "ab+") as f:  # writes go to the end, wherever one has read
        if f.tell():
            f.seek(-1, os.SEEK_END)
            f.write(b"" if f.read(1) == b"\n" else b"\n")
        f.write(json.dumps(entry).encode() + b"\n")


def read_log(path):
    """List of dict; lines that a crash has cut off are left out. An empty list if there is no such file."""
    entries = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def write_log(entries, path):
    """A whole new log. Raises OSError."""
    write_whole("".join(json.dumps(entry) + "\n" for entry in entries).encode(), path)


def cut_log(path, last_step):
    """Drop what came after a step: it will be logged again. Raises OSError."""
    kept = [entry for entry in read_log(path) if entry["iter"] <= last_step]
    if kept:
        write_log(kept, path)
    elif os.path.exists(path):
        os.remove(path)


def draw_losses(out_dir):
    """out_dir/loss.png: the training loss of all batches and of each source, and its validation loss."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    def smooth(points):
        """Each the mean of the last twentieth of all: (steps, losses)."""
        n = 1 + len(points) // 20
        parts = [[x for _, x in points[max(0, i - n) : i]] for i in range(1, len(points) + 1)]
        return [step for step, _ in points], [sum(part) / len(part) for part in parts]

    def points(key, source):
        return [(e["iter"], e[key][source]) for e in entries if source in e.get(key, {})]

    entries = read_log(os.path.join(out_dir, "log.jsonl"))
    axes = Figure(figsize=(9, 5), layout="constrained").subplots()
    total = [(e["iter"], e["loss"]) for e in entries if e.get("loss") is not None]
    axes.plot(*smooth(total), color="0.2", lw=1.5, label="all batches")
    sources = {source for e in entries for source in {**e.get("losses", {}), **e.get("val_losses", {})}}
    for n, source in enumerate(sorted(sources)):
        style = {"color": colormaps["tab20"](n % 20), "lw": 1}
        axes.plot(*smooth(points("losses", source)), label=source, alpha=0.7, **style)
        validated = points("val_losses", source)
        axes.plot([i for i, _ in validated], [x for _, x in validated], ls=":", marker="o", ms=4, **style)
    axes.set(xlabel="step", ylabel="loss in nats", title=out_dir)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, title="lines: training, smoothed; dots: validation", title_fontsize=8)
    save_picture(axes.figure, os.path.join(out_dir, "loss.png"))
