"""
The evaluation: how many unseen tasks does a checkpoint solve, exactly, and what do its answers look like?

    python eval_arc.py out/demo/route_a/ckpt.pt                 every suite; results beside the checkpoint
    python eval_arc.py A/ckpt.pt B/ckpt.pt --out_dir=out/both   several on the same tasks, side by side
    python eval_arc.py 'out/run/ckpt_[0-9]*.pt'                 those that a run has kept, and curves of them
    python eval_arc.py USER/NAME@v0.1                           one that is published on the hub
    python eval_arc.py CKPT --suites=sudoku4,arc1 --limit=20    the first 20 tasks of two suites
    python eval_arc.py CKPT --augment=16 --ttt_steps=128        16 views, and a copy is tuned to each task
    python eval_arc.py CKPT --n_sup=16 --n_rollouts=8           Route B: eight tries, that vote
    python eval_arc.py CKPT --tasks=my_tasks                    ARC-style JSON, Kaggle's challenges too
    torchrun --nproc_per_node=2 eval_arc.py CKPT                the same answers from two GPUs

A task is solved when all its test outputs are right in every cell and in size: in one of two attempts at each
output in ARC suites, in one attempt in puzzles. The model gets its tasks without their test outputs.

A run that was killed goes on: what the same checkpoint has answered with the same settings is not asked
again. Figures of other models and suites that out_dir holds stay there; of a suite that is asked again,
those of the tasks asked last. What is written to it:

    report.html        all of it, to look at
    grids.png          a few tasks of each suite with their answers
    submission.json    of an ARC suite, as the ARC Prize takes it; of several, submission_MODEL_SUITE.json
    eval.json          {model: {params, iter, checkpoint, data, ..., suites: {suite: figures}}}, figures:
        total, solved, interval       tasks; 95% interval of solved / total
        score                         mean share of a task's test outputs solved, as ARC Prize scores
        pass_1, oracle                tasks solved with one attempt, with any number
        guessable                     [solved, tasks] of those with small answers: see `guessable`
        too_long, unknown             tasks that do not fit into block_size; tasks without known outputs
        protocol                      inductive, ttt, and what was trained on: see suites.known
        against                       {other model: {only_this, only_other, p}}: exact McNemar test
    answers.jsonl      a line for every model, suite and task: see `judge`

Read next: smol/solve.py (how a model comes to its attempts), smol/language.py (suites that are no tasks).
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import math
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

import configurator
import smol.suites
from smol import arc, checkpoint, language, report, runtime, snapshots, solve
from smol.engine import NOISE
from smol.files import lock, write_whole

# -----------------------------------------------------------------------------
# settings

suites = ""  # what is asked, separated by commas, as smol/suites.py names them; "" means all that are there
tasks = ""  # your own tasks: a folder of ARC-style .json files, or one file
solutions = ""  # the file of their test outputs, {id: [output, ...]}; "": ...solutions.json beside it
limit: int | None = None  # only the first tasks of each suite
shortest: int | None = None  # only the shortest tasks of each suite: the quickest
# ---- how it is asked; more of anything takes longer
augment = 1  # views of each task that vote; 1 is the task as it is
samples = 1  # Route A, and puzzles in words: answers to each view
programs = 0  # programs written for each ARC task
n_sup: int | None = None  # Route B: supervision steps; None means as it was trained
halt: float | None = None  # Route B: stop once the halting probability is above this; None means never
n_rollouts = 1  # Route B: answers to each view, all but the first with noise, that vote
noise = NOISE  # of the others, on z, which has size 1
ttt_steps = 0  # test-time training: steps on each task
ttt_lr = 1e-3  # its learning rate
seed = 1337  # of views, draws and test-time training
# ---- where
out_dir = ""  # where the results go; "" means beside the checkpoint
device = "auto"  # cpu, cuda, cuda:1
dtype = "auto"  # float32, bfloat16, float16; auto: on a GPU as train.py chooses, on a CPU float32

RANGES = {
    "[1, inf)": "limit shortest augment samples n_sup n_rollouts",
    "[0, inf)": "programs noise ttt_steps seed",
    "(0, inf)": "ttt_lr",
    "[0, 1]": "halt",
    ("auto", "float32", "bfloat16", "float16"): "dtype",
}
ARC_RULES = (*smol.suites.ARC_SUITES, "tasks")  # scored as ARC's rules say: two attempts
ROWS_TOGETHER = 64  # views handed to a model at a time: what is lost when a run is killed
PARTIAL = "answers.partial.jsonl"  # of the suite that is being asked

# -----------------------------------------------------------------------------
# one task


def rows_of(grid):
    """A grid (h, w) as JSON: a list of strings, a row each, a digit each cell. Text and None stay."""
    if grid is None or isinstance(grid, str):
        return grid
    return ["".join(map(str, row)) for row in grid.tolist()]


def judge(task, given, attempts):
    """
    The record of a task, a line of answers.jsonl. given: for each test input a solve.Given, or None where
    the task is too long. `votes` and `scores` are those of solve.Candidate, `steps` Route B's answer after
    each supervision step with its halting probability. A task without known outputs has "solved": None.
    """
    tests = []
    for (puzzle, expected), found in zip(task.test, given):
        candidates = found.candidates if found else []
        wanted = rows_of(expected)
        right = [rows_of(c.grid) == wanted for c in candidates]
        kept = candidates[:2]
        test = {
            "input": rows_of(puzzle),
            "expected": wanted,
            "attempts": [rows_of(c.grid) for c in kept],
            "right": right[:2],
            "solved": any(right[:attempts]) if wanted is not None else None,
            "oracle": any(right),
            "votes": [c.votes for c in kept],
            "scores": [round(c.score, 6) for c in kept],
            "programs": [c.program for c in kept],
        }
        if found and found.steps:
            test["steps"] = [[rows_of(grid), round(halting, 6)] for grid, halting in found.steps]
        tests.append(test)
    known = all(expected is not None for _, expected in task.test)
    return {
        "id": task.id,
        "kind": task.kind,
        "solved": all(t["solved"] for t in tests) if known else None,
        "too_long": any(found is None for found in given),
        "demonstrations": [[rows_of(x), rows_of(y)] for x, y in task.train],
        "test": tests,
    }


# -----------------------------------------------------------------------------
# figures of a suite, from its records alone


def guessable(record):
    """Whether each output of a task has at most 9 cells or one colour: such are found by chance as well."""
    return all(arc.trivial(np.array([*"".join(t["expected"])])) for t in record["test"])


def figures(records, attempts):
    judged = [r for r in records if r["solved"] is not None]
    solved = sum(r["solved"] for r in judged)
    small = [r["solved"] for r in judged if guessable(r)]
    scores = [np.mean([t["solved"] for t in r["test"]]) for r in judged]
    return {
        "total": len(judged),
        "solved": solved,
        "interval": smol.suites.interval(solved, len(judged)),
        "score": round(float(np.mean(scores)), 6) if judged else 0.0,
        "attempts": attempts,
        "pass_1": sum(all(any(t["right"][:1]) for t in r["test"]) for r in judged),
        "oracle": sum(all(t["oracle"] for t in r["test"]) for r in judged),
        "guessable": [sum(small), len(small)],
        "too_long": sum(r["too_long"] for r in records),
        "unknown": len(records) - len(judged),
        "seconds": round(sum(r.get("seconds", 0.0) for r in records), 3),
    }


def against(records, others):
    """
    {only_this, only_other, p} of two models' records, on the tasks that both were asked. p: McNemar's exact
    test, the probability of a split as uneven as this if such tasks fell to either by chance.
    """
    others = {r["id"]: r["solved"] for r in others if r["solved"] is not None}
    pairs = [(r["solved"], others[r["id"]]) for r in records if r["solved"] is not None and r["id"] in others]
    this = sum(a and not b for a, b in pairs)
    other = sum(b and not a for a, b in pairs)
    tail = sum(math.comb(this + other, i) for i in range(min(this, other) + 1)) / 2 ** (this + other)
    return {"only_this": this, "only_other": other, "p": float(f"{min(1.0, 2 * tail):.3g}")}


# -----------------------------------------------------------------------------
# asking


def length(task):
    """About how long a task is as tokens: decides with which others it is asked."""
    if isinstance(task.test[0][0], str):
        return len(task.test[0][0])
    return sum(x.size + y.size for x, y in task.train) + max(x.size for x, _ in task.test)


def ask(name, model, about, suite, tasks, settings, folder):
    """
    Records of a suite, on rank 0. Long tasks come first, about ROWS_TOGETHER rows at a time; under torchrun
    every process asks its part. Answers are kept in the folder as they come: a run may be killed.
    """
    path, partial = (os.path.join(folder, file) for file in ("answers.jsonl", PARTIAL))
    runtime.all_agree(None)  # wait for what rank 0 still writes: it may be of this file by another name
    earlier = {r["key"]: r for r in read_answers(path) + read_answers(partial)}
    # what the answer to a task depends on: a record without answers is the task as JSON
    asked = [about["sha256"], suite, dataclasses.asdict(settings), about["device"], about["dtype"]]
    keys = {t.id: snapshots.key_of(*asked, judge(t, [None] * len(t.test), 1)) for t in tasks}
    found = {i: {**earlier[k], "model": name} for i, k in keys.items() if k in earlier}
    if found:
        runtime.print0(f"{name} {suite}: {len(found)} of {len(tasks)} have been answered before")

    rows = settings.augment * settings.samples * settings.n_rollouts * (4 if settings.ttt_steps else 1)
    size, n = max(1, ROWS_TOGETHER // rows), runtime.world_size
    todo = sorted((task for task in tasks if task.id not in found), key=length, reverse=True)
    chunks = [todo[i : i + size] for i in range(0, len(todo), size)]
    bar = {"desc": f"{name} {suite}", "dynamic_ncols": True, "leave": False, "disable": not runtime.master}
    for i in tqdm(range(0, len(chunks), n), **bar):
        records = []
        for chunk in chunks[i : i + n][runtime.rank : runtime.rank + 1]:
            started = time.perf_counter()
            with runtime.mixed_precision(about["device"], about["dtype"])[0]:
                given = solve.solve(model, solve.without_answers(chunk), settings)
            seconds = round((time.perf_counter() - started) / len(chunk), 4)
            judged = (judge(t, some, attempts_of(suite)) for t, some in zip(chunk, given))
            records = [{**record, "seconds": seconds} for record in judged]
        for record in itertools.chain(*runtime.gather(records)):
            found[record["id"]] = {**record, "model": name, "suite": suite, "key": keys[record["id"]]}
            runtime.append_log(found[record["id"]], partial)
    if not runtime.master:
        return []
    records = [found[task.id] for task in tasks]
    kept = [r for r in runtime.read_log(path) if (r["model"], r["suite"]) != (name, suite)]
    runtime.write_log(kept + records, path)
    return records


def attempts_of(suite):
    return 2 if suite in ARC_RULES else 1


def measure(name, model, about, suite, before, limit):
    """Figures of a suite that is not of tasks, {"error": why} where there are none. before: its last ones."""
    device, dtype = about["device"], about["dtype"]
    texts, data = {}, about["data"]
    if suite == "language" and data["stage"]:
        try:
            texts = language.held_out(data["data_dir"], data["stage"], data["tag"])
        except (OSError, ValueError) as e:
            print(f"{name} {suite}: no bits per byte: {e}")
    key = snapshots.key_of(about["sha256"], suite, limit, device, dtype, texts)
    if before.get("key") == key:
        print(f"{name} {suite}: has been measured before")
        return before
    try:
        with runtime.mixed_precision(device, dtype)[0]:
            if suite == "language":
                found = language.evaluate(model, data["data_dir"], texts, limit)
            else:
                found = language.evaluate_benchmarks(model, suite, limit)
    except OSError as e:  # no network, no sandbox: no reason to lose what is there
        return {"error": str(e)}
    return {**found, "key": key}


# -----------------------------------------------------------------------------
# eval.json


def describe(name, path, device, dtype):
    """What eval.json says of a checkpoint besides its suites: how it was named, which file that is."""
    model, ckpt = checkpoint.load_model(path)
    train = ckpt["train"]
    data = train.get("data", {})
    return {
        "model": ckpt["model"],
        "params": model.num_params(),
        "checkpoint": path if os.path.exists(name) else name,
        "folder": os.path.dirname(path),  # where the logs of its run are
        "sha256": snapshots.sha256_file(path),
        "iter": train.get("iter"),
        "val_loss": train.get("val_loss"),
        "data": {
            "data_dir": ckpt.get("config", {}).get("data_dir", "data"),  # not of a published one
            "stage": data.get("stage"),
            "tag": data.get("tag"),
            "sources": data.get("sources", []),
        },
        "device": device.split(":")[0],
        "card": runtime.device_name(device),
        "dtype": dtype,
        "suites": {},
    }


def name_of(about, results):
    """The checkpoint's folder, with as many before it as tell it from others, and the file if not ckpt.pt."""
    if not os.path.exists(about["checkpoint"]):
        return about["checkpoint"]
    path = os.path.realpath(about["checkpoint"])
    folder, file = os.path.split(path)
    own = [] if file in ("ckpt.pt", checkpoint.WEIGHTS) else [file.removesuffix(".pt")]
    parts = folder.split(os.sep)
    for i in reversed(range(len(parts))):
        name = "/".join(parts[i:] + own)
        other = results.get(name, about)
        if other["sha256"] == about["sha256"] or os.path.realpath(other["checkpoint"]) == path:
            break
    return name


