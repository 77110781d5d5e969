"""
Does distillation on a student's own answers pay? The same student and CPU seconds, several ways to go on, held-out puzzles solved.

    python bench_distill.py out/student{seed}/ckpt.pt TEACHER.pt --seconds=60 --seeds=1,2,3 --out_dir=out/bench_distill

The ways are rows of ARMS, settings of distill.py: everything else is the same for all of them, the prompts too. A run is stopped when its
process has used that many CPU seconds, teacher, sampling and learning together (log.jsonl counts them), so other work on the machine does
not matter. Prints a table, and writes it with all curves to results.json and curves.png in out_dir. Runs that are there already are kept.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import torch
from tqdm import tqdm

import candidates
import checkpoint
import eval_arc
import logbook
import suites

HERE = os.path.dirname(os.path.abspath(__file__))
ARMS = {
    "on-policy, reverse KL": ["--objective=reverse_kl", "--on_policy=1"],
    "on-policy, JSD": ["--objective=jsd", "--beta=0.5", "--on_policy=1"],
    "supervised": ["--objective=answers", "--on_policy=0", "--off_policy=dataset"],
    "off-policy, teacher's answers": ["--objective=answers", "--on_policy=0", "--off_policy=teacher"],
    "on-policy, forward KL": ["--objective=forward_kl", "--on_policy=1"],
}


def solved(path, suite, limit):
    """(solved, of) of a suite's first tasks, by a checkpoint's averaged weights."""
    model, _ = checkpoint.load_model(path)
    found = eval_arc.evaluate(suites.load(suite)[:limit], lambda tasks: candidates.solve(model, tasks, candidates.Settings()))
    return sum(r["solved"] for r in found), len(found)


def run_arm(out, student, teacher, seconds, settings):
    """Distil until the process has used `seconds` of CPU, by its own count; a finished run is not done again."""
    if os.path.exists(os.path.join(out, "ckpt.pt")):
        return
    command = [sys.executable, os.path.join(HERE, "distill.py"), f"--out_dir={out}", f"--init_from={student}", f"--teacher={teacher}",
               "--log_interval=1", "--check_tasks=0", "--max_iters=1000000", "--eval_interval=1000000", "--decay_iters=0",
               *settings]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        time.sleep(0.5)
        entries = [e for e in logbook.read(os.path.join(out, "log.jsonl")) if "cpu_seconds" in e]
        if entries and entries[-1]["cpu_seconds"] >= seconds:
            process.send_signal(signal.SIGTERM)
            break
    errors = process.communicate()[1]
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed: {(errors.strip().splitlines() or ['?'])[-1]}")


def draw(results, path):
    """Own answers right on training prompts (smoothed) by CPU seconds, one line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(dict.fromkeys(r["arm"] for r in results)):
        for r in (r for r in results if r["arm"] == arm):
            smooth, points = None, []
            for x, y in r["curve"]:
                smooth = y if smooth is None else 0.8 * smooth + 0.2 * y
                points.append((x, smooth))
            axes.plot(*zip(*points), color=f"C{number}", lw=1.2, label=arm if r["seed"] == results[0]["seed"] else None)
    axes.set(xlabel="CPU seconds", ylabel="share of answers right, training prompts, smoothed")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="its checkpoint; {seed} in it stands for the seed of a run, for students of their own")
    parser.add_argument("teacher")
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of a run (default 60)")
    parser.add_argument("--seeds", type=lambda s: [int(n) for n in s.split(",")], default=[1, 2, 3])
    parser.add_argument("--arms", type=lambda s: [int(n) for n in s.split(",")], help="numbers of ARMS' rows, from 0 (default: all)")
    parser.add_argument("--suite", default="sudoku4")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--out_dir", default="out/bench_distill")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of distill.py, for all runs, without the dashes")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    results = []

    def student_of(seed):
        return args.student.replace("{seed}", str(seed))

    try:
        before = {path: solved(path, args.suite, args.limit) for path in [args.teacher, *map(student_of, args.seeds)]}
        print(f"{args.suite} before: " + ", ".join(f"{path} {n}/{of}" for path, (n, of) in before.items()), flush=True)
        names = [list(ARMS)[i] for i in args.arms] if args.arms else list(ARMS)
        for seed in tqdm(args.seeds, unit="seed"):
            for arm in names:
                out = os.path.join(args.out_dir, f"{list(ARMS).index(arm)}_{seed}")
                settings = [*ARMS[arm], f"--seed={seed}", *(f"--{s}" for s in args.settings)]
                run_arm(out, student_of(seed), args.teacher, args.seconds, settings)
                log = [e for e in logbook.read(os.path.join(out, "log.jsonl")) if "cpu_seconds" in e]
                right, of = solved(os.path.join(out, "ckpt.pt"), args.suite, args.limit)
                curve = [(e["cpu_seconds"], e["own_right"]) for e in log if e.get("own_right") is not None]
                shares = {k: round(statistics.mean(e[k] for e in log), 3) for k in ("sampling", "scoring", "learning")}
                results.append({"arm": arm, "seed": seed, "solved": right, "of": of, "steps": log[-1]["iter"],
                                "cpu_seconds": log[-1]["cpu_seconds"], **shares, "curve": curve})  # fmt: skip
                print(json.dumps({k: v for k, v in results[-1].items() if k != "curve"}), flush=True)
                with open(os.path.join(args.out_dir, "results.json"), "w", encoding="utf-8") as f:
                    json.dump({"before": before, "results": results}, f)
                draw(results, os.path.join(args.out_dir, "curves.png"))
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    print("\n| way | solved, by seed | mean | steps | sampling, scoring, learning |\n|---|---|---|---|---|")
    for arm in names:
        rows = [r for r in results if r["arm"] == arm]
        print(f"| {arm} | {', '.join(str(r['solved']) for r in rows)} of {rows[0]['of']} | "
              f"{statistics.mean(r['solved'] for r in rows):.1f} | {', '.join(str(r['steps']) for r in rows)} | "
              f"{', '.join(f'{statistics.mean(r[k] for r in rows):.0%}' for k in ('sampling', 'scoring', 'learning'))} |")  # fmt: skip


if __name__ == "__main__":
    main()
