"""
The evaluation: how many unseen tasks does a checkpoint solve, exactly, and what do its answers look like?

    python eval_arc.py out/demo/route_a/ckpt.pt                        one checkpoint, every suite: the results lie beside it
    python eval_arc.py A/ckpt.pt B/ckpt.pt --out_dir=out/compare       several, on the same tasks, side by side, with a paired test
    python eval_arc.py CKPT --suites=sudoku4,arc1 --limit=20           a quick look: the first 20 tasks of two suites
    python eval_arc.py CKPT --suites=arc1 --augment=16 --ttt_steps=32  all that helps: 16 views of each task, a model tuned to each
    python eval_arc.py CKPT --suites=arc1 --augment=11 --n_sup=2 --halt=0.9      Route B: many views, few steps, the cheapest votes
    python eval_arc.py CKPT --tasks=my_tasks                           your own ARC-style JSON files
    python eval_arc.py CKPT --tasks=X_challenges.json                  Kaggle's, with X_solutions.json
    torchrun --nproc_per_node=2 eval_arc.py CKPT ...                   the same answers from two GPUs

The suites are in suites.py. A task is solved when all its test outputs are right in every cell and in size; two attempts at each output
in arc1 and arc2, as ARC's rules allow, one in puzzles. A task that does not fit into the model's block_size is not solved and is
counted in `too_long` as well. The model is handed tasks with their test outputs taken out.

All of arc1, the 100M models on two T4s (projected, `python -m bench.answer`): Route A in 16 views 8 minutes;
Route B in 16 views 4.8 hours with its 16 supervision steps, 18 to 36 minutes with --n_sup=2 --halt=0.9, by how
often it is sure after one step, and at most 25 in 11 views.
On 4x4 sudokus two steps were as good as more, and many views worth more than many steps (LOG.md): ask yours with
`python -m bench.answer --checkpoint=CKPT`.

A run that was killed goes on where it was: what has been answered, by the same checkpoint with the same settings, is not asked again.

What is written, all of it into --out_dir: eval.json, answers.jsonl, grids.png, report.html, and for ARC
tasks the submission_MODEL_SUITE.json of the ARC Prize; where one model is asked one of these suites,
submission.json as well, which is the same. A folder that has results keeps them: what is asked is put in by
model and suite, in place of what the same model had there for the same suite. A model is a checkpoint file
by its content; one that was trained on under the same path takes the place of what it was, with all its
suites.

eval.json: {model name: report}. A report says which checkpoint it is (params, checkpoint, sha256, iter,
model, config, data: {stage, tag, sources}, ...), how it was evaluated last (settings, device, seconds of
all its suites, gpu_hours, protocol: 'inductive', 'ttt', 'transductive', or 'transductive + ttt') and what
came out, suites: {suite: figures}:

    protocol, settings, n_sup       how this suite was asked, where suites were asked one after the other
    total, solved, interval         tasks; interval: 95% of solved / total, [low, high], by Wilson's score
    score                           mean over tasks of the share of their test outputs that are solved: what ARC Prize ranks by
    outputs_total, outputs_solved, outputs_interval         test outputs, the same way
    attempts                        how many answers to a test input count
    pass_1, pass_2, oracle          tasks solved with one attempt, two, and with any number of the candidates there were
    candidates                      different candidates per test input, mean
    unknown                         tasks of --tasks whose outputs nobody gave: answered, and in none of these figures
    too_long, too_long_ids          tasks with a test input that does not fit into the model's block_size
    by_size                         {'1-25', ...: [solved, total]} test outputs by the number of their cells
    cells_right, cells_right_by_copying     share of cells right in the first attempt, and if the input itself were the answer
    against                         {other model: {only_this, only_other, p}}: tasks that one solves and the
                                    other does not, of those that both were asked; exact McNemar
    seconds, available              time taken, of all processes together; tasks that the suite has, of which --limit may take the first

answers.jsonl: a line for every model, suite and task tried, {...}:

    model, suite, id, kind          kind: arc, sudoku, maze, logic
    solved, too_long, seconds
    demonstrations                  [[input, output], ...]: grids; a grid is a list of strings, a row each, a digit each cell
    test                            for each test input {
        input, expected             grids (expected: null where nobody knows it). Text in suites of text (logic): there, strings
        attempts                    [grid, ...], best first: as many as count, and two at least; strings in suites of text
        right                       [bool, ...] of each attempt
        solved, oracle              one of the attempts right; any candidate right
        votes, scores               of each attempt: views and samples that gave it; the model's own score (Route A: mean log-probability
                                    of a cell; Route B: halting probability)
        candidates                  how many different ones there were
        programs                    [text or null, ...]: of each attempt, the program that gave it, if one did
        steps                       Route B, on the task as it is: [[grid or null, halting probability], ...] after each supervision step
    }
    key                             what the answer depends on, hashed: a run that was killed goes on after the tasks with its own keys

Suites of text (logic) have no demonstrations. Figures of suites that are not tasks (language, lm_eval:...) are in eval.json as language.py
and harness.py give them, and part by part in measured.jsonl, for a run that is killed.

Read next: solve.py (how a model comes to its attempts), scores.py (what counts as right), sample.py (one task, in the terminal).
"""

