"""What both routes promise alike: shapes, gradients, loss, separate documents, decoding, learning."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import BUILD, RECURSION, SHAPE, dense, documents, make_task, puzzle_batch, text

import model_dense
import model_trm
from model_dense import linear_cross_entropy
from smol import arc, engine
from smol import tokenizer as tok
from smol.engine import generate, sample
from smol.loader import pad_rows, puzzle_row
from smol.loop import make_optimizers
from smol.muon import Muon, muon_and_adamw
from smol.tokenizer import IGNORE

both = pytest.mark.parametrize("route", ("dense", "trm"))
FILES = {"dense": model_dense, "trm": model_trm}


# ---- size and shape


@both
def test_defaults_are_the_100m_model(route):
    with torch.device("meta"):
        model = FILES[route].Model(FILES[route].Config())
    n = model.num_params()
    assert 98e6 <= n <= 102e6 and n == sum(math.prod(p.shape) for p in model.parameters())
    assert model.flops_per_token(1024) > 2 * 0.9 * n  # every matrix is used, a multiply and an add each
    assert {block.kind for block in model.blocks[3::4]} == {"a"}
    assert {block.kind for block in model.blocks[:3]} == {"k"}


@both
@pytest.mark.parametrize("wrong", (dict(n_embd=25), dict(layer_pattern="kx"), dict(n_head=0)))
def test_impossible_shapes_are_refused(route, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        BUILD[route](**wrong)


@both
def test_every_parameter_gets_a_gradient(route):
    """One without would stop a run on two processes."""
    model = BUILD[route]().train()
    for mode, batch in (("text", (text(2, 8), text(2, 8, 1))), ("puzzle", None)):
        batch = batch or puzzle_batch(model.puzzle_format, range(3))
        model.zero_grad()
        model(*batch, mode=mode)[1].backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == [], mode


@both
def test_optimizers_hold_every_parameter_once_and_decay_only_matrices(route):
    model = BUILD[route]()
    (optimizer,) = make_optimizers(model, "adamw", 0.1, 1e-3, (0.9, 0.95))
    groups = optimizer.param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in decayed}
    assert names == {
        n for n, _ in model.named_parameters() if n.endswith("_proj.weight") and "b_proj" not in n
    }
    muon, _ = muon_and_adamw(model, 0.1, 1e-3, (0.9, 0.95))
    assert {id(p) for p in muon.param_groups[0]["params"]} == decayed


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has one to compare with from 2.9 on")
def test_our_muon_is_pytorchs():
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=rng) for shape in ((24, 40), (40, 24), (32, 32))]
    weights = [[w.clone() for w in start] for _ in range(2)]
    ours = Muon(weights[0], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.Muon(weights[1], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(6):
        for a, b in zip(*weights):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b, old in zip(*weights, start):
        assert (a - b).norm() < 0.02 * (a - old).norm()  # bfloat16 has 8 bits


@both
@pytest.mark.parametrize("how", ("recomputed", "compiled"))
def test_recomputed_and_compiled_blocks_have_the_same_gradients(route, how):
    """Route A in text with several documents, Route B in a puzzle: compiling takes its time."""
    model = BUILD[route](n_layer=2, layer_pattern="ka").train()
    idx, _ = documents([5, 6])
    mode, batch = "text", (idx, idx.roll(-1, 1))
    if route == "trm":
        mode, batch = "puzzle", puzzle_batch(model.puzzle_format, range(2))

    def gradients():
        model.zero_grad()
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
            loss = model(*batch, mode=mode)[1]
        loss.backward()
        kept.append(len(held))
        return [p.grad.clone() for p in model.parameters()]

    kept = []  # how many tensors the forward leaves for the backward
    want = gradients()
    model.config.recompute = how == "recomputed"
    if how == "compiled":
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert how == "compiled" or kept[1] < kept[0] / 2


# ---- the loss


@pytest.mark.parametrize("at_once", (2**23, 70, 1))
def test_linear_cross_entropy(at_once, monkeypatch):
    monkeypatch.setattr(model_dense, "LOGITS_AT_ONCE", at_once)
    rng = torch.Generator().manual_seed(0)
    N, D, V = 13, 6, 31
    x, weight = (torch.randn(n, D, generator=rng).requires_grad_() for n in (N, V))
    targets, share = torch.randint(0, V, (N,), generator=rng), torch.rand(N, generator=rng) / N
    want = (F.cross_entropy(x @ weight.T, targets, reduction="none") * share).sum()
    wanted = torch.autograd.grad(want, (x, weight))
    got = linear_cross_entropy(x, weight, targets, share)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(3 * got, (x, weight)), wanted):
        torch.testing.assert_close(a, 3 * b, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, share), want)
        far = (F.cross_entropy(100 * x @ weight.T, targets, reduction="none") * share).sum()
        assert far > 90  # in float32 the probabilities of such targets are zero
        torch.testing.assert_close(linear_cross_entropy(100 * x, weight, targets, share), far)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            got = linear_cross_entropy(x, weight, targets, share)
        assert got.dtype == torch.float32 and abs(got - want) < 0.02
        for a, b in zip(torch.autograd.grad(got, (x, weight)), wanted):
            assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


@both
def test_text_loss_is_cross_entropy_of_the_logits(route):
    model, idx, targets = BUILD[route](), text(2, 10), text(2, 10, seed=1)
    targets[0, :4] = IGNORE
    want = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(model(idx, targets)[1], want)


@both
def test_a_batch_without_any_target(route):
    model = BUILD[route]().train()
    for mode, idx in (("text", text(2, 6)), ("puzzle", puzzle_batch(model.puzzle_format, range(2))[0])):
        loss = model(idx, torch.full_like(idx, IGNORE), mode=mode)[1]
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- what a token sees


@both
@torch.no_grad()
def test_documents_know_nothing_of_each_other_nor_of_what_comes(route):
    model = BUILD[route]().double()  # rounding is far below what is looked for
    idx, bounds = documents([30, 0, 3, 60])
    idx = torch.cat([text(1, 20, seed=9), idx], 1)  # the row begins in the middle of a document
    bounds = [0] + [b + 20 for b in bounds]
    idx = torch.cat([idx, text(1, idx.shape[1], seed=8)])  # beside a row without any
    before = model(idx)[0]
    for a, b in zip(bounds, bounds[1:]):
        torch.testing.assert_close(before[0, a:b], model(idx[:1, a:b])[0][0], rtol=1e-6, atol=1e-6)
        middle = (a + b + 1) // 2
        other = idx.clone()
        other[0, middle:b] = text(1, b - middle, seed=77)
        change = (model(other)[0] - before).abs().amax(-1)
        assert (change[0, middle:b] > 1e-4).all()
        change[0, middle:b] = 0
        assert change.max() < 1e-9


@both
@torch.no_grad()
def test_attention_gets_a_mask_only_where_a_row_has_several_documents(route, monkeypatch):
    """A mask rules out the flash kernel."""
    masks, attend = [], F.scaled_dot_product_attention

    def spy(*args, attn_mask, is_causal):
        masks.append(None if is_causal else attn_mask.shape)
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model, alone, (several, _) = BUILD[route](), text(2, 33), documents([20, 11])
    alone[0, 0] = tok.EOT
    for idx, want in (
        (alone, None),
        (several, (1, 1, 33, 33)),
        (torch.cat([alone, several]), (3, 1, 33, 33)),
    ):
        masks.clear()
        model(idx)
        assert set(masks) == {want}


# ---- decoding


def prompts():
    """Text, a single token, several documents, grids that are cut off in the middle."""
    grids = torch.from_numpy(arc.encode("arc", make_task(4).train).astype(np.int64))
    packed = documents([9, 4, 1])[0][0]
    return [text(1, 12)[0], text(1, 1, 1)[0], torch.tensor([tok.EOT]), packed, grids[:-4], grids[:9]]


def greedy(model, prompts, n, stop=()):
    return torch.stack(list(generate(model, prompts, n, temperature=0, stop=stop)), 1)


@both
@pytest.mark.parametrize("at_once", (2**15, 40))
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(route, at_once, monkeypatch):
    """Prompts of all lengths at once, and read in parts; text and grids follow."""
    monkeypatch.setattr(engine, "BATCH_TOKENS", at_once)
    model = BUILD[route](1)
    soup = [tok.INPUT, tok.OUTPUT, tok.ROW, tok.CELL0, tok.CELL0 + 3, tok.BLANK, tok.ARC, 17]
    after = torch.from_numpy(np.random.default_rng(0).choice(soup, (len(prompts()), 30)))
    x, cache = engine.prefill(model, prompts(), 30)
    steps = [x] + [engine.decode_step(model, after[:, t], cache) for t in range(30)]
    got = F.linear(torch.stack(steps, 1), model.wte.weight)
    for b, prompt in enumerate(prompts()):
        want = model(torch.cat([prompt, after[b]])[None])[0][0, len(prompt) - 1 :]
        torch.testing.assert_close(got[b], want, rtol=1e-3, atol=3e-3)


@both
def test_rows_are_continued_as_if_alone_and_stop_by_themselves(route):
    model = BUILD[route](2)
    free = greedy(model, prompts(), 8)
    for row, prompt in zip(free, prompts()):
        assert torch.equal(row, greedy(model, prompt[None], 8)[0])
    stop = free[0, 2].item()
    for row, want in zip(greedy(model, prompts(), 8, (stop,)).tolist(), free.tolist()):
        end = want.index(stop) + 1 if stop in want else len(row)
        assert row[:end] == want[:end] and set(row[end:]) <= {tok.PAD}
    assert len(greedy(model, prompts()[:1], 8, (stop,))[0]) == free[0].tolist().index(stop) + 1


def test_half_precision_decodes():
    model = dense()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype), torch.no_grad():
            x, cache = engine.prefill(model, prompts(), 1)
            assert engine.decode_step(model, torch.full((len(x),), 17), cache).isfinite().all()
        assert cache.layers[3][0].dtype == dtype  # keys of full attention


def test_top_k_top_p_and_temperature():
    p = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    rng = torch.Generator().manual_seed(0)
    for options, kept in (
        (dict(top_p=0.01), [1]),
        (dict(top_p=1e-60), [1]),
        (dict(top_p=0.69), [1, 3]),
        (dict(top_p=0.71), [1, 3, 2]),
        (dict(top_k=2), [1, 3]),
        (dict(top_k=2, top_p=0.5), [1]),
        (dict(), [0, 1, 2, 3, 4]),
    ):
        drawn = sample(p.log().repeat(20000, 1), 1.0, generator=rng, **options)
        want = torch.zeros(5)
        want[kept] = p[kept] / p[kept].sum()
        assert (drawn.bincount(minlength=5) / 20000 - want).abs().max() < 0.015, options
    drawn = sample(p.log().repeat(20000, 1), 0.5, generator=rng)
    assert (drawn.bincount(minlength=5) / 20000 - p.square() / p.square().sum()).abs().max() < 0.015
    logits = torch.randn(4, tok.VOCAB_SIZE, generator=rng) * 100
    logits[:, tok.END + 1 :] = 1e4  # ids without a name
    assert all(torch.equal(sample(logits, t), sample(logits, 0)) for t in (1e-30, 1e-60))
    assert sample(logits, 1.0).max() <= tok.END


@both
def test_no_text_from_nan_logits_and_none_after_an_empty_prompt(route):
    model = BUILD[route]()
    for wrong in ([], [text(1, 3)[0], text(1, 0)[0]]):
        with pytest.raises(ValueError, match="prompt is empty"):
            greedy(model, wrong, 3)
    model.wte.weight.data[5] = math.nan
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            list(generate(model, text(2, 6), 5, temperature=temperature))


# ---- answers


@both
def test_what_does_not_fit_has_no_answer(route):
    task, long = make_task(0, side=2), make_task(7, demos=8, side=5)
    x, _ = task.test[0]
    needed = sum(arc.prompt_and_room("arc", task.train, x, BUILD[route]().puzzle_format))
    model = BUILD[route](block_size=needed)
    (none,), (some,) = model.answer([long, task])
    assert none is None and some
    assert BUILD[route](block_size=needed - 1).answer([task]) == [[None]]
    assert model.answer([]) == []


# ---- learning


@both
@pytest.mark.parametrize("mode", ("text", "puzzle"))
def test_overfits_one_batch(route, mode):
    """From the initial weights; a puzzle until it is answered, and Route B's halting head believes it."""
    torch.manual_seed(0)
    shape = {**SHAPE, "n_layer": 2, "layer_pattern": "ka", "n_embd": 48, "n_head": 4}
    config = FILES[route].Config(**shape, **(RECURSION if route == "trm" else {}))
    model, task = FILES[route].Model(config).train(), make_task(11, side=4)
    document = arc.encode("arc", [*task.train, *task.test])
    puzzle = pad_rows([puzzle_row(document, model.puzzle_format, "none")], 80)
    batch = (text(2, 12), text(2, 12, seed=1)) if mode == "text" else puzzle
    (optimizer,) = make_optimizers(model, "adamw", 0.0, 5e-3, (0.9, 0.95))
    losses, carry = [], None
    for _ in range(30 if mode == "text" else 80):
        _, loss, carry = model(*batch, mode=mode, carry=carry)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])
    if mode == "text":
        assert abs(losses[0] - math.log(tok.VOCAB_SIZE)) < 1.5  # it starts by knowing nothing
    else:
        options = {"halt": 0.5} if route == "trm" else {}
        answer, score = model.eval().answer([task], **options)[0][0][0]
        assert np.array_equal(answer, task.test[0][1]) and score > (0.5 if route == "trm" else -3)
