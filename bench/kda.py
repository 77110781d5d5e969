"""
Kimi Delta Attention beside PyTorch's attention and flash-linear-attention, in the same run:

    python -m bench.kda                       operator and layer, forward and backward; a decoding step
    python -m bench.kda --json_file=kda.json  and the rows as JSON

Milliseconds are medians, and contenders take turns. It runs on the GPU where there is one, else on all CPU
cores. With OMP_NUM_THREADS=1 they are those that the process was given, so that other jobs on the machine
count less. Rivals that are not installed are left out (`pip install fla-core==0.6.0 einops` brings FLA).
Figures worth keeping go into LOG.md with their date and machine.
"""

import ctypes
import functools
import json
import math
import statistics
import sys

import torch
import torch.nn.functional as F

import configurator
from bench.train import clock, this_device
from kda import KimiDeltaAttention, choose_backend, kda, kda_step
from model_dense import Attention, Config, rope_3d
from smol import runtime
from smol.files import write_whole

json_file = ""  # write the rows here as well

# (B, T, H, K) of the operator, the first with all kinds of gates, the others with mild ones; (B, T, width,
# heads) of the layer, the last two as puzzles are, short and wide; (B, H, K) of a decoding step
SHAPES = {
    "cpu": [(1, 1024, 8, 64), (1, 4096, 8, 64), (1, 8192, 8, 64), (1, 32768, 8, 64), (64, 48, 2, 32)],
    "cuda": [(8, 2048, 9, 64), (2, 8192, 9, 64), (1, 32768, 9, 64), (4, 4096, 16, 128)],
    "layer": [(8, 256, 128, 4), (64, 32, 64, 4), (64, 43, 64, 2)],
    "decoding": [(1, 9, 64), (16, 9, 64), (256, 9, 64)],
}
TINY_SHAPES = {"layer": [(2, 16, 24, 2)], "decoding": [(2, 2, 8)]}
TINY_SHAPES |= dict.fromkeys(("cpu", "cuda"), [(1, 32, 2, 8)])
GATES = ("mild", "trained layer", "strong", "resets every 10 tokens")
SECONDS = 1.5  # of calls of each contender
NAIVE_LIMIT = 1024  # tokens up to which FLA's naive form, seconds a call on a CPU, is run


def medians_ms(runs, device):
    """
    {name: function without arguments} -> {name: its median milliseconds}. They take turns, so that a machine
    that slows down slows down all of them. About SECONDS of each, at least 5 calls after 2 to warm up; of
    those that take over a second, 1 after 1.
    """
    times = {name: [] for name in runs}

    def enough(t):
        return len(t) == 200 or sum(t[1:]) > SECONDS and (len(t) >= 7 or t[-1] > 1)

    while left := [name for name, t in times.items() if not enough(t)]:
        for name in left:
            start = clock(device)
            runs[name]()
            times[name].append(clock(device) - start)
    return {name: 1000 * statistics.median(t[2:] or t[-1:]) for name, t in times.items()}


