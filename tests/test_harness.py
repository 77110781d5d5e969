"""Our models behind lm-eval's interface: its figures are the ones that are known, on tasks built from local files."""

import functools
import json
import math
import sys
import types

import pytest
import torch
from test_language import Table, tiny
from tiny import stand_ins  # noqa: F401

import eval_arc
from smol import tokenizer as tok

try:
    from smol import harness

    missing = False
except ValueError:  # without lm-eval: our side of the interface, on top of modules that have its names alone
    names = ("lm_eval", "lm_eval.utils", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lm_eval"].utils = sys.modules["lm_eval.utils"]
        sys.modules["lm_eval.api.model"].TemplateLM = sys.modules["lm_eval.tasks"].TaskManager = object
        from smol import harness
    del sys.modules["smol.harness"], sys.modules["smol"].harness  # for all others, it is missing
    missing = True
pytestmark = pytest.mark.usefixtures("stand_ins")
needs_lm_eval = pytest.mark.skipif(missing, reason="needs lm-eval")

CAPITALS = (
    ("France", ("Paris", "Rome")),
    ("Italy", ("Oslo", "Rome")),
    ("Norway", ("Oslo", "Bern")),
    ("Peru", ("Lima", "Quito")),
)
RIGHT = (0, 1, 0, 0)
TEXTS = ("Grids are made of cells.", "Cells have colours, ten of them.")
TASKS = {
    "capitals": {
        "output_type": "multiple_choice",
        "doc_to_text": "The capital of {{country}} is",
        "doc_to_choice": "cities",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "sentences": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "The capital of {{country}} is",
        "doc_to_target": "{{city}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks")
    rows = {
        "capitals": [
            {"country": c, "cities": list(cities), "right": right}
            for (c, cities), right in zip(CAPITALS, RIGHT)
        ],
        "sentences": [{"text": text} for text in TEXTS],
        "writing": [
            {"country": c, "city": f" {cities[right]}"} for (c, cities), right in zip(CAPITALS, RIGHT)
        ],
    }
    for name, task in TASKS.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        files = {"data_files": {"test": str(out / f"{name}.jsonl")}, "cache_dir": str(out / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **task}
        (out / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML too
    return str(out)


@needs_lm_eval
def test_three_kinds_of_tasks_give_what_is_known(folder):
    """A model that knows three of the four capitals by heart, and is sure of the wrong one of the fourth."""
    known = [
        f"The capital of {c} is {cities[right]}. And more" for (c, cities), right in zip(CAPITALS[:3], RIGHT)
    ]
    figures = harness.evaluate(
        Table([*known, "The capital of Peru is Quito."]), ["capitals", "writing"], include_path=folder
    )
    capitals, writing = figures["results"]["capitals"], figures["results"]["writing"]
    assert (
        capitals["acc"]["value"] == 0.75
        and 0 < capitals["acc"]["interval"][0] < 0.75 < capitals["acc"]["interval"][1] <= 1
    )
    assert writing["exact_match"]["value"] == 0.75
    assert figures["items"] == {"capitals": 4, "writing": 4} and json.loads(json.dumps(figures)) == figures

    sentences = harness.evaluate(Table(), ["sentences"], include_path=folder)["results"][
        "sentences"
    ]  # all tokens are equally likely to it
    tokens = sum(len(tok.load().encode_ordinary(t)) for t in TEXTS)
    expected = math.log2(tok.VOCAB_SIZE) * tokens / sum(map(len, TEXTS))
    assert sentences["bits_per_byte"]["value"] == pytest.approx(expected, rel=1e-5)


@needs_lm_eval
@pytest.mark.parametrize("name", ["dense", "trm"])
def test_both_routes_go_through(folder, name):
    figures = harness.evaluate(tiny(name, block_size=24), list(TASKS), limit=2, include_path=folder)
    assert set(figures["results"]) == set(TASKS) and set(figures["items"].values()) == {2}


@needs_lm_eval
def test_a_text_longer_than_the_block_is_read_in_windows():
    """Every token predicted once, and all but a window's first from those before it."""
    model, ids = tiny("dense", block_size=8), tok.load().encode_ordinary(" ".join(TEXTS) * 2)
    (got,) = harness.Wrapped(model).loglikelihood_rolling(
        [type("Request", (), {"args": (" ".join(TEXTS) * 2,)})]
    )
    given, expected = [tok.EOT, *ids], 0.0
    last = len(ids) - len(ids) % 8 if len(ids) % 8 else len(ids)
    for start in range(0, last, 8):
        expected += score(model, given[start : start + 8], ids[start : start + 8])
    if last < len(ids):  # the last window is a full one, of which only the rest is counted
        expected += score(model, given[len(ids) - 8 : len(ids)], ids[-8:], count=len(ids) - last)
    assert got == pytest.approx(expected, rel=1e-4)


def score(model, given, wanted, count=None):
    with torch.no_grad():
        logs = model(torch.tensor([given]))[0][0].log_softmax(-1)
    return sum(float(logs[t, wanted[t]]) for t in range(len(wanted) - (count or len(wanted)), len(wanted)))


class Reads:
    """In place of a model: notes what it is given, and writes the same word for ever."""

    puzzle_format, config = "autoregressive", types.SimpleNamespace(block_size=64)

    def __init__(self):
        self.seen = []

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, prompts, max_new_tokens, temperature):
        self.seen += [len(p) for p in prompts]
        for _ in range(max_new_tokens):
            yield torch.full((len(prompts),), tok.load().encode_ordinary(" a")[0])


@pytest.mark.parametrize(
    "words, asked, read, written",
    [
        # What is written gives way to the prompt, down to half of block_size; then the prompt does
        (20, 8, 21, 8),
        (20, 60, 21, 43),
        (20, 64, 21, 43),
        (20, 2048, 21, 43),
        (80, 16, 48, 16),
        (60, 40, 32, 32),
        (80, 2048, 32, 32),
    ],
)
def test_a_prompt_keeps_its_room_whatever_is_asked_for_beside_it(words, asked, read, written, capsys):
    prompts, settings = [" b" * words, " b" * 20], [{"max_gen_toks": asked}, {"max_gen_toks": 8}]
    for order in (1, -1):
        model = Reads()
        wrapped = harness.Wrapped(model)
        first, second = wrapped.write(prompts[::order], settings[::order])[::order]
        assert model.seen[::order] == [read, 21] and (first, second) == (" a" * written, " a" * 8)
        wrapped.write(prompts, settings)
        fits = (read, written) == (words + 1, asked)
        assert capsys.readouterr().out.count("block_size 64") == (0 if fits else 1)  # once, for all


def test_what_is_written_ends_at_the_first_of_the_words():
    encode = tok.load().encode_ordinary
    assert harness.cut(encode("one. two\n"), ["\n", "."]) == ("one", True)
    assert harness.cut(encode("one two"), ["."]) == ("one two", False)
    assert harness.cut([*encode("one"), tok.EOT, *encode("two")], ["."]) == ("one", True)


@needs_lm_eval
def test_an_unknown_task_is_an_error_in_a_line_before_anything_is_measured(folder, tmp_path, monkeypatch):
    few = functools.partial(
        harness.TaskManager, include_defaults=False
    )  # lm-eval's own are thousands of files
    monkeypatch.setattr(harness, "TaskManager", lambda **kw: few(include_path=folder))
    harness.manager.cache_clear()
    with pytest.raises(ValueError, match="no task 'capitol': the closest are capitals"):
        harness.evaluate(Table(), ["capitol"], include_path=folder)
    monkeypatch.setattr(
        sys,
        "argv",
        ["eval_arc.py", "ckpt.pt", "--suites=sudoku4,lm_eval:capitals,sentense", f"--out_dir={tmp_path}"],
    )
    with pytest.raises(SystemExit, match="^error: lm-eval has no task 'sentense': the closest are sentences"):
        eval_arc.main()
    assert not list(tmp_path.iterdir())
    harness.manager.cache_clear()


def test_without_lm_eval_there_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "harness", raising=False)
    with pytest.raises(ValueError, match="pip install lm-eval"):
        from smol import harness  # noqa: F401
