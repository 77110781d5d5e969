"""
What thinking costs on this machine: `python -m bench.answer`.

    python -m bench.answer                  Route B: supervision steps and tasks per second, memory by supervision steps; Route A beside it
    python -m bench.answer --json           the same as JSON
    python -m bench.answer --checkpoint=out/demo/route_b/ckpt.pt --suite=sudoku4 --limit=50     what halting and fewer steps cost it

Three questions. How fast are tasks answered, and does memory stay the same however long Route B thinks? What do passes without gradient
save, against the same recursion with all activations kept? Does a training step cost what its passes through the core say? Then a
projection of the hours that ARC-AGI-1's evaluation set takes on other cards: from FLOPs, and where Route A writes, from operations and
bytes. With --checkpoint, another question: how few supervision steps are enough?

The tasks are mazes, all of one size. On a CPU with one thread, seconds are the processor's own. Before this: model_trm.py. Read next:
bench/recursion.py, which asks what all this is worth.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import eval_arc
from bench.kda import peak_mb
from bench.models import clock
from bench.train import SMALL
from configurator import positive
from model_dense import cache_bytes, run_blocks, tokens_at_once
from smol import arc, checkpoint, engine, loader, puzzles, runtime, solve, suites

# Memory of the cards of runtime.py, GB/s, from NVIDIA's data sheets
GB_PER_S = {
    "T4": 320,
    "V100": 900,
    "P100": 732,
    "RTX 3060": 360,
    "RTX 3090": 936,
    "RTX 4090": 1008,
    "A10": 600,
    "L4": 300,
    "L40S": 864,
    "A100": 1555,
    "H100 PCIe": 2000,
    "H100": 3350,
    "H200": 4800,
}
BANDWIDTH_SHARE = 0.7  # of it that is reached: assumed
LAUNCH_US = 10  # microseconds that PyTorch takes to start an operation on a GPU: assumed
NARROW = {"n_head": 2, "n_embd": 16, "n_ff": 16, "vocab_size": 50304}
FREE = (
    "view",
    "unsqueeze",
    "transpose",
    "slice",
    "select",
    "split",
    "detach",
    "expand",
)  # start nothing on the card
HALTS = (None, 0.99, 0.95, 0.9, 0.7, 0.5)  # thresholds that are tried

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
    x, layout = net.embed_canvas(idx, net.puzzle_words())
    x = x.detach()

    def forward():
        with torch.no_grad(), autocast:
            return run_blocks(net.blocks, x, layout)

    def both():
        start = x.clone().requires_grad_()
        with autocast:
            y = run_blocks(net.blocks, start, layout)
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
            for _ in net.eval().answer_steps(idx, n):
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


# -----------------------------------------------------------------------------
# what a whole evaluation takes, elsewhere


def questions(net, set_name="arc1_eval"):
    """
    -> (a list of (task, tokens of the prompt, of the answer, room for an answer after the prompt), of every test input of an ARC set that
    fits into net; how many do not). Route B's prompt has the canvas in it, and needs no other room.
    """
    found, left_out = [], 0
    for task in arc.load(set_name):
        for x, y in task.test:
            length, room = arc.prompt_and_room(task.kind, task.train, x, net.puzzle_format)
            if length + room > net.config.block_size:
                left_out += 1
            else:
                found.append((task, length, y.shape[0] * (y.shape[1] + 1) + 1, room))
    return found, left_out


def projection(net, views, card, cards, mfu, steps=None, set_name="arc1_eval"):
    """
    Hours that an ARC set takes, every task seen in `views` ways: FLOPs over what the cards would do at a share mfu of their peak. Route B
    thinks `steps` supervision steps on average (None: n_sup); Route A reads, and then writes, which `decoding` estimates.
    """
    asked, left_out = questions(net, set_name)
    if net.puzzle_format == "canvas":
        flops = (steps or net.config.n_sup) * sum(
            n * net.flops_per_token(n, "puzzle") for _, n, _, _ in asked
        )
        written = 0.0
    else:
        read = 1 + (
            solve.RESCORED * min(views, solve.RESCORING_VIEWS) / views if views > 1 else 0
        )  # and read again, at most
        flops = read * sum(n * net.flops_per_token(n, "puzzle") for _, n, _, _ in asked)
        written = decoding(net, asked, views, card)
    seconds = (views * flops / (runtime.CARDS[card][0] * 1e12 * mfu) + written) / cards
    return {
        "set": set_name,
        "tests": len(asked),
        "left_out": left_out,
        "views": views,
        "pflop": views * flops / 1e15,
        "hours": seconds / 3600,
        "hours_writing": written / cards / 3600,
        "on": f"{cards} x {card} at {mfu:.0%} of its peak",
    }


def decoding(net, asked, views, card):
    """
    Seconds in which one card writes answers of the true size, in the batches that eval_arc.py makes. A step of a batch takes as long as
    starting its operations one by one does, or as fetching weights and caches from memory, whichever is longer.
    """
    started = operations(net) * LAUNCH_US / 1e6
    fetched = BANDWIDTH_SHARE * GB_PER_S[card] * 1e9
    tokens = tokens_at_once(
        net.config, runtime.CARDS[card][1] * 1e9 - 4 * net.num_params()
    )  # of a card that does nothing else
    by_task, total = {}, 0.0
    for task, *rest in asked:
        by_task.setdefault(task.id, (task, []))[1].append(rest)
    for part in eval_arc.chunks([task for task, _ in by_task.values()], views):
        rows = [row for task in part for row in by_task[task.id][1] for _ in range(views)]
        for batch in engine.batches_by_length(rows, lambda row: row[0] + row[2], tokens):
            held = 2 * net.num_params() + len(batch) * cache_bytes(net.config, batch[-1][0] + batch[-1][2], 2)
            total += max(written for _, written, _ in batch) * max(started, held / fetched)
    return total


def operations(net):
    """How many operations PyTorch starts for a step of decoding: counted on a narrow model with as many layers."""

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.n += not any(word in str(func) for word in FREE)
            return func(*args, **(kwargs or {}))

    narrow = checkpoint.make_model(
        "dense", {"n_layer": net.config.n_layer, "layer_pattern": net.config.layer_pattern, **NARROW}
    ).eval()
    with torch.no_grad():
        _, cache = engine.prefill(narrow, torch.full((2, 8), 5), 1)
        with Count():
            engine.decode_step(narrow, torch.tensor([5, 5]), cache)
    return Count.n


# -----------------------------------------------------------------------------
# what may be left out of it: fewer supervision steps


class Recorded:
    """Stands in for Route B in solve.solve: what it said at every step, cut off where fewer steps or halting would have ended it."""

    puzzle_format = "canvas"

    def __init__(self, said):
        self.said, self.steps = said, []  # {a task as it was seen: its steps}; how many were left each time

    def answer(self, tasks, n_sup, trace, halt):
        out = []
        for task in tasks:
            out.append(
                [None if steps is None else stopped(steps[:n_sup], halt) for steps in self.said[seen(task)]]
            )
            self.steps += [len(steps) for steps in out[-1] if steps is not None]
        return out


def seen(task):
    """A task's id and all of its grids that a model is shown, as one text."""
    return repr(
        [
            task.id,
            *(eval_arc.rows_of(grid) for pair in task.train for grid in pair),
            *(eval_arc.rows_of(x) for x, _ in task.test),
        ]
    )


