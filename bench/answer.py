"""
What answering costs.

    python -m bench.answer                              tasks per second of both routes, hours for ARC-AGI-1
    python -m bench.answer CKPT --suite=sudoku4 --limit=50      what fewer steps and halting cost a Route B

The tasks are mazes of one size. The hours are FLOPs over a share of the cards' peak: of all reading, not of
Route A's writing. Before this: smol/solve.py.
"""

import contextlib
import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch

import configurator
import eval_arc
from smol import arc, checkpoint, puzzles, runtime, solve, suites
from smol.files import write_whole

suite = "sudoku4"  # of eval_arc.py, for the second table
limit = 50  # its first tasks
views = 16  # of each task, in the hours and in the second table
n_sup = 16  # supervision steps, at most
model_settings = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_ff": 688}  # {}: the 100M models
side = 5  # of the mazes
rows = 2  # tasks at a time
card = "T4"
cards = 2
mfu = 0.25  # share of their peak that is reached, assumed
device = "auto"
out = "out/bench_answer.json"

RANGES = {
    "[1, inf)": "limit views n_sup side rows cards",
    "(0, 1]": "mfu",
    tuple(runtime.CARDS): "card",
}
HALTS = (None, 0.99, 0.9, 0.5)  # halting probabilities above which a puzzle stops


def seconds(run, where, times=3):
    """The least that `run` takes, of several times after one to warm up."""
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        run()
        if where.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def speed(name, c, where):
    """
    Figures of an untrained model on mazes, and the hours of a 100M model for ARC-AGI-1's evaluation tasks.
    """
    torch.manual_seed(0)
    net = checkpoint.make_model(name, c.model_settings).to(where).eval()
    tasks = [puzzles.maze(np.random.default_rng(0), c.side, c.side) for _ in range(c.rows)]
    dtype = runtime.pick_dtype("auto", where)
    autocast = contextlib.nullcontext()
    if dtype != "float32":
        autocast = torch.autocast("cuda", dtype=getattr(torch, dtype))
    how = {"n_sup": c.n_sup} if name == "trm" else {}
    with autocast:
        taken = seconds(lambda: net.answer(tasks, **how), where)
    with torch.device("meta"):
        full = checkpoint.make_model(name, {"block_size": 10240})
    return {
        "model": name,
        "params": net.num_params(),
        "dtype": dtype,
        "tasks_per_second": len(tasks) / taken,
        "ms_per_step": 1000 * taken / c.n_sup if name == "trm" else None,
        "memory_gb": runtime.peak_memory(where) / 1e9,
        "hours": hours(full, c.views, c.n_sup, c.card, c.cards, c.mfu),
    }


def hours(net, n_views, steps, card_name, n_cards, share, set_name="arc1_eval"):
    """Of n_cards for all views of a set; test inputs that are too long for the model are left out."""
    flops = 0.0
    for task in arc.load(set_name):
        for x, _ in task.test:
            length, room = arc.prompt_and_room(task.kind, task.train, x, net.puzzle_format)
            if length + room <= net.config.block_size:
                flops += length * net.flops_per_token(length, "puzzle")
    flops *= n_views * (steps if net.puzzle_format == "canvas" else 1)
    return flops / (runtime.CARDS[card_name][0] * 1e12 * share) / n_cards / 3600


def fewer_steps(net, tasks, n_views, most):
    """What eval_arc.py gives for 1, 2, 4, ... supervision steps at most, with and without halting."""
    found = []
    for steps in sorted({min(2**i, most) for i in range(most.bit_length() + 1)}):
        for halt in HALTS:
            settings = solve.Settings(augment=n_views, n_sup=steps, halt=halt)
            taken = []

            def answer(part, settings=settings, taken=taken):
                given = solve.solve(net, part, settings)
                taken += [len(g.steps) for task in given for g in task if g]
                return given

            records = eval_arc.evaluate(tasks, answer, 2, n_views)
            figures = eval_arc.figures(records, 2)
            row = {"n_sup": steps, "halt": halt, "steps": float(np.mean(taken)), "total": figures["total"]}
            found.append({**row, "solved": figures["pass_1"], "in_two_attempts": figures["pass_2"]})
    return found


def print_table(rows_of_table):
    columns = list(rows_of_table[0])
    print(" | ".join(columns))
    for row in rows_of_table:
        print(" | ".join(f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in columns))


def main(argv):
    config, paths = configurator.read(globals(), argv, usage="[CKPT]")
    c = SimpleNamespace(**config)
    try:
        where = runtime.pick_device(c.device)
        if paths:
            net, _ = checkpoint.load_model(paths[0], where)
            tasks = suites.load(c.suite)[: c.limit]
            if net.puzzle_format != "canvas" or isinstance(tasks[0].test[0][0], str):
                raise ValueError("supervision steps are Route B's, on suites of grids")
            found = fewer_steps(net, tasks, c.views, c.n_sup)
        else:
            found = [speed(name, c, where) for name in ("dense", "trm")]
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    print_table(found)
    write_whole(json.dumps(found, indent=2).encode(), c.out)


if __name__ == "__main__":
    main(sys.argv[1:])
