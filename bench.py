"""
Every speed claim, measured beside what it is compared with, in the same run.

    python bench.py kda             Kimi Delta Attention beside PyTorch's scaled_dot_product_attention, operator and layer
    python bench.py kda --json      the same as JSON

Milliseconds are medians. Runs on the GPU where there is one, else on all CPU cores. Figures worth keeping go into LOG.md with their
date and machine.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from kda import KimiDeltaAttention, kda
from model_dense import Attention, Config, rope_3d

# (B, T, H, K) of the operator; (B, T, width, heads) of the layer: the last rows are what puzzles look like, short and wide
OPERATOR_SHAPES = [(1, 1024, 8, 64), (1, 4096, 8, 64), (1, 8192, 8, 64), (64, 48, 2, 32)]
LAYER_SHAPES = [(8, 256, 128, 4), (64, 32, 64, 4), (64, 43, 64, 2)]


def median_ms(run, device, seconds=1.5):
    """Median time of run() in milliseconds, over at least 5 calls and about `seconds` of them, after two to warm up."""
    times = []
    for i in range(2 + 200):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
        if i >= 6 and sum(times) > 1000 * seconds:
            break
    return statistics.median(times[2:])


def forward_and_backward(f, inputs, device):
    """(forward ms without gradients, forward + backward ms) of f(*inputs), gradients to all inputs."""
    with torch.no_grad():
        forward = median_ms(lambda: f(*inputs), device)
    inputs = [x.detach().requires_grad_() for x in inputs]
    ones = torch.ones_like(f(*inputs))

    def both():
        for x in inputs:
            x.grad = None
        f(*inputs).backward(ones)

    return forward, median_ms(both, device)


def bench_kda(device):
    """Rows of {what, shape, forward_ms, both_ms, rival, rival_forward_ms, rival_both_ms, ratio of both}."""
    rows = []

    def row(what, shape, ours, rival, theirs):
        rows.append({
            "what": what, "shape": shape, "forward_ms": ours[0], "both_ms": ours[1], "rival": rival, "rival_forward_ms": theirs[0],
            "rival_both_ms": theirs[1], "ratio": ours[1] / theirs[1],
        })  # fmt: skip

    progress = tqdm(total=len(OPERATOR_SHAPES) + len(LAYER_SHAPES), leave=False)
    for B, T, H, K in OPERATOR_SHAPES:
        q, k, v = torch.randn(3, B, T, H, K, device=device).unbind(0)
        g, beta = -0.1 * torch.rand(B, T, H, K, device=device), torch.rand(B, T, H, device=device)
        ours = forward_and_backward(lambda *x: kda(*x, backend="chunk")[0], [q, F.normalize(k, dim=-1), v, g, beta], device)
        heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        theirs = forward_and_backward(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), heads_first, device)
        row("operator", (B, T, H, K), ours, "scaled_dot_product_attention", theirs)
        progress.update()
    for B, T, width, heads in LAYER_SHAPES:
        x = torch.randn(B, T, width, device=device)
        layer = KimiDeltaAttention(width, heads, width // heads).to(device)
        attention = Attention(Config(n_embd=width, n_head=heads)).to(device)
        rope = rope_3d(torch.zeros(B, T, 3, dtype=torch.long, device=device), width // heads, 100.0)
        ours = forward_and_backward(lambda x: layer(x)[0], [x], device)
        theirs = forward_and_backward(lambda x: attention(x, rope)[0], [x], device)
        row("layer", (B, T, width, heads), ours, "attention layer of Route A", theirs)
        progress.update()
    progress.close()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kda"])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows = bench_kda(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if args.json:
        print(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=2))
        return
    print(f"{name}, torch {torch.__version__}, float32; milliseconds; ratio: KDA's forward + backward over the rival's")
    print(f"{'':9s} {'shape':20s} {'forward':>9s} {'fwd+bwd':>9s} | {'forward':>9s} {'fwd+bwd':>9s} {'ratio':>6s}  rival")
    for r in rows:
        print(f"{r['what']:9s} {str(tuple(r['shape'])):20s} {r['forward_ms']:9.2f} {r['both_ms']:9.2f} | "
              f"{r['rival_forward_ms']:9.2f} {r['rival_both_ms']:9.2f} {r['ratio']:6.2f}  {r['rival']}")  # fmt: skip


if __name__ == "__main__":
    main()