def stopped(steps, halt):
    """steps: list of (grid, halting probability) -> those up to the first that is surer than `halt`; all of them for None."""
    end = next((n for n, (_, p) in enumerate(steps, 1) if halt is not None and p > halt), len(steps))
    return steps[:end]


def halting(net, tasks, views, n_sup):
    """
    Route B on tasks in `views` ways, thinking n_sup steps once -> for 1, 2, 4, ... views, as many limits on the steps and every threshold
    of HALTS a dict {views, n_sup, halt, steps: on average, solved: after voting, pass_2, total}: what eval_arc.py would give, without
    asking again. Thresholds that no answer passes are left out.
    """
    settings = solve.Settings(augment=views)
    said = {}
    for part in tqdm(
        eval_arc.chunks(tasks, views), desc="thinking", unit="batch", dynamic_ncols=True, leave=False
    ):
        hidden = solve.without_answers(part)
        asked = [
            solve.look(view, task) for task in hidden for view in solve.views(task, views, settings.seed)
        ]
        said.update(zip(map(seen, asked), net.answer(asked, n_sup=n_sup, trace=True)))
    found = []
    for n_views, limit, halt in itertools.product(doubled(views), doubled(n_sup), HALTS):
        recorded, some = (
            Recorded(said),
            dataclasses.replace(settings, augment=n_views, n_sup=limit, halt=halt),
        )
        given = solve.solve(recorded, solve.without_answers(tasks), some)
        figures = eval_arc.figures([eval_arc.judge(task, g, 2) for task, g in zip(tasks, given)], 2)
        steps = float(np.mean(recorded.steps)) if recorded.steps else 0.0
        if halt is None or steps < limit:
            found.append(
                {
                    "views": n_views,
                    "n_sup": limit,
                    "halt": halt,
                    "steps": steps,
                    "solved": figures["pass_1"],
                    "pass_2": figures["pass_2"],
                    "total": figures["total"],
                }
            )
    return found


