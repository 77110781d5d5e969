"""
The evaluation: how many unseen tasks does a checkpoint solve, exactly, and what do its answers look like?

    python eval_arc.py out/demo/route_a/ckpt.pt                        one checkpoint: eval.json and grids.png beside it
    python eval_arc.py A/ckpt.pt B/ckpt.pt --out_dir=out/compare       several, on the same tasks, in one table and one picture
    python eval_arc.py CKPT --suites=sudoku4,arc1 --limit=20           a quick look: the first 20 tasks of two suites

The suites are ARC-AGI-1's evaluation set (arc1, 400 tasks), ARC-AGI-2's public evaluation set (arc2, 120), and the held-out puzzles
of puzzles.py. A task is solved when all its test outputs are right in every cell and in size; two attempts at each output in
arc1 and arc2, as ARC's rules allow, one in puzzles. A task that does not fit into the model's block_size is not solved and is
counted in `too_long` as well. The model is handed tasks with their test outputs taken out.

What is written, all of it into --out_dir:

eval.json: {model name: report}. A report says which checkpoint it is (params, checkpoint, sha256, iter, model, config, data: {stage, tag,
sources}, ...), how it was evaluated (settings, device, seconds, gpu_hours, protocol: 'inductive', 'ttt' or 'transductive') and what came
out, suites: {suite: figures}:

    total, solved, interval         tasks; interval: 95% of solved / total, [low, high]
    outputs_total, outputs_solved, outputs_interval         test outputs, the same way
    attempts                        how many answers to a test input count
    pass_1, pass_2, oracle          tasks solved with one attempt, two, and with any number of the candidates there were
    candidates                      different candidates per test input, mean
    too_long, too_long_ids          tasks with a test input that does not fit into the model's block_size
    by_size                         {'1-25', ...: [solved, total]} test outputs by the number of their cells
    verdicts                        {'right', 'differs', 'breaks a rule', 'unfinished', 'wrong size', 'no answer': count}, first attempts
    cells_right, cells_right_by_copying     share of cells right in the first attempt, and if the input itself were the answer
    against                         {other model: {only_this, only_other, p}}: tasks that one solves and the other does not, exact McNemar
    seconds, available              time taken; tasks that the suite has, of which --limit may have taken the first

answers.jsonl: a line for every model, suite and task tried, {...}:

    model, suite, id, kind          kind: arc, sudoku, maze, logic
    solved, too_long, seconds
    demonstrations                  [[input, output], ...]: grids; a grid is a list of strings, a row each, a digit each cell
    test                            for each test input {
        input, expected             grids (expected: null where nobody knows it). Text in suites of text (logic): there, strings
        attempts                    [grid or null, ...], best first, as many as count; strings in suites of text
        right                       [bool, ...] of each attempt
        solved, oracle, verdict     one of the attempts right; any candidate right; what the first attempt is, as in `verdicts`
        votes, scores               of each attempt: views and samples that gave it; the model's own score (Route A: mean log-probability
                                    of a cell; Route B: halting probability)
        candidates                  how many different ones there were
        programs                    [text or null, ...]: of each attempt, the program that gave it, if one did
        steps                       Route B, on the task as it is: [[grid or null, halting probability], ...] after each supervision step
    }
    key                             what the answer depends on, hashed: a run that was killed goes on after the tasks with its own keys

Suites of text (logic) have no demonstrations. Figures of suites that are not tasks (language, lm_eval:...) are in eval.json alone, as
language.py gives them.

Read next: candidates.py (how a model comes to its attempts), scores.py (what counts as right), sample.py (one task, in the terminal).
"""
import argparse
import difflib
import hashlib
import math
import os
import sys
import time
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

import arc
import checkpoint
import configurator
import puzzles

ARC_SUITES = {"arc1": "arc1_eval", "arc2": "arc2_eval"}
SUITES = (*ARC_SUITES, *puzzles.SUITES)
ROUTES = {"dense": "route_a", "trm": "route_b"}  # what the models are called in reports
BATCH = 32        # tasks handed to a model at a time: bounds memory, and the progress bar moves
SHOWN = 3         # tasks of each suite in the picture
LEGIBLE = 12      # grids with longer sides are only shown where there is nothing smaller to show
ALL_STEPS = 6     # a picture has room for this many supervision steps; of more, it shows 1, 2, 4, 8, ... and the last