def read_results(path):
    """eval.json of an earlier evaluation, {} where there is none. ValueError where it cannot be added to."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
        report.table(results)
        report.history(results)
        return results
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged or of another version: move it away") from None


def read_answers(path):
    """The records that an earlier evaluation has left. ValueError where one is no such record."""
    records = runtime.read_log(path)
    if not all(isinstance(r, dict) and r.keys() >= {"key", "model", "suite", "id", "test"} for r in records):
        raise ValueError(f"{path} is damaged or of another version: move it away")
    return records


# -----------------------------------------------------------------------------
# the command


def submission(records):
    """
    The ARC Prize's format: {task id: [{"attempt_1": grid, "attempt_2": grid} for each test input]}. Where
    there is no second attempt the first is given again, where there is none a black cell.
    """
    out = {}
    for r in records:
        out[r["id"]] = []
        for t in r["test"]:
            attempts = [[[int(cell) for cell in row] for row in rows] for rows in t["attempts"]] or [[[0]]]
            out[r["id"]].append({"attempt_1": attempts[0], "attempt_2": attempts[-1]})
    return out


def save_json(value, path):
    write_whole((json.dumps(report.finite(value), indent=1) + "\n").encode(), path)


def tasks_asked(c):
    """{suite: its tasks, None where it is not of tasks}. ValueError for what can be wrong with it."""
    names = smol.suites.names(c.suites) if c.suites else [] if c.tasks else smol.suites.default()
    asked = {name: smol.suites.load(name) if smol.suites.is_tasks(name) else None for name in names}
    if c.tasks:
        asked["tasks"] = arc.read_tasks(c.tasks, c.solutions)
    for name in asked:
        if name.startswith("lm_eval:"):
            language.check_benchmarks(name)
    return asked


def chosen(tasks, c):
    """Those of a suite's tasks that are asked, and the settings that leave others out."""
    used = {}
    if c.limit and c.limit < len(tasks):
        tasks, used["limit"] = tasks[: c.limit], c.limit
    if c.shortest and c.shortest < len(tasks):
        tasks, used["shortest"] = sorted(tasks, key=length)[: c.shortest], c.shortest
    return tasks, used


