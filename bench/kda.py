"""
Kimi Delta Attention, measured beside what it is compared with, in the same run. The other benches:

    python -m bench.kda             Kimi Delta Attention beside flash-linear-attention and PyTorch's scaled_dot_product_attention
    python -m bench.kda --json      the same as JSON
    python -m bench.train           the training step of both routes beside a plain GPT of the same size (--nanogpt=PATH: and nanoGPT)
    python -m bench.train sweep config/route_a_stage1.py      the fastest batch size, dtype, compile and recompute on this machine
    python -m bench.train plan config/route_a_stage1.py       tokens, hours and memory of that run (train, sweep and plan have a --help)
    python -m bench.prepare         tokenising, and the whole of prepare.py, beside nanoGPT's way to prepare text
    python -m bench.models decode          milliseconds per token and bytes of cache, by context
    python -m bench.answer          tasks per second of both routes, and what thinking longer costs Route B
    python -m bench.recursion       what recursion is worth (it has a --help)
    python -m bench.models learn           loss by seconds and by tokens, beside nanoGPT and other settings

Milliseconds are medians, contenders take turns. Runs on the GPU where there is one, else on all CPU cores; with OMP_NUM_THREADS=1
milliseconds are those that the process was given, so that other jobs on the machine count less. Rivals that are not installed are left out
(`pip install fla-core==0.6.0 einops` brings flash-linear-attention). Figures worth keeping go into LOG.md with
their date and machine.

Read next: bench/train.py, bench/models.py.
"""

import argparse
import ctypes
import importlib
import importlib.util
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from kda import CHUNK, KimiDeltaAttention, choose_backend, kda, kda_step
from model_dense import Attention, Config, rope_3d
from smol import runtime

# -----------------------------------------------------------------------------
# measuring


