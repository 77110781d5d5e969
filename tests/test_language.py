"""The language suite: its items are sound, its figures are what known models must get, and training data is kept clear of it."""

import ast
import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smol import checkpoint, curate, language, language_items, sandbox, snapshots
from smol import tokenizer as tok

QUESTIONS, FUNCTIONS = language_items.questions(), language_items.functions()


def tiny(name, block_size=128):
    torch.manual_seed(1)
    settings = {
        "n_layer": 2,
        "layer_pattern": "ka",
        "n_head": 2,
        "n_embd": 16,
        "n_ff": 24,
        "block_size": block_size,
    }
    recursion = {"n_latent": 1, "n_recursion": 1, "n_sup": 2} if name == "trm" else {}
    model = checkpoint.make_model(name, {**settings, **recursion})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.eval()


class Table(torch.nn.Module):
    """A model that knows texts by heart: after any beginning of one it is sure of the next token; elsewhere all are equally likely."""

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

    def generate(self, prompts, max_new_tokens, temperature):
        assert temperature == 0
        rows = [p.tolist() for p in prompts]
        for _ in range(max_new_tokens):
            drawn = [self.next.get(tuple(ids), tok.EOT) for ids in rows]
            rows = [[*ids, i] for ids, i in zip(rows, drawn)]
            yield torch.tensor(drawn)


# the items


def test_there_are_enough_questions_of_every_kind_and_none_twice():
    assert len(QUESTIONS) >= 100 and all(count >= 10 for count in Counter(q[0] for q in QUESTIONS).values())
    assert len({beginning for _, beginning, _, _ in QUESTIONS}) == len(QUESTIONS)
    for _, beginning, choices, _ in QUESTIONS:
        assert (
            len(choices) == len(set(choices)) == 4
            and beginning == beginning.strip()
            and all(c == c.strip() and c for c in choices)
        )
        ends = [
            tok.load().encode_ordinary(" " + choice) for choice in choices
        ]  # one that begins like another is never less likely
        assert not any(a != b and a == b[: len(a)] for a in ends for b in ends), beginning


def test_the_right_answer_is_at_no_favourite_place_and_of_no_favourite_length():
    assert max(Counter(right for *_, right in QUESTIONS).values()) <= math.ceil(len(QUESTIONS) / 4)
    longest = sum(
        len(choices[right]) > max(len(c) for i, c in enumerate(choices) if i != right)
        for _, _, choices, right in QUESTIONS
    )
    shortest = sum(
        len(choices[right]) < min(len(c) for i, c in enumerate(choices) if i != right)
        for _, _, choices, right in QUESTIONS
    )
    assert longest < 0.3 * len(QUESTIONS) and shortest < 0.3 * len(QUESTIONS)


def test_sums_are_right_and_the_wrong_ones_wrong():
    sums = [(b, choices, right) for category, b, choices, right in QUESTIONS if category == "arithmetic"]
    assert len(sums) > 10
    for beginning, choices, right in sums:
        value = eval(beginning.removesuffix("="))  # ours
        assert [int(c) == value for c in choices] == [i == right for i in range(4)]


def test_every_function_has_a_solution_that_passes_and_a_mistake_that_fails():
    assert len(FUNCTIONS) >= 30 and len({name for name, *_ in FUNCTIONS}) == len(FUNCTIONS)
    everything = "".join(stub + solution for _, stub, _, solution, _ in FUNCTIONS)
    solved = sandbox.run_tests(everything, [test for _, _, tests, _, _ in FUNCTIONS for test in tests])
    assert solved.ok, solved.reason
    for name, stub, tests, solution, mistake in FUNCTIONS:
        assert (
            len(tests) >= 2
            and f"def {name}(" in stub
            and ast.get_docstring(ast.parse(stub + solution).body[0])
        )
        for wrong in (mistake, "    return None\n", "    pass\n"):
            space = {}
            exec(stub + wrong, space)  # ours

            def passes(call, value):
                try:
                    return sandbox.same(eval(call, space), value)
                except Exception:
                    return False

            assert not all(passes(*test) for test in tests), name


