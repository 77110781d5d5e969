"""The report: what is in the page, that it needs nothing else, and, where there is a browser, that it can be gone through by keyboard."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from smol import arc, report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "</script><script>document.title = 'broken in'</script><!-- \u2028 <b>bold</b> &amp;"


def rows(grid):
    return ["".join(map(str, row)) for row in grid.tolist()]


def record(model, task, attempts, steps=None, too_long=False, suite="arc1"):
    test = []
    for x, y in task.test:
        right = [a is not None and np.array_equal(a, y) for a in attempts]
        test.append(
            {
                "input": rows(x),
                "expected": rows(y),
                "attempts": [a if a is None else rows(a) for a in attempts],
                "right": right,
                "solved": any(right),
                "oracle": any(right),
                "votes": [2, 1],
                "scores": [-0.25, float("-inf")],
                "candidates": 3,
                "programs": [NASTY, None],
                **({"steps": [[g if g is None else rows(g), h] for g, h in steps]} if steps else {}),
            }
        )
    solved = all(t["solved"] for t in test)
    return {
        "model": model,
        "suite": suite,
        "id": task.id,
        "kind": task.kind,
        "solved": solved,
        "too_long": too_long,
        "key": "0123",
        "demonstrations": [[rows(x), rows(y)] for x, y in task.train],
        "test": test,
    }


def figures(solved, total):
    return {
        "total": total,
        "solved": solved,
        "interval": [0.1, 0.9],
        "outputs_total": total,
        "outputs_solved": solved,
        "too_long": 0,
        "pass_1": solved,
        "pass_2": solved,
        "oracle": solved,
        "seconds": 1.0,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three ARC tasks by two models and a question in words by one: A solves the first, B the first two, the third is too long for A."""
    out = tmp_path_factory.mktemp("results")
    tasks = arc.load("arc1_eval")[:3]
    tasks = [arc.Task(t.id, t.kind, t.train, t.test[:1]) for t in tasks]
    answer = [t.test[0][1] for t in tasks]
    wrong = [(a + 1) % 10 for a in answer]
    records = [record("a", tasks[0], [wrong[0], answer[0]]), record("a", tasks[1], [wrong[1], None])]
    records.append(record("a", tasks[2], [], too_long=True))
    steps = [(None, 0.1), (wrong[0], 0.4), (answer[0], 0.9)]
    records += [
        record("b", tasks[0], [answer[0]], steps),
        record("b", tasks[1], [answer[1]], steps),
        record("b", tasks[2], [wrong[2][:1]]),
    ]
    records.append(
        {
            "model": "a",
            "suite": "logic",
            "id": "logic-0",
            "kind": "logic",
            "solved": False,
            "too_long": False,
            "demonstrations": [],
            "test": [{"input": NASTY, "expected": "yes", "attempts": ["no"], "solved": False}],
        }
    )
    (out / "answers.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records) + '{"model": "a", "sui'
    )  # killed while writing
    asked = {"category": "facts", "question": NASTY, "choices": ["w", "x", "y", "z"], "right": 1, "picked": 2}
    questions = {
        "total": 1,
        "right": 0,
        "accuracy": 0.0,
        "interval": [0.0, 0.8],
        "chance": 0.25,
        "by_category": {"facts": [0, 1]},
        "answers": [{**asked, "log_probabilities": [-1, -2, -1, -3]}],
    }
    code = {
        "total": 1,
        "solved": 0,
        "accuracy": 0.0,
        "interval": [0.0, 0.8],
        "answers": [{"name": "f", "stub": "def f():\n", "written": NASTY, "solved": False, "reason": NASTY}],
    }
    language = {
        "bits_per_byte": {
            "stdlib": {"bits_per_byte": 1.25, "interval": [1.2, 1.3], "bytes": 1000, "tokens": 300}
        },
        "questions": questions,
        "code": code,
        "seconds": 1.0,
    }
    lm_eval = {"results": {"sciq": {"acc": {"value": 0.5, "interval": [0.4, 0.6]}}}}
    for name in "ab":
        (out / name).mkdir()
        lines = [
            {"iter": i, "suites": {"arc1": {"solved": i, "total": 9, "interval": [0, 1]}, "language": {}}}
            for i in (2, 1)
        ]
        (out / name / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    suites = {
        "a": {"arc1": figures(1, 3), "logic": figures(0, 1), "language": language, "lm_eval:sciq": lm_eval},
        "b": {"arc1": figures(2, 3)},
    }
    about = {"params": 7, "iter": 3, "val_loss": float("nan"), "config": {"x": 1}}
    reports = {
        name: {**about, "model": model, "checkpoint": str(out / name / "ckpt.pt"), "suites": suites[name]}
        for name, model in (("a", "dense"), ("b", "trm"))
    }
    (out / "eval.json").write_text(json.dumps(reports))
    return out


class Page(HTMLParser):
    """Everything that a page consists of: its elements with their attributes, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += text


def test_the_page_has_everything_that_was_measured(folder):
    path = report.write(str(folder))
    assert path == str(folder / "report.html")
    page = Page(open(path, encoding="utf-8").read())
    data = json.loads(page.scripts[0], parse_constant=lambda name: pytest.fail(f"no browser reads {name}"))
    assert (
        [m["name"] for m in data["models"]] == ["a", "b"]
        and data["models"][0]["val_loss"] is None
        and "config" not in data["models"][0]
    )
    assert data["models"][1]["suites"]["arc1"]["solved"] == 2 and len(data["palette"]) == 10
    tasks = arc.load("arc1_eval")[:3]
    assert [t["id"] for t in data["tasks"]] == [t.id for t in tasks] + ["logic-0"]
    for task, shown in zip(tasks, data["tasks"]):
        assert shown["demonstrations"] == [[rows(x), rows(y)] for x, y in task.train]
        assert shown["test"] == [{"input": rows(task.test[0][0]), "expected": rows(task.test[0][1])}]
        assert set(shown["answers"]) == {"a", "b"}
    first = {name: answer["test"][0] for name, answer in data["tasks"][0]["answers"].items()}
    assert (
        first["a"]["solved"]
        and first["a"]["attempts"][1] == rows(tasks[0].test[0][1])
        and first["a"]["scores"] == [-0.25, None]
    )
    assert [halt for _, halt in first["b"]["steps"]] == [0.1, 0.4, 0.9]
    assert data["tasks"][2]["answers"]["a"]["too_long"] and data["tasks"][3]["test"][0]["input"] == NASTY
    assert [
        (h["name"], [p["iter"] for p in h["points"]], list(h["points"][0]["suites"])) for h in data["history"]
    ] == [("a", [1, 2], ["arc1"]), ("b", [1, 2], ["arc1"])]


def test_the_page_needs_nothing_else_and_runs_nothing_of_the_models(folder):
    text = open(report.write(str(folder)), encoding="utf-8").read()
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 2 and "broken in" not in page.scripts[1]
    assert not any(set(attributes) & {"src", "href", "srcset", "data"} for _, attributes in page.elements)
    policy = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'")
    assert not re.search(
        r"@import|url\(|innerHTML|fetch\(|XMLHttpRequest|document\.write|\beval\(",
        text.replace(page.scripts[0], ""),
    )
    assert "$DATA$" not in page.scripts[0] and "$TITLE$" not in text


def test_a_run_that_was_evaluated_as_it_went_shows_its_curves_alone(folder, tmp_path):
    shutil.copy(folder / "a" / "evals.jsonl", tmp_path)
    data = report.gather(str(tmp_path))
    assert data["models"] == data["tasks"] == [] and [len(h["points"]) for h in data["history"]] == [2]
    assert os.path.isfile(report.write(str(tmp_path)))


def test_what_is_wrong_is_said_in_a_line(tmp_path):
    (tmp_path / "eval.json").write_text('{"a": ')
    for folder, words in ((tmp_path, "is damaged"), (tmp_path / "none", "nothing to draw")):
        with pytest.raises((OSError, ValueError), match=words) as e:
            report.write(str(folder))
        assert len(str(e.value).splitlines()) == 1
    assert os.listdir(tmp_path) == ["eval.json"]


DRIVE = """
const said = [], $ = query => document.querySelector(query);
const look = what => said.push([what, $("#count").textContent, $("#task h3")?.textContent ?? ""]);
const press = key => { document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true})); look(key); };
look("start");
["j", "ArrowRight", "k", "ArrowLeft", "ArrowLeft", "j"].forEach(press);
press("k");
const slider = $("input.steps"), label = () => slider.parentNode.lastChild.textContent;
said.push(["slider", slider.value, label()]);
press(","); said.push(["slider", slider.value, label()]);
press(","); said.push(["slider", slider.value, label()]);
const choose = (id, value) => { $(id).value = value; $(id).onchange(); look(value); };
["unsolved", "solved by b", "models differ", "too long", "all outcomes"].forEach(value => choose("#outcome", value));
choose("#suite", "logic");
said.push(["text", $("#task pre").textContent, document.title]);
$("#search").focus(); press("j");
choose("#suite", "arc1");
const ink = [...$("#task canvas").getContext("2d").getImageData(3, 3, 1, 1).data].slice(0, 3).join();
said.push(["cell", ink, $("#tiles").children.length]);
const howMany = query => document.querySelectorAll(query).length;
said.push(["figures", howMany("#results tbody tr:not(.group)"), howMany("#curves circle")]);
document.body.replaceChildren(Object.assign(document.createElement("output"), {textContent: JSON.stringify(said)}));
"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_in_a_browser(folder, tmp_path):
    """Keyboard, filters, slider and drawing, driven inside headless chromium by a script put behind the page's own."""
    text = open(report.write(str(folder)), encoding="utf-8").read()
    (tmp_path / "driven.html").write_text(
        text.replace("</body>", f"<script>{DRIVE}</script></body>"), encoding="utf-8"
    )
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"file://{tmp_path / 'driven.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<output>(.*?)</output>", done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    said = json.loads(html.unescape(found[1]))
    tasks = arc.load("arc1_eval")[:3]
    counts = [(what, count) for what, count, _ in said[:8]]
    assert counts == [
        ("start", "1 of 4"),
        ("j", "2 of 4"),
        ("ArrowRight", "3 of 4"),
        ("k", "2 of 4"),
        ("ArrowLeft", "1 of 4"),
        ("ArrowLeft", "1 of 4"),
        ("j", "2 of 4"),
        ("k", "1 of 4"),
    ]
    assert all(tasks[int(count[0]) - 1].id in title for _, count, title in said[:8])
    wrong = tasks[0].test[0][1].size
    assert [entry[1:] for entry in said if entry[0] == "slider"] == [
        ["3", "step 3 of 3 · halt 0.90 · right"],
        ["2", f"step 2 of 3 · halt 0.40 · {wrong} wrong"],
        ["1", "step 1 of 3 · halt 0.10"],
    ]
    filtered = {what: count[-1] for what, count, _ in said[-11:-5]}
    assert filtered == {
        "unsolved": "2",
        "solved by b": "2",
        "models differ": "1",
        "too long": "1",
        "all outcomes": "4",
        "logic": "1",
    }
    (_, text, title), (_, count, _), _, (_, ink, tiles), (_, n_figures, n_points) = said[-5:]
    assert (text, title) == (NASTY, "a and b")  # as text, and nothing in it ran
    assert count == "1 of 1"  # typing a j in the search box goes nowhere
    colour = arc.PALETTE[int(tasks[0].train[0][0][0, 0])]
    assert (ink, tiles) == (",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5)), 3)
    assert (n_figures, n_points) == (6, 4)
