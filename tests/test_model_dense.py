"""Route A: its attention by hand, grids under their grammar, what caches and answers hold."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TASKS, dense, text

from model_dense import Config, Model, cache_bytes, rope_3d
from smol import arc, engine
from smol import tokenizer as tok
from smol.loader import IGNORE, pad_rows, puzzle_row


@torch.no_grad()
@pytest.mark.parametrize("n_embd", (64, 1024))
def test_an_untrained_model_knows_nothing(n_embd):
    """Also not that a token comes again, which a tied embedding too large would make it predict."""
    torch.manual_seed(0)
    model = Model(Config(n_layer=1, n_head=n_embd // 32, n_embd=n_embd, n_ff=64))
    idx = torch.randint(50257, (1, 64))
    assert abs(model(idx, idx.roll(-1, 1))[1].item() - np.log(tok.VOCAB_SIZE)) < 0.1
    (block,) = model.blocks
    x = torch.randn(1, 5, n_embd)
    assert torch.equal(block(x, None)[0], x)  # every branch adds nothing
    assert not block.mixer.f_proj[1].weight.any()  # KDA forgets at the pace of its dt_bias alone


# ---- attention


def attention_by_hand(a, x, positions, base, seen):
    """Full attention one query at a time; seen(i) -> the positions that i may look at."""
    T, D = x.shape
    H, d = a.n_head, D // a.n_head
    q, k, v = (x @ a.qkv_proj.weight.T).view(T, 3, H, d).unbind(1)

    def prepare(t, norm):  # RMSNorm, then pairs (i, i + d / 2) turned as complex numbers
        t = t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        turned = torch.complex(t[..., : d // 2], t[..., d // 2 :])
        for i in range(d // 2):
            angle = positions[:, i % 3].double() * base ** (-(i // 3) / (d / 6))
            turned[..., i] *= torch.polar(torch.ones_like(angle), angle).to(turned.dtype)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    q, k = prepare(q, a.q_norm), prepare(k, a.k_norm)
    y = torch.zeros(T, H, d)
    for i in range(T):
        for h in range(H):
            p = (k[seen(i), h] @ q[i, h] / d**0.5).softmax(0)
            y[i, h] = p @ v[seen(i), h]
    return y.reshape(T, D) @ a.o_proj.weight.T


@torch.no_grad()
def test_attention_is_its_formula():
    a = dense(layer_pattern="a").blocks[0].mixer
    idx = torch.from_numpy(arc.encode("arc", TASKS[2].train).astype(np.int64))[None, :20]
    positions = arc.positions(idx)
    x = torch.randn(1, 20, 24, generator=torch.Generator().manual_seed(0))
    rope = rope_3d(positions, 12, 100.0)
    causal = attention_by_hand(a, x[0], positions[0], 100.0, lambda i: list(range(i + 1)))
    torch.testing.assert_close(a(x, rope)[0], causal, rtol=1e-4, atol=1e-5)
    attn_mask = torch.arange(20).view(1, 1, 1, 20) < 15
    free = attention_by_hand(a, x[0], positions[0], 100.0, lambda i: list(range(15)))
    torch.testing.assert_close(a(x, rope, attn_mask)[0], free, rtol=1e-4, atol=1e-5)


# ---- grids


def allowed_by_hand(rows, H, W):
    """The ids that may follow these rows of an answer, the last of them unfinished."""
    width, colours = W if len(rows) == 1 else len(rows[0]), list(range(tok.CELL0, tok.CELL0 + 10))
    if len(rows) > 1 and not rows[-1]:
        return [tok.EOT] + (colours if len(rows) <= H else [])
    ends = rows[-1] and (len(rows) == 1 or len(rows[-1]) == width)
    return (colours if len(rows[-1]) < width else []) + ([tok.ROW] if ends else [])


@torch.no_grad()
def answer_by_hand(model, task, test_input):
    """Greedy under the grammar, by the full forward at every token."""
    ids = arc.encode_prompt(task.kind, task.train, test_input).astype(np.int64).tolist()
    rows, score = [[]], 0.0
    while True:
        allowed = allowed_by_hand(rows, *arc.canvas_shape(task.train, test_input))
        log_p = model(torch.tensor([ids]), mode="puzzle")[0][0, -1, allowed].log_softmax(0)
        choice = allowed[log_p.argmax()]
        score += log_p.max().item()
        if choice == tok.EOT:
            return np.array(rows[:-1], dtype=np.uint8), score
        ids.append(choice)
        if choice == tok.ROW:
            rows.append([])
        else:
            rows[-1].append(choice - tok.CELL0)


@pytest.mark.parametrize("seed, size", ((1, 0.3), (0, 1.0)))
def test_answers_are_greedy_decoding_by_hand_in_any_batch(seed, size, monkeypatch):
    model = dense(seed, size=size)
    whole = model.answer(TASKS)
    monkeypatch.setattr(engine, "BATCH_TOKENS", 150)
    parts = model.answer(TASKS)
    for task, *answers in zip(TASKS, whole, parts):
        for (test_input, _), *given in zip(task.test, *answers):
            want, score = answer_by_hand(model, task, test_input)
            for ((grid, got),) in given:
                assert grid.dtype == np.uint8 and np.array_equal(grid, want) and abs(got - score) < 1e-3


@torch.no_grad()
def test_puzzle_loss_is_cross_entropy_among_what_a_grid_is_written_with():
    """Row by row, however many answers are learned from; no other word of the vocabulary counts."""
    model = dense(3)
    documents = [arc.encode(t.kind, [*t.train, *t.test]) for t in TASKS[:4]]
    rows = [puzzle_row(d, "autoregressive", "arc", np.random.default_rng(5)) for d in documents]
    want = 0.0
    for idx, targets in rows:
        logits = model(torch.from_numpy(idx)[None], mode="puzzle")[0][0]
        parts = []
        for at in np.flatnonzero(targets != IGNORE):
            log_p = logits[at, engine.GRID_IDS].log_softmax(0)
            parts.append(-log_p[engine.GRID_IDS.index(targets[at])])
        want += sum(parts) / len(parts) / len(rows)
    batch = pad_rows(rows, max(len(idx) for idx, _ in rows))
    torch.testing.assert_close(model(*batch, mode="puzzle")[1], want, rtol=1e-4, atol=1e-5)
    model.wte.weight[: tok.EOT] += 1.0  # words of text
    torch.testing.assert_close(model(*batch, mode="puzzle")[1], want, rtol=1e-4, atol=1e-5)


def test_draws_depend_on_seed_and_prompt_alone():
    model = dense(1)
    together = model.answer(TASKS[:3], samples=3, seed=5)
    for task, given in zip(TASKS, together):
        for alone, some in zip(model.answer([task], samples=3, seed=5)[0], given):
            assert [g.tolist() for g, _ in alone] == [g.tolist() for g, _ in some] and len(some) == 3
    assert any(a[0][1][0].tolist() != b[0][1][0].tolist() for a, b in zip(together, model.answer(TASKS, 3)))
    logits = torch.zeros(4000, 12)
    logits[:, 1] = 1.0
    noise = [np.random.default_rng(i) for i in range(4000)]
    drawn = engine.write_grids(logits, lambda drawn: logits, [(1, 1)] * 4000, 0.5, noise)
    share = np.mean([grid[0, 0] == 1 for grid, _ in drawn])
    assert abs(share - math.exp(2) / (math.exp(2) + 9)) < 0.03  # of the ten colours at temperature 0.5


@pytest.mark.parametrize("wrong", (math.nan, math.inf))
def test_logits_that_are_not_finite_are_no_answer(wrong):
    """The other rows are written as if it were not there, and all ends with the largest grid."""
    limits = [(2, 3), (2, 2), (1, 3)]
    logits = torch.randn(9, 3, 12, generator=torch.Generator().manual_seed(0))
    logits[:, :, engine.END] = -1e9  # stops only where it must

    def grids(logits, rows):
        steps = iter(logits[1:, rows])  # as many as the largest grid takes: StopIteration after them
        sizes, noise = [limits[r] for r in rows], [None] * len(rows)
        return engine.write_grids(logits[0, rows], lambda drawn: next(steps), sizes, 1.0, noise)

    for at in (0, 2, 4):
        broken = logits.clone()
        broken[at, 1] = wrong
        first, none, last = grids(broken, [0, 1, 2])
        assert none is None
        for got, (want,) in ((first, grids(logits, [0])), (last, grids(logits, [2]))):
            assert np.array_equal(got[0], want[0]) and got[1] == want[1]


@torch.no_grad()
def test_the_score_of_an_answer_is_its_log_probability_by_the_forward_and_as_it_was_written():
    """Among what the grammar allows: colours, the end of the row, in the first column that of the grid."""
    model, rng = dense(2, size=0.3), np.random.default_rng(0)
    tasks = [replace(task, test=[pair]) for task in TASKS for pair in task.test]
    given = [[rng.integers(0, 10, s).astype(np.uint8) for s in ((2, 3), (1, 1), (4, 2))] for _ in tasks]
    for task, answers, got in zip(tasks, given, model.score_answers(tasks, given)):
        ((test_input, _),) = task.test
        for answer, score in zip(answers, got):
            ids = arc.encode(task.kind, [*task.train, (test_input, answer)]).astype(np.int64)
            logits = model(torch.from_numpy(ids)[None], mode="puzzle")[0][0]
            limit = np.maximum(arc.canvas_shape(task.train, test_input), answer.shape)
            rows, want = [[]], 0.0
            for at in range(len(arc.encode_prompt(task.kind, task.train, test_input)), len(ids)):
                allowed, came = allowed_by_hand(rows, *limit), int(ids[at])
                want += float(logits[at - 1, allowed].log_softmax(0)[allowed.index(came)])
                rows = [*rows, []] if came == tok.ROW else [*rows[:-1], [*rows[-1], came]]
            assert abs(score - want) < 1e-3
    ((written, other),) = model.answer(tasks[:1], samples=2)[0]
    scores = model.score_answers(tasks[:1], [[written[0], other[0]]])[0]
    assert scores == pytest.approx([written[1], other[1]], abs=1e-3)


# ---- costs


def test_cache_bytes_are_those_of_the_caches():
    model = dense()
    _, cache = engine.prefill(model, text(1, 50))
    held = [t.untyped_storage().nbytes() for layer in cache.layers for t in layer]
    assert sum(held) == cache_bytes(model.config, 50)