def test_documents_that_quote_an_item_are_recognised():
    texts = language_items.evaluation_texts()
    known = curate.TextEvaluations(curate.text_tables(texts))
    long = [
        t
        for group in texts.values()
        for t in group
        if len(re.findall(r"[A-Za-z0-9]+", t)) >= curate.TEXT_NGRAM
    ]
    assert len(long) > 80 and all(t in long for t in texts["language_functions"])
    documents = [f"Somebody wrote this once: {t.upper()}, and then they went home." for t in long]
    assert len(known.quoted(curate.read_words(documents))) == len(long)
    assert not known.quoted(
        curate.read_words(["A man who looks after people's teeth wrote a function that returns the sum."])
    )


# models of which it is known what they must get


def test_who_knows_everything_is_always_right():
    model = Table(
        [f"{beginning} {choices[right]}" for _, beginning, choices, right in QUESTIONS]
        + [f"{stub}{solution}\nprint(1)\n" for _, stub, _, solution, _ in FUNCTIONS]
    )
    questions, code = language.answer_questions(model), language.write_code(model, FUNCTIONS[:20])
    assert (questions["right"], questions["accuracy"], questions["interval"][1]) == (len(QUESTIONS), 1.0, 1.0)
    assert all(a["picked"] == a["right"] for a in questions["answers"])
    assert [(a["solved"], a["reason"]) for a in code] == [(True, "")] * 20
    assert code[0]["written"].rstrip() == FUNCTIONS[0][3].rstrip()  # and not the print after it


def test_who_knows_only_what_is_wrong_is_never_right():
    model = Table(
        [f"{beginning} {choices[right - 1]}" for _, beginning, choices, right in QUESTIONS]
        + [stub + mistake for _, stub, _, _, mistake in FUNCTIONS]
    )
    questions, code = language.answer_questions(model), language.write_code(model, FUNCTIONS[:10])
    assert (questions["right"], questions["interval"][0]) == (0, 0.0)
    assert not any(a["solved"] for a in code) and all(a["reason"] for a in code)


def test_who_knows_nothing_is_at_chance_and_as_surprised_as_can_be(tmp_path):
    """Ends of as many tokens are equally likely to it: where all four are, it must get a quarter of the point."""
    questions = language.answer_questions(Table())
    even = [a for a in questions["answers"] if len(set(a["log_probabilities"])) == 1]
    assert (
        len(even) > 60
        and questions["chance"] == 0.25
        and questions["interval"][0] < 0.25 < questions["interval"][1]
    )
    data, text = tmp_path / "data", "Grids are made of cells, and cells have colours.\n"
    write_stage(data, [text] * 40)
    (entries,) = language.held_out(data, "s").values()
    figures = language.bits_per_byte(Table(block_size=64), data, entries)
    tokens, n_bytes = len(tok.load().encode_ordinary(text)), len(text)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(tok.VOCAB_SIZE) * tokens / n_bytes, rel=0.02)
    low, high = figures["interval"]
    assert low <= figures["bits_per_byte"] <= high


def write_stage(data, texts):
    about = {"source": "words", "group": "web", "kind": "text", "augment": "none"}
    documents = [np.array([*tok.load().encode_ordinary(t), tok.EOT], np.uint16) for t in texts]
    entries = [snapshots.write_shard(data, about, split, documents) for split in ("train", "val")]
    mixture = {
        "stage": "s",
        "seed": 1,
        "groups": {},
        "weights": {"words": 1.0},
        "tokenizer": tok.fingerprint(),
    }
    snapshots.write_stage(data, "s", entries, mixture, {})