# -----------------------------------------------------------------------------
# scores


def load_suite(name):
    """-> list[arc.Task], always the same ones in the same order. ValueError naming the closest suite."""
    if name not in SUITES:
        closest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0)[0]
        raise ValueError(f"unknown suite {name!r}: did you mean {closest!r}? There are {', '.join(SUITES)}")
    return arc.load(ARC_SUITES[name]) if name in ARC_SUITES else puzzles.heldout(name)


def without_answers(tasks):
    """The tasks, with a 1x1 grid of colour 0 in place of every test output: a model cannot read what it was not given."""
    hidden = np.zeros((1, 1), np.uint8)
    return [arc.Task(task.id, task.kind, task.train, [(x, hidden) for x, _ in task.test]) for task in tasks]


def share_right(grid, expected):
    """The share of cells of an answer (a grid or None) that are right; 0 when there is none or its shape is wrong."""
    return float((grid == expected).mean()) if grid is not None and grid.shape == expected.shape else 0.0


def evaluate(tasks, answer, attempts=1, progress=lambda n: None):
    """
    Have `answer` (as the method of that name of both models) solve the tasks, a few at a time; progress is told how many are done.
    -> (figures, answers). answers is {task id: for each test input, grids, best first, or None where the task is too long}. figures:

        total, solved, too_long         tasks; too_long where at least one test input does not fit into the model's block_size
        outputs_total, outputs_solved   test outputs
        attempts                        how many answers to a test input count
        cells_right                     share of cells right in the first attempt, mean over the test inputs that fit; None if none does
        cells_right_by_copying          the same if the test input itself were the answer, for comparison
        seconds                         time taken
    """
    answers, started = {}, time.perf_counter()
    for start in range(0, len(tasks), BATCH):
        part = tasks[start : start + BATCH]
        for task, given in zip(part, answer(without_answers(part))):
            answers[task.id] = [None if candidates is None else [grid for grid, _ in candidates] for candidates in given]
        progress(len(part))
    seconds = time.perf_counter() - started
    scores = arc.score(tasks, answers, attempts)
    shares = [(share_right(first(candidates), y), share_right(x, y))
              for task in tasks for (x, y), candidates in zip(task.test, answers[task.id]) if candidates is not None]
    right, copied = np.mean(shares, axis=0).round(6).tolist() if shares else (None, None)
    return {
        "total": scores["tasks_total"], "solved": scores["tasks_solved"],
        "too_long": sum(any(candidates is None for candidates in given) for given in answers.values()),
        "outputs_total": scores["outputs_total"], "outputs_solved": scores["outputs_solved"], "attempts": attempts,
        "cells_right": right, "cells_right_by_copying": copied, "seconds": round(seconds, 3),
    }, answers  # fmt: skip


def first(candidates):
    """The best of a list of candidates; None when there are none."""
    return candidates[0] if candidates else None


# -----------------------------------------------------------------------------
# the report


def name_models(paths, routes):
    """A name for each checkpoint: its route where that tells them apart, else the folder it lies in, else its path."""
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    names = list(routes)
    for better in (folders, paths):
        count = Counter(names)
        names = [b if count[name] > 1 else name for name, b in zip(names, better)]
    return names


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def number(train, name):
    """A figure that training left in the checkpoint; None where it left none, or left no finite number (JSON has no NaN)."""
    value = train.get(name)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def report_on(path, model, ckpt, n_sup, device):
    """What a report says about a checkpoint besides its suites: which it is, how it was trained, how it is evaluated."""
    train = ckpt.get("train") or {}
    return {
        "params": model.num_params(), "train_seconds": number(train, "seconds"), "tokens_per_second": number(train, "tokens_per_second"),
        "val_loss": number(train, "val_loss"), "val_losses": {k: number(train["val_losses"], k) for k in train.get("val_losses") or {}},
        "checkpoint": path, "sha256": sha256_of(path), "iter": train.get("iter"), "model": ckpt["model"],
        "model_config": dict(ckpt["model_config"]), "config": ckpt.get("config"), "device": device,
        "n_sup": (n_sup or model.config.n_sup) if ckpt["model"] == "trm" else None,
    }  # fmt: skip