import argparse
import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections import Counter

import torch
from tqdm import tqdm

import configurator
from configurator import positive
from smol import arc, checkpoint, language, runtime, scores, snapshots, solve, suites
from smol import report as draw_report
from smol.files import write_whole
from smol.solve import without_answers

ROUTES = {"dense": "route_a", "trm": "route_b"}  # what the models are called in reports
ARC_RULES = (*suites.ARC_SUITES, "tasks")  # suites that are scored and handed in as ARC's rules say
HOW = ("protocol", "settings", "n_sup")  # of a report: how it was asked, which may differ from suite to suite
ATTEMPTS = 2  # that count in ARC suites; in puzzles, which have one solution by their rules, it is 1
ROWS_AT_ONCE = 64  # views of tasks handed to a model at a time: bounds what is lost when killed, and the progress bar moves
MEASURED = "measured.jsonl"  # in out_dir: parts of the suites that are no tasks, as they are done
EVAL_DEMOS = "arc_eval_demos"  # the source of demonstrations (never test outputs) of evaluation tasks: whoever trains on it is transductive
SHOWN = 3  # tasks of each suite in the picture
LEGIBLE = 12  # grids with longer sides are only shown where there is nothing smaller to show
ALL_STEPS = (
    6  # a picture has room for this many supervision steps; of more, it shows 1, 2, 4, 8, ... and the last
)

# -----------------------------------------------------------------------------
# asking


def length(task):
    """About how long a task is as tokens, which decides with which others it is asked."""
    if isinstance(task.test[0][0], str):
        return len(task.test[0][0])
    return sum(x.size + y.size for x, y in task.train) + max(x.size for x, _ in task.test)