def run(c, words):
    if not words:
        raise ValueError("name a checkpoint: python eval_arc.py out/ckpt.pt")
    if c.solutions and not c.tasks:
        raise ValueError("--solutions has the outputs of --tasks: name these as well")
    # a pattern such as 'out/run/ckpt_[0-9]*.pt', in the order of the steps: ckpt_500 before ckpt_1000
    found = [sorted(glob.glob(word), key=lambda file: (len(file), file)) or [word] for word in words]
    asked = tasks_asked(c)
    if c.shortest and not any(asked.values()):
        raise ValueError(f"--shortest is about suites of tasks, and {', '.join(asked)} has none")
    files = {name: checkpoint.local_file(name) for some in found for name in some}
    beside = {os.path.dirname(f) if os.path.exists(n) else f"out/hub/{n}" for n, f in files.items()}
    if len(beside) > 1 and not c.out_dir:
        raise ValueError("with checkpoints of several runs, say with --out_dir=FOLDER where the results go")
    folder = c.out_dir or beside.pop() or "."
    settings = solve.Settings(**{f.name: getattr(c, f.name) for f in dataclasses.fields(solve.Settings)})
    on = runtime.pick_device(c.device)
    dtype = runtime.pick_dtype(c.dtype, on)
    abouts = {path: describe(name, path, on, dtype) for name, path in files.items()}
    if solve.asks_for_route_b(settings) and all(about["model"] != "trm" for about in abouts.values()):
        raise ValueError("--n_sup, --halt, --n_rollouts and --noise are about Route B, and there is none")
    with lock(folder, "evaluation") if runtime.master else contextlib.nullcontext():
        file = os.path.join(folder, "eval.json")
        results, models = read_results(file), {}
        for path, about in abouts.items():
            name = name_of(about, results)
            before = results.get(name, about)
            if before["sha256"] != about["sha256"]:
                runtime.print0(f"{name} has been trained on since: what there was of it is replaced")
                before = about
            models[name], results[name] = path, {**about, "suites": before["suites"]}
        if runtime.world_size > 1:
            runtime.start_processes(on.split(":")[0])

        jobs, loaded = [(name, suite) for name in models for suite in asked], None
        for name, suite in sorted(jobs, key=lambda job: asked[job[1]] is None):  # the last are rank 0's alone
            if name != loaded:  # one at a time: there can be many
                model, loaded = checkpoint.load_model(models[name], on)[0], name
            about, tasks = results[name], asked[suite]
            if tasks is not None:
                tasks, used = chosen(tasks, c)
                how = settings_for(suite, tasks, model, settings)
                records = ask(name, model, about, suite, tasks, how, folder)
            if not runtime.master:
                continue
            if tasks is None:
                found = measure(name, model, about, suite, about["suites"].get(suite, {}), c.limit)
            else:
                found = figures(records, attempts_of(suite))
                found.update(how_asked(about, how, suite))
                found["settings"].update(used)
                print(f"{name} {suite}: {found['solved']} of {found['total']} solved", flush=True)
            about["suites"][suite] = found
            save_json(results, file)
        if runtime.master:
            finish(results, jobs, folder)


