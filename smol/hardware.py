"""
The machine: which device and number format to use on it, how fast it could be, and how much memory a run has taken.

Read next: train.py, which asks, and bench/kda.py, which measures against the same table.
"""

import contextlib
import ctypes
import re
import resource
import sys

import torch

# name as PyTorch reports it: (dense half-precision tensor TFLOPS with float32 accumulation, GB of memory, compute capability).
# From NVIDIA's data sheets, without sparsity. GeForce cards do float32 accumulation at half the rate that is usually quoted: a 3060 has
# 28 SMs * 512 multiply-adds * 1.777 GHz = 51 TFLOPS accumulating in fp16, 25.5 in fp32, which is what PyTorch's matmuls do.
CARDS = {
    "T4": (65, 16, (7, 5)),
    "V100": (125, 16, (7, 0)),
    "P100": (18.7, 16, (6, 0)),  # no tensor cores
    "RTX 3060": (25.5, 12, (8, 6)),
    "RTX 3090": (71, 24, (8, 6)),
    "RTX 4090": (165.2, 24, (8, 9)),
    "A10": (125, 24, (8, 6)),
    "L4": (121, 24, (8, 9)),
    "L40S": (362, 48, (8, 9)),
    "A100": (312, 40, (8, 0)),
    "H100 PCIe": (756, 80, (9, 0)),
    "H100": (989, 80, (9, 0)),
    "H200": (989, 141, (9, 0)),
}


def pick_device(device):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> device. ValueError, in one line, where there is none such."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(
            f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}: leave it out, or use --device=cpu"
        )
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but PyTorch sees no GPU: use --device=cpu")
    if ":" in device and int(device.split(":")[1]) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r}, but PyTorch counts {torch.cuda.device_count()} GPUs, from cuda:0 on"
        )
    return device


def pick_dtype(dtype, device):
    """'auto' -> bfloat16 from compute capability 8.0 on, float16 before, float32 on CPU. ValueError for another name than the three."""
    if dtype == "auto":
        if not device.startswith("cuda"):
            return "float32"
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    return dtype


def name(device):
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def keep_freed_memory():
    """
    Let the C library keep what tensors on the CPU have freed, for the next ones, instead of giving it back to the system and asking for
    it again, page by page: a tenth to a third of the time of large steps (LOG.md). Only with glibc, so on most Linux systems.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(
            -3, 32 << 20
        )  # M_MMAP_THRESHOLD: blocks of up to 32 MB, the most it allows, come from the heap


def peak_flops(card):
    """Peak FLOPs per second of a card by the name that PyTorch reports, for MFU; None for a card (or CPU) that is not in the table."""
    found = [known for known in CARDS if re.search(rf"\b{known}\b", card)]
    return CARDS[max(found, key=len)][0] * 1e12 if found else None


def peak_memory(device):
    """Most bytes that this process has held so far: allocated by PyTorch on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    with (
        contextlib.suppress(OSError),
        open("/proc/self/status") as f,
    ):  # Linux. There, ru_maxrss begins at what the parent held
        for line in f:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device):
    """Bytes that tensors could still take on a GPU: what nobody has, and what PyTorch keeps for later. 0 on a CPU, which does not tell."""
    if device.type != "cuda":
        return 0
    return (
        torch.cuda.mem_get_info(device)[0]
        + torch.cuda.memory_reserved(device)
        - torch.cuda.memory_allocated(device)
    )


def out_of_memory(error):
    """Whether an exception says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
