"""
report.html: what an evaluation found, to look at: figures with intervals, curves over training, and every task with every answer.

One file that opens from disk and fetches nothing: report.html with the data put in. In it: arrow keys or j and k go through the
tasks, comma and full stop through Route B's supervision steps; the address names the task, so it can be sent to somebody.

eval_arc.py writes it after every evaluation; its docstring says what is in the files it is drawn from. Read next: report.html.
"""

import html
import json
import math
import os

from smol import arc, runtime
from smol.files import write_whole

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.html")
LEFT_OUT = ("config", "model_config", "suites")  # of a model's report: nobody looks for them here


def gather(out_dir, json_name="eval.json"):
    """
    -> what the page draws: {models: [{name, suites, ...}], tasks: [{suite, id, kind, demonstrations, test, answers: {model: ...}}],
    history: [{name, points: [{iter, suites: {suite: {solved, total, interval}}}]}], palette}. FileNotFoundError where there is nothing to
    draw, ValueError for a damaged file, both in one line.
    """
    models, tasks, logs = [], {}, {}
    if os.path.isfile(os.path.join(out_dir, json_name)):
        report = read_json(os.path.join(out_dir, json_name))
        for name, r in report.items():
            models.append(
                {
                    **{k: v for k, v in r.items() if k not in LEFT_OUT},
                    "name": name,
                    "suites": r.get("suites") or {},
                }
            )
            if r.get("checkpoint"):
                logs[name] = os.path.join(os.path.dirname(r["checkpoint"]) or ".", "evals.jsonl")
        for record in runtime.read_log(os.path.join(out_dir, "answers.jsonl")):
            add(tasks, record, report)
    if not logs or os.path.join(out_dir, "evals.jsonl") not in logs.values():
        logs.setdefault(os.path.basename(os.path.abspath(out_dir)), os.path.join(out_dir, "evals.jsonl"))
    history = [
        {"name": name, "points": points} for name, path in logs.items() if (points := read_history(path))
    ]
    if not models and not history:
        raise FileNotFoundError(
            f"nothing to draw in {out_dir}: it has no {json_name}, which eval_arc.py writes, and no evals.jsonl"
        )
    return {"models": models, "tasks": list(tasks.values()), "history": history, "palette": arc.PALETTE}


def add(tasks, record, names):
    """Put a line of answers.jsonl with the other models' answers to the same task. names: of the models in the report."""
    if not {"model", "suite", "id", "test"} <= record.keys() or record["model"] not in names:
        return
    task = tasks.setdefault(
        (record["suite"], record["id"]),
        {
            "suite": record["suite"],
            "id": record["id"],
            "kind": record.get("kind"),
            "demonstrations": record.get("demonstrations") or [],
            "test": [{"input": t.get("input"), "expected": t.get("expected")} for t in record["test"]],
            "answers": {},
        },
    )
    task["answers"][record["model"]] = {
        "solved": record.get("solved"),
        "too_long": record.get("too_long"),
        "test": [
            {k: v for k, v in t.items() if k not in ("input", "expected", "right", "candidates")}
            for t in record["test"]
        ],
    }


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
        raise ValueError(f"{path} is damaged, or not what eval_arc.py writes: evaluate again")
    return value


def read_history(path):
    """evals.jsonl -> list of {iter, suites: {suite: {solved, total, interval}}} by step, of suites of tasks; empty if there is no file."""
    points = {}
    for entry in runtime.read_log(path):
        suites = {
            suite: {k: s.get(k) for k in ("solved", "total", "interval")}
            for suite, s in (entry.get("suites") or {}).items()
            if isinstance(s, dict) and s.get("total") and "solved" in s
        }
        if suites and isinstance(entry.get("iter"), int):
            points.setdefault(entry["iter"], {"iter": entry["iter"], "suites": {}})["suites"].update(suites)
    return [points[i] for i in sorted(points)]


def finite(value):
    """The same with None in place of numbers that are none: JSON has no NaN, and a browser would refuse all of it."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(data, title):
    """-> the HTML. Whatever is in `data`, it cannot end the script element that it stands in."""
    with open(TEMPLATE, encoding="utf-8") as f:
        before, after = f.read().replace("$TITLE$", html.escape(title)).split("$DATA$</script>")
    return (
        before + json.dumps(finite(data), separators=(",", ":")).replace("<", "\\u003c") + "</script>" + after
    )


def write(out_dir, json_name="eval.json"):
    """Draw out_dir/report.html. -> its path. Written whole or not at all; raises as gather() does."""
    data = gather(out_dir, json_name)
    title = " and ".join(m["name"] for m in data["models"])
    text = page(data, title if 0 < len(title) < 60 else os.path.basename(os.path.abspath(out_dir)))
    path = os.path.join(out_dir, "report.html")
    write_whole(text.encode(), path)
    return path
