"""The table, the picture, and the page: what is in it, that it needs nothing else, that its keys work."""

import html
import json
import re
import shutil
import subprocess

import pytest

import eval_arc
from smol import arc, report, solve
from smol.solve import Candidate, Given

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "</script><script>document.title = 'broken in'</script><!-- \u2028 <b>bold</b> &amp;"
TASKS = [arc.Task(t.id, t.kind, t.train, t.test[:1]) for t in arc.load("arc1_eval")[:3]]
ANSWERS = [t.test[0][1] for t in TASKS]


def record(number, attempts, steps=(), too_long=False):
    candidates = [Candidate(grid, 2, -0.25, NASTY) for grid in attempts]
    return eval_arc.judge(TASKS[number], [None if too_long else Given(candidates, list(steps))], 2)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Three ARC tasks by two models: a solves the first, b the first two, the third is too long for a."""
    folder = tmp_path_factory.mktemp("results")
    wrong = [(answer + 1) % 10 for answer in ANSWERS]
    steps = [(None, 0.1), (wrong[0], 0.4), (ANSWERS[0], 0.9)]
    words = arc.Task("logic-0", "logic", [], [(NASTY, "yes")])
    records = {
        ("a", "arc1"): [record(0, [wrong[0], ANSWERS[0]]), record(1, [wrong[1]]), record(2, [], (), True)],
        ("b", "arc1"): [record(i, [ANSWERS[i]], steps) for i in range(2)] + [record(2, [wrong[2][:1]])],
        ("a", "logic"): [eval_arc.judge(words, [Given([Candidate("no")])], 1)],
    }
    asked = {"category": "facts", "question": NASTY, "choices": ["w", "x", "y", "z"], "right": 1, "picked": 2}
    share = {"total": 1, "accuracy": 0.0, "interval": [0.0, 0.8]}
    answer = {"name": "f", "stub": "def f():\n", "written": NASTY, "solved": False, "reason": NASTY}
    questions = {**share, "right": 0, "chance": 0.25, "answers": [{**asked, "log_probabilities": [-1] * 4}]}
    language = {
        "bits_per_byte": {"stdlib": {"bits_per_byte": 1.25, "interval": [1.2, 1.3], "bytes": 1000}},
        "questions": questions,
        "code": {**share, "solved": 0, "answers": [answer]},
    }
    lm_eval = {"results": {"sciq": {"acc": {"value": 0.5, "interval": [0.4, 0.6]}}}}
    for (name, suite), some in records.items():
        for r in some:
            r.update(model=name, suite=suite)
    results = {}
    for name, model in (("a", "dense"), ("b", "trm")):
        about = {"params": 7, "iter": 3, "val_loss": float("nan"), "model": model}
        about["data"] = {"data_dir": str(folder), "stage": "demo", "tag": None}
        where = {"checkpoint": str(folder / name / "ckpt.pt"), "folder": str(folder / name)}
        results[name] = {**about, **where, "suites": {}}
        for key, some in records.items():
            if key[0] == name:
                figures = eval_arc.figures(some, 2 if key[1] == "arc1" else 1)
                asked = {"settings": vars(solve.Settings(augment=4)), "protocol": "inductive"}
                results[name]["suites"][key[1]] = {**figures, **asked}
        (folder / name).mkdir()
        suites = {"arc1": {"solved": 1, "total": 9, "interval": [0, 1]}, "language": {}}
        lines = [json.dumps({"iter": i, "suites": suites}) + "\n" for i in (2, 1)]
        text = "".join(lines) + '{"iter": 3, "cut'  # killed while writing
        (folder / name / "evals.jsonl").write_text(text)
        entries = [{"iter": 1, "loss": 5}, *({"iter": i, "val_losses": {"maze": 4 / i}} for i in (1, 2))]
        (folder / name / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    results["a"]["suites"].update({"language": language, "lm_eval:sciq": lm_eval})
    return results, records, folder


@pytest.fixture(scope="module")
def written(found):
    results, records, folder = found
    assert report.write(results, records, str(folder)) == str(folder / "report.html")
    return folder / "report.html"


def scripts(page):
    """The data and the page's own, as a browser finds them: the first </script> ends a script."""
    return re.findall(r"<script[^>]*>(.*?)</script", page, re.S)


