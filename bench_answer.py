"""
What thinking costs on this machine: `bench.py answer`.

    python bench.py answer                  Route B: supervision steps and tasks per second, memory by supervision steps; Route A beside it
    python bench.py answer --json           the same as JSON

Three questions. How fast are tasks answered, and does memory stay the same however long Route B thinks? What do passes without gradient
save, against the same recursion with all activations kept? Does a training step cost what its passes through the core say? Then a
projection, from FLOPs alone, of the hours that ARC-AGI-1's evaluation set takes on other cards.

The tasks are mazes, all of one size. On a CPU with one thread, seconds are the processor's own. Before this: model_trm.py. Next to read:
bench_recursion.py, which asks what all this is worth.
"""

import argparse
import contextlib
import json

import numpy as np
import torch

import arc
import checkpoint
import hardware
import loader
import puzzles
from bench import peak_mb
from bench_models import clock
from bench_train import SMALL
from model_dense import run_blocks

TURNS = 8  # of a training step, one of its passes, and one with its backward: the least of each counts

def seconds(*runs, device, times=3):
    """
    For each of the runs the least that it takes, of `times` after one to warm up. They take turns, so that whatever else the machine is
    busy with, and the clock it runs at, are the same for all: a step beside its passes is a ratio, which one slow minute would spoil.
    """
    taken = [[] for _ in runs]
    for _ in range(times + 1):
        for run, times_taken in zip(runs, taken):
            start = clock(device)
            run()
            times_taken.append(clock(device) - start)
    return [min(t[1:]) for t in taken]


def training_step(net, idx, targets, autocast):
    """A supervision step of training, optimizer left out: -> function."""

    def run():
        with autocast:
            loss = net.train()(idx, targets, mode="puzzle")[1]
        loss.backward()
        net.zero_grad(set_to_none=True)

    return run


def passes_apart(net, idx, autocast):
    """Two functions: one pass through the core without gradient; one forward and backward."""
    x, rope, visible = net.embed_canvas(idx)
    x = x.detach()

    def forward():
        with torch.no_grad(), autocast:
            return run_blocks(net.blocks, x, rope, visible=visible)

    def both():
        start = x.clone().requires_grad_()
        with autocast:
            y = run_blocks(net.blocks, start, rope, visible=visible)
        y.backward(torch.ones_like(y))
        net.zero_grad(set_to_none=True)

    return forward, both


def measure(net, tasks, n_sup, device, autocast):
    """Figures of Route B on tasks of one length."""
    rows = [loader.puzzle_row(arc.encode(t.kind, t.test), "canvas", "none") for t in tasks]
    idx, targets = (t.to(device) for t in loader.pad_rows(rows, len(rows[0][0])))
    found = {"rows": len(tasks), "length": idx.shape[1]}

    def think(n, grad=False):
        with torch.set_grad_enabled(grad), autocast:
            for _ in net.eval().think(idx, n):
                pass

    (taken,) = seconds(lambda: think(n_sup), device=device, times=1)
    found["steps_per_second"] = n_sup / taken  # of the whole batch
    found["tasks_per_second"] = len(tasks) / taken
    found["memory_mb"] = {n: peak_mb(lambda n=n: think(n), device) for n in (1, n_sup)}
    found["memory_mb_all_kept"] = {n: peak_mb(lambda n=n: think(n, grad=True), device) for n in (1, 2)}

    step = training_step(net, idx, targets, autocast)
    found["training_mb"] = peak_mb(step, device)
    taken, forward, both = seconds(step, *passes_apart(net, idx, autocast), device=device, times=TURNS)
    all_passes, kept = net.passes("puzzle")
    found["training_ms"] = 1000 * taken
    found["pass_ms"], found["pass_both_ms"] = 1000 * forward, 1000 * both
    found["predicted_ms"] = 1000 * ((all_passes - kept) * forward + kept * both)
    own, net.config.n_grad = net.config.n_grad, net.config.n_recursion
    (taken,) = seconds(step, device=device, times=1)
    found["training_ms_all_kept"], found["training_mb_all_kept"] = 1000 * taken, peak_mb(step, device)
    net.config.n_grad = own
    return found


def projection(net, views, card, cards, mfu, set_name="arc1_eval"):
    """Hours that an ARC set takes, every task seen in `views` ways: FLOPs over what the cards would do at a share mfu of their peak."""
    flops, tests, left_out = 0.0, 0, 0
    for task in arc.load(set_name):
        for test_input, _ in task.test:
            canvas = arc.canvas_shape(task.train, test_input)
            length = len(arc.encode_prompt(task.kind, task.train, test_input, canvas=canvas))
            if length > net.config.block_size:
                left_out += 1
                continue
            tests += 1
            steps = net.config.n_sup if net.puzzle_format == "canvas" else 1
            flops += steps * length * net.flops_per_token(length, "puzzle")
    rate = cards * hardware.CARDS[card][0] * 1e12 * mfu
    return {"set": set_name, "tests": tests, "left_out": left_out, "views": views, "pflop": views * flops / 1e15,
            "hours": views * flops / rate / 3600, "on": f"{cards} x {card} at {mfu:.0%} of its peak"}  # fmt: skip


