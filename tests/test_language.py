"""The suites of text: sound items, figures that known models must get, lm-eval on local tasks."""

import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make, stand_ins  # noqa: F401

from smol import curate, language, sandbox, snapshots, suites
from smol import tokenizer as tok

pytestmark = pytest.mark.usefixtures("stand_ins")
QUESTIONS, FUNCTIONS = suites.questions(), suites.functions()
SENTENCE = "Grids are made of cells, and cells have colours.\n"


class Table(torch.nn.Module):
    """A model that has memorised texts: after any beginning of one it is sure of the next token."""

    puzzle_format = "autoregressive"

    def __init__(self, texts=(), block_size=256):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(block_size=block_size)
        self.next = {}
        for text in texts:
            ids = [tok.EOT, *tok.load().encode_ordinary(text), tok.EOT]
            self.next.update({tuple(ids[:i]): ids[i] for i in range(1, len(ids))})

    def forward(self, idx):
        assert idx.shape[1] <= self.config.block_size
        logits = torch.zeros(*idx.shape, tok.VOCAB_SIZE)
        for row, ids in zip(logits, idx.tolist()):
            for t in range(len(ids)):
                if tuple(ids[: t + 1]) in self.next:
                    row[t, self.next[tuple(ids[: t + 1])]] = 50.0
        return logits, None, None

    def continue_texts(self, prompts, uniform, temperature, n_ids):
        rows = [p.tolist() for p in prompts]
        for row in rows:
            for _ in range(uniform.shape[1]):
                row.append(self.next.get(tuple(row), tok.EOT))
        return [torch.tensor(row[len(p) :]) for row, p in zip(rows, prompts)]


# the items


def test_questions_are_sound():
    """Four choices, none the beginning of another; no favourite place or length of the right one."""
    assert len(QUESTIONS) >= 100 and len({question for _, question, _, _ in QUESTIONS}) == len(QUESTIONS)
    for category, question, choices, right in QUESTIONS:
        ends = [tok.load().encode_ordinary(" " + choice) for choice in choices]
        assert len(set(choices)) == 4
        assert not any(a != b and a == b[: len(a)] for a in ends for b in ends), question
        if category == "arithmetic":
            value = eval(question.removesuffix("="))  # ours
            assert [int(c) == value for c in choices] == [i == right for i in range(4)]
    assert max(Counter(right for *_, right in QUESTIONS).values()) <= math.ceil(len(QUESTIONS) / 4)
    lengths = [
        (len(c[right]), [len(x) for i, x in enumerate(c) if i != right]) for _, _, c, right in QUESTIONS
    ]
    assert sum(n > max(others) for n, others in lengths) < 0.3 * len(QUESTIONS)
    assert sum(n < min(others) for n, others in lengths) < 0.3 * len(QUESTIONS)


def test_every_function_has_a_solution_that_passes_and_a_mistake_that_fails():
    assert len(FUNCTIONS) >= 30 and len({name for name, *_ in FUNCTIONS}) == len(FUNCTIONS)
    everything = "".join(stub + solution for _, stub, _, solution, _ in FUNCTIONS)
    solved = sandbox.run_tests(everything, [test for _, _, tests, _, _ in FUNCTIONS for test in tests])
    assert solved.ok, solved.reason

    def passes(space, call, value):
        try:
            return sandbox.same(eval(call, space), value)
        except Exception:
            return False

    for name, stub, tests, _, mistake in FUNCTIONS:
        for wrong in (mistake, "    return None\n"):
            space = {}
            exec(stub + wrong, space)  # ours
            assert not all(passes(space, *test) for test in tests), name


def test_documents_that_quote_an_item_are_recognised():
    texts = suites.language_texts()
    known = curate.text_tables(texts)
    words = re.compile("[A-Za-z0-9]+")
    long = [t for some in texts.values() for t in some if len(words.findall(t)) >= curate.TEXT_NGRAM]
    assert len(long) > 80 and all(t in long for t in texts["language_functions"])
    documents = [f"Somebody wrote this once: {t.upper()}, and then they went home." for t in long]
    assert len(curate.quoted(curate.read_words(documents), known)) == len(long)
    other = "A function that a dentist wrote returns the sum of two."
    assert not curate.quoted(curate.read_words([other]), known)