def rows(grid):
    return ["".join(map(str, row)) for row in grid.tolist()]


def test_the_page_has_everything_that_was_measured(written):
    text = scripts(written.read_text(encoding="utf-8"))[0]
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"no browser reads {name}"))
    assert [m["name"] for m in data["models"]] == ["a", "b"] and data["models"][0]["val_loss"] is None
    assert data["models"][1]["suites"]["arc1"]["solved"] == 2
    shown = {(r["model"], r["suite"], r["id"]): r for r in data["records"]}
    assert len(shown) == 7 and ("a", "logic", "logic-0") in shown
    for task in TASKS:
        r = shown["b", "arc1", task.id]
        assert r["demonstrations"] == [[rows(x), rows(y)] for x, y in task.train]
        assert [r["test"][0]["input"], r["test"][0]["expected"]] == [rows(grid) for grid in task.test[0]]
    first = {name: shown[name, "arc1", TASKS[0].id]["test"][0] for name in "ab"}
    assert first["a"]["solved"] and first["a"]["attempts"][1] == rows(ANSWERS[0])
    assert first["a"]["scores"] == [-0.25, -0.25]
    assert [halting for _, halting in first["b"]["steps"]] == [0.1, 0.4, 0.9]
    assert {h["name"]: [p["iter"] for p in h["points"]] for h in data["history"]} == {
        "a": [1, 2],
        "b": [1, 2],
    }
    assert data["history"][0]["losses"] == {"maze": [[1, 4], [2, 2]]}
    assert str(written.parent) not in text  # a path of this machine is nobody's business


def test_checkpoints_of_one_run_are_points_of_its_curves(found):
    results = json.loads(json.dumps(found[0]))
    results = {f"a/{step}": {**results["a"], "iter": step} for step in (20, 10, None)}  # None: weights alone
    (run,) = report.history(results)
    assert (run["name"], run["model"], [p["iter"] for p in run["points"]]) == ("a", "a/20", [10, 20])
    assert run["points"][0]["suites"]["arc1"]["solved"] == 1


def test_the_page_needs_nothing_else_and_runs_nothing_of_the_models(written):
    text = written.read_text(encoding="utf-8")
    data, _ = scripts(text)
    rest = text.replace(data, "")
    assert "$DATA$" not in data and "$TITLE$" not in text and "broken in" not in rest
    assert len(re.findall('http-equiv="Content-Security-Policy" content="default-src \'none\';', rest)) == 1
    reaching_out = r"@import|url\(|fetch\(|XMLHttpRequest|<[^>]* (src|href)="
    assert not re.search(rf"{reaching_out}|innerHTML|document\.write|\beval\(", rest)


def test_the_table_says_how_models_were_asked_and_which_is_better(found):
    results = json.loads(json.dumps(found[0]))
    results["b"]["suites"]["arc1"]["against"] = {"a": {"only_this": 9, "only_other": 1, "p": 0.021}}
    results["a"]["suites"]["arc1"]["against"] = {"b": {"only_this": 1, "only_other": 9, "p": 0.021}}
    results["a"]["suites"]["logic"]["against"] = {"b": {"only_this": 2, "only_other": 1, "p": 1.0}}
    lines = report.table(results).splitlines()
    assert sum("is better than" in line for line in lines) == 1
    row = next(line.split() for line in lines if line.split()[:2] == ["arc1", "b"])
    assert row[2:4] == ["66.7%", "2/3"]
    assert "arc1: b is better than a: 9 tasks alone against 1 (p = 0.021)" in lines
    assert "arc1: b was asked with --augment=4 (inductive)" in lines
    results["a"]["suites"]["arc1"]["guessable"] = [1, 2]
    apart = "a solved 1 of 2 whose answers have at most 9 cells or one colour, 0 of 1 others"
    assert f"arc1: {apart}" in report.table(results).splitlines()