def settings_for(suite, tasks, model, settings):
    """Without what is of no use here. Where two attempts count, Route A answers a single view twice."""
    on_canvas = model.puzzle_format == "canvas" and suite not in smol.suites.IN_WORDS
    change = {"samples": 1} if on_canvas else {"n_sup": None, "halt": None, "n_rollouts": 1}
    if not on_canvas and attempts_of(suite) == 2 and settings.augment * settings.samples == 1:
        change["samples"] = 2
    if change.get("n_rollouts", settings.n_rollouts) == 1:
        change["noise"] = NOISE
    if suite in smol.suites.IN_WORDS:
        change["augment"] = 1
    if not any(task.train for task in tasks):
        change["ttt_steps"] = 0
    if not change.get("ttt_steps", settings.ttt_steps):
        change["ttt_lr"] = solve.Settings.ttt_lr
    if not any(task.kind == "arc" for task in tasks):
        change["programs"] = 0
    return dataclasses.replace(settings, **change)


def how_asked(about, settings, suite):
    protocol = [smol.suites.known(suite, about["data"]["sources"]), "ttt" * (settings.ttt_steps > 0)]
    protocol = " + ".join(filter(None, protocol)) or "inductive"
    return {"protocol": protocol, "settings": dataclasses.asdict(settings)}