def chunks(tasks, rows_per_task):
    """Tasks of similar length, long ones first, about ROWS_AT_ONCE rows at a time: what is asked together, whoever asks, and when."""
    size = max(1, ROWS_AT_ONCE // rows_per_task)
    tasks = sorted(tasks, key=length, reverse=True)
    return [tasks[i : i + size] for i in range(0, len(tasks), size)]


def evaluate(tasks, answer, attempts=1, rows_per_task=1, *, before=None, keep=None, progress=None):
    """
    Have `answer` solve the tasks -> their records (scores.judge), in the order of the tasks. answer(tasks without test outputs) -> for each
    task, for each test input, a solve.Given, or None where it is too long: solve.solve with a model.
    rows_per_task: how many rows `answer` makes of a task, about, so that not too many are asked together.
    before: {task id: record} of tasks that need not be asked again; keep(records) is called with new ones as they come; progress(n) with
    how many more are done. Under torchrun every process asks its part, and the first alone returns all of them, the others [].
    """
    before, mine = before or {}, []
    for number, chunk in enumerate(chunks(tasks, rows_per_task)):
        if number % runtime.world_size != runtime.rank:
            continue
        asked = [task for task in chunk if task.id not in before]
        started = time.perf_counter()
        new = (
            [
                scores.judge(task, given, attempts)
                for task, given in zip(asked, answer(without_answers(asked)))
            ]
            if asked
            else []
        )
        for record in new:
            record["seconds"] = round((time.perf_counter() - started) / len(asked), 4)
        if keep and new:
            keep(new)
        mine += [before[task.id] for task in chunk if task.id in before] + new
        if progress:
            progress(len(chunk))
    found = {record["id"]: record for part in runtime.gather(mine) for record in part}
    return [found[task.id] for task in tasks if found]


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


def names_among(before, names, paths, digests):
    """
    The names, as they are in a folder that has a report, `before`: a checkpoint that is in it keeps its
    name, by content or else by path, and the name of another is not taken.
    """
    out = []
    for name, path, digest in zip(names, paths, digests):
        whole = os.path.realpath(path)
        had = [n for n, r in before.items() if r["sha256"] == digest]
        had += [n for n, r in before.items() if os.path.realpath(r["checkpoint"]) == whole]
        had += [n for n in (name, os.path.basename(os.path.dirname(whole)), path) if n not in before]
        out.append(next((n for n in had if n not in out), whole))
    return out


def read_report(path):
    """eval.json of an earlier evaluation, {} where there is none. ValueError where it cannot be added to."""
    if not os.path.exists(path):
        return {}
    report = draw_report.read_json(path)
    try:
        table(report) if report else None
        [(r["sha256"], r["checkpoint"]) for r in report.values()]
    except (KeyError, TypeError, ValueError, AttributeError):
        what = "is of another version, or not what eval_arc.py writes"
        raise ValueError(f"{path} {what}: move it away, or choose another --out_dir") from None
    return report


def number(train, name):
    """A figure that training left in the checkpoint; None where it left none, or left no finite number (JSON has no NaN)."""
    value = train.get(name)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def trained_on(ckpt):
    """
    -> {stage, tag, snapshot, sources} of a checkpoint's data. sources: the names that train.py noted, else those of the mixture it was
    configured with, else those of the stage as it lies here, else None.
    """
    data, config = (ckpt.get("train") or {}).get("data") or {}, ckpt.get("config") or {}
    sources = data.get("sources") or list(config.get("mixture") or {}) or None
    if sources is None and data.get("stage"):
        with contextlib.suppress(OSError, ValueError):
            _, mixture = snapshots.read_manifest(
                config.get("data_dir", "data"), data["stage"], data.get("tag"), verify=False
            )
            sources = sorted(name for name, share in mixture["weights"].items() if share > 0)
    return {
        "stage": data.get("stage"),
        "tag": data.get("tag"),
        "snapshot": data.get("snapshot"),
        "sources": sources,
    }


def report_on(path, model, ckpt, settings, device, dtype):
    """What a report says about a checkpoint besides its suites: which it is, how it was trained, how it is evaluated."""
    train, data = ckpt.get("train") or {}, trained_on(ckpt)
    was_on = ["transductive"] * (EVAL_DEMOS in (data["sources"] or [])) + ["ttt"] * (settings.ttt_steps > 0)
    return {
        "params": model.num_params(),
        "train_seconds": number(train, "seconds"),
        "tokens_per_second": number(train, "tokens_per_second"),
        "val_loss": number(train, "val_loss"),
        "val_losses": {k: number(train["val_losses"], k) for k in train.get("val_losses") or {}},
        "checkpoint": path,
        "sha256": snapshots.sha256_file(path),
        "iter": train.get("iter"),
        "model": ckpt["model"],
        "model_config": dict(ckpt["model_config"]),
        "config": ckpt.get("config"),
        "data": data,
        "protocol": " + ".join(was_on) or "inductive",
        "settings": dataclasses.asdict(settings),
        "device": device,
        "card": runtime.device_name(device),
        "dtype": dtype,
        "n_sup": (settings.n_sup or model.config.n_sup) if ckpt["model"] == "trm" else None,
    }


def columns(rows):
    """rows: lists of texts, the first is the head -> lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * w for w in widths], *rows[1:]]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:]))]
        ).rstrip()
        for row in rows
    ]


def table(report):
    """The report as lines of text: who was asked, what came out suite by suite, and what differs more than chance would have it."""

    def shown(value, form):
        return "-" if value is None else format(value, form)

    lines = columns(
        [["", "parameters", "training s", "tokens/s", "loss (text)", "protocol"]]
        + [
            [
                name,
                f"{r['params']:,}",
                shown(r["train_seconds"], ",.0f"),
                shown(r["tokens_per_second"], ",.0f"),
                shown(r["val_loss"], ".3f"),
                r["protocol"],
            ]
            for name, r in report.items()
        ]
    ) + [""]
    notes = []
    rows = [
        ["", "", "score", "pass@2", "solved", "", "95%", "outputs", "pass@1", "oracle", "too long", "seconds"]
    ]
    attempts, tried = {}, {}
    for suite in dict.fromkeys(suite for r in report.values() for suite in r["suites"]):
        for name, r in report.items():
            s = r["suites"].get(suite)
            if s is None:
                continue
            if not suites.is_tasks(suite):
                notes.append(f"\n{suite}, {name}\n{words(s)}")
                continue
            low, high = s["interval"]
            ranked = [f"{s['score']:.1%}", str(s["pass_2"])] if suite in ARC_RULES else ["", ""]
            rows.append(
                [
                    suite,
                    name,
                    *ranked,
                    f"{s['solved']}/{s['total']}",
                    f"{s['solved'] / max(1, s['total']):.1%}",
                    f"{low:.1%} to {high:.1%}",
                    f"{s['outputs_solved']}/{s['outputs_total']}",
                    str(s["pass_1"]),
                    str(s["oracle"]),
                    str(s["too_long"]),
                    f"{s['seconds']:.1f}",
                ]
            )
            other = {k: v for k, v in (s.get("settings") or {}).items() if v != r["settings"].get(k)}
            if other:
                asked = " ".join(f"--{k}={v}" for k, v in other.items())
                notes.append(f"{suite}: {name} was asked another time, with {asked} ({s['protocol']})")
            for other, p in (s.get("against") or {}).items():
                if p["p"] < 0.05 and p["only_this"] > p["only_other"]:
                    tally = f"{p['only_this']} tasks that the other does not solve, against {p['only_other']}"
                    notes.append(f"{suite}: {name} is better than {other}: {tally} (p = {p['p']:.2g})")
            if s["attempts"] > 1:
                attempts[suite] = max(s["attempts"], attempts.get(suite, 0))
            if s["total"] + s["unknown"] < s["available"]:
                tried.setdefault(s["total"] + s["unknown"], {})[f"{s['available']} in {suite}"] = True
    if len(rows) > 1:
        lines += columns(rows) + [""]
        if any(row[2] for row in rows[1:]):
            lines.append(
                "score: mean over tasks of the share of their test outputs that are solved, "
                "what ARC Prize ranks by."
            )
        allowed = "1 attempt"
        if attempts:
            allowed = f"{max(attempts.values())} attempts in {', '.join(attempts)}, 1 in others"
        lines.append(
            f"solved: tasks with all test outputs right ({allowed}); oracle: with any of the candidates."
        )
    for n, available in tried.items():
        lines.append(f"Limited to the first {n} tasks of each; there are {', '.join(available)}.")
    return "\n".join(lines + notes)


def words(s):
    """Figures of language.py or harness.py as lines of text."""
    if "error" in s:
        return f"none: {s['error']}"
    if "results" not in s:
        return language.table(s)
    found = ((task, metric, f) for task, metrics in s["results"].items() for metric, f in metrics.items())
    return "\n".join(
        f"{task:32}{metric:24}{f['value']:10.4f}   {'{:.4f} to {:.4f}'.format(*f['interval']) if f['interval'] else ''}"
        for task, metric, f in found
        if f["value"] is not None
    )


# -----------------------------------------------------------------------------
# the picture


def choose(tasks, n=SHOWN):
    """
    The numbers of n tasks worth looking at. tasks: of each, {model: its record}. Legible ones before large
    ones, ones that every model was asked and that fit before others, and first of all ones that show each
    model both right and wrong, where it is.
    """

    def size(record):
        shown = [grid for pair in record["demonstrations"][:1] for grid in pair] + [
            record["test"][0][k] for k in ("input", "expected")
        ]
        largest = max(max(len(grid), len(grid[0])) for grid in shown if grid)
        return largest if largest > LEGIBLE else 0

    outcomes = [
        {(model, r["test"][0]["right"][:1] == [True]) for model, r in of.items() if not r["too_long"]}
        for of in tasks
    ]
    sizes = [size(next(iter(of.values()))) for of in tasks]
    left = sorted((i for i, o in enumerate(outcomes) if o), key=lambda i: (-len(outcomes[i]), sizes[i]))
    chosen, seen = [], set()
    while left and len(chosen) < n:
        best = max(left, key=lambda i: len(outcomes[i] - seen))  # the first of the best
        left.remove(best)
        chosen.append(best)
        seen |= outcomes[best]
    return chosen


def steps_shown(n):
    """Which of supervision steps 1..n are shown: all, or 1, 2, 4, 8, ... and the last."""
    return (
        list(range(1, n + 1)) if n <= ALL_STEPS else [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    )


def picture_row(names, records):
    """
    A row for arc.picture: a demonstration, the first test input, what is expected, and what each model makes of it.
    records: for each of the named models, its record of the task.
    """
    task, test = records[0], records[0]["test"][0]
    expected = scores.grid_of(test["expected"])
    panels = []
    for x, y in task["demonstrations"][:1]:
        panels = [("demonstration", scores.grid_of(x), None), ("its output", scores.grid_of(y), None)]
    panels.append(("test input" if panels else "puzzle", scores.grid_of(test["input"]), None))
    if expected is not None:
        panels.append(("expected", expected, None))
    for name, record in zip(names, records):
        test = record["test"][0]
        if record["too_long"]:
            panels.append((f"{name}: too long", None, expected))
            continue
        steps = test.get("steps", [])
        for n in steps_shown(len(steps)):
            panels.append(
                (f"{name} step {n}, halt {steps[n - 1][1]:.2f}", scores.grid_of(steps[n - 1][0]), expected)
            )
        best = test["attempts"][0] if test["attempts"] else None
        if not steps or best != steps[-1][0]:  # an earlier step was surer, or others have voted against it
            panels.append(
                (
                    f"{name}, votes {test['votes'][0]}" if steps and best else name,
                    scores.grid_of(best),
                    expected,
                )
            )
    more = f"   (test 1 of {len(task['test'])})" if len(task["test"]) > 1 else ""
    return (
        task["id"] if task["id"].startswith(task["suite"]) else f"{task['suite']}   {task['id']}"
    ) + more, panels


# -----------------------------------------------------------------------------
# the command


def whole(text):
    """For argparse: a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, not {text!r}")
    return int(text)


def share(text):
    """For argparse: a number between 0 and 1."""
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, not {text!r}")


def key_of(sha256, suite, task, settings, attempts, device, dtype):
    """What a task's record depends on, hashed: the checkpoint, how it is asked, and the task."""
    pairs = [[scores.rows_of(grid) for grid in pair] for pair in task.train + task.test]
    return hashed(
        [sha256, suite, task.id, pairs, dataclasses.asdict(settings), attempts, device.split(":")[0], dtype]
    )


def hashed(what):
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def write_lines(records, path):
    write_whole("".join(json.dumps(record) + "\n" for record in records).encode(), path)


def ask(name, suite, tasks, model, report, settings, attempts, earlier, out_dir):
    """
    Have a model solve a suite -> records, on the first process. earlier: {key: record} of what has been answered before; what is new goes
    into out_dir as it comes.
    """
    keys = {
        t.id: key_of(report["sha256"], suite, t, settings, attempts, report["device"], report["dtype"])
        for t in tasks
    }
    before = {t.id: {**earlier[keys[t.id]], "model": name} for t in tasks if keys[t.id] in earlier}
    if before and runtime.master:
        print(
            f"{name} {suite}: {len(before)} of {len(tasks)} have been answered before ({out_dir}/answers*.jsonl) and are not asked again"
        )

    def keep(records):
        for record in records:
            record.update(model=name, suite=suite, key=keys[record["id"]])
            problem = runtime.append_log(
                record, os.path.join(out_dir, f"answers.partial{runtime.rank}.jsonl")
            )
            if problem:
                raise OSError(problem)

    device_type = report["device"].split(":")[0]
    half = report["dtype"] != "float32"
    with tqdm(
        total=len(tasks),
        desc=f"{name} {suite}",
        unit="task",
        dynamic_ncols=True,
        leave=False,
        disable=not runtime.master,
    ) as bar:
        with (
            torch.autocast(device_type, getattr(torch, report["dtype"])) if half else contextlib.nullcontext()
        ):
            rows_per_task = settings.augment * settings.samples * (4 if settings.ttt_steps else 1)
            return evaluate(
                tasks,
                lambda part: solve.solve(model, part, settings),
                attempts,
                rows_per_task,
                before=before,
                keep=keep,
                progress=bar.update,
            )


def measure(name, suite, model, r, limit, out_dir):
    """
    A suite that is not of tasks -> (its figures, or {"error": why there are none}; the key of its lines in out_dir/measured.jsonl). r: the
    report, which says what it was trained on. What stands in that file is not measured again; what is new goes there as it comes.
    """
    path = os.path.join(out_dir, MEASURED)
    config, data = r["config"] or {}, r["data"]
    stage = {
        "data_dir": config.get("data_dir") or "data",
        "stage": data["stage"] or config.get("data"),
        "tag": data["tag"],
    }
    texts = None
    if suite == "language" and stage["stage"]:
        try:
            texts = language.held_out(**stage)
        except (OSError, ValueError) as e:
            print(f"{name} {suite}: no bits per byte: {e}")
            stage["stage"] = None
    key = hashed([r["sha256"], suite, limit, r["device"].split(":")[0], texts])
    before = {line["part"]: line["found"] for line in runtime.read_log(path) if line.get("key") == key}
    if before:
        print(
            f"{name} {suite}: {len(before)} parts of it have been measured before ({path}) and are not measured again"
        )

    def keep(part, found):
        line = {"key": key, "model": name, "suite": suite, "part": part, "found": draw_report.finite(found)}
        problem = runtime.append_log(line, path)
        if problem:
            print(problem)

    if suite.startswith("lm_eval:"):
        from smol import harness  # here, because lm-eval is optional

        try:
            if suite not in before:
                keep(suite, before.setdefault(suite, harness.evaluate(model, benchmarks(suite), limit)))
            return before[suite], key
        except (OSError, ValueError) as e:  # no network: no reason to lose what is there
            return {"error": str(e)}, key
    return language.evaluate(
        model, **stage, limit=limit, desc=f"{name} {suite}", before=before, keep=keep
    ), key


def say_suite(name, suite, s):
    """A line on one model and suite, as soon as it is known."""
    cells, copied = s["cells_right"], s["cells_right_by_copying"]
    score = f"score {s['score']:.1%}, " if suite in ARC_RULES else ""
    print(
        f"{name} {suite}: {score}{s['solved']} of {s['total']} solved, {s['too_long']} too long"
        + (f", {s['unknown']} more answered whose outputs nobody gave" if s["unknown"] else "")
        + ("" if cells is None else f"; {cells:.1%} of cells right (copying the input: {copied:.1%})")
        + f"; {s['seconds']:.1f} s",
        flush=True,
    )


def what_is_asked(args):
    """
    The command line -> (names of the suites in order, {suite of tasks: its tasks}, device, dtype). Whatever can be wrong with it, whichever
    the checkpoint is, is a ValueError or OSError in here, before anything takes long.
    """
    if os.path.basename(args.json) != args.json or not args.json.endswith(".json"):
        raise ValueError(
            f"--json={args.json} must be the name of a .json file without a folder: the folder is --out_dir"
        )
    if not (0 <= args.temperature < math.inf and 0 < args.ttt_lr < math.inf):
        raise ValueError(
            f"--temperature={args.temperature} must be 0 or more, and --ttt_lr={args.ttt_lr} above 0"
        )
    chosen = suites.names(args.suites) if args.suites is not None else [] if args.tasks else suites.default()
    tasks = {suite: suites.load(suite) for suite in chosen if suites.is_tasks(suite)}
    if args.tasks:
        tasks["tasks"] = arc.read_tasks(args.tasks)
        chosen.append("tasks")
    device = runtime.pick_device(args.device)
    if device == "cuda" and runtime.world_size > 1:
        device = f"cuda:{runtime.local_rank}"
    dtype = runtime.pick_dtype(args.dtype, device)
    for suite in chosen:
        if suite.startswith("lm_eval:"):
            from smol import (
                harness,
            )  # here, because lm-eval is optional: this says so where it is not installed

            harness.check(benchmarks(suite))
    return chosen, tasks, device, dtype


def benchmarks(suite):
    """'lm_eval:sciq,arc_easy' -> ['sciq', 'arc_easy']."""
    return suite.removeprefix("lm_eval:").split(",")


def run(args):
    if len(set(map(os.path.realpath, args.checkpoints))) < len(args.checkpoints):
        raise ValueError("the same checkpoint is given twice")
    if len(args.checkpoints) > 1 and args.out_dir is None:
        raise ValueError("with several checkpoints, say with --out_dir=FOLDER where the results go")
    chosen, tasks, device, dtype = what_is_asked(args)
    settings = solve.Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(solve.Settings)})
    out_dir = args.out_dir or os.path.dirname(args.checkpoints[0]) or "."

    loaded = [checkpoint.load_model(path, device) for path in args.checkpoints]
    if (settings.n_sup or settings.halt is not None) and all(ckpt["model"] != "trm" for _, ckpt in loaded):
        raise ValueError(
            "--n_sup and --halt are about Route B's supervision steps, and no checkpoint of Route B is given"
        )
    before = read_report(os.path.join(out_dir, args.json))
    reports = [
        report_on(path, model, ckpt, settings, device, dtype)
        for path, (model, ckpt) in zip(args.checkpoints, loaded)
    ]
    names = name_models(args.checkpoints, [ROUTES[ckpt["model"]] for _, ckpt in loaded])
    names = names_among(before, names, args.checkpoints, [r["sha256"] for r in reports])
    report = dict(zip(names, reports))
    models = {name: model for name, (model, _) in zip(names, loaded)}
    del loaded
    os.makedirs(out_dir, exist_ok=True)
    if runtime.world_size > 1:
        runtime.start_processes(device.split(":")[0])

    earlier = {
        r.get("key"): r
        for path in glob.glob(os.path.join(glob.escape(out_dir), "answers*.jsonl"))
        for r in runtime.read_log(path)
    }
    records = {}
    for name, model in models.items():
        report[name]["suites"] = {}
        for suite in chosen:
            if not suites.is_tasks(suite):
                continue
            part = tasks[suite][: args.limit]
            attempts = (args.attempts or ATTEMPTS) if suite in ARC_RULES else 1
            records[name, suite] = ask(
                name, suite, part, model, report[name], settings, attempts, earlier, out_dir
            )
            if runtime.master:
                found = scores.figures(records[name, suite], attempts)
                found.update(available=len(tasks[suite]), **{k: report[name][k] for k in HOW})
                report[name]["suites"][suite] = found
                say_suite(name, suite, report[name]["suites"][suite])
    if runtime.master:
        finish(args, models, chosen, records, report, out_dir)