def clock(device):
    """
    A function that gives seconds. On a CPU with one thread (OMP_NUM_THREADS=1) those that the process has had, not those that have passed:
    other jobs may run beside.
    """
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def medians_ms(runs, device, seconds=1.5):
    """
    runs: {name: function without arguments} -> {name: its median time in milliseconds}. They take turns, so that a machine that slows
    down slows down all of them: about `seconds` of each, at least 5 calls after 2 to warm up, of those that take over a second at least 1.
    """
    now, times = clock(device), {name: [] for name in runs}
    while True:
        left = [name for name, t in times.items() if len(t) < 200 and not (sum(t) > seconds and (len(t) >= 7 or t[-1] > 1))]
        if not left:
            return {name: 1000 * statistics.median(t[2:] or t[-1:]) for name, t in times.items()}
        for name in left:
            if device == "cuda":
                torch.cuda.synchronize()
            start = now()
            runs[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(now() - start)


def peak_mb(run, device):
    """Memory that run() takes at its peak beyond what was there before, in MB; None where the system does not tell."""
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
    """
    contenders: {name: (f, its inputs)} -> {name: {forward_ms (no gradients), both_ms, peak_mb of both}}, with gradients to all inputs.
    """
    forward, both = {}, {}
    for name, (f, inputs) in contenders.items():
        leaves = [x.detach().requires_grad_() for x in inputs]
        ones = torch.ones_like(f(*inputs))

        def with_gradients(f=f, leaves=leaves, ones=ones):
            for x in leaves:
                x.grad = None
            f(*leaves).backward(ones)

        forward[name], both[name] = torch.no_grad()(lambda f=f, inputs=inputs: f(*inputs)), with_gradients
    times = medians_ms(forward, device), medians_ms(both, device)
    return {name: {"forward_ms": times[0][name], "both_ms": times[1][name], "peak_mb": peak_mb(both[name], device)} for name in contenders}


def machine_peaks(device, dtype):
    """(multiply-adds as FLOP/s of a large matmul, bytes/s of a large copy), measured here."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    big = torch.empty(64 * 2**20 // a.element_size(), device=device, dtype=dtype)
    copy = torch.empty_like(big)
    ms = medians_ms({"product": lambda: a @ a, "copy": lambda: copy.copy_(big)}, device)
    return 2 * n**3 / (ms["product"] / 1e3), 2 * big.nbytes / (ms["copy"] / 1e3)


# -----------------------------------------------------------------------------
# kda

# (B, T, H, K) of the operator; (B, T, width, heads) of the layer: the last rows are what puzzles look like, short and wide
CPU_SHAPES = [(1, 1024, 8, 64), (1, 4096, 8, 64), (1, 8192, 8, 64), (1, 32768, 8, 64), (64, 48, 2, 32)]
CUDA_SHAPES = [(8, 2048, 9, 64), (2, 8192, 9, 64), (1, 32768, 9, 64), (4, 4096, 16, 128)]
LAYER_SHAPES = [(8, 256, 128, 4), (64, 32, 64, 4), (64, 43, 64, 2)]
DECODING_SHAPES = [(1, 9, 64), (16, 9, 64), (256, 9, 64)]  # (B, H, K)
NAIVE_LIMIT = 1024  # tokens up to which flash-linear-attention's naive form, seconds a call on a CPU, is run


def kda_flops(B, T, H, K):
    """Floating point operations of the matrix products of the chunked form with K = V: (forward, forward + backward)."""
    pairs, states = 2 * CHUNK * K, 2 * K * K  # per token: a C x C matrix against (C, K), a (K, V) state against (C, K)
    forward = 4 * pairs + 3 * states
    return B * T * H * forward, B * T * H * (forward + 9 * pairs + 8 * states)


def operator_rivals(device, q, k, v, g, beta):
    """{name: (function, its inputs)} of those that are installed."""
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    rivals = {"scaled_dot_product_attention": (lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), heads_first)}
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


def bench_kda(device):
    """Rows of {what, shape, backend, forward_ms, both_ms, peak_mb, roofline, rivals: {name: {..., ratio}}}; ratio is of both_ms."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    shapes = CPU_SHAPES if device == "cpu" else CUDA_SHAPES
    chosen, _ = choose_backend(torch.device(device), dtype)
    flops_per_s, bytes_per_s = machine_peaks(device, dtype)
    rows = []
    progress = tqdm(total=len(shapes) + len(LAYER_SHAPES) + len(DECODING_SHAPES), leave=False)
    for B, T, H, K in shapes:
        q, k, v = torch.randn(3, B, T, H, K, device=device).unbind(0)
        g, beta = -0.1 * torch.rand(B, T, H, K, device=device), torch.rand(B, T, H, device=device)
        inputs = [q.to(dtype), F.normalize(k, dim=-1).to(dtype), v.to(dtype), g, beta]
        moved = sum(x.nbytes for x in inputs) + v.to(dtype).nbytes
        contenders = {backend: (lambda *x, backend=backend: kda(*x, backend=backend)[0], inputs) for backend in sorted({chosen, "chunk"})}
        own_rivals = operator_rivals(device, *inputs)
        figures = forward_and_backward({**contenders, **own_rivals}, device)
        rivals = {name: figures[name] for name in own_rivals}
        for backend in contenders:
            ours = figures[backend]
            limits = [max(flops / flops_per_s, bytes / bytes_per_s) for flops, bytes in zip(kda_flops(B, T, H, K), (moved, 3 * moved))]
            ours["roofline"] = 1000 * limits[1] / ours["both_ms"]
            rows.append({"what": "operator", "shape": (B, T, H, K), "backend": backend, **ours,
                         "rivals": {name: dict(rival) for name, rival in rivals.items()}})  # fmt: skip
        progress.update()
    for B, T, width, heads in LAYER_SHAPES:
        x = torch.randn(B, T, width, device=device)
        layer = KimiDeltaAttention(width, heads, width // heads).to(device)
        attention = Attention(Config(n_embd=width, n_head=heads)).to(device)
        rope = rope_3d(torch.zeros(B, T, 3, dtype=torch.long, device=device), width // heads, 100.0)
        contenders = {"ours": (lambda x: layer(x)[0], [x]), "attention layer": (lambda x: attention(x, rope), [x])}
        figures = forward_and_backward(contenders, device)
        ours = figures.pop("ours")
        rows.append({"what": "layer", "shape": (B, T, width, heads), "backend": chosen, **ours, "rivals": figures})
        progress.update()
    for B, H, K in DECODING_SHAPES:
        q, k, v = F.normalize(torch.randn(3, B, H, K, device=device), dim=-1).to(dtype).unbind(0)
        g, beta, state = -torch.rand(B, H, K, device=device), torch.rand(B, H, device=device), torch.zeros(B, H, K, K, device=device)
        contenders = {"ours": lambda: kda_step(q, k, v, g, beta, state)}
        if device == "cuda" and importlib.util.find_spec("fla"):
            from fla.ops.kda import fused_recurrent_kda

            one = [x.unsqueeze(1) for x in (q, k, v, g, beta)]
            contenders["fla fused_recurrent_kda"] = lambda: fused_recurrent_kda(*one, initial_state=state, output_final_state=True)
        times = medians_ms(contenders, device)
        rivals = {name: {"forward_ms": ms} for name, ms in times.items() if name != "ours"}
        rows.append({"what": "decoding step", "shape": (B, H, K), "backend": chosen, "forward_ms": times["ours"], "rivals": rivals})
        progress.update()
    progress.close()
    for row in rows:
        for rival in row["rivals"].values():
            rival["ratio"] = row.get("both_ms", row["forward_ms"]) / rival.get("both_ms", rival["forward_ms"])
    return rows, {"dtype": str(dtype).removeprefix("torch."), "matmul_gflops": flops_per_s / 1e9, "copy_gb_per_s": bytes_per_s / 1e9}


def print_kda(rows, machine):
    print(f"{machine['device']}, torch {machine['torch']}, {machine['dtype']}; "
          f"a large matmul reaches {machine['matmul_gflops']:.0f} GFLOP/s here, a copy {machine['copy_gb_per_s']:.1f} GB/s")  # fmt: skip
    print("both: forward + backward; roofline: the time those two would allow, over ours; ratio: our time over the rival's\n")
    print(f"{'':46s} {'forward ms':>10s} {'both ms':>10s} {'peak MB':>8s} {'roofline':>8s} {'ratio':>7s}")

    def line(name, row):
        cells = [("forward_ms", "10.2f"), ("both_ms", "10.2f"), ("peak_mb", "8.0f"), ("roofline", "8.0%"), ("ratio", "7.2f")]
        numbers = (f"{row[n]:{f}}" if row.get(n) is not None else " " * int(f.split(".")[0]) for n, f in cells)
        print(f"{name:46s} " + " ".join(numbers).rstrip())

    for row in rows:
        line(f"{row['what']} {row['shape']} {row['backend']}", row)
        for name, rival in row["rivals"].items():
            line(f"    {name}", rival)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}; see python -m bench.kda --help")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if device == "cpu":
        runtime.keep_freed_memory()  # as train.py does
    rows, machine = bench_kda(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device == "cpu":
        name += ", milliseconds of its own time" if torch.get_num_threads() == 1 else ""
    machine = {"device": name, "torch": torch.__version__, **machine}
    if args.json:
        print(json.dumps({**machine, "rows": rows}, indent=2))
    else:
        print_kda(rows, machine)


if __name__ == "__main__":
    main()