def finish(results, asked, folder):
    """Comparisons, and all that is made of eval.json and answers.jsonl."""
    records = {}
    for r in read_answers(os.path.join(folder, "answers.jsonl")):
        if r["suite"] in results.get(r["model"], {"suites": ()})["suites"]:
            records.setdefault((r["model"], r["suite"]), []).append(r)
    runtime.write_log([r for some in records.values() for r in some], os.path.join(folder, "answers.jsonl"))
    partial = os.path.join(folder, PARTIAL)
    # a run that was killed has asked other suites, and may go on
    left = [r for r in runtime.read_log(partial) if (r["model"], r["suite"]) not in asked]
    if left:
        runtime.write_log(left, partial)
    elif os.path.exists(partial):
        os.remove(partial)
    for (name, suite), own in records.items():
        others = [other for other in results if other != name and (other, suite) in records]
        pairs = {other: against(own, records[other, suite]) for other in others}
        results[name]["suites"][suite]["against"] = pairs
    save_json(results, os.path.join(folder, "eval.json"))

    for_prize = [key for key in asked if key[1] in ARC_RULES]
    for name, suite in for_prize:
        file = f"submission_{name}_{suite}.json".replace(os.sep, "-")
        file = file if len(for_prize) > 1 else "submission.json"
        save_json(submission(records[name, suite]), os.path.join(folder, file))

    report.draw_grids(results, records, os.path.join(folder, "grids.png"))
    page = report.write(results, records, folder)
    print(f"\n{report.table(results)}\n\nlook at {page}")


def main(argv):
    config, paths = configurator.read(globals(), argv, usage="CKPT [CKPT ...]")
    try:
        run(SimpleNamespace(**config), paths)
        runtime.end_processes()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except Exception as e:
        if full := runtime.out_of_memory(e):
            e = "out of memory: lower --augment, --samples or --n_rollouts, or take --device=cpu"
        elif not isinstance(e, (ValueError, OSError)):
            raise
        if runtime.world_size > 1 and full:  # the others have not run out of memory
            print(f"error: {e} (process {runtime.rank})", file=sys.stderr)
            runtime.exit_now(e)
        if runtime.world_size > 1:
            runtime.stop(e)
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