def finish(args, models, chosen, records, report, out_dir):
    """The suites that are no tasks, comparisons, and all that is written. On the first process."""
    keys = set()  # of the lines of measured.jsonl that are in these figures
    for name, r in report.items():
        for suite in chosen:
            if not suites.is_tasks(suite):
                r["suites"][suite], key = measure(name, suite, models[name], r, args.limit, out_dir)
                keys.add(key)
        r["suites"] = {suite: r["suites"][suite] for suite in chosen}

    # What other evaluations have left in the folder stays, but for what is asked here and what has changed
    files = (args.json, "answers.jsonl", MEASURED)
    figures, answers, measured = (os.path.join(out_dir, name) for name in files)
    before = read_report(figures)
    gone = {name for name, r in report.items() if name in before and before[name]["sha256"] != r["sha256"]}
    for name in gone:
        path = report[name]["checkpoint"]
        print(f"{name}: {path} has been trained on since; what {out_dir} had of it is replaced")
    asked = {(name, suite) for name in report for suite in chosen}

    def stays(line):
        return (line.get("model"), line.get("suite")) not in asked and line.get("model") not in gone

    new = list(records)
    kept = {}
    for record in filter(stays, runtime.read_log(answers)):
        kept.setdefault((record.get("model"), record.get("suite")), []).append(record)
    records = {**kept, **records}
    for name, r in report.items():
        if name in before and name not in gone:
            r["suites"] = {**before[name]["suites"], **r["suites"]}
    report = {**before, **report}
    for name, r in report.items():
        for suite in r["suites"]:
            if (name, suite) in records:
                others = [other for other in report if other != name and (other, suite) in records]
                pairs = {
                    other: scores.against(records[name, suite], records[other, suite]) for other in others
                }
                r["suites"][suite]["against"] = pairs
        r["seconds"] = round(sum(s.get("seconds", 0.0) for s in r["suites"].values()), 3)
        r["gpu_hours"] = round(r["seconds"] / 3600, 6) if r["device"].startswith("cuda") else None

    write_lines([record for part in records.values() for record in part], answers)
    partial = glob.glob(os.path.join(glob.escape(out_dir), "answers.partial*.jsonl"))
    left = [line for path in partial for line in runtime.read_log(path) if stays(line)]  # of others, killed
    if left:
        write_lines(left, os.path.join(out_dir, "answers.partial0.jsonl"))
    for path in partial:
        if not left or not path.endswith("partial0.jsonl"):
            os.remove(path)
    if os.path.exists(measured):
        lines = [line for line in runtime.read_log(measured) if line.get("key") in keys or stays(line)]
        write_lines(lines, measured) if lines else os.remove(measured)
    written = [("figures", figures), ("answers", answers)]
    configurator.save(draw_report.finite(report), figures)
    for_prize = [key for key in new if key[1] in ARC_RULES]
    for name, suite in for_prize:
        which = [f"_{name}_{suite}".replace(os.sep, "-"), *([""] if len(for_prize) == 1 else [])]
        for path in (os.path.join(out_dir, f"submission{w}.json") for w in which):
            configurator.save(scores.submission(records[name, suite]), path)
            written.append(("submission", path))

    rows, drawn = [], [name for name in report if any(model == name for model, _ in records)]
    for suite in dict.fromkeys(suite for r in report.values() for suite in r["suites"]):
        if not suites.is_tasks(suite) or suite in suites.IN_WORDS:
            continue
        tasks = {}
        for name in drawn:
            for record in records.get((name, suite), []):
                tasks.setdefault(record["id"], {})[name] = record
        tasks = list(tasks.values())
        rows += [picture_row(list(tasks[i]), list(tasks[i].values())) for i in choose(tasks)]
    if rows:
        written.append(("picture", os.path.join(out_dir, "grids.png")))
        halt = (
            "; halt: how likely Route B thinks it is that all is right"
            if any(r["model"] == "trm" for r in report.values())
            else ""
        )
        arc.picture(rows, written[-1][1], f"{', '.join(drawn)}   (crosses: wrong cells{halt})")
    written.append(("report", draw_report.write(out_dir, args.json)))
    print("\n" + table(report) + "\n")
    for what, path in written:
        print(f"{what:12s} {path}")
    if not rows and any(suites.is_tasks(s) and s not in suites.IN_WORDS for s in chosen):
        print("picture      none: every task was too long")