def doubled(most):
    """1, 2, 4, ..., most."""
    return [n for n in (2**i for i in range(most.bit_length())) if n < most] + [most]


def print_halting(rows, full, args):
    """The figures of `halting`, cheap ones first, and what they would make of ARC-AGI-1. Marked: no cheaper one solves as many."""
    print(
        f"{args.checkpoint} on {rows[0]['total']} tasks of {args.suite}. Minutes: what the 100M model would take for arc1 with as many\n"
        f"steps on average, on {args.cards} x {args.card} at {args.mfu:.0%} of its peak. *: none that costs less solves as many.\n"
    )
    print(
        f"{'views':>7s} {'steps at most':>14s} {'halting above':>14s} {'steps on average':>17s} {'solved':>7s} {'in two attempts':>16s} "
        f"{'minutes':>8s}"
    )
    minutes, best = 60 * projection(full, 1, args.card, args.cards, args.mfu, 1)["hours"], -1
    for r in sorted(rows, key=lambda r: (r["views"] * r["steps"], -r["solved"])):
        halt = "never" if r["halt"] is None else f"{r['halt']:g}"
        print(
            f"{'* ' if r['solved'] > best else '  '}{r['views']:5d} {r['n_sup']:14d} {halt:>14s} {r['steps']:17.2f} {r['solved']:7d} "
            f"{r['pass_2']:16d} {minutes * r['views'] * r['steps']:8.0f}"
        )
        best = max(best, r["solved"])


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m bench.answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: sys.exit(f"error: {message}; see python -m bench.answer --help")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.add_argument(
        "--size",
        choices=("auto", "full", "small"),
        default="auto",
        help="full: 100M; small: 16M; auto: full on a GPU",
    )
    parser.add_argument(
        "--side", metavar="N", type=positive, help="of the mazes (default: 20 on a GPU, 5 else)"
    )
    parser.add_argument(
        "--rows", metavar="N", type=positive, help="tasks at a time (default: 16 on a GPU, 2 else)"
    )
    parser.add_argument(
        "--n_sup", metavar="N", type=positive, default=16, help="supervision steps, at most (default 16)"
    )
    parser.add_argument(
        "--views",
        metavar="N",
        type=positive,
        default=16,
        help="ways in which every task is seen, at most (default 16)",
    )
    parser.add_argument(
        "--card",
        metavar="NAME",
        choices=tuple(runtime.CARDS),
        default="T4",
        help=f"of the projection (default T4): {', '.join(runtime.CARDS)}",
    )
    parser.add_argument("--cards", metavar="N", type=positive, default=2, help="how many of them (default 2)")
    parser.add_argument(
        "--mfu",
        metavar="SHARE",
        type=float,
        default=0.25,
        help="of their peak that is reached, assumed (default 0.25)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="CKPT",
        help="of Route B: what fewer steps and halting cost it, and nothing else",
    )
    parser.add_argument(
        "--suite",
        default="sudoku4",
        help="with --checkpoint: of eval_arc.py, which is asked (default sudoku4)",
    )
    parser.add_argument(
        "--limit", metavar="N", type=positive, help="with --checkpoint: the first N tasks of it (default all)"
    )
    args = parser.parse_args(argv)
    with torch.device("meta"):
        full = {
            name: checkpoint.make_model(model, {"block_size": 10240})
            for name, model in (("route_a", "dense"), ("route_b", "trm"))
        }
    elsewhere = (args.views, args.card, args.cards, args.mfu)
    device = runtime.pick_device("auto")
    if args.checkpoint:
        try:
            net, _ = checkpoint.load_model(args.checkpoint, device)
            if net.puzzle_format != "canvas":
                raise ValueError(
                    f"--checkpoint={args.checkpoint} is of Route A, which takes no supervision steps"
                )
            tasks = suites.load(args.suite)[: args.limit]
            if not isinstance(tasks[0].test[0][0], np.ndarray):
                raise ValueError(
                    f"--suite={args.suite} is in words, which take no supervision steps one could leave out"
                )
            rows = halting(net, tasks, args.views, args.n_sup)
        except (ValueError, OSError) as e:
            sys.exit(f"error: {e}")
        print(json.dumps(rows, indent=2)) if args.json else print_halting(rows, full["route_b"], args)
        return
    args.side, args.rows = (
        args.side or (5 if device == "cpu" else 20),
        args.rows or (2 if device == "cpu" else 16),
    )
    dtype = runtime.pick_dtype("auto", device)
    autocast = (
        contextlib.nullcontext()
        if dtype == "float32"
        else torch.autocast(device, dtype=getattr(torch, dtype))
    )
    small = args.size == "small" or (args.size == "auto" and device == "cpu")
    rng = np.random.default_rng(0)
    tasks = [puzzles.maze(rng, args.side, args.side) for _ in range(args.rows)]
    torch.manual_seed(0)
    b = checkpoint.make_model("trm", SMALL if small else {}).to(device)
    found = {
        "device": runtime.device_name(device),
        "dtype": dtype,
        "params": b.num_params(),
        "n_sup": args.n_sup,
        "route_b": measure(b, tasks, args.n_sup, device, autocast),
    }
    a = checkpoint.make_model("dense", SMALL if small else {}).to(device).eval()
    with autocast:
        (taken,) = seconds(lambda: a.answer(tasks), device=device, times=1)
    found["route_a"] = {
        "tasks_per_second": len(tasks) / taken,
        "memory_mb": peak_mb(lambda: a.answer(tasks), device),
    }
    found["route_a"]["projection"] = projection(full["route_a"], *elsewhere)
    found["route_b"]["projection"] = {
        steps: projection(full["route_b"], *elsewhere, steps) for steps in (16, 4, 2, 1)
    }
    if args.json:
        print(json.dumps(found, indent=2))
        return

    def mb(value):
        return "?" if value is None else f"{value:,.0f} MB"

    r, n = found["route_b"], args.n_sup
    off = r["training_ms"] / r["predicted_ms"] - 1
    print(
        f"{found['params'] / 1e6:.1f}M parameters, {dtype} on {found['device']}, {r['rows']} tasks of {r['length']} "
        f"tokens, n {b.config.n_latent}, T {b.config.n_recursion}"
    )
    print(
        f"Route B answers: {r['steps_per_second']:.2f} supervision steps/s, {r['tasks_per_second']:.2f} tasks/s at {n} steps; memory "
        + ", ".join(f"{mb(v)} for {k}" for k, v in r["memory_mb"].items())
        + " steps; with all activations kept "
        + ", ".join(f"{mb(v)} for {k}" for k, v in r["memory_mb_all_kept"].items())
    )
    print(
        f"Route B trains: {r['training_ms']:,.0f} ms a supervision step, {mb(r['training_mb'])}; its {b.passes('puzzle')[0]} passes, "
        f"{b.passes('puzzle')[1]} with gradient, predict {r['predicted_ms']:,.0f} ms ({off:+.1%}: a pass takes {r['pass_ms']:.1f} ms, "
        f"with its backward {r['pass_both_ms']:.1f}); gradient through all passes: {r['training_ms_all_kept']:,.0f} ms, "
        f"{mb(r['training_mb_all_kept'])}"
    )
    print(
        f"Route A answers: {found['route_a']['tasks_per_second']:.2f} tasks/s, left to right; memory {mb(found['route_a']['memory_mb'])}"
    )
    p = found["route_a"]["projection"]
    print(f"\n{p['set']}, {p['tests']} test inputs in {p['views']} views, the 100M models on {p['on']}:")
    print(
        f"Route A: {p['pflop']:,.1f} PFLOP of reading; writing takes {p['hours_writing']:.2f} h; together {p['hours']:.2f} h"
    )
    for steps, p in found["route_b"]["projection"].items():
        print(
            f"Route B, {steps:2d} supervision steps on average: {p['pflop']:,.1f} PFLOP, {p['hours']:.2f} h"
        )
    print(
        f"(Writing: {LAUNCH_US} us to start each of {operations(full['route_a'])} operations of a step, or memory at "
        f"{BANDWIDTH_SHARE:.0%} of its rate, both assumed. How many steps --n_sup and --halt leave, and what that costs: --checkpoint.)"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
