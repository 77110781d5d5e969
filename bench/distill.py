"""
Does distillation on a student's own answers pay? The same student and CPU seconds, several ways to go on, held-out puzzles solved.

    python -m bench.distill out/student{seed}/ckpt.pt TEACHER.pt --seconds=60 --seeds=1,2,3 --rates=5e-4,1e-3,2e-3

The ways are rows of ARMS, settings of distill.py: everything else is the same for all of them, the prompts too. A run is stopped when its
process has used that many CPU seconds, teacher, sampling and learning together (log.jsonl counts them), so other work on the machine does
not matter. Every way has the best of the same learning rates, chosen with the first seed on puzzles that are not in the suite. Prints a
table, and writes it with all curves to results.json and curves.png in out_dir. Runs that are there already are kept.
Before this: distill.py.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import eval_arc
from smol import arc, checkpoint, puzzles, runtime, solve
from smol.files import write_whole

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the checkout
ARMS = {
    "supervised": ["--objective=answers", "--on_policy=0", "--off_policy=dataset"],
    "off-policy, teacher's answers": ["--objective=answers", "--on_policy=0", "--off_policy=teacher"],
    "on-policy, forward KL": ["--objective=forward_kl", "--on_policy=1"],
    "on-policy, reverse KL, temperature 2": ["--objective=reverse_kl", "--temperature=2", "--on_policy=1"],
    "on-policy, reverse KL": ["--objective=reverse_kl", "--on_policy=1"],
    "on-policy, JSD": ["--objective=jsd", "--beta=0.5", "--on_policy=1"],
    "off-policy, forward KL": ["--objective=forward_kl", "--on_policy=0", "--off_policy=teacher"],
}
CHECK = 100  # held-out puzzles of each point of a curve, as many of these as the stage has


def other_sudokus(n):
    """n puzzles like the suite's sudoku4, none of them in it: answers that are never trained on, as the suite's are."""
    in_suite = {puzzles.task_hash(task) for task in puzzles.heldout("sudoku4")}
    rng, found = np.random.default_rng(4005), []
    while len(found) < n:
        task = puzzles.sudoku(rng, 4, 6, "test")
        if puzzles.task_hash(task) not in in_suite:
            found.append(arc.Task(f"other-{len(found)}", task.kind, task.train, task.test))
    return found


def solved(path, tasks):
    """How many tasks a checkpoint's averaged weights solve, asked as eval_arc.py asks."""
    model, _ = checkpoint.load_model(path)
    found = eval_arc.evaluate(tasks, lambda tasks: solve.solve(model, tasks, solve.Settings()))
    return sum(r["solved"] for r in found)


