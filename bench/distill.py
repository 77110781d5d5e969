"""
Does distillation on a student's own answers pay? The same student and CPU seconds, several ways to go on.

    python -m bench.distill out/student{seed}/ckpt.pt out/teacher/ckpt.pt --seconds=60 --rates="(1e-3, 2e-3)"

The student is of Route A, and {seed} in its path stands for the seed of a run. A run is stopped when its
process has used that many CPU seconds since its first logged step: teacher, sampling and learning together,
whatever else the machine does. Every way has the best of the same learning rates, chosen with the first
seed on puzzles that are not in the suite. Runs that are there already are kept. Before this: distill.py.
"""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch

import configurator
import eval_arc
from smol import arc, checkpoint, puzzles, solve, suites
from smol.files import write_whole

seconds = 60.0  # of CPU, for a run
seeds = (1, 2, 3)
rates = (1e-3,)
ways = (0, 1, 2)  # rows of WAYS
others = 200  # puzzles outside the suite, which choose the rate
common = "--optimizer=adamw --ema=0.95 --batch_size=2 --gradient_accumulation_steps=1"  # of every run
out_dir = "out/bench_distill"

WAYS = {
    "supervised": ("train.py", ""),
    "off-policy, forward KL": ("distill.py", "--on_policy=0"),
    "on-policy, forward KL": ("distill.py", "--on_policy=1"),
    "on-policy, reverse KL, temperature 2": ("distill.py", "--objective=reverse_kl --temperature=2"),
    "on-policy, JSD": ("distill.py", "--objective=jsd"),
}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the checkout
NOT_SETTINGS = (
    "vocab_size",
    "rope_base",
    "norm_eps",
)  # of a model's config, what train.py has no setting for


def other_sudokus(n):
    """n puzzles like the suite's sudoku4, none of them in it."""
    in_suite = {arc.task_hash(task) for task in suites.load("sudoku4")}
    rng, found = np.random.default_rng(4005), []
    while len(found) < n:
        task = puzzles.sudoku(rng, 4, 6, "test")
        if arc.task_hash(task) not in in_suite:
            found.append(arc.Task(f"other-{len(found)}", task.kind, task.train, task.test))
    return found


def solved(path, tasks):
    """How many tasks a checkpoint solves, asked as eval_arc.py asks."""
    model, _ = checkpoint.load_model(path)
    records = eval_arc.evaluate(tasks, lambda part: solve.solve(model, part, solve.Settings()))
    return sum(record["solved"] for record in records)


def cpu_seconds(pid):
    """That a process has used so far (Linux)."""
    with open(f"/proc/{pid}/stat") as f:
        user, system = f.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def run(way, student, teacher, settings, limit, out):
    """One run, until it has used `limit` CPU seconds -> its checkpoint."""
    path = os.path.join(out, "ckpt.pt")
    if os.path.exists(path):
        return path
    script, own = WAYS[way]
    command = [sys.executable, os.path.join(ROOT, script), f"--out_dir={out}", f"--init_from={student}"]
    command += ["--log_interval=1", "--max_iters=1000000", "--eval_interval=1000000", "--decay_iters=0"]
    if script == "distill.py":
        command += [f"--teacher={teacher}"]
    else:
        model = checkpoint.load(student)["model_config"]
        command += [f"--{k}={v}" for k, v in model.items() if v is not None and k not in NOT_SETTINGS]
    command += [*shlex.split(own), *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    before = None
    while process.poll() is None:
        if before is None and os.path.exists(os.path.join(out, "log.jsonl")):
            before = cpu_seconds(process.pid)
        if before is not None and cpu_seconds(process.pid) - before >= limit:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.2)
    errors = process.communicate()[1]
    if process.returncode:
        raise ValueError(f"{shlex.join(command)} failed: {(errors.strip().splitlines() or ['?'])[-1]}")
    return path


def main(argv):
    config, words = configurator.read(globals(), argv, usage="STUDENT TEACHER")
    c = SimpleNamespace(**config)
    if len(words) != 2:
        sys.exit("error: name the checkpoints of a student and of a teacher")
    student, teacher = words
    torch.set_num_threads(1)
    suite, outside, results = suites.load("sudoku4"), other_sudokus(c.others), []

    def one(way, seed, rate):
        out = os.path.join(c.out_dir, f"{list(WAYS).index(way)}_{seed}_{rate:g}")
        settings = [*shlex.split(c.common), f"--seed={seed}", f"--learning_rate={rate}"]
        return run(way, student.replace("{seed}", str(seed)), teacher, settings, c.seconds, out)

    try:
        for path in (teacher, *(student.replace("{seed}", str(seed)) for seed in c.seeds)):
            print(f"{path}: {solved(path, suite)} of {len(suite)}")
        print("way | rate | solved | mean | others | mean | steps")
        for way in [list(WAYS)[i] for i in c.ways]:
            rate = c.rates[0]
            if len(c.rates) > 1:
                rate = max(c.rates, key=lambda r: solved(one(way, c.seeds[0], r), outside))
            paths = [one(way, seed, rate) for seed in c.seeds]
            row = {"way": way, "rate": rate, "solved": [solved(path, suite) for path in paths]}
            row["others"] = [solved(path, outside) for path in paths]
            row["steps"] = [checkpoint.load(path)["train"]["iter"] for path in paths]
            results.append(row)
            means = [f"{statistics.mean(row[k]):.1f}" for k in ("solved", "others")]
            shown = row["solved"], means[0], row["others"], means[1], row["steps"]
            print(way, f"{rate:g}", *shown, sep=" | ", flush=True)
            write_whole(json.dumps(results, indent=2).encode(), os.path.join(c.out_dir, "results.json"))
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