# real models


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_log_probabilities_are_those_of_one_row_at_a_time(name):
    model, rng = tiny(name, block_size=40), np.random.default_rng(1)
    sizes = ((1, 1), (5, 3), (2, 9), (30, 10), (70, 4), (3, 60))
    rows = [(rng.integers(0, 50000, a).tolist(), rng.integers(0, 50000, b).tolist()) for a, b in sizes]
    for (context, continuation), (got, greedy) in zip(
        rows, language.log_probabilities(model, rows), strict=True
    ):
        ids = torch.tensor([*context, *continuation][-41:])
        with torch.no_grad():
            expected = model(ids[None, :-1])[0][0].log_softmax(-1)
        n = min(len(continuation), len(ids) - 1)
        want = [float(expected[t, ids[t + 1]]) for t in range(len(ids) - 1 - n, len(ids) - 1)]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        assert greedy.tolist() == [
            bool(expected[t].argmax() == ids[t + 1]) for t in range(len(ids) - 1 - n, len(ids) - 1)
        ]


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_both_routes_go_through_the_whole_suite(name, tmp_path, monkeypatch):
    monkeypatch.setattr(language.complete, "__defaults__", (12,))  # tokens: an untrained model uses them all
    write_stage(tmp_path, ["Grids are made of cells, and cells have colours.\n"] * 20)
    bars, make_bar = [], language.tqdm
    monkeypatch.setattr(language, "tqdm", lambda **kw: bars.append(make_bar(**kw)) or bars[-1])
    figures = language.evaluate(tiny(name), tmp_path, "s", limit=3)
    assert figures["bits_per_byte"]["words"]["bits_per_byte"] > 2 and figures["seconds"] > 0
    assert (figures["questions"]["total"], figures["code"]["total"]) == (3, 3)
    assert [bar.n for bar in bars] == [bar.total for bar in bars] and [bar.total for bar in bars][1:] == [
        3 * 4,
        3,
    ]
    assert json.loads(json.dumps(figures)) == figures and len(language.table(figures).splitlines()) >= 6


def test_parts_that_were_measured_before_are_not_measured_again(tmp_path, monkeypatch):
    """Cut off after any part, the rest gives what the whole gives: its figures, and its seconds."""
    write_stage(tmp_path, ["Grids are made of cells, and cells have colours.\n"] * 20)
    monkeypatch.setattr(language, "CODE_BATCH", 1)
    model, kept = Table(), {}
    whole = language.evaluate(model, tmp_path, "s", limit=2, keep=kept.__setitem__)
    assert list(kept) == [
        "bits per byte of words",
        "questions",
        *(f"code from {FUNCTIONS[i][0]} on" for i in (0, -1)),
    ]
    for n in (1, 3, 4):
        new = []
        before = json.loads(json.dumps(dict(list(kept.items())[:n])))
        again = language.evaluate(
            model, tmp_path, "s", limit=2, before=before, keep=lambda part, found: new.append(part)
        )
        assert new == list(kept)[n:] and (n < 4 or again == whole)
        assert {k: v for k, v in again.items() if k != "seconds"} == {
            k: v for k, v in whole.items() if k != "seconds"
        }


def test_what_is_written_ends_with_the_function():
    encode = tok.load().encode_ordinary
    text = "    x = 1\n\n    return x\nprint(x)\n"
    assert language.body(encode(text)) == ("    x = 1\n\n    return x\n", True)
    assert language.body(encode("    return 1\n")) == ("    return 1\n", False)
    assert language.body([*encode("    return 1"), tok.EOT, *encode(" more")]) == ("    return 1", True)
    assert language.body(encode("no")) == ("", True)
    assert language.body([]) == ("", False)


# figures


def test_the_interval_of_a_ratio():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(400):  # the interval of a ratio must hold the true one in about 95% of samples
        below = rng.integers(50, 150, 40)
        low, high = language.ratio_interval(below * 2.0 + rng.normal(0, 30, 40), below)
        hits += low <= 2.0 <= high
    assert 0.9 < hits / 400 < 0.985
    assert language.ratio_interval(np.array([3.0]), np.array([1])) is None