def table(report):
    """The report as lines of text: a row for each model, columns for how it was trained and for every suite."""
    def shown(value, form):
        return "-" if value is None else format(value, form)

    def result(suite, s):
        if suite in ARC_SUITES:
            return f"{s['total'] - s['too_long']} / {s['solved']} / {s['too_long']}"
        return f"{s['solved']}/{s['total']}" + (f" ({s['too_long']} too long)" if s["too_long"] else "")

    suites = list(next(iter(report.values()))["suites"])
    rows = [["", "", "training", "", "validation", *("tried / solved" if s in ARC_SUITES else "" for s in suites)],
            ["", "parameters", "seconds", "tokens/s", "loss (text)", *(f"{s} / too long" if s in ARC_SUITES else s for s in suites)]]
    for name, r in report.items():
        rows.append([name, f"{r['params']:,}", shown(r["train_seconds"], ",.0f"), shown(r["tokens_per_second"], ",.0f"),
                     shown(r["val_loss"], ".3f"), *(result(s, r["suites"][s]) for s in suites)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(2, ["-" * w for w in widths])
    lines = ["  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:]))]).rstrip() for row in rows]
    lines.append("")
    lines.append("Puzzles: solved exactly, of all. arc1, arc2: tasks that fit into block_size, solved in two attempts, and tasks too long.")
    for suite in suites:
        s = next(iter(report.values()))["suites"][suite]
        if s["total"] < s["available"]:
            lines.append(f"Limited: {suite} is the first {s['total']} of its {s['available']} tasks.")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# the picture


def choose(tasks, answers, n=SHOWN):
    """
    n tasks worth looking at. answers: for each model, what `evaluate` returned. Legible ones before large ones, ones that fit into every
    model before others, and first of all ones that show each model both right and wrong, where it is (about the first test input).
    """
    def size(task):
        largest = max(max(g.shape) for pair in task.train[:1] + task.test[:1] for g in pair)
        return largest if largest > LEGIBLE else 0

    outcomes = {task.id: {(m, np.array_equal(first(given[task.id][0]), task.test[0][1]))
                          for m, given in enumerate(answers) if given[task.id][0] is not None} for task in tasks}
    left = sorted((t for t in tasks if outcomes[t.id]), key=lambda t: (-len(outcomes[t.id]), size(t)))
    chosen, seen = [], set()
    while left and len(chosen) < n:
        best = max(left, key=lambda t: len(outcomes[t.id] - seen))  # the first of the best
        left.remove(best)
        chosen.append(best)
        seen |= outcomes[best.id]
    return chosen


def steps_shown(n):
    """Which of supervision steps 1..n are shown: all, or 1, 2, 4, 8, ... and the last."""
    return list(range(1, n + 1)) if n <= ALL_STEPS else [2**i for i in range(n.bit_length()) if 2**i < n] + [n]


def picture_row(suite, task, models, answers, n_sup):
    """
    A row for arc.picture: a demonstration, the first test input, what is expected, and what each model makes of it.
    models: {name: model}; answers: for each model, what `evaluate` returned.
    """
    test_input, expected = task.test[0]
    panels = [panel for x, y in task.train[:1] for panel in (("demonstration", x, None), ("its output", y, None))]
    panels += [("test input" if task.train else "puzzle", test_input, None), ("expected", expected, None)]
    for (name, model), given in zip(models.items(), answers):
        if given[task.id][0] is None:
            panels.append((f"{name}: too long", None, expected))
        elif model.puzzle_format == "canvas":
            only = without_answers([arc.Task(task.id, task.kind, task.train, task.test[:1])])
            trace = model.answer(only, n_sup=n_sup, trace=True)[0][0]
            for step in steps_shown(len(trace)):
                grid, halt = trace[step - 1]
                panels.append((f"{name} step {step}, halt {halt:.2f}", grid, expected))
        else:
            panels.append((name, first(given[task.id][0]), expected))
    more = f"   (test 1 of {len(task.test)})" if len(task.test) > 1 else ""
    return (task.id if task.id.startswith(suite) else f"{suite}   {task.id}") + more, panels


# -----------------------------------------------------------------------------
# the command


def positive(text):
    """For argparse: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)


def pick_device(name):
    """'auto' is the GPU where there is one. ValueError for a device that cannot be used here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} cannot be used on this machine: leave --device out, or try --device=cpu") from None
    return name


def run(args):
    suites = list(dict.fromkeys(filter(None, args.suites.split(","))))
    if not suites:
        raise ValueError(f"--suites names no suite: there are {', '.join(SUITES)}")
    if os.path.basename(args.json) != args.json or not args.json.endswith(".json"):
        raise ValueError(f"--json={args.json} must be the name of a .json file without a folder: the folder is --out_dir")
    if len(set(map(os.path.realpath, args.checkpoints))) < len(args.checkpoints):
        raise ValueError("the same checkpoint is given twice")
    if len(args.checkpoints) > 1 and args.out_dir is None:
        raise ValueError("with several checkpoints, say with --out_dir=FOLDER where the results go")
    tasks = {suite: load_suite(suite) for suite in suites}
    device = pick_device(args.device)
    out_dir = args.out_dir or os.path.dirname(args.checkpoints[0]) or "."

    # Everything that can be wrong is found out here, before anything takes long
    loaded = [checkpoint.load_model(path, device) for path in args.checkpoints]
    if args.n_sup and all(ckpt["model"] != "trm" for _, ckpt in loaded):
        raise ValueError("--n_sup is about Route B's supervision steps, and no checkpoint of Route B is given")
    names = name_models(args.checkpoints, [ROUTES[ckpt["model"]] for _, ckpt in loaded])
    models = {name: model for name, (model, _) in zip(names, loaded)}
    report = {name: report_on(path, model, ckpt, args.n_sup, device) for name, path, (model, ckpt) in zip(names, args.checkpoints, loaded)}
    del loaded
    os.makedirs(out_dir, exist_ok=True)

    answers = {}
    for name, model in models.items():
        report[name]["suites"] = {}
        options = {"n_sup": args.n_sup} if model.puzzle_format == "canvas" else {}
        for suite in suites:
            part = tasks[suite][: args.limit]
            with tqdm(total=len(part), desc=f"{name} {suite}", unit="task", dynamic_ncols=True, leave=False) as bar:
                figures, answers[name, suite] = evaluate(
                    part, lambda t: model.answer(t, **options), 2 if suite in ARC_SUITES else 1, bar.update)  # noqa: B023 (used at once)
            report[name]["suites"][suite] = {**figures, "available": len(tasks[suite])}
            cells, copied = figures["cells_right"], figures["cells_right_by_copying"]
            print(f"{name} {suite}: {figures['solved']} of {figures['total']} solved, {figures['too_long']} too long"
                  + ("" if cells is None else f"; {cells:.1%} of cells right (copying the input: {copied:.1%})")
                  + f"; {figures['seconds']:.1f} s", flush=True)

    rows = []
    for suite in suites:
        given = [answers[name, suite] for name in models]
        rows += [picture_row(suite, task, models, given, args.n_sup) for task in choose(tasks[suite][: args.limit], given)]
    json_path, png_path = os.path.join(out_dir, args.json), os.path.join(out_dir, "grids.png")
    configurator.save(report, json_path)
    print("\n" + table(report))
    print(f"\nfigures  {json_path}")
    if rows:
        halt = "; halt: how likely Route B thinks it is that all is right" if any(r["model"] == "trm" for r in report.values()) else ""
        arc.picture(rows, png_path, f"{', '.join(models)}   (crosses: wrong cells{halt})")
        print(f"picture  {png_path}")
    else:
        print("picture  none: every task was too long")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}; see python eval_arc.py --help")
    parser.add_argument("checkpoints", metavar="CKPT", nargs="+", help="a ckpt.pt that train.py wrote")
    parser.add_argument("--suites", default=",".join(SUITES), help=f"separated by commas (default {','.join(SUITES)})")
    parser.add_argument("--limit", metavar="N", type=positive, help="only the first N tasks of each suite (default all)")
    parser.add_argument("--out_dir", metavar="FOLDER", help="where the results go (default: beside the checkpoint)")
    parser.add_argument("--json", metavar="NAME", default="eval.json", help="file name of the figures (default eval.json)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    parser.add_argument("--n_sup", metavar="N", type=positive, help="supervision steps of Route B (default: as it was trained)")
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
