"""
Evaluating each new checkpoint of a folder while it is being written, beside the training and not in its way.

    python eval_arc.py out/route_b_stage3 --watch --suites=sudoku4,arc1 --limit=50

Looks at every .pt file of the folder, again and again. A new one, or one that was replaced, is evaluated as eval_arc.py does, into
FOLDER/evals/ITER-HASH/; its figures become a line of FOLDER/evals.jsonl, where train.py's own eval_suites go as well. Drawn anew are
FOLDER/evals.png, what share of each suite is solved by training step with 95% intervals, and FOLDER/report.html, the last checkpoints side
by side.

Read next: eval_arc.py, train.py.
"""

import argparse
import glob
import json
import os
import time

import checkpoint
import configurator
import logbook
import report
import scores
import stages
from files import save_picture

SECONDS = 10  # between two looks


def watch(args, run):
    """args as eval_arc.py parses them, with one folder in place of checkpoints; run: eval_arc.run. Ends with Ctrl-C alone."""
    if len(args.checkpoints) != 1 or not os.path.isdir(args.checkpoints[0]):
        raise ValueError("--watch wants one folder that train.py writes checkpoints into")
    folder, seen, waiting = args.checkpoints[0], {}, False
    out_dir = args.out_dir or folder
    os.makedirs(out_dir, exist_ok=True)
    evals = os.path.join(out_dir, "evals.jsonl")
    while True:
        new = [path for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.pt"))) if seen.get(path) != stamp(path)]
        new = [path for path in new if not os.path.basename(path).startswith("ckpt_eval")]  # a second name, which is soon gone
        for path in new:
            seen[path] = stamp(path)
            waiting = False
            evaluate(path, args, run, out_dir, evals)
        if not waiting:
            print(f"waiting for the next checkpoint in {folder} (Ctrl-C ends this)", flush=True)
            waiting = True
        time.sleep(SECONDS)


def stamp(path):
    """Changes when the file is replaced; None where it has gone."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size


def evaluate(path, args, run, out_dir, evals):
    """One checkpoint, under a second name: training may replace the first while it is read. One that is in evals.jsonl is left out."""
    link = os.path.join(out_dir, f"ckpt_eval_watch.{os.getpid()}.pt")
    try:
        os.link(path, link)
    except FileNotFoundError:
        return
    except OSError:  # another disk
        link = path
    try:
        digest = stages.sha256_file(link)
        if any(entry.get("sha256") == digest for entry in logbook.read(evals)):
            return
        step = (checkpoint.load(link)["train"] or {}).get("iter")
        into = os.path.join(out_dir, "evals", f"{step}-{digest[:8]}")
        print(f"\n{path}, step {step}", flush=True)
        run(argparse.Namespace(**{**vars(args), "checkpoints": [link], "out_dir": into, "json": "eval.json"}))
        with open(os.path.join(into, "eval.json"), encoding="utf-8") as f:
            found = json.load(f)
        (figures,) = found.values()
        figures["checkpoint"] = path
        configurator.save(found, f.name)
        report.write(into)
        problem = logbook.append({"iter": step, **figures}, evals)
        if problem:
            print(problem)
        draw(evals, os.path.join(out_dir, "evals.png"))
        print(report.write(out_dir))
    except ValueError as e:  # one bad file is no reason not to look at the next
        print(f"{path} is left out: {e}", flush=True)
    finally:
        if link != path:
            os.remove(link)


def draw(evals, path):
    """The share of each suite that is solved, by training step, from evals.jsonl. Written whole or not at all."""
    from matplotlib.figure import Figure

    entries = sorted((e for e in logbook.read(evals) if e.get("iter") is not None), key=lambda e: e["iter"])
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(suite for e in entries for suite, s in e["suites"].items() if s.get("total"))
    for suite in names:
        points = [(e["iter"], e["suites"][suite]) for e in entries if e["suites"].get(suite, {}).get("total")]
        steps = [step for step, _ in points]
        low, high = zip(*(s.get("interval") or scores.interval(s["solved"], s["total"]) for _, s in points))
        (line,) = axes.plot(steps, [s["solved"] / s["total"] for _, s in points], marker="o", ms=4, label=suite)
        axes.fill_between(steps, low, high, alpha=0.12, color=line.get_color(), lw=0)
    axes.set(xlabel="step", ylabel="share of tasks solved", ylim=(0, 1), title="evaluations, with 95% intervals")
    axes.grid(alpha=0.3)
    if names:
        axes.legend(fontsize=8)
    save_picture(figure, path)
