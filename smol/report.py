"""
What an evaluation found, for people: a table, a picture, and report.html.

report.html is one file that opens from disk and fetches nothing: figures with intervals, curves of what was
solved and of the loss over training, and every task with every answer. Arrow keys or j and k go through the
tasks, comma and full stop through Route B's supervision steps; the address names the task, so it can be sent
to somebody.

`results` is eval.json and `records` are the lines of answers.jsonl, {(model, suite): [record, ...]}, as
eval_arc.py describes them. Read next: report.html, the template.
"""

import html
import json
import os
from pathlib import Path

import numpy as np

from smol import arc, language, runtime, solve, suites
from smol.files import write_whole

PANELS = 12  # grids beside each other in the picture
LEGIBLE = 12  # grids with longer sides are shown only where there are no smaller ones


def table(results):
    """eval.json as lines of text: the models, a row for each suite and model, and remarks."""
    lines, remarks = [], []
    for name, r in results.items():
        loss = "" if r["val_loss"] is None else f", validation loss {r['val_loss']:.3f}"
        lines.append(f"{name}: {r['params']:,} parameters, step {r['iter']}{loss}")
    rows = [["", "", "score", "solved", "", "95%", "pass@1", "oracle", "too long", "seconds"]]
    for suite in dict.fromkeys(suite for r in results.values() for suite in r["suites"]):
        for name, r in results.items():
            if suite in r["suites"] and suites.is_tasks(suite):
                rows.append([suite, name, *row(r["suites"][suite])])
                remarks += [f"{suite}: {name} {remark}" for remark in remarks_on(r["suites"][suite])]
            elif suite in r["suites"]:
                remarks += ["", f"{suite}, {name}"]
                for what, value, ends, remark in language.rows(r["suites"][suite]):
                    value = "-" if value is None else f"{value:.3f}"
                    ends = "{:.3f} to {:.3f}".format(*ends) if ends else ""
                    remarks.append(f"  {what:32} {value:>8}   {ends:16}   {remark}".rstrip())
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows if len(rows) > 1 else []:
        left = [text.ljust(width) for text, width in zip(cells[:2], widths)]
        right = [text.rjust(width) for text, width in zip(cells[2:], widths[2:])]
        lines.append("  ".join(left + right).rstrip())
    return "\n".join(lines + remarks)


def row(s):
    """Figures of a suite of tasks as cells of the table. Only ARC suites have a score and two attempts."""
    score = f"{s['score']:.1%}" if s["attempts"] > 1 else ""
    solved = [f"{s['solved']}/{s['total']}", f"{s['solved'] / max(1, s['total']):.1%}"]
    ends = "{:.1%} to {:.1%}".format(*s["interval"])
    more = [s["pass_1"], s["oracle"], s["too_long"], f"{s['seconds']:.1f}"]
    return [str(cell) for cell in (score, *solved, ends, *more)]


def remarks_on(s):
    """How a suite was asked, what of it could be guessed, and whom the model beats by more than chance."""
    asked = [f"--{k}={v}" for k, v in s["settings"].items() if v != getattr(solve.Settings, k, None)]
    if asked or s["protocol"] != "inductive":
        yield f"was asked with {' '.join(asked) or 'the defaults'} ({s['protocol']})"
    if s["attempts"] > 1 and s["solved"]:
        solved, total = s["guessable"]
        yield (
            f"solved {solved} of {total} whose answers have at most 9 cells or one colour, "
            f"{s['solved'] - solved} of {s['total'] - total} others"
        )
    for other, a in s.get("against", {}).items():
        if a["p"] < 0.05 and a["only_this"] > a["only_other"]:
            tally = f"{a['only_this']} tasks alone against {a['only_other']}"
            yield f"is better than {other}: {tally} (p = {a['p']:.2g})"


# -----------------------------------------------------------------------------
# grids.png


def draw_grids(results, records, path):
    """
    A line for each suite of grids: a few of its tasks, each with every model's first attempt, solved and
    unsolved ones in proportion. No file if all are too long.
    """
    rows = []
    for suite in dict.fromkeys(suite for _, suite in records if suite not in suites.IN_WORDS):
        by_task = {}
        for name in results:
            for record in records.get((name, suite), []):
                by_task.setdefault(record["id"], {})[name] = record
        tasks = [panels_of(task) for task in choose(list(by_task.values()))]
        panels = [panel for task in tasks for panel in [*task, None]][:-1]
        if panels:
            solved = ((n, r["suites"][suite]) for n, r in results.items() if suite in r["suites"])
            tally = ", ".join(f"{name} {s['solved']} of {s['total']}" for name, s in solved)
            kind = next(iter(next(iter(by_task.values())).values()))["kind"]
            rows.append((f"{suite}: {tally}", kind, panels))
    if rows:
        arc.picture(rows, path, "Held-out tasks and first attempts")