# models of which it is known what they must get


@pytest.mark.parametrize("right", [True, False])
def test_who_has_memorised_the_answers_gets_all_and_who_has_memorised_mistakes_none(right):
    model = Table(
        [f"{question} {choices[place if right else place - 1]}" for _, question, choices, place in QUESTIONS]
        + [f"{stub}{good if right else bad}\nprint(1)\n" for _, stub, _, good, bad in FUNCTIONS]
    )
    some = QUESTIONS[::4]
    questions, code = language.answer_questions(model, some), language.write_code(model, FUNCTIONS[:10])
    assert (questions["right"], questions["accuracy"]) == (right * len(some), float(right))
    assert questions["interval"][right] == float(right)
    assert all((a["picked"] == a["right"]) == right for a in questions["answers"])
    assert code["solved"] == right * 10 and all(bool(a["reason"]) != right for a in code["answers"])
    assert code["answers"][0]["written"].rstrip() == FUNCTIONS[0][3 if right else 4].rstrip()  # no print(1)


def test_who_knows_nothing_is_at_chance_and_as_surprised_as_can_be(tmp_path):
    """Ends of as many tokens are equally likely to it: of four such it gets a quarter of the point."""
    questions = language.answer_questions(Table(), QUESTIONS[::3])
    even = [a for a in questions["answers"] if len(set(a["log_probabilities"])) == 1]
    assert len(even) > 15 and questions["interval"][0] < 0.25 < questions["interval"][1]
    write_stage(tmp_path, [SENTENCE] * 40)
    (shards,) = language.held_out(tmp_path, "s").values()
    figures = language.bits_per_byte(Table(block_size=64), tmp_path, shards)
    tokens = len(tok.load().encode_ordinary(SENTENCE))
    expected = math.log2(tok.VOCAB_SIZE) * tokens / len(SENTENCE)
    assert figures["bits_per_byte"] == pytest.approx(expected, rel=0.02)
    assert figures["interval"][0] <= figures["bits_per_byte"] <= figures["interval"][1]


def write_stage(data, texts):
    about = {"source": "words", "group": "web", "kind": "text", "augment": "none"}
    documents = [np.array([*tok.load().encode_ordinary(t), tok.EOT], np.uint16) for t in texts]
    entries = [snapshots.write_shard(data, about, split, documents) for split in ("train", "val")]
    mixture = {"stage": "s", "seed": 1, "groups": {}, "weights": {"words": 1.0}}
    mixture["tokenizer"] = tok.fingerprint()
    snapshots.write_stage(data, "s", entries, mixture, {})


