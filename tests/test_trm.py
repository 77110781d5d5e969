"""Route B: the published recursion by hand, how KDA reads grids, the carry, halting, answers, bounds."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TASKS, puzzle_batch, text, trm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model_trm
from smol import arc, engine, puzzles
from smol import tokenizer as tok
from smol.engine import ANSWER_IDS
from smol.loader import pad_rows, puzzle_row
from smol.tokenizer import IGNORE

# ---- how KDA reads grids, by hand


def canvas_by_hand(row):
    """bool (T,): the cells, blank or not, behind the last <|output|> of a row."""
    ids = row.tolist()
    start = max(i for i, token in enumerate(ids) if token == tok.OUTPUT)
    cells = [tok.BLANK, *range(tok.CELL0, tok.CELL0 + 10)]
    return torch.tensor([i > start and token in cells for i, token in enumerate(ids)])


def grids_by_hand(row):
    """-> where the first grid begins, and of each {(r, c): tokens there}; a marker is with the first cell."""
    marks = [i for i, token in enumerate(row) if token in (tok.INPUT, tok.OUTPUT)] + [len(row)]
    grids = []
    for a, b in zip(marks, marks[1:]):
        r, c, cells = 0, 0, {(0, 0): [a]}
        for at in range(a + 1, b):
            cells.setdefault((r, c), []).append(at)
            r, c = (r + 1, 0) if row[at] == tok.ROW else (r, c + 1)
        grids.append(cells)
    return marks[0], grids


def lines_by_hand(row, way):
    """row (T,), without padding -> lists of the tokens in each line that is read in one of eight ways."""
    before, grids = grids_by_hand(row)
    if way >= 6 and len(grids) > 1:
        line = list(range(before))
        for i in range(0, len(grids), 2):
            pair = grids[i : i + 2]
            for cell in sorted({p for cells in pair for p in cells}, reverse=way == 7):
                line += [at for cells in pair for at in cells.get(cell, [])]
        return [line]
    lines = [list(range(before))]
    for cells in grids:
        side = round(max(1 + max(r for r, _ in cells), max(c for _, c in cells)) ** 0.5)
        line_of = (lambda r, c: r, lambda r, c: c, lambda r, c: (r // side, c // side))[way % 6 // 2]
        for line in sorted({line_of(*p) for p in cells}):
            lines.append(sorted(at for p, tokens in cells.items() if line_of(*p) == line for at in tokens))
    return [line[::-1] if way % 2 else line for line in lines if line]


def kda_by_lines(mixer, h, first_head, idx):
    """Each head has read each line as a sequence of its own: its part of the layer on that line."""
    H, K = mixer.num_heads, mixer.head_dim
    out, projection = torch.zeros_like(h), mixer.o_proj
    mixer.o_proj = torch.nn.Identity()  # heads apart
    for way in range(8):
        keep = torch.tensor([(first_head + i) % 8 == way for i in range(H)])
        by_length = {}  # lines of one length go through the layer together
        for b, row in enumerate(idx.tolist() if keep.any() else ()):
            for line in lines_by_hand(row[: row.index(tok.PAD)] if tok.PAD in row else row, way):
                by_length.setdefault(len(line), []).append((b, line))
        for lines in by_length.values():
            b, line = torch.tensor([b for b, _ in lines])[:, None], torch.tensor([line for _, line in lines])
            read = mixer(h[b, line])[0].unflatten(-1, (H, K)) * keep[:, None]
            out = out.index_put((b, line), projection(read.flatten(2)), accumulate=True)
    mixer.o_proj = projection
    return out


def mlp_by_lines(mixer, h, way, idx):
    """Each row, column or tile of cells (way 0, 1, 2), for itself: its part of the layer on that line."""
    out, (up, down) = torch.zeros_like(h), (mixer.up_proj.weight, mixer.down_proj.weight)
    for b, row in enumerate(idx.tolist()):
        _, grids = grids_by_hand([token for token in row if token != tok.PAD])
        for cells in grids:
            side = round(max(1 + max(r for r, _ in cells), max(c for _, c in cells)) ** 0.5)
            lines = {}
            for (r, c), tokens in cells.items():
                places = (r, c), (c, r), ((r // side, c // side), r % side * side + c % side)
                line, place = places[way]
                if row[tokens[-1]] != tok.ROW:
                    lines.setdefault(line, {})[place] = tokens[-1]
            for line in lines.values():
                at, places = list(line.values()), list(line)
                gate, value = (up[:, places] @ h[b, at]).chunk(2)
                out[b, at] = down[places] @ (F.silu(gate) * value)
    return out


# ---- the recursion, by hand


def core_by_hand(model, h, rope, seen, idx):
    """The core f: post-norm blocks, one after the other. seen None: text, which is read as it stands."""

    def norm(x, m):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight

    heads = lines = 0
    for block in model.blocks:
        if block.kind == "a":
            mixed = block.mixer(h, rope, seen)
        elif block.kind == "m":
            mixed = torch.zeros_like(h) if seen is None else mlp_by_lines(block.mixer, h, lines % 3, idx)
            lines += 1
        else:
            mixed = block.mixer(h)[0] if seen is None else kda_by_lines(block.mixer, h, heads, idx)
            heads += block.mixer.num_heads
        h = norm(h + mixed, block.norm_1)
        gate, up = (h @ block.mlp.up_proj.weight.T).chunk(2, -1)
        h = norm(h + (gate * torch.sigmoid(gate) * up) @ block.mlp.down_proj.weight.T, block.norm_2)
    return h


def trm_by_hand(model, idx, n, T, n_sup, seen, n_grad=1):
    """Yields y, z after each supervision step, with the gradient that it trains with."""
    d = model.config.n_embd
    rope = model.rope(arc.positions(idx))

    def embed():
        x = model.wte.weight[idx]
        if seen is not None:  # the cells of the test input
            given = torch.stack([canvas_by_hand(row) for row in idx]) & (idx != tok.BLANK)
            x = x + model.wte.weight[tok.BLANK] * given[..., None]
        return x * math.sqrt(d)

    def recursion(y, z):
        for _ in range(n):
            z = core_by_hand(model, x + y + z, rope, seen, idx)
        return core_by_hand(model, y + z, rope, seen, idx), z

    y, z = model.y_init.expand(*idx.shape, d), model.z_init.expand(*idx.shape, d)
    for _ in range(n_sup):
        x, y, z = embed(), y.detach(), z.detach()
        with torch.no_grad():
            for _ in range(T - n_grad):
                y, z = recursion(y, z)
        for _ in range(n_grad):
            y, z = recursion(y, z)
        yield y, z


def loss_by_hand(model, y, idx, targets):
    """Means over rows of the mean over canvas cells: of the loss, and of the halting head's."""
    answer, halting = [], []
    for b in range(len(idx)):
        cells = [i for i in range(idx.shape[1]) if targets[b, i] != IGNORE]
        logits = y[b, cells] @ model.wte.weight[torch.tensor(ANSWER_IDS)].T
        wanted = torch.tensor([ANSWER_IDS.index(targets[b, i]) for i in cells])
        answer.append(F.cross_entropy(logits, wanted))
        q = y[b, cells] @ model.q_head.weight[0] + model.q_head.bias[0]
        right = logits.argmax(-1) == wanted
        halting.append(F.softplus(torch.where(right, -q, q)).mean())  # -log of what it gave to the truth
    return sum(answer) / len(answer), sum(halting) / len(halting)