def main(argv):
    parser = argparse.ArgumentParser(prog="bench.py answer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--size", choices=("auto", "full", "small"), default="auto", help="full: 100M; small: 16M; auto: full on a GPU")
    parser.add_argument("--side", type=int, help="of the mazes (default: 20 on a GPU, 5 else)")
    parser.add_argument("--rows", type=int, help="tasks at a time (default: 16 on a GPU, 2 else)")
    parser.add_argument("--n_sup", type=int, default=16)
    parser.add_argument("--views", type=int, default=16, help="ways in which the projection sees every task")
    parser.add_argument("--card", choices=tuple(hardware.CARDS), default="T4")
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--mfu", type=float, default=0.25)
    args = parser.parse_args(argv[1:])
    device = hardware.pick_device("auto")
    args.side, args.rows = args.side or (5 if device == "cpu" else 20), args.rows or (2 if device == "cpu" else 16)
    dtype = hardware.pick_dtype("auto", device)
    autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast(device, dtype=getattr(torch, dtype))
    small = args.size == "small" or (args.size == "auto" and device == "cpu")
    rng = np.random.default_rng(0)
    tasks = [puzzles.maze(rng, args.side, args.side) for _ in range(args.rows)]
    torch.manual_seed(0)
    b = checkpoint.make_model("trm", SMALL if small else {}).to(device)
    found = {"device": hardware.name(device), "dtype": dtype, "params": b.num_params(), "n_sup": args.n_sup,
             "route_b": measure(b, tasks, args.n_sup, device, autocast)}  # fmt: skip
    a = checkpoint.make_model("dense", SMALL if small else {}).to(device).eval()
    with autocast:
        (taken,) = seconds(lambda: a.answer(tasks), device=device, times=1)
    found["route_a"] = {"tasks_per_second": len(tasks) / taken, "memory_mb": peak_mb(lambda: a.answer(tasks), device)}
    with torch.device("meta"):
        full = {name: checkpoint.make_model(model, {"block_size": 10240}) for name, model in (("route_a", "dense"), ("route_b", "trm"))}
    for name, net in full.items():
        found[name]["projection"] = projection(net, args.views, args.card, args.cards, args.mfu)
    if args.json:
        print(json.dumps(found, indent=2))
        return

    def mb(value):
        return "?" if value is None else f"{value:,.0f} MB"

    r, n = found["route_b"], args.n_sup
    off = r["training_ms"] / r["predicted_ms"] - 1
    print(f"{found['params'] / 1e6:.1f}M parameters, {dtype} on {found['device']}, {r['rows']} tasks of {r['length']} "
          f"tokens, n {b.config.n_latent}, T {b.config.n_recursion}")  # fmt: skip
    print(f"Route B answers: {r['steps_per_second']:.2f} supervision steps/s, {r['tasks_per_second']:.2f} tasks/s at {n} steps; memory "
          + ", ".join(f"{mb(v)} for {k}" for k, v in r["memory_mb"].items()) + " steps; with all activations kept "
          + ", ".join(f"{mb(v)} for {k}" for k, v in r["memory_mb_all_kept"].items()))  # fmt: skip
    print(f"Route B trains: {r['training_ms']:,.0f} ms a supervision step, {mb(r['training_mb'])}; its {b.passes('puzzle')[0]} passes, "
          f"{b.passes('puzzle')[1]} with gradient, predict {r['predicted_ms']:,.0f} ms ({off:+.1%}: a pass takes {r['pass_ms']:.1f} ms, "
          f"with its backward {r['pass_both_ms']:.1f}); gradient through all passes: {r['training_ms_all_kept']:,.0f} ms, "
          f"{mb(r['training_mb_all_kept'])}")  # fmt: skip
    print(f"Route A answers: {found['route_a']['tasks_per_second']:.2f} tasks/s, left to right; memory {mb(found['route_a']['memory_mb'])}")
    for name in ("route_a", "route_b"):
        p = found[name]["projection"]
        print(f"{name}, 100M: {p['set']}, {p['tests']} test inputs in {p['views']} views: {p['pflop']:,.1f} PFLOP, {p['hours']:.2f} h on "
              f"{p['on']}")  # fmt: skip
    print("(Route A decodes token by token, bound by memory and not by FLOPs: it takes longer. Route B's rows that halt take less.)")