def run_arm(out, student, teacher, seconds, settings):
    """Distil until the process has used `seconds` of CPU, by its own count; a run that is there already goes on from where it is."""

    def used():
        return max(
            (
                e["cpu_seconds"]
                for e in runtime.read_log(os.path.join(out, "log.jsonl"))
                if "cpu_seconds" in e
            ),
            default=0.0,
        )

    if os.path.exists(os.path.join(out, "ckpt.pt")):
        if used() >= seconds:
            return
        student = "resume"
    command = [
        sys.executable,
        os.path.join(HERE, "distill.py"),
        f"--out_dir={out}",
        f"--init_from={student}",
        f"--teacher={teacher}",
        "--log_interval=1",
        f"--check_tasks={CHECK}",
        "--max_iters=1000000",
        "--eval_interval=50",
        "--decay_iters=0",
        *settings,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        time.sleep(0.5)
        if used() >= seconds:
            process.send_signal(signal.SIGTERM)
            break
    errors = process.communicate()[1]
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed: {(errors.strip().splitlines() or ['?'])[-1]}")


def draw(results, path):
    """Held-out puzzles solved by CPU seconds: one line a way, the mean over seeds, and a dot for every measurement."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(dict.fromkeys(r["arm"] for r in results)):
        runs = [r for r in results if r["arm"] == arm]
        for r in runs:
            axes.plot(*zip(*r["curve"]), ".", color=f"C{number}", ms=4, alpha=0.5)
        at = np.linspace(0, max(x for r in runs for x, _ in r["curve"]), 100)
        axes.plot(
            at,
            np.mean([np.interp(at, *zip(*r["curve"])) for r in runs], 0),
            color=f"C{number}",
            lw=1.6,
            label=arm,
        )
    axes.set(xlabel="CPU seconds, teacher and sampling included", ylabel="share of held-out puzzles solved")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "student", help="its checkpoint; {seed} in it stands for the seed of a run, for students of their own"
    )
    parser.add_argument("teacher")
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of a run (default 60)")
    parser.add_argument("--seeds", type=lambda s: [int(n) for n in s.split(",")], default=[1, 2, 3])
    parser.add_argument(
        "--arms",
        type=lambda s: [int(n) for n in s.split(",")],
        help="numbers of ARMS' rows, from 0 (default: all)",
    )
    parser.add_argument(
        "--rates",
        type=lambda s: [float(x) for x in s.split(",")],
        default=[1e-3],
        help="learning rates (default 1e-3)",
    )
    parser.add_argument(
        "--others",
        type=int,
        default=200,
        help="held-out puzzles that choose the rate, beside the suite's (default 200)",
    )
    parser.add_argument("--out_dir", default="out/bench_distill")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="of distill.py, for all runs, without the dashes"
    )
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    before = {}
    results, suite, others = [], puzzles.heldout("sudoku4"), other_sudokus(args.others)
    names = [list(ARMS)[i] for i in args.arms] if args.arms else list(ARMS)[:4]

    def run(arm, seed, rate):
        out, student = (
            os.path.join(args.out_dir, f"{list(ARMS).index(arm)}_{seed}_{rate:g}"),
            args.student.replace("{seed}", str(seed)),
        )
        settings = [
            *(f"--{s}" for s in args.settings),
            *ARMS[arm],
            f"--seed={seed}",
            f"--learning_rate={rate}",
        ]
        run_arm(out, student, args.teacher, args.seconds, settings)
        return out

    try:
        for path in (args.teacher, *(args.student.replace("{seed}", str(seed)) for seed in args.seeds)):
            if os.path.isfile(path):
                before[path] = solved(path, suite), solved(path, others)
                print(
                    f"before: {path}, {before[path][0]} of {len(suite)}, {before[path][1]} of {len(others)} others",
                    flush=True,
                )
        for arm in tqdm(names, unit="way"):
            tried = dict.fromkeys(args.rates, 0)
            for rate in args.rates if len(args.rates) > 1 else ():
                tried[rate] = solved(os.path.join(run(arm, args.seeds[0], rate), "ckpt.pt"), others)
            rate = max(tried, key=tried.get)
            print(f"{arm}: {', '.join(f'{n} at {r:g}' for r, n in tried.items())}", flush=True)
            for seed in args.seeds:
                out = run(arm, seed, rate)
                log = runtime.read_log(os.path.join(out, "log.jsonl"))
                steps = [e for e in log if "cpu_seconds" in e]
                used = {0: 0.0, **{e["iter"]: e["cpu_seconds"] for e in steps}}
                curve = [(used[e["iter"]], e["student_solved"]) for e in log if "student_solved" in e]
                path = os.path.join(out, "ckpt.pt")
                right, right_of_others = solved(path, suite), solved(path, others)
                shares = {
                    k: round(statistics.mean(e[k] for e in steps), 3)
                    for k in ("sampling", "scoring", "learning")
                }
                results.append(
                    {
                        "arm": arm,
                        "seed": seed,
                        "rate": rate,
                        "tried": tried,
                        "solved": right,
                        "others": right_of_others,
                        "steps": steps[-1]["iter"],
                        "cpu_seconds": steps[-1]["cpu_seconds"],
                        **shares,
                        "curve": curve,
                    }
                )
                print(
                    json.dumps({k: v for k, v in results[-1].items() if k not in ("curve", "tried")}),
                    flush=True,
                )
                write_whole(
                    json.dumps({"before": before, "results": results}).encode(),
                    os.path.join(args.out_dir, "results.json"),
                )
                draw(results, os.path.join(args.out_dir, "curves.png"))
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(
        f"\n| way | rate | solved of {len(suite)} | mean | of {len(others)} others | mean | steps | sampling, scoring, learning |"
    )
    print("|---" * 8 + "|")
    for arm in names:
        rows = [r for r in results if r["arm"] == arm]
        by_seed = {k: ", ".join(str(r[k]) for r in rows) for k in ("solved", "others", "steps")}
        mean = {
            k: statistics.mean(r[k] for r in rows)
            for k in ("solved", "others", "sampling", "scoring", "learning")
        }
        print(
            f"| {arm} | {rows[0]['rate']:g} | {by_seed['solved']} | {mean['solved']:.1f} | {by_seed['others']} | {mean['others']:.1f} | "
            f"{by_seed['steps']} | {mean['sampling']:.0%}, {mean['scoring']:.0%}, {mean['learning']:.0%} |"
        )


if __name__ == "__main__":
    main()