def check_gradients(model, got, want):
    grads = torch.autograd.grad(got, list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), grads, wanted):
        a, b = (torch.zeros(1) if t is None else t for t in (a, b))
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6, name


@pytest.mark.parametrize(
    "n, T, n_grad, n_head, pattern", ((2, 2, 1, 2, "kkka"), (1, 3, 2, 4, "kkka"), (1, 2, 1, 2, "mmma"))
)
def test_training_is_the_published_recursion(n, T, n_grad, n_head, pattern):
    shape = dict(n_latent=n, n_recursion=T, n_grad=n_grad, n_sup=2, n_head=n_head, layer_pattern=pattern)
    model = trm(**shape, halt_exploration=0.0)
    model.train().q_head.bias.data -= 100  # never halts early
    idx, targets = puzzle_batch("canvas", range(3))
    real, carry = idx != tok.PAD, None
    for y, z in trm_by_hand(model, idx, n, T, 2, real[:, None, None, :], n_grad):
        answer, halting = loss_by_hand(model, y, idx, targets)
        _, got, carry = model(idx, targets, mode="puzzle", carry=carry)
        torch.testing.assert_close(got, answer + 0.5 * halting, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(carry["y"][real], y.detach()[real], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(carry["z"][real], z.detach()[real], rtol=1e-3, atol=1e-4)
        assert not carry["y"].requires_grad and not carry["z"].requires_grad
        check_gradients(model, got, answer + 0.5 * halting)
    assert carry["halted"].all() and (carry["steps"] == 2).all()
    torch.testing.assert_close(model.eval()(idx, targets, mode="puzzle")[1], answer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_head", (2, 4))
def test_short_lines_as_sequences_are_read_as_one_row_after_the_other(n_head, monkeypatch):
    """Puzzles without demonstrations, of several sizes, with padding."""
    rng, results = np.random.default_rng(0), []
    tasks = [puzzles.sudoku(rng, 9, 30, "train"), puzzles.maze(rng, 4, 6), puzzles.maze(rng, 3, 3)]
    rows = [puzzle_row(arc.encode(t.kind, t.test), "canvas", "none") for t in tasks]
    idx, targets = pad_rows(rows, 128)
    model = trm(n_head=n_head).train()
    for short in (model_trm.SHORT, 0):
        monkeypatch.setattr(model_trm, "SHORT", short)
        laid_out = model.lines(idx, arc.positions(idx)).values()
        assert all((lines.starts is None) == (short > 0) for lines in laid_out)
        _, loss, carry = model(idx, targets, mode="puzzle")
        results.append((carry["y"][idx != tok.PAD], loss))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    check_gradients(model, results[0][1], results[1][1])


@pytest.mark.parametrize("pattern", ("kkka", "mkma"))
def test_text_is_one_latent_recursion(pattern):
    model, idx, targets = trm(layer_pattern=pattern), text(2, 9), text(2, 9, seed=1)
    ((y, _),) = trm_by_hand(model, idx, 1, 1, 1, None)
    logits = y @ model.wte.weight.T
    torch.testing.assert_close(model(idx)[0], logits, rtol=1e-3, atol=1e-3)
    want, got = F.cross_entropy(logits.flatten(0, 1), targets.flatten()), model.train()(idx, targets)[1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    check_gradients(model, got, want)
    torch.autograd.grad(model(idx, targets)[1], list(model.parameters()))  # DDP waits for one of each


# ---- the carry


def test_rows_stay_until_they_halt_and_are_then_replaced():
    model = trm(n_sup=3, halt_exploration=0.0).train()
    old, new = puzzle_batch("canvas", range(4), 96), puzzle_batch("canvas", range(10, 14), 96)
    _, _, carry = model(*old, mode="puzzle")
    carry["halted"] = torch.tensor([False, True, False, True])
    kept = {k: v.clone() for k, v in carry.items()}
    _, _, after = model(*new, mode="puzzle", carry=carry)
    assert all(torch.equal(carry[k], kept[k]) for k in kept)  # what came in is not written over
    for b, halted in enumerate(kept["halted"].tolist()):
        source = new if halted else old
        assert torch.equal(after["idx"][b], source[0][b]) and torch.equal(after["targets"][b], source[1][b])
    assert after["steps"].tolist() == [2, 1, 2, 1] and after["begun"].tolist() == [1, 2, 1, 2]
    _, _, fresh = model(*new, mode="puzzle")  # a new row starts as if nothing had been there
    torch.testing.assert_close(after["y"][1], fresh["y"][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["z"][3], fresh["z"][3], rtol=1e-4, atol=1e-5)
    assert (after["y"][0] - fresh["y"][0]).abs().max() > 1e-3
    for other in (puzzle_batch("canvas", range(3), 96), puzzle_batch("canvas", range(4), 128)):
        with pytest.raises(ValueError, match="carry"):
            model(*other, mode="puzzle", carry=carry)


@torch.no_grad()
def test_the_halting_head_decides_and_n_sup_is_the_end():
    batch = puzzle_batch("canvas", range(5), 96)
    for bias, steps in ((100.0, 1), (-100.0, 3)):
        model, carry = trm(n_sup=3, halt_exploration=0.0).train(), None
        model.q_head.bias.fill_(bias)
        for step in range(1, 4):
            _, _, carry = model(*batch, mode="puzzle", carry=carry)
            assert carry["halted"].tolist() == [step >= steps] * 5


@torch.no_grad()
def test_exploration_is_a_rows_own_and_drawn_anew_when_it_comes_again():
    model = trm(n_sup=4, halt_exploration=0.2, n_latent=1, n_recursion=1, n_layer=1).train()
    idx, targets = puzzle_batch("canvas", range(10), 96)
    for row in idx:
        least = model.min_steps(row.expand(1000, -1), torch.arange(1000))
        assert 0.15 < (least > 1).float().mean() < 0.25
        assert least.unique().tolist() == [1, 2, 3, 4]

    def decisions(rows, calls, carry=None):
        found = []
        for _ in range(calls):
            _, _, carry = model(idx[rows], targets[rows], mode="puzzle", carry=carry)
            found.append(carry["halted"])
        return torch.stack(found, 1), carry

    model.q_head.bias.fill_(100.0)  # stops as soon as it may; the next call begins another row there
    halted, carry = decisions(slice(None), 40)
    assert torch.equal(carry["begun"], 1 + halted[:, :-1].sum(1)) and not halted.all()
    halves = [decisions(rows, 40)[0] for rows in (slice(0, 5), slice(5, 10))]
    assert torch.equal(torch.cat(halves), halted)  # whoever is beside it
    first, carry = decisions(slice(None), 15)  # what was saved and loaded goes on as it would have
    rest, _ = decisions(slice(None), 25, {k: v.clone() for k, v in carry.items()})
    assert torch.equal(torch.cat([first, rest], 1), halted)


# ---- answers


def same(a, b):
    return (a is None) == (b is None) and (a is None or np.array_equal(a, b))


@torch.no_grad()
def steps_by_hand(model, task, test_input):
    """What stands on the canvas after each supervision step, and the halting head's probability."""
    H, W = arc.canvas_shape(task.train, test_input)
    ids = arc.encode_prompt(task.kind, task.train, test_input, canvas=(H, W)).astype(np.int64)
    idx, c = torch.from_numpy(ids)[None], model.config
    everyone = torch.ones(1, 1, 1, len(ids), dtype=torch.bool)
    for y, _ in trm_by_hand(model, idx, c.n_latent, c.n_recursion, c.n_sup, everyone):
        choice = (y[0, -H * (W + 1) :] @ model.wte.weight[torch.tensor(ANSWER_IDS)].T).argmax(-1)
        cells = y[0, -H * (W + 1) :].view(H, W + 1, -1)[:, :W]
        p = torch.sigmoid(cells @ model.q_head.weight[0] + model.q_head.bias[0]).min()
        yield arc.read_canvas(np.array([ANSWER_IDS[c] for c in choice]), (H, W)), p.item()


def test_answers_step_by_step_alone_and_in_batches():
    model = trm(3, n_sup=4)
    trace, answers = model.answer(TASKS[:3], trace=True), model.answer(TASKS[:3])
    for i, task in enumerate(TASKS[:3]):
        alone = model.answer([task], trace=True)[0]
        for j, (test_input, _) in enumerate(task.test):
            want = list(steps_by_hand(model, task, test_input))
            assert len(want) == len(trace[i][j]) == len(alone[j]) == 4
            for (g, p), (g1, p1), (g2, p2) in zip(want, trace[i][j], alone[j]):
                assert same(g, g1) and same(g, g2) and abs(p - p1) < 1e-3 and abs(p - p2) < 1e-3
            assert [g.tolist() for g, _ in answers[i][j]] == [g.tolist() for g, *_ in engine.ranked(want)]
    assert len(model.answer(TASKS[:1], n_sup=2, trace=True)[0][0]) == 2


def test_the_most_probable_answer_comes_first():
    a, b, c = (np.array([[i]], np.uint8) for i in range(3))
    steps = [(a, 0.5), (b, 0.9), (None, 1.0), (b, 0.2), (c, 0.5), (a, 0.4)]
    assert [(g.item(), *more) for g, *more in engine.ranked(steps)] == [(1, 0.9, 1), (0, 0.5, 0), (2, 0.5, 0)]
    assert engine.ranked([(a, 0.5), (b, 0.5)])[0][0] is b  # the latest of equal ones
    assert engine.ranked([(None, 0.7)]) == []
    assert engine.ranked([(a, -9.0), (b, -8.0)])[0][0] is b  # published TRM's confidence is a logit


def test_rollouts_vote_for_their_most_confident_answer():
    a, b, c = (np.array([[i]], np.uint8) for i in range(3))
    rollouts = [[(a, 0.1), (b, 0.95)], [(a, 0.3), (c, 0.2)], [(a, 0.4), (None, 1.0)], [(c, 0.5), (b, 0.4)]]
    steps = sum(rollouts, [])
    votes = [(0, 0.4, 2), (1, 0.95, 1), (2, 0.5, 1)]
    assert [(g.item(), *more) for g, *more in engine.ranked(steps, 4)] == votes
    assert engine.chosen_rollout(steps, 4) == rollouts[2]
    assert engine.chosen_rollout(rollouts[0] + rollouts[3], 2) == rollouts[0]  # as many votes: by confidence
    assert engine.chosen_rollout([(None, 0.0), (None, 0.0)], 2) == [(None, 0.0)]


def same_traces(a, b):
    return len(a) == len(b) and all(same(g, h) and abs(p - q) < 1e-3 for (g, p), (h, q) in zip(a, b))


@torch.no_grad()
def test_rollouts_start_with_the_plain_answer_and_are_a_puzzles_own():
    model, options = trm(3, n_sup=4), {"trace": True, "noise": 0.5}
    plain, two, four = (model.answer(TASKS[:3], n_rollouts=n, **options) for n in (1, 2, 4))
    still = model.answer(TASKS[:3], n_rollouts=2, trace=True, noise=0.0)
    other = model.answer(TASKS[:3], n_rollouts=2, seed=1, **options)
    for i, task in enumerate(TASKS[:3]):
        alone = model.answer([task], n_rollouts=4, **options)[0]
        for j in range(len(task.test)):
            assert len(four[i][j]) == 16 and same_traces(four[i][j], alone[j])
            assert same_traces(four[i][j][:4], plain[i][j]) and same_traces(four[i][j][:8], two[i][j])
            assert same_traces(still[i][j], plain[i][j] * 2)
            rollouts = [four[i][j][n : n + 4] for n in range(0, 16, 4)] + [other[i][j][4:]]
            assert not any(same_traces(a, b) for n, a in enumerate(rollouts) for b in rollouts[:n])
    every = model.answer(TASKS[:3], n_rollouts=4, noise=0.5)
    for given, trace in zip(sum(every, []), sum(four, [])):
        assert same_traces(given, [(grid, p) for grid, p, _ in engine.ranked(trace, 4)])


@torch.no_grad()
def test_noise_has_its_size_on_z_and_none_on_the_first_rollout(monkeypatch):
    model, seen = trm(n_sup=2), []
    monkeypatch.setattr(model, "deep_recursion", lambda x, y, z, layout: (seen.append(z), (y, z))[1])
    idx, _ = puzzle_batch("canvas", range(3))
    list(model.answer_steps(idx, n_rollouts=50, noise=0.7))
    real = (idx != tok.PAD).repeat_interleave(50, 0)
    for step, z in enumerate(seen, 1):
        noise = (z - model.z_init).view(3, 50, *z.shape[1:])
        assert not noise[:, 0].any() and not (z - model.z_init)[~real].any()
        drawn = noise[:, 1:][real.view(3, 50, -1)[:, 1:]]
        assert abs(drawn.std() / 0.7 / step**0.5 - 1) < 0.01 and abs(drawn.mean()) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("n_rollouts", [1, 3])
def test_a_puzzle_leaves_the_batch_when_one_of_its_rollouts_is_sure(n_rollouts):
    """The others do not notice, and it costs nothing any more."""
    model, how, n_rows = trm(3, n_sup=6), {"trace": True, "n_rollouts": n_rollouts, "noise": 0.5}, []
    model.q_head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    whole = sum(model.answer(TASKS, **how), [])
    threshold = float(np.median([max(p for _, p in trace) for trace in whole]))  # half of them get there
    model.blocks[0].register_forward_hook(lambda block, inputs, output: n_rows.append(len(inputs[0])))
    early, taken = sum(model.answer(TASKS, halt=threshold, **how), []), []
    for a, b in zip(whole, early):
        sure = [any(a[k * 6 + step][1] > threshold for k in range(n_rollouts)) for step in range(6)]
        taken.append(sure.index(True) + 1 if any(sure) else 6)
        assert same_traces(b, [a[k * 6 + step] for k in range(n_rollouts) for step in range(taken[-1])])
    assert min(taken) < max(taken) == 6
    assert sum(n_rows) == n_rollouts * sum(taken) * model.passes("puzzle")[0]
    model.q_head.bias.fill_(100.0)
    assert {len(trace) for task in model.answer(TASKS, halt=0.5, **how) for trace in task} == {n_rollouts}


@pytest.mark.parametrize("part", ("wte", "q_head"))
def test_a_diverged_model_answers_nothing(part):
    model = trm()
    for p in getattr(model, part).parameters():
        p.data.fill_(math.nan)
    assert model.answer(TASKS[:2], halt=0.5) == [[[]], [[], []]]
    assert model.answer(TASKS[:1], trace=True) == [[[(None, 0.0)] * 3]]


# ---- bounds and costs


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_vectors_and_gradients_stay_bounded_at_the_published_depth(dtype):
    """
    8 supervision steps of 21 passes through 8 layers; in float16 with a loss scale as a GradScaler finds it.
    A pass hands back about as much gradient as it gets.
    """
    torch.manual_seed(0)
    model = model_trm.Model(model_trm.Config(256, n_head=2, n_embd=32, n_ff=88, halt_exploration=0.0)).train()
    model.q_head.bias.data -= 100
    batch, carry, sizes, back = puzzle_batch("canvas", [1]), None, [], []
    scale = 4096.0 if dtype == torch.float16 else 1.0

    def look(block, inputs, output):
        sizes.append(output[0].detach().float().square().mean().sqrt().item())
        if output[0].requires_grad:
            output[0].register_hook(lambda g: back.append(g.float().norm().item() / scale))

    model.blocks[-1].register_forward_hook(look)
    for _ in range(8 if dtype == torch.float32 else 2):
        sizes.clear()
        back.clear()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            _, loss, carry = model(*batch, mode="puzzle", carry=carry)
        (loss * scale).backward()
        total = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() / scale
        model.zero_grad()
        assert len(sizes) == 21 and all(0.9 < size < 1.1 for size in sizes)
        assert 0.01 < total < 100 and len(back) == 7 and 0.02 < back[-1] / back[0] < 50
    assert carry["y"].dtype == carry["z"].dtype == dtype  # gigabytes wait in the carries of a run


@pytest.mark.parametrize("pattern, tolerance", (("a", 0.01), ("kkka", 0.2)))
def test_flops_are_those_that_pytorch_counts(pattern, tolerance):
    """KDA without its solves; the formula has the chunks of a GPU, of 64 tokens, and a CPU's have 32."""
    model = trm(n_embd=96, n_ff=256, layer_pattern=pattern, n_recursion=3, n_grad=2).train()
    puzzle = torch.randint(tok.CELL0, tok.CELL0 + 10, (2, 64))
    for mode, idx in (("text", text(2, 64)), ("puzzle", puzzle)):
        for training in (False, True):
            with FlopCounterMode(display=False) as counted, torch.set_grad_enabled(training):
                with sdpa_kernel(SDPBackend.MATH):
                    if training:
                        model(idx, idx, mode=mode)[1].backward()
                    else:  # a puzzle with targets takes one supervision step
                        model(idx, None if mode == "text" else idx, mode=mode)
            want = model.flops_per_token(64 if mode == "puzzle" else 2 * 64, mode, training) * idx.numel()
            assert abs(counted.get_total_flops() / want - 1) < tolerance, (mode, training)