def end_with_stdin():
    """Wait until whoever holds the other end of stdin has closed it, or died, and end with it."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def main():
    about = (
        __doc__[: __doc__.index("eval.json: {model name")]
        + "The top of eval_arc.py tells what these files hold, field by field."
    )
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}; see python eval_arc.py --help")
    parser.add_argument("checkpoints", metavar="CKPT", nargs="+", help="a ckpt.pt that train.py wrote")
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--suites", metavar="NAMES", help=f"separated by commas (default: all that are there): {suites.ALL}"
    )
    group.add_argument(
        "--tasks",
        metavar="PATH",
        help="your own tasks: a folder of ARC-style .json files, or one file, of one or many, "
        "or Kaggle's ..._challenges.json",
    )
    group.add_argument(
        "--limit", metavar="N", type=positive, help="only the first N tasks of each suite (default: all)"
    )
    group.add_argument(
        "--attempts",
        metavar="N",
        type=positive,
        help=f"answers that count in ARC suites (default {ATTEMPTS})",
    )
    group = parser.add_argument_group("how it is asked (more of anything takes longer)")
    group.add_argument(
        "--augment",
        metavar="N",
        type=positive,
        default=1,
        help="views of each task that vote (default 1: as it is)",
    )
    group.add_argument(
        "--samples", metavar="N", type=positive, default=1, help="Route A: answers to each view (default 1)"
    )
    group.add_argument(
        "--temperature", metavar="T", type=float, default=0.8, help="of answers that are drawn (default 0.8)"
    )
    group.add_argument(
        "--programs",
        metavar="N",
        type=whole,
        default=0,
        help="programs written for each ARC task (default 0)",
    )
    group.add_argument(
        "--n_sup",
        metavar="N",
        type=positive,
        help="Route B: supervision steps, at most (default: as it was trained)",
    )
    group.add_argument(
        "--halt",
        metavar="P",
        type=share,
        help="Route B: stop thinking once it is more than P sure (default: never)",
    )
    group.add_argument(
        "--ttt_steps",
        metavar="N",
        type=whole,
        default=0,
        help="test-time training: steps on each task (default 0)",
    )
    group.add_argument(
        "--ttt_rank", metavar="N", type=whole, default=8, help="its rank; 0 tunes all weights (default 8)"
    )
    group.add_argument(
        "--ttt_lr", metavar="RATE", type=float, default=1e-3, help="its learning rate (default 1e-3)"
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=whole,
        default=1337,
        help="of views, draws and test-time training (default 1337)",
    )
    group = parser.add_argument_group("where")
    group.add_argument(
        "--out_dir", metavar="FOLDER", help="where the results go (default: beside the checkpoint)"
    )
    group.add_argument(
        "--json", metavar="NAME", default="eval.json", help="file name of the figures (default eval.json)"
    )
    group.add_argument(
        "--device",
        metavar="NAME",
        default="auto",
        help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)",
    )
    group.add_argument(
        "--dtype",
        metavar="NAME",
        default="auto",
        help="float32, bfloat16, float16 (default: as train.py would choose; float32 on a CPU)",
    )
    parser.add_argument("--ends_with_stdin", action="store_true", help=argparse.SUPPRESS)  # of loop.py
    args = parser.parse_args()
    if args.ends_with_stdin:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    try:
        run(args)
        runtime.end_processes()
    except (ValueError, OSError) as e:
        if runtime.world_size > 1:
            runtime.stop(e)
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