def test_the_picture_shows_solved_tasks_first_and_as_large_a_share_as_there_is():
    def task(solved, side=3, too_long=False):
        rows = ["0" * side] * side
        test = [{"input": rows, "expected": rows, "attempts": []}]
        return {"a": {"id": "x", "solved": solved, "too_long": too_long, "demonstrations": [], "test": test}}

    for n in (0, 1, 10, 19, 20):
        shown = [t["a"]["solved"] for t in report.choose([task(i >= 20 - n) for i in range(20)])]
        assert len(shown) == report.PANELS // 3 and shown == sorted(shown, reverse=True)
        assert abs(sum(shown) - len(shown) * n / 20) <= 1
        assert any(shown) == (n > 0) and all(shown) == (n == 20)
    large, small = task(True, 20), task(False)
    assert report.choose([large, small]) == [small] and report.choose([large]) == [large]
    large["a"]["test"][0] |= {"input": ["0"], "expected": ["0" * 20]}
    assert report.choose([large, small]) == [small]
    assert report.choose([task(False, too_long=True)]) == []


# in a block of its own: the page has names of its own at the top
DRIVE = """
const said = {}, $ = query => document.querySelector(query);
const count = () => $("#count").textContent;
const press = key => {
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
};
said.keys = ["j", "ArrowRight", "k", "ArrowLeft", "ArrowLeft"].map(key => { press(key); return count(); });
said.title = $("#task h3").textContent;
said.rows = [...document.querySelectorAll("#results td:first-child")].map(cell => cell.textContent);
said.figures = [...document.querySelectorAll("#results b")].map(figure => figure.textContent);
const slider = $("input.steps"), label = () => slider.parentNode.lastChild.textContent;
said.steps = [label()];
press(","); said.steps.push(label());
press(","); said.steps.push(label());
const choose = (id, value) => { $(id).value = value; $(id).onchange(); return count().at(-1); };
const outcomes = ["unsolved", "solved by b", "models differ", "too long", "all outcomes"];
said.outcomes = outcomes.map(value => choose("#outcome", value)).join("");
choose("#suite", "logic");
said.text = [$("#task pre").textContent, document.title];
choose("#suite", "arc1");
said.ink = [...$("#task canvas").getContext("2d").getImageData(3, 3, 1, 1).data].slice(0, 3);
const output = Object.assign(document.createElement("output"), {textContent: JSON.stringify(said)});
document.body.replaceChildren(output);
"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_in_a_browser(written, tmp_path):
    """Keyboard, filters, slider and drawing, driven by a script put behind the page's own."""
    text = written.read_text(encoding="utf-8").replace("</body>", f"<script>{{{DRIVE}}}</script></body>")
    (tmp_path / "driven.html").write_text(text, encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --dump-dom"
    profile, page = f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'driven.html'}"
    command = [BROWSER, *options.split(), profile, page]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<output>(.*?)</output>", done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    said = json.loads(html.unescape(found[1]))
    assert said["keys"] == [f"{n} of 4" for n in (2, 3, 2, 1, 1)] and TASKS[0].id in said["title"]
    assert said["steps"] == [
        "step 3 of 3 · halt 0.90 · right",
        f"step 2 of 3 · halt 0.40 · {ANSWERS[0].size} wrong",
        "step 1 of 3 · halt 0.10",
    ]
    assert said["rows"] == ["arc1", "logic", "bits per byte, stdlib", "questions", "code", "sciq, acc"]
    assert said["figures"] == ["33.3%", "66.7%", "0%", "1.25", "0", "0", "0.5"]
    assert said["outcomes"] == "22114"
    assert said["text"] == [NASTY, "a and b"]  # as text, and nothing in it ran
    colour = arc.PALETTE[int(TASKS[0].train[0][0][0, 0])]
    assert said["ink"] == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