def grid_of(rows):
    return rows and np.array([[int(cell) for cell in row] for row in rows], np.uint8)


def choose(tasks):
    """
    Some of a suite's tasks, each {model: record}, as many as fit into PANELS: solved ones (by some model)
    first, and as large a share of them as among all. Large ones only where there are no others.
    """

    def large(task):
        test = next(iter(task.values()))["test"][0]
        grids = [test["input"], test["expected"] or test["input"]]
        return max(side for grid in grids for side in (len(grid), len(grid[0]))) > LEGIBLE

    fit = [task for task in tasks if not all(r["too_long"] for r in task.values())]
    fit = [task for task in fit if not large(task)] or fit
    if not fit:
        return []
    fit.sort(key=lambda task: not any(r["solved"] for r in task.values()))
    shown = min(len(fit), max(1, PANELS // len(panels_of(fit[0]))))
    return [fit[i] for i in np.linspace(0, len(fit) - 1, shown).astype(int)]


def panels_of(task):
    """Panels for arc.picture of a task, {model: record}, with its first demonstration and test input."""
    record = next(iter(task.values()))
    expected, panels = grid_of(record["test"][0]["expected"]), []
    for x, y in record["demonstrations"][:1]:
        panels += [("demonstration", grid_of(x), None), ("its output", grid_of(y), None)]
    panels.append((record["id"].partition(":")[0], grid_of(record["test"][0]["input"]), None))
    if expected is not None:
        panels.append(("expected", expected, None))
    for name, r in task.items():
        attempts = r["test"][0]["attempts"]
        panels.append((name, grid_of(attempts[0]) if attempts else None, expected))
    return panels


# -----------------------------------------------------------------------------
# report.html


def write(results, records, folder):
    """folder/report.html; returns its path. Whatever is in the data, it cannot end its script element."""
    models = []
    for name, r in results.items():  # where a run lies on this machine is nobody else's business
        shown = {key: r.get(key) for key in ("model", "params", "iter", "val_loss", "card", "sha256")}
        figures = {}
        for suite, s in r["suites"].items():
            more = {"remarks": [*remarks_on(s)]} if suites.is_tasks(suite) else {"rows": language.rows(s)}
            figures[suite] = {**s, **more}
        data = {"stage": r["data"]["stage"], "tag": r["data"]["tag"]}
        models.append({"name": name, **shown, "data": data, "suites": figures})
    data = {
        "models": models,
        "records": [record for some in records.values() for record in some],
        "history": history(results),
        "palette": arc.PALETTE,
    }
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    title = " and ".join(results) if len(results) < 4 else os.path.basename(os.path.abspath(folder))
    before, after = template.replace("$TITLE$", html.escape(title)).split("$DATA$</script>")
    text = json.dumps(finite(data), separators=(",", ":")).replace("<", "\\u003c")
    path = os.path.join(folder, "report.html")
    write_whole((before + text + "</script>" + after).encode(), path)
    return path


def history(results):
    """
    Of each run, [{name, model: its first one here, points, losses}]. points: [{iter, suites: {suite: {solved,
    total, interval}}}] of its checkpoints where several were asked, else as in its evals.jsonl. losses: the
    held-out loss {source: [[iter, loss]]} of its log.jsonl. Both files lie beside a checkpoint, and are
    published with it.
    """
    runs, out = {}, []
    for name, r in results.items():
        runs.setdefault(r["folder"], []).append(name)
    for folder, names in runs.items():
        entries = [results[name] for name in names]
        if len(names) == 1:
            entries = runtime.read_log(os.path.join(folder, "evals.jsonl"))
        points, losses = {}, {}
        for entry in entries:  # of a run that was resumed, the last entry of each step counts
            keys, counted = ("solved", "total", "interval"), entry["suites"].items()
            found = {suite: {key: s[key] for key in keys} for suite, s in counted if s.get("total")}
            points[entry["iter"]] = {"iter": entry["iter"], "suites": found}
        for entry in runtime.read_log(os.path.join(folder, "log.jsonl")):
            for source, loss in entry.get("val_losses", {}).items():
                losses.setdefault(source, []).append([entry["iter"], loss])
        name = names[0] if len(names) == 1 else os.path.basename(folder)
        points = [points[i] for i in sorted(points.keys() - {None})]
        out.append({"name": name, "model": names[0], "points": points, "losses": losses})
    return [run for run in out if run["points"] or run["losses"]]


def finite(value):
    """The same with None in place of numbers that are not finite: JSON has none."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)
