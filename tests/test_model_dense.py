"""Route A beyond what both routes share (test_models.py): documents in one row, decoding of prompts of any lengths, grouped queries."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_models import TASKS, dense, make_task, text, trm

import model_dense
import model_trm
from model_dense import Config, Model, cache_bytes, document_starts, next_place, sample, tokens_at_once
from smol import arc, runtime
from smol import tokenizer as tok

PATTERNS = ("kkka", "a", "k", "kkkkkkka")


def documents(lengths, seed=0):
    """One row of documents, each begun by an EOT, and a list of where they begin."""
    parts = [torch.cat([torch.tensor([tok.EOT]), text(1, n, seed + i)[0]]) for i, n in enumerate(lengths)]
    return torch.cat(parts)[None], np.cumsum([0] + [n + 1 for n in lengths]).tolist()


@torch.no_grad()
@pytest.mark.parametrize("n_embd", (64, 640, 1024))
def test_an_untrained_model_knows_nothing(n_embd):
    """However wide: also not that a token comes again, which a tied embedding too large would have it say."""
    torch.manual_seed(0)
    model = Model(Config(n_layer=1, n_head=n_embd // 32, n_embd=n_embd, n_ff=64))
    idx = torch.randint(50257, (1, 64))
    loss = model(idx, idx.roll(-1, 1))[1]
    assert abs(loss.item() - np.log(tok.VOCAB_SIZE)) < 0.1


# ---- documents


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_a_document_among_others_is_as_if_alone(pattern):
    model = dense(layer_pattern=pattern, n_layer=len(pattern) if len(pattern) > 4 else 4)
    idx, bounds = documents([40, 1, 0, 2, 90, 5])
    logits = model(idx)[0][0]
    for a, b in zip(bounds, bounds[1:]):
        torch.testing.assert_close(logits[a:b], model(idx[:, a:b])[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_changing_one_document_moves_no_other(pattern):
    model = dense(layer_pattern=pattern, n_layer=len(pattern) if len(pattern) > 4 else 4)
    model.double()  # so that rounding, which differs, is far below what is looked for
    idx, bounds = documents([30, 3, 60, 12])
    idx = torch.cat([text(1, 20, seed=9), idx], 1)  # the row begins in the middle of a document
    bounds = [0] + [b + 20 for b in bounds]
    idx = torch.cat([idx, text(1, idx.shape[1], seed=8)])  # beside a row without any
    before = model(idx)[0]
    for a, b in zip(bounds, bounds[1:]):
        other = idx.clone()
        other[0, a + (a > 0) : b] = text(1, b - a - (a > 0), seed=77)
        moved = (model(other)[0] - before).abs().amax(-1)
        assert (moved[0, a + (a > 0) : b] > 1e-3).all()
        moved[0, a:b] = 0
        assert moved.max() < 1e-9, (a, b)
    joined = dense(
        layer_pattern=pattern, separate_documents=False, n_layer=len(pattern) if len(pattern) > 4 else 4
    )
    before, other = joined(idx)[0], idx.clone()
    other[0, 5] += 1
    assert (joined(other)[0] - before)[0, bounds[2]].abs().max() > 1e-5


def test_no_gradient_crosses_documents():
    model = dense()
    idx, bounds = documents([30, 20])
    targets = torch.full_like(idx, model_dense.IGNORE)
    targets[0, bounds[1] :] = text(1, 21)[0]
    model(idx, targets)[1].backward()
    only_first = [i for i in idx[0, 1 : bounds[1]].tolist() if i not in idx[0, bounds[1] :].tolist()]
    head = dense()
    logits = head(idx[:, bounds[1] :])[0]
    F.cross_entropy(logits[0], targets[0, bounds[1] :]).backward()
    torch.testing.assert_close(
        model.wte.weight.grad[only_first], head.wte.weight.grad[only_first], rtol=1e-3, atol=1e-7
    )


@torch.no_grad()
def test_rows_without_a_boundary_take_the_same_path_as_before():
    idx = text(2, 33)
    idx[:, 0] = tok.EOT
    assert document_starts(idx) is None
    torch.testing.assert_close(dense()(idx)[0], dense(separate_documents=False)(idx)[0], rtol=0, atol=0)


class Elsewhere(torch.Tensor):
    """Says that it lies on a GPU."""

    device = property(lambda self: torch.device("cuda"))


@torch.no_grad()
def test_attention_gets_a_mask_only_where_a_row_has_several_documents(monkeypatch):
    """A mask rules out the flash kernel. Wherever the rows lie, one document each needs none."""
    masks, attend, find = [], F.scaled_dot_product_attention, model_dense.document_starts

    def spy(*args, attn_mask, is_causal, **kwargs):
        masks.append(None if is_causal else attn_mask.shape)
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)

    def find_elsewhere(idx):
        starts = find(idx.as_subclass(Elsewhere))
        return None if starts is None else starts.as_subclass(torch.Tensor)

    alone, (several, _) = text(2, 33), documents([20, 11])
    alone[0, 0] = tok.EOT
    cases = (alone, None), (several, (1, 1, 33, 33)), (torch.cat([alone, several]), (3, 1, 33, 33))
    for file, build in ((model_dense, dense), (model_trm, trm)):
        model, found = build(), []
        for function in (find, find_elsewhere):
            monkeypatch.setattr(file, "document_starts", function)
            for idx, want in cases:
                masks.clear()
                found.append(model(idx)[0])
                assert masks and set(masks) == {want}
        a, b, both = found[:3]
        torch.testing.assert_close(both, torch.cat([a, b]), rtol=1e-4, atol=1e-4)
        assert all(torch.equal(x, y) for x, y in zip(found[:3], found[3:]))


def test_recomputing_knows_documents_too():
    idx, _ = documents([20, 30])
    grads = []
    for recompute in (False, True):
        model = dense(recompute=recompute)
        model(idx, idx.roll(-1, 1))[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- decoding


def prompts_of_all_kinds():
    grids = torch.from_numpy(arc.encode("arc", make_task(4).train).astype(np.int64))
    packed, _ = documents([9, 4, 1])
    return [
        text(1, 12)[0],
        text(1, 1, seed=1)[0],
        torch.tensor([tok.EOT]),
        packed[0],
        packed[0, :-1],
        grids[:-4],
        grids[:9],
    ]


@pytest.mark.parametrize("separate", (True, False))
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_reading_on_is_the_full_forward_at_every_position(pattern, separate, monkeypatch):
    """Prompts of seven lengths at once; what follows holds ends of documents, text, and grids. Keys and values outgrow their room."""
    monkeypatch.setattr(model_dense, "CACHE_ROOM", 8)
    model = dense(1, layer_pattern=pattern, separate_documents=separate)
    prompts = prompts_of_all_kinds()
    rng = np.random.default_rng(0)
    soup = [tok.EOT, tok.INPUT, tok.OUTPUT, tok.ROW, tok.CELL0, tok.CELL0 + 3, tok.ARC, 17]
    after = torch.from_numpy(rng.choice(soup, (len(prompts), 40)))
    x, past = model.read(prompts)
    steps = [x]
    for t in range(after.shape[1]):
        steps.append(model.read_on(after[:, t], past))
    got = F.linear(torch.stack(steps, 1), model.wte.weight)
    for b, prompt in enumerate(prompts):
        want = model(torch.cat([prompt, after[b]])[None])[0][0, len(prompt) - 1 :]
        torch.testing.assert_close(got[b], want, rtol=1e-3, atol=1e-3)


def test_prompts_of_different_lengths_are_continued_as_if_alone():
    model = dense(2, size=0.3)
    prompts = prompts_of_all_kinds()
    together = torch.stack(list(model.generate(prompts, 12, temperature=0, stop=())), 1)
    for row, prompt in zip(together, prompts):
        alone = torch.stack(list(model.generate(prompt[None], 12, temperature=0, stop=())), 1)[0]
        assert torch.equal(row, alone)
        full = model(torch.cat([prompt, row])[None])[0][0, len(prompt) - 1 : -1, : tok.END + 1]
        assert torch.equal(full.argmax(-1), row)


def test_each_row_stops_by_itself():
    model = dense(3, size=0.3)
    prompts = [text(1, n, seed=n)[0] for n in (3, 8, 5)]
    free = torch.stack(list(model.generate(prompts, 10, temperature=0, stop=())), 1)
    stop = (free[0, 2].item(), free[1, 6].item())
    got = torch.stack(list(model.generate(prompts, 10, temperature=0, stop=stop)), 1)
    for row, want in zip(got.tolist(), free.tolist()):
        end = next((i for i, t in enumerate(want) if t in stop), len(want) - 1) + 1
        end = min(end, len(row))
        assert row[:end] == want[:end] and set(row[end:]) <= {tok.PAD}
    both = [next(i for i, t in enumerate(row) if t in stop) for row in free[:2].tolist()]
    assert (
        len(list(model.generate(prompts[:2], 10, temperature=0, stop=stop))) == max(both) + 1
    )  # nobody is left


def test_positions_are_carried_on():
    """Against arc.positions of the whole row, for token soup."""
    rng = np.random.default_rng(0)
    ids = [
        tok.EOT,
        tok.ARC,
        tok.SUDOKU,
        tok.INPUT,
        tok.OUTPUT,
        tok.ROW,
        tok.CELL0,
        tok.CELL0 + 9,
        tok.BLANK,
        tok.VOID,
        tok.PAD,
        17,
    ]
    p = np.array([1, 1, 1, 3, 3, 6, 9, 9, 2, 2, 1, 1]) / 39
    idx = torch.from_numpy(rng.choice(ids, (64, 120), p=p))
    want = arc.positions(idx)
    grids, place = (idx[:, 0] == tok.INPUT) | (idx[:, 0] == tok.OUTPUT), want[:, 0]
    for t in range(1, idx.shape[1]):
        grids, place = next_place(grids.long(), place, idx[:, t - 1], idx[:, t])
        assert torch.equal(place, want[:, t])
    assert want.amax((0, 1)).min() > 3  # it was not all at the origin


@pytest.mark.parametrize("pattern, n_kv_head", (("kkka", None), ("a", 1), ("k", None)))
@torch.no_grad()
def test_cache_bytes_are_those_of_the_caches(pattern, n_kv_head, monkeypatch):
    monkeypatch.setattr(model_dense, "CACHE_ROOM", 1)
    model = dense(layer_pattern=pattern, n_kv_head=n_kv_head)
    _, past = model.read(text(1, 50))
    held = sum(t.nbytes for cache in past.caches for t in cache if torch.is_tensor(t))
    assert held == cache_bytes(model.config, 50)


def test_appending_to_a_cache_does_not_copy_it_every_time():
    k = torch.randn(1, 2, 3, 4)
    cache, moved = (k[:, :, :0], k[:, :, :0], 0), 0
    for _ in range(300):
        before = cache[0].data_ptr()
        cache = model_dense.append(cache, k, -k)
        moved += cache[0].data_ptr() != before
    assert cache[2] == 900 and moved <= 4
    assert torch.equal(cache[0][:, :, :900], k.repeat(1, 1, 300, 1)) and torch.equal(
        cache[1][:, :, :900], -cache[0][:, :, :900]
    )


# ---- sampling


def test_top_p_draws_from_the_likeliest_that_reach_it():
    p = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    logits = p.log().repeat(20000, 1)
    rng = torch.Generator().manual_seed(0)
    for top_p, kept in (
        (0.01, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 2]),
        (1.0, [0, 1, 2, 3, 4]),
    ):
        share = sample(logits, 1.0, top_p=top_p, generator=rng).bincount(minlength=5) / len(logits)
        want = torch.zeros(5)
        want[kept] = p[kept] / p[kept].sum()
        assert (share - want).abs().max() < 0.015, top_p
    share = sample(logits, 1.0, top_k=2, top_p=0.5, generator=rng).bincount(minlength=5) / len(
        logits
    )  # 4/7 of what top_k leaves
    assert share[1] == 1
    share = sample(logits, 0.5, generator=rng).bincount(minlength=5) / len(logits)
    assert (share - p.square() / p.square().sum()).abs().max() < 0.015


def test_no_temperature_is_too_low():
    logits = torch.randn(4, tok.VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(sample(logits, 1e-30), sample(logits, 0))


# ---- grouped queries


@torch.no_grad()
def test_grouped_queries_are_full_attention_with_repeated_keys_and_values():
    grouped, full = dense(n_head=4, n_kv_head=2), dense(n_head=4)
    weights = grouped.state_dict()
    for name, w in weights.items():
        if "qkv_proj" in name:
            q, k, v = w.view(8, 6, 24).split((4, 2, 2))
            weights[name] = torch.cat([q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)]).flatten(0, 1)
    full.load_state_dict(weights)
    idx, _ = documents([20, 15])
    torch.testing.assert_close(grouped(idx)[0], full(idx)[0], rtol=1e-4, atol=1e-4)
    drawn = [
        torch.stack(list(m.generate(idx[:, :30], 8, temperature=0, stop=())), 1) for m in (grouped, full)
    ]
    assert torch.equal(*drawn)
    assert cache_bytes(grouped.config, 100) < cache_bytes(full.config, 100)


@pytest.mark.parametrize("n_kv_head", (0, 3, 8))
def test_heads_that_cannot_be_shared_evenly_are_refused(n_kv_head):
    with pytest.raises(ValueError, match="n_kv_head"):
        Model(Config(n_layer=1, n_head=4, n_kv_head=n_kv_head, n_embd=32, n_ff=8))


@pytest.mark.parametrize("pattern", ("a", "k"))
def test_norm_eps_reaches_every_norm(pattern):
    model = dense(layer_pattern=pattern, norm_eps=0.25)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert len(norms) == 1 + 4 * (4 if pattern == "a" else 3) and {m.eps for m in norms} == {0.25}


# ---- the description


def test_the_description_adds_up(capsys):
    with torch.device("meta"):
        model = Model(Config())
    model_dense.describe(model)
    out = capsys.readouterr().out
    parts = [int(line.split()[-2].replace(",", "")) for line in out.splitlines() if line.endswith("%")]
    assert parts[-1] == sum(parts[:-1]) == model.num_params()
    assert f"{cache_bytes(model.config, 16384) / 1e6:.1f}" in out
    assert cache_bytes(model.config, 16384) < 0.3 * cache_bytes(Config(layer_pattern="a"), 16384)


# ---- answers


def test_a_gpu_writes_as_much_together_as_its_memory_holds():
    assert [tokens_at_once(Config(), free) for free in (0, 3e9, 5e9, 15e9)] == [2**15, 2**15, 2**16, 2**17]


def test_batches_by_length_do_not_change_answers(monkeypatch):
    """Nor does reading a batch in parts, where a GPU writes more rows together than it could read."""
    model = dense(1, size=0.3)
    whole, given = model.answer(TASKS), [[y for _, y in task.test] for task in TASKS]
    rescored, batches, write = model.answer_logits(TASKS, given), [], model_dense.write_grids
    monkeypatch.setattr(
        model_dense, "write_grids", lambda *args: batches.append(len(args[2])) or write(*args)
    )
    monkeypatch.setattr(model_dense, "ANSWER_TOKENS", 150)
    for free in (0, 1e9):
        monkeypatch.setattr(runtime, "free_memory", lambda device, free=free: free)
        for a, b in zip(whole, model.answer(TASKS)):
            assert all(
                np.array_equal(x[0][0], y[0][0]) and abs(x[0][1] - y[0][1]) < 1e-3 for x, y in zip(a, b)
            )
        batches.append(None)
    small, large = batches[: batches.index(None)], batches[batches.index(None) + 1 : -1]
    assert sum(small) == sum(large) and len(small) > len(large)
    for a, b in zip(rescored, model.answer_logits(TASKS, given)):
        assert all(np.allclose(x, y, atol=1e-4) for x, y in zip(a, b))