def peak_mb(run, device):
    """MB that run() takes at its peak, beyond what was there; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not sys.platform.startswith("linux"):
        return None

    def status(field):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(field)) / 1e3

    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed but still hold would hide what this one needs
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def forward_and_backward(contenders, device):
    """{name: (f, its inputs)} -> {name: {forward_ms (no gradients), both_ms, peak_mb of both}}."""
    forward, both = {}, {}
    for name, (f, inputs) in contenders.items():
        leaves = [x.detach().requires_grad_() for x in inputs]
        ones = torch.ones_like(f(*inputs))

        def with_gradients(f=f, leaves=leaves, ones=ones):
            for x in leaves:
                x.grad = None
            f(*leaves).backward(ones)

        forward[name], both[name] = torch.no_grad()(lambda f=f, inputs=inputs: f(*inputs)), with_gradients
    ms = medians_ms(forward, device), medians_ms(both, device)
    peaks = {name: peak_mb(both[name], device) for name in contenders}
    return {n: {"forward_ms": ms[0][n], "both_ms": ms[1][n], "peak_mb": peaks[n]} for n in contenders}


def make_gates(kind, B, T, H, K, device):
    u = torch.rand(B, T, H, K, device=device)
    if kind == "strong":
        return -16 * u
    if kind == "trained layer":  # -exp(A_log) softplus: heads from 1 to 16, some tokens forget nearly all
        return -torch.linspace(1, 16, H, device=device)[:, None] * F.softplus(2 * torch.randn_like(u) - 3)
    g = -0.1 * u
    if kind == "mild":
        return g
    return g.masked_fill((torch.arange(T, device=device) % 10 == 0)[:, None, None], -math.inf)


def operator_rivals(device, q, k, v, g, beta):
    """{name: (function, its inputs)} of those that are installed."""
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    rivals = {"scaled_dot_product_attention": (attend, heads_first)}
    try:
        from fla.ops.kda import chunk_kda
        from fla.ops.kda.naive import naive_chunk_kda
    except ImportError:
        return rivals
    if device == "cuda":
        rivals["fla chunk_kda"] = lambda *x: chunk_kda(*x)[0], [q, k, v, g, beta]
    elif q.shape[1] <= NAIVE_LIMIT and q.shape[1] % 64 == 0:  # it knows whole chunks only
        rivals["fla naive_chunk_kda"] = lambda *x: naive_chunk_kda(*x)[0], [q, k, v, g, beta]
    return rivals


def measure(device, dtype, shapes):
    """Rows of {what, shape, forward_ms, both_ms, peak_mb, rivals: {name: {..., ratio: ours over theirs}}}."""
    for i, shape in enumerate(shapes[device]):
        for kind in GATES[:1] if i else GATES:
            q, k, v = torch.randn(3, *shape, device=device).unbind(0)
            g, beta = make_gates(kind, *shape, device), torch.rand(shape[:3], device=device)
            inputs = [q.to(dtype), F.normalize(k, dim=-1).to(dtype), v.to(dtype), g, beta]
            contenders = {"ours": (lambda *x: kda(*x)[0], inputs), **operator_rivals(device, *inputs)}
            name = f"{kind} gates, {choose_backend(g.device, dtype)[0]}"
            yield row_of("operator", shape, name, forward_and_backward(contenders, device))
    for B, T, width, heads in shapes["layer"]:
        x = torch.randn(B, T, width, device=device)
        layer = KimiDeltaAttention(width, heads, width // heads).to(device)
        attention = Attention(Config(n_embd=width, n_head=heads)).to(device)
        rope = rope_3d(torch.zeros(B, T, 3, dtype=torch.long, device=device), width // heads, 100.0)
        contenders = {"ours": (lambda x: layer(x)[0], [x])}
        contenders["attention layer"] = lambda x: attention(x, rope), [x]
        yield row_of("layer", (B, T, width, heads), "", forward_and_backward(contenders, device))
    for B, H, K in shapes["decoding"]:
        q, k, v = F.normalize(torch.randn(3, B, H, K, device=device), dim=-1).to(dtype).unbind(0)
        g, beta = -torch.rand(B, H, K, device=device), torch.rand(B, H, device=device)
        state = torch.zeros(B, H, K, K, device=device)
        ms = medians_ms({"ours": lambda: kda_step(q, k, v, g, beta, state)}, device)
        yield row_of("decoding step", (B, H, K), "", {"ours": {"forward_ms": ms["ours"]}})


def row_of(what, shape, name, figures):
    """figures: those of "ours" and of each rival."""
    ours = figures.pop("ours")
    for rival in figures.values():
        rival["ratio"] = ours["both_ms"] / rival["both_ms"]
    return {"what": what, "shape": shape, "name": name, **ours, "rivals": figures}


def print_row(name, row):
    cells = [("forward_ms", "10.2f"), ("both_ms", "10.2f"), ("peak_mb", "8.0f"), ("ratio", "7.2f")]
    numbers = (f"{row[n]:{f}}" if row.get(n) is not None else " " * int(f.split(".")[0]) for n, f in cells)
    print(f"{name:64s} " + " ".join(numbers).rstrip(), flush=True)


def main(argv):
    config, _ = configurator.read(globals(), argv)
    torch.set_flush_denormal(True)  # subnormals cost strong gates up to 8%
    runtime.keep_freed_memory()  # as train.py does
    torch.manual_seed(0)
    device = this_device()
    dtype = getattr(torch, runtime.pick_dtype("auto", device))
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    gflops = 2 * 2048**3 / 1e6 / medians_ms({"product": lambda: a @ a}, device)["product"]
    print(f"{dtype}; a large matmul reaches {gflops:.0f} GFLOP/s here")
    print(f"ratio: our time over the rival's\n\n{'':64s} forward ms    both ms  peak MB   ratio")
    rows = []
    for row in measure(device, dtype, SHAPES):
        rows.append(row)
        print_row(f"{row['what']} {row['shape']} {row['name']}", row)
        for rival, figures in row["rivals"].items():
            print_row(f"    {rival}", figures)
    if config["json_file"]:
        machine = {"device": runtime.device_name(device), "threads": torch.get_num_threads()}
        machine |= {"torch": torch.__version__, "dtype": str(dtype), "matmul_gflops": gflops}
        write_whole(json.dumps({**machine, "rows": rows}, indent=2).encode(), config["json_file"])


if __name__ == "__main__":
    main(sys.argv[1:])