# real models


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_log_probs_are_those_of_one_row_at_a_time(name):
    model, rng = make(name, block_size=40), np.random.default_rng(1)
    sizes = ((1, 1), (5, 3), (2, 9), (30, 10), (70, 4), (3, 60))
    rows = [(rng.integers(0, 50000, a).tolist(), rng.integers(0, 50000, b).tolist()) for a, b in sizes]
    for (context, continuation), (found, likeliest) in zip(
        rows, language.log_probs(model, rows), strict=True
    ):
        ids = torch.tensor([*context, *continuation][-41:])
        with torch.no_grad():
            expected = model(ids[None, :-1])[0][0].log_softmax(-1)
        places = range(len(ids) - 1 - min(len(continuation), len(ids) - 1), len(ids) - 1)
        np.testing.assert_allclose(found, [float(expected[t, ids[t + 1]]) for t in places], 1e-4, 1e-4)
        assert likeliest.tolist() == [bool(expected[t].argmax() == ids[t + 1]) for t in places]


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_both_routes_go_through_the_whole_suite(name, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "CODE_TOKENS", 12)  # an untrained model uses them all
    write_stage(tmp_path, [SENTENCE] * 20)
    figures = language.evaluate(make(name), tmp_path, language.held_out(tmp_path, "s"), limit=3)
    assert figures["bits_per_byte"]["words"]["bits_per_byte"] > 2 and figures["seconds"] > 0
    assert (figures["questions"]["total"], figures["code"]["total"]) == (3, 3)
    texts = [question for _, question, *_ in suites.questions()]  # evenly spread
    asked = [answer["question"] for answer in figures["questions"]["answers"]]
    assert asked == [texts[0], texts[(len(texts) - 1) // 2], texts[-1]]
    assert json.loads(json.dumps(figures)) == figures and len(language.rows(figures)) == 3


# intervals


def test_the_interval_of_a_ratio_covers_the_true_one_in_95_of_100_samples():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(400):
        below = rng.integers(50, 150, 40)
        low, high = language.ratio_interval(below * 2.0 + rng.normal(0, 30, 40), below)
        hits += low <= 2.0 <= high
    assert 0.9 < hits / 400 < 0.985
    assert language.ratio_interval(np.array([3.0]), np.array([1])) is None


# lm-eval

CAPITALS = [("France", "Paris", "Rome"), ("Italy", "Rome", "Oslo"), ("Peru", "Lima", "Quito")]
TEXT = "Grids are made of cells. Cells have colours, ten of them."
CAPITAL = {"doc_to_text": "The capital of {{country}} is"}
BENCHMARKS = {
    "capitals": {**CAPITAL, "output_type": "multiple_choice", "doc_to_choice": "cities", "doc_to_target": 0},
    "sentences": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    "writing": {**CAPITAL, "output_type": "generate_until", "doc_to_target": "{{city}}"},
}
MEAN = {"aggregation": "mean", "higher_is_better": True}
BENCHMARKS["capitals"]["metric_list"] = [{"metric": "acc", **MEAN}]
BENCHMARKS["sentences"]["metric_list"] = [{"metric": "bits_per_byte"}]
BENCHMARKS["writing"]["metric_list"] = [{"metric": "exact_match", **MEAN}]
BENCHMARKS["writing"]["generation_kwargs"] = {"until": ["."], "max_gen_toks": 8}


@pytest.fixture
def local_benchmarks(tmp_path, monkeypatch):
    """Three tasks of lm-eval from local files, in place of its own, which are thousands."""
    tasks = pytest.importorskip("lm_eval.tasks")
    rows = [{"country": c, "cities": some, "city": f" {some[0]}", "text": TEXT} for c, *some in CAPITALS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    for name, task in BENCHMARKS.items():
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **task}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML too
    table = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(language, "benchmarks", lambda: table)


def test_lm_eval_gives_what_is_known(local_benchmarks):
    """A model that has memorised two of three capitals, and the wrong one of the third."""
    known = [f"The capital of {c} is {right}. And more" for c, right, _ in CAPITALS[:2]]
    model = Table([*known, "The capital of Peru is Quito."])
    figures = language.evaluate_benchmarks(model, "lm_eval:capitals,writing")["results"]
    value, (low, high) = figures["capitals"]["acc"].values()
    assert low < value < high and value == pytest.approx(2 / 3, abs=1e-5)
    assert figures["writing"]["exact_match"]["value"] == pytest.approx(2 / 3, abs=1e-5)
    # Everything is equally likely to a model that knows nothing, also beyond its block_size
    found = language.evaluate_benchmarks(Table(block_size=8), "lm_eval:sentences")["results"]["sentences"]
    expected = math.log2(tok.VOCAB_SIZE) * len(tok.load().encode_ordinary(TEXT)) / len(TEXT)
    assert found["bits_per_byte"]["value"] == pytest.approx(expected, rel=1e-5)


def test_lm_eval_keeps_the_end_of_each_context_that_is_too_long(local_benchmarks):
    """Of a prompt four tokens are read, and two where two are written. The third answer is a wrong one."""
    model = Table(block_size=4)
    for country, city in (("France", "Paris"), ("Italy", "Rome"), ("Peru", "Quito")):
        prompt = tok.load().encode_ordinary(f"The capital of {country} is")
        first, *rest = tok.load().encode_ordinary(f" {city}.")
        model.next |= {tuple(prompt[-4:]): first, tuple(prompt[-2:]): first, (*prompt[-2:], first): rest[0]}
    figures = language.evaluate_benchmarks(model, "lm_eval:capitals,writing")["results"]
    assert figures["capitals"]["acc"]["value"] == pytest.approx(2 / 3, abs=1e-5)
    assert figures["writing"]["exact_match"]["value"] == pytest.approx(2 / 3, abs=1e-5)
