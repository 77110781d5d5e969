"""Both routes against literal rewritings of what they say they compute, on models of a few thousand parameters (and a large vocabulary)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model_dense
import model_trm
from model_dense import IGNORE, LinearCrossEntropy, linear_cross_entropy, rope_3d, rotate
from model_trm import ANSWER_IDS
from smol import arc
from smol import tokenizer as tok
from smol.loader import pad_rows, puzzle_row
from smol.muon import Muon, muon_and_adamw, orthogonal

torch.set_num_threads(1)  # tensors are small here: threads would only wait for each other
SHAPE = dict(block_size=256, n_layer=4, n_head=2, n_embd=24, n_ff=32)
RECURSION = dict(n_latent=2, n_recursion=2, n_sup=3)
TEXT_RECURSION = dict(text_n_latent=2, text_n_recursion=2, text_n_sup=2)


def shake(model, seed, size):
    """
    At initialisation many weights are zero or one. Move every one, so that every one matters. What branches add is kept small:
    an untrained core that is gone through twenty times otherwise turns one rounding into another answer.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += size * torch.randn(p.shape, generator=rng)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p *= 0.3
    return model.eval()


def dense(seed=0, size=0.1, **settings):
    torch.manual_seed(seed)
    return shake(model_dense.Model(model_dense.Config(**{**SHAPE, **settings})), seed, size)


def trm(seed=0, size=0.1, **settings):
    torch.manual_seed(seed)
    return shake(model_trm.Model(model_trm.Config(**{**SHAPE, **RECURSION, **settings})), seed, size)


def both(**settings):
    return [
        ("dense", dense(**settings)),
        ("trm", trm(**settings)),
        ("trm recursive", trm(**TEXT_RECURSION, **settings)),
    ]


def routes(**settings):
    return [("dense", dense(**settings)), ("trm", trm(**settings))]


def text(B, T, seed=0):
    return torch.randint(0, tok.N_GPT2 - 1, (B, T), generator=torch.Generator().manual_seed(seed))


def grid(rng, h, w, colours=10):
    return rng.integers(0, colours, (h, w)).astype(np.uint8)


def make_task(seed, demos=2, tests=1, side=3):
    """A task whose output is the input mirrored; the sides of its grids differ."""
    rng = np.random.default_rng(seed)

    def pair():
        x = grid(rng, *rng.integers(1, side + 1, 2))
        return x, x[:, ::-1].copy()

    return arc.Task(f"t{seed}", "arc", [pair() for _ in range(demos)], [pair() for _ in range(tests)])


TASKS = [
    make_task(0),
    make_task(1, demos=1, tests=2),
    make_task(2, demos=3),
    make_task(3, demos=1, side=5),
    make_task(0),
]


def puzzle_batch(puzzle_format, seeds, length=None):
    rows = []
    for seed in seeds:
        task = make_task(seed)
        rows.append(puzzle_row(arc.encode("arc", [*task.train, *task.test]), puzzle_format, "none"))
    return pad_rows(rows, length or max(len(x) for x, _ in rows))


# ---- size and shape


@pytest.mark.parametrize("file", (model_dense, model_trm))
def test_defaults_are_the_100m_model(file):
    with torch.device("meta"):
        model = file.Model(file.Config())
    n = sum(math.prod(p.shape) for p in model.parameters())
    assert model.num_params() == n
    assert 98e6 <= n <= 102e6
    kinds = "".join(block.kind for block in model.blocks)
    assert kinds == "kkka" * (len(kinds) // 4)
    assert (
        model.flops_per_token(1024) > 2 * 0.9 * n
    )  # every matrix is used at least once, a multiply and an add each


@pytest.mark.parametrize("file", (model_dense, model_trm))
@pytest.mark.parametrize(
    "wrong",
    (
        dict(n_embd=25),
        dict(n_embd=8),
        dict(n_embd=18),
        dict(layer_pattern=""),
        dict(layer_pattern="kx"),
        dict(n_head=0),
        dict(vocab_size=1000),
    ),
)
def test_impossible_shapes_are_refused_in_one_line(file, wrong):
    with pytest.raises(ValueError) as e:
        file.Model(file.Config(**{**SHAPE, **wrong}))
    (name,) = wrong
    assert name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ("n_latent", "n_recursion", "n_grad", "n_sup"))
def test_no_recursion_at_all_is_refused(name):
    for setting in (name, f"text_{name}"):
        with pytest.raises(ValueError, match=setting):
            trm(**{setting: 0})


def test_more_recursions_with_gradient_than_there_are_are_refused():
    for text in ("", "text_"):
        with pytest.raises(ValueError, match=f"{text}n_grad=3.*{text}n_recursion=2"):
            trm(**{f"{text}n_recursion": 2, f"{text}n_grad": 3})


@pytest.mark.parametrize("pattern", ("a", "k", "kkka", "ak"))
def test_every_layer_pattern_runs_and_decodes(pattern):
    for name, model in routes(layer_pattern=pattern):
        assert "".join(block.kind for block in model.blocks) == (pattern * 4)[:4]
        check_greedy(model, text(2, 9), 4, name)
        assert all(len(a) == len(t.test) for a, t in zip(model.answer(TASKS[:2]), TASKS))


def test_every_parameter_gets_a_gradient():
    """What gets none in some step would stop a run on two processes."""
    for name, model in both():
        model.train()
        model(text(2, 8), text(2, 8, seed=1))[1].backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == [], f"{name}, text"
        model.zero_grad()
        model(*puzzle_batch(model.puzzle_format, range(3)), mode="puzzle")[1].backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == [], f"{name}, puzzle"


def test_optimizer_holds_every_parameter_once_and_decays_matrices_only():
    for name, model in both():
        groups = model.configure_optimizer(0.1, 1e-3, (0.9, 0.95)).param_groups
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        names = {n for n, p in model.named_parameters() if id(p) in decayed}
        assert names and not [
            n for n in names if "norm" in n or "bias" in n or "A_log" in n or "conv" in n or "wte" in n
        ]
        gates = ("f_proj", "g_proj", "b_proj", "q_head")
        assert not [n for n in names if any(gate in n for gate in gates)]
        assert {
            n for n, _ in model.named_parameters() if n.endswith("_proj.weight") and "b_proj" not in n
        } == names


def test_muon_takes_the_decayed_matrices_and_adamw_the_rest():
    for name, model in both():
        muon, adamw = muon_and_adamw(model, 0.1, 1e-3, (0.9, 0.95))
        held = [id(p) for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        decayed = model.configure_optimizer(0.1, 1e-3, (0.9, 0.95)).param_groups[0]["params"]
        assert [id(p) for p in muon.param_groups[0]["params"]] == [id(p) for p in decayed]
        assert all(p.ndim == 2 for p in decayed) and not any(
            group["weight_decay"] for group in adamw.param_groups
        )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has one to compare with from 2.9 on")
def test_our_muon_is_pytorchs():
    rng = torch.Generator().manual_seed(0)
    weights = [
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(i))
            for i, shape in enumerate(((24, 40), (40, 24), (32, 32)))
        ]
        for _ in range(2)
    ]
    ours = Muon(weights[0], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.Muon(weights[1], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = [w.clone() for w in weights[0]]
    for _ in range(6):
        for a, b in zip(*weights):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b, old in zip(*weights, start):
        assert (a - b).norm() < 0.02 * (a - old).norm()  # bfloat16 has 8 bits
    theirs.load_state_dict(
        {**theirs.state_dict(), "state": ours.state_dict()["state"]}
    )  # a run may go on with the other one


def test_an_update_of_muon_has_singular_values_near_one():
    for shape in ((30, 50), (50, 30)):
        u, _, v = torch.linalg.svd(
            torch.randn(shape, generator=torch.Generator().manual_seed(1)), full_matrices=False
        )
        s = torch.logspace(0, -2, 30)
        values = torch.linalg.svdvals(orthogonal((u * s) @ v).float())
        assert values.min() > 0.3 and values.max() < 1.3, values


def test_recomputed_activations_give_the_same_gradients():
    for name, model in both():
        gradients = []
        for model.config.recompute in (False, True):
            for mode, batch in (
                ("text", (text(2, 8), text(2, 8, seed=1))),
                ("puzzle", puzzle_batch(model.puzzle_format, range(3))),
            ):
                model.zero_grad()
                model.train()(*batch, mode=mode)[1].backward()
                gradients.append([p.grad.clone() for p in model.parameters()])
        for kept, again in zip(gradients[:2], gradients[2:]):
            assert all(torch.equal(a, b) for a, b in zip(kept, again)), name


# ---- pieces


@pytest.mark.parametrize("at_once", (2**23, 70, 1))
def test_linear_cross_entropy(at_once, monkeypatch):
    monkeypatch.setattr(model_dense, "LOGITS_AT_ONCE", at_once)
    rng = torch.Generator().manual_seed(0)
    N, D, V = 13, 6, 31
    x, weight = (
        torch.randn(N, D, generator=rng).requires_grad_(),
        torch.randn(V, D, generator=rng).requires_grad_(),
    )
    targets, share = torch.randint(0, V, (N,), generator=rng), torch.rand(N, generator=rng) / N
    got = LinearCrossEntropy.apply(x, weight, targets, share)
    want = (F.cross_entropy(x @ weight.T, targets, reduction="none") * share).sum()
    wanted = torch.autograd.grad(want, (x, weight))
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(3 * got, (x, weight)), wanted):
        torch.testing.assert_close(a, 3 * b, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(LinearCrossEntropy.apply(x, weight, targets, share), want)
    (alone,) = torch.autograd.grad(LinearCrossEntropy.apply(x, weight.detach(), targets, share), (x,))
    torch.testing.assert_close(alone, wanted[0], rtol=1e-5, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = LinearCrossEntropy.apply(x, weight, targets, share)
    assert got.dtype == torch.float32 and abs(got - want) < 0.02
    for a, b in zip(torch.autograd.grad(got, (x, weight)), wanted):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


def test_linear_cross_entropy_in_float64_and_once_only():
    """Its gradients are computed in the forward: a second derivative would be silently wrong."""
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 3, dtype=torch.float64, generator=rng).requires_grad_() for n in (5, 7))
    rest = torch.randint(0, 7, (5,), generator=rng), torch.rand(5, dtype=torch.float64, generator=rng) / 5
    assert torch.autograd.gradcheck(lambda x, weight: LinearCrossEntropy.apply(x, weight, *rest), (x, weight))
    for factor in (1, weight.square().sum()):
        loss = factor * LinearCrossEntropy.apply(x, weight, *rest)
        with pytest.raises(RuntimeError, match="second derivative"):
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + gradient.square().sum()).backward()


def test_without_gradients_only_the_logits_are_computed():
    """Three products for loss and gradients, one for the loss alone; the loss is the same."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count = getattr(self, "count", 0) + (
                func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
            )
            return func(*args, **(kwargs or {}))

    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets, share = torch.arange(5), torch.full((5,), 0.2)
    with Products() as learning:
        want = linear_cross_entropy(x, weight, targets, share)
    with Products() as looking, torch.no_grad():
        got = linear_cross_entropy(x, weight, targets, share)
    assert got == want and (learning.count, looking.count) == (3, 1)
    assert want.requires_grad and not got.requires_grad


def test_extreme_logits():
    x = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    loss = LinearCrossEntropy.apply(x, weight, torch.tensor([1, 1]), torch.tensor([0.5, 0.5]))
    loss.backward()
    assert loss.item() == 300.0 and x.grad.isfinite().all() and weight.grad.isfinite().all()


def test_a_batch_without_any_target():
    for name, model in both():
        model.train()
        for mode, idx in (("text", text(2, 6)), ("puzzle", puzzle_batch(model.puzzle_format, range(2))[0])):
            _, loss, _ = model(idx, torch.full_like(idx, IGNORE), mode=mode)
            loss.backward()
            assert loss.isfinite(), (name, mode)
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), (name, mode)
            model.zero_grad()


def attention_by_hand(a, x, positions, base, seen):
    """Full attention one query at a time; seen(i) -> the positions that i may look at."""
    T, D = x.shape
    H, d = a.n_head, D // a.n_head
    q, k, v = (x @ a.qkv_proj.weight.T).view(T, 3, H, d).unbind(1)

    def prepare(t, norm):  # RMSNorm, then pairs (i, i + d / 2) turned as complex numbers
        t = t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        turned = torch.complex(t[..., : d // 2], t[..., d // 2 :])
        for i in range(d // 2):
            level = i // 3
            angle = positions[:, i % 3].double() * base ** (-level / (d / 6))
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
    model = dense(layer_pattern="a")
    a = model.blocks[0].mixer
    idx = torch.from_numpy(arc.encode("arc", make_task(5).train).astype(np.int64))[None, :20]
    positions = arc.positions(idx)
    x = torch.randn(1, 20, 24, generator=torch.Generator().manual_seed(0))
    rope = rope_3d(positions, 12, 100.0)
    causal = attention_by_hand(a, x[0], positions[0], 100.0, lambda i: list(range(i + 1)))
    torch.testing.assert_close(a(x, rope)[0][0], causal, rtol=1e-4, atol=1e-5)
    visible = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    visible[..., 15:] = False
    free = attention_by_hand(a, x[0], positions[0], 100.0, lambda i: list(range(15)))
    torch.testing.assert_close(a(x, rope, visible=visible)[0][0], free, rtol=1e-4, atol=1e-5)
    for cuts in (
        [7, 13],
        [1] * 20,
        [20],
        [19, 1],
    ):  # prefill, more than one token onto a cache, single tokens
        cache, parts, start = a.empty_cache(1), [], 0
        for n in cuts:
            y, cache = a(x[:, start : start + n], tuple(t[:, :, start : start + n] for t in rope), cache)
            parts.append(y)
            start += n
        torch.testing.assert_close(torch.cat(parts, 1)[0], causal, rtol=1e-4, atol=1e-5)


def test_rotation_depends_on_differences_only_and_leaves_text_alone():
    q, k = torch.randn(2, 1, 1, 1, 12, generator=torch.Generator().manual_seed(0))

    def product(a, b):
        return (
            rotate(q, rope_3d(torch.tensor([[a]]), 12, 100.0))
            * rotate(k, rope_3d(torch.tensor([[b]]), 12, 100.0))
        ).sum()

    torch.testing.assert_close(
        product([3, 7, 1], [1, 2, 4]), product([13, 10, 5], [11, 5, 8]), rtol=1e-4, atol=1e-5
    )
    assert abs(product([3, 7, 1], [1, 2, 4]) - product([3, 7, 2], [1, 2, 4])) > 1e-4
    assert torch.equal(rotate(q, rope_3d(torch.zeros(1, 1, 3, dtype=torch.long), 12, 100.0)), q)


# ---- text


@torch.no_grad()
def test_text_is_causal():
    for name, model in both():
        idx = text(1, 70)
        before = model(idx)[0]
        for t in (0, 5, 64, 69):
            other = idx.clone()
            other[0, t] = (other[0, t] + 1000) % 50000
            changed = (model(other)[0] - before).abs().amax(-1)[0]
            assert (changed[:t] < 1e-4).all(), name
            assert changed[t] > 1e-3, name


def test_text_loss_is_cross_entropy_of_the_logits():
    for name, model in both():
        idx, targets = text(2, 10), text(2, 10, seed=1)
        targets[0, :4] = IGNORE
        with torch.no_grad():
            logits, nothing, carry = model(idx)
            assert logits.shape == (2, 10, tok.VOCAB_SIZE) and nothing is None and carry is None
            _, loss, carry = model(idx, targets)
            assert carry is None
        torch.testing.assert_close(
            loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        )


@torch.no_grad()
def check_greedy(model, idx, n, what):
    drawn = torch.stack(list(model.generate(idx, n, temperature=0, stop=())), 1)
    assert drawn.shape == (len(idx), n), what
    full = model(torch.cat([idx, drawn], 1))[0][:, idx.shape[1] - 1 : -1, : tok.END + 1]
    best = full.max(-1).values
    # The argmax itself, or a draw with it up to rounding.
    torch.testing.assert_close(
        full.gather(-1, drawn[..., None])[..., 0], best, rtol=1e-4, atol=1e-4, msg=what
    )


def test_greedy_decoding_equals_the_full_forward():
    for name, model in both():
        check_greedy(model, text(3, 12), 6, name)
        check_greedy(model, text(1, 1), 3, name)
        check_greedy(model, text(1, 70), 2, name)


def test_decoding_of_grids_counts_positions_on():
    """The prompt ends in the middle of a grid; what is drawn is put where it belongs."""
    for name, model in routes():
        prompt = torch.from_numpy(arc.encode("arc", make_task(4).train)[:-4].astype(np.int64))[None]
        check_greedy(model, prompt, 8, name)


def test_sampling():
    model = dense()
    idx = text(2, 5)

    def draw(seed, **kw):
        return torch.stack(
            list(model.generate(idx, 20, generator=torch.Generator().manual_seed(seed), stop=(), **kw)), 1
        )

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(
        draw(1, top_k=1), torch.stack(list(model.generate(idx, 20, temperature=0, stop=())), 1)
    )
    with torch.no_grad():
        model.wte.weight[tok.END + 1 :] = 100 * model.norm_f.weight  # ids without a name would win every draw
    assert draw(3).max() <= tok.END
    greedy = [t[0].item() for t in model.generate(idx[:1], 20, temperature=0, stop=())]
    stopped = [t[0].item() for t in model.generate(idx[:1], 20, temperature=0, stop=(greedy[2],))]
    assert stopped == greedy[: greedy.index(greedy[2]) + 1]  # the token that stops it is shown as well


# ---- Route A: answers


def test_dense_answers_are_grids_no_larger_than_the_canvas():
    for seed in range(2):
        model = dense(seed, size=1.0)
        answers = model.answer(TASKS)
        for task, per_task in zip(TASKS, answers):
            assert len(per_task) == len(task.test)
            for (test_input, _), candidates in zip(task.test, per_task):
                ((answer, score),) = candidates
                h, w = arc.canvas_shape(task.train, test_input)
                assert 1 <= answer.shape[0] <= h and 1 <= answer.shape[1] <= w and score <= 0
                arc.validate_grid(answer)
                kind, pairs = arc.decode(arc.encode(task.kind, [(test_input, answer)]))
                assert np.array_equal(pairs[0][1], answer) and answer.dtype == np.uint8


@torch.no_grad()
def dense_answer_by_hand(model, task, test_input):
    """Greedy under the grammar, by the full forward at every token."""
    ids = arc.encode_prompt(task.kind, task.train, test_input).astype(np.int64).tolist()
    H, W = arc.canvas_shape(task.train, test_input)
    colours = list(range(tok.CELL0, tok.CELL0 + 10))
    rows, score = [[]], 0.0
    while True:
        width = W if len(rows) == 1 else len(rows[0])
        allowed = []
        if rows[-1] or len(rows) == 1:
            allowed += colours if len(rows[-1]) < width else []
            allowed += [tok.ROW] if rows[-1] and (len(rows) == 1 or len(rows[-1]) == width) else []
        else:
            allowed += [tok.EOT] + (colours if len(rows) <= H else [])
        log_p = model(torch.tensor([ids]))[0][0, -1, allowed].log_softmax(0)
        choice = allowed[log_p.argmax()]
        score += log_p.max().item()
        if choice == tok.EOT:
            return np.array(rows[:-1], dtype=np.uint8), score
        ids.append(choice)
        if choice == tok.ROW:
            rows.append([])
        else:
            rows[-1].append(choice - tok.CELL0)


def test_dense_answers_equal_greedy_decoding_by_hand_alone_and_in_batches():
    model = dense(1, size=0.3)
    together = model.answer(TASKS)
    for task, per_task in zip(TASKS, together):
        alone = model.answer([task])[0]
        for (test_input, _), a, b in zip(task.test, per_task, alone):
            want, score = dense_answer_by_hand(model, task, test_input)
            for ((got, got_score),) in (a, b):
                assert np.array_equal(got, want)
                assert abs(got_score - score) < 1e-3
    assert np.array_equal(together[0][0][0][0], together[4][0][0][0])  # the same task twice


def counted(read_on, most):
    """read_on, which gives up after `most` calls: a loop that never ends is a failure, and no wait."""

    def limited(*args):
        limited.calls += 1
        assert limited.calls <= most, "goes on and on"
        return read_on(*args)

    limited.calls = 0
    return limited


@pytest.mark.parametrize("wrong", (math.nan, math.inf, -math.inf))
def test_logits_that_are_not_finite_are_no_answer(wrong):
    """The other rows are written as if it were not there, and all ends with the largest grid."""
    rng, limits = torch.Generator().manual_seed(0), [(2, 3), (2, 2), (1, 3)]
    logits = torch.randn(9, 3, 12, generator=rng)
    logits[:, :, 11] = -1e9  # stops only where it must

    def grids(logits, rows):
        step = iter(logits[1:, rows])
        read_on = counted(lambda drawn: next(step), 8)
        return model_dense.write_grids(logits[0, rows], read_on, [limits[r] for r in rows])

    for at in (0, 2, 4):
        broken = logits.clone()
        broken[at, 1] = wrong
        first, none, last = grids(broken, [0, 1, 2])
        assert none is None
        for got, (want,) in ((first, grids(logits, [0])), (last, grids(logits, [2]))):
            assert same(got[0], want[0]) and got[1] == want[1]


@pytest.mark.parametrize("samples", (1, 3))
def test_a_diverged_model_answers_nothing(samples, monkeypatch):
    model = dense()
    for p in model.parameters():
        p.data.fill_(math.nan)
    monkeypatch.setattr(model, "read_on", counted(model.read_on, 40))
    assert model.answer(TASKS, samples=samples) == [[[] for _ in task.test] for task in TASKS]
    assert model.decode_grids([text(1, 5)[0]] * 2, [(3, 3)] * 2) == [None, None]


@pytest.mark.parametrize("part", ("wte", "q_head"))
def test_a_diverged_route_b_answers_nothing(part):
    model = trm()
    want = model.answer(TASKS[:2])
    assert all(answer for task in want for answer in task)
    for p in getattr(model, part).parameters():
        p.data.fill_(math.nan)
    assert model.answer(TASKS[:2], halt=0.5) == [[[]], [[], []]]
    assert model.answer(TASKS[:1], trace=True) == [[[(None, 0.0)] * 3]]


def test_a_diverged_model_writes_no_text():
    for name, model in routes():
        model.wte.weight.data[5] = math.nan
        for temperature in (0, 1.0):
            with pytest.raises(ValueError, match="not finite") as e:
                list(model.generate(text(2, 6), 5, temperature=temperature))
            assert "\n" not in str(e.value), name
    logits = torch.tensor([[0.0, -math.inf, 2.0]])  # an id that is ruled out is none that is wrong
    assert model_dense.sample(logits, 0).item() == 2 and model_dense.sample(logits, 1.0).item() in (0, 2)


def test_an_empty_prompt_is_refused_in_one_line():
    for name, model in routes():
        for prompts in ([], [[]], [text(1, 3)[0], text(1, 3)[0][:0]], text(2, 0)):
            with pytest.raises(ValueError, match="prompt is empty") as e:
                list(model.generate(prompts, 3))
            assert "\n" not in str(e.value), name
        assert len(list(model.generate([torch.tensor([tok.EOT])], 3, stop=()))) == 3


def test_answers_do_not_read_the_test_outputs():
    for name, model in routes():
        hidden = [arc.Task(t.id, t.kind, t.train, [(x, None) for x, _ in t.test]) for t in TASKS]
        for a, b in zip(model.answer(TASKS), model.answer(hidden)):
            assert all(np.array_equal(x[0][0], y[0][0]) for x, y in zip(a, b))


@torch.no_grad()
def test_dense_answer_logits_are_log_probabilities_of_the_forward():
    model = dense(2, size=0.3)
    rng = np.random.default_rng(0)
    answers = [[grid(rng, 2, 3)], [None, grid(rng, 1, 1)], [grid(rng, 4, 2)]]
    out = model.answer_logits(TASKS[:3], answers)
    assert out[1][0] is None
    for task, given, got in zip(TASKS, answers, out):
        for (test_input, _), answer, log_p in zip(task.test, given, got):
            if answer is None:
                continue
            assert log_p.shape == answer.shape and log_p.dtype == np.float32
            ids = torch.from_numpy(
                arc.encode(task.kind, [*task.train, (test_input, answer)]).astype(np.int64)
            )
            all_log_p = model(ids[None])[0][0].log_softmax(-1)
            start = len(arc.encode_prompt(task.kind, task.train, test_input))
            h, w = answer.shape
            for r in range(h):
                for c in range(w):
                    at = start + r * (w + 1) + c
                    want = all_log_p[at - 1, tok.CELL0 + int(answer[r, c])].item()
                    assert abs(log_p[r, c] - want) < 1e-4


def test_tasks_longer_than_the_context_have_no_answer():
    task, long = make_task(0, side=2), make_task(7, demos=8, side=5)
    for name, model in routes(block_size=80):
        answers = model.answer([long, task])
        assert answers[0] == [None] and answers[1][0], name
        given = [[long.test[0][1]], [task.test[0][1]]]
        out = model.answer_logits([long, task], given)
        assert out[0] == [None] and out[1][0].shape == given[1][0].shape, name
        assert model.answer([]) == [] and model.answer_logits([], []) == []


def test_an_answer_that_just_fits_can_be_given_and_rescored():
    task = make_task(0, side=2)
    (test_input, _) = task.test[0]
    h, w = arc.canvas_shape(task.train, test_input)
    sizes = {
        "dense": len(arc.encode_prompt(task.kind, task.train, test_input)) + h * (w + 1),
        "trm": len(arc.encode_prompt(task.kind, task.train, test_input, (h, w))),
    }
    for name, size in sizes.items():
        model = dict(routes(block_size=size))[name]
        assert model.answer([task])[0][0], name
        assert model.answer_logits([task], [[np.zeros((h, w), np.uint8)]])[0][0] is not None, name
        assert dict(routes(block_size=size - 1))[name].answer([task]) == [[None]], name


# ---- Route B: recursion


def canvas_by_hand(row):
    """bool (L,): the cells, blank or not, behind the last <|output|> of a row."""
    ids = row.tolist()
    start = max(i for i, token in enumerate(ids) if token == tok.OUTPUT)
    return torch.tensor(
        [
            i > start and (tok.CELL0 <= token < tok.CELL0 + 10 or token == tok.BLANK)
            for i, token in enumerate(ids)
        ]
    )


def test_cells_of_the_canvas():
    idx, targets = puzzle_batch("canvas", range(12), length=128)
    cells = arc.canvas_cells(idx, arc.positions(idx))
    assert torch.equal(cells, torch.stack([canvas_by_hand(row) for row in idx])) and torch.equal(
        cells, targets != IGNORE
    )
    words = text(2, 30)
    assert not arc.canvas_cells(words, arc.positions(words)).any()


def grids_by_hand(row):
    """
    row (L,) -> where its first grid begins, and for each of its grids {(r, c): tokens that stand there}, from the text alone: its opening,
    which counts as standing where the first cell does, then cells and <|row|>s.
    """
    openings = [i for i, token in enumerate(row) if token in (tok.INPUT, tok.OUTPUT)] + [len(row)]
    grids = []
    for a, b in zip(openings, openings[1:]):
        r, c, places = 0, 0, {(0, 0): [a]}
        for at in range(a + 1, b):
            places.setdefault((r, c), []).append(at)
            r, c = (r + 1, 0) if row[at] == tok.ROW else (r, c + 1)
        grids.append(places)
    return openings[0], grids


def lines_by_hand(row, way):
    """
    row (L,) -> lists of the tokens in each line that is read in one of eight ways: rows, columns, tiles, each forwards and from their ends;
    pairs, forwards and with the places of each from the last to the first, or rows again where there is one grid only.
    """
    before, grids = grids_by_hand(row)
    if way >= 6 and len(grids) > 1:
        line = list(range(before))
        for i in range(0, len(grids), 2):
            pair = grids[i : i + 2]
            for place in sorted({p for places in pair for p in places}, reverse=way == 7):
                line += [at for places in pair for at in places.get(place, [])]
        return [line]
    lines = [list(range(before))]
    for places in grids:
        side = round(
            max(1 + max(r for r, _ in places), max(c for _, c in places)) ** 0.5
        )  # as many cells as a line, about
        line_of = (lambda r, c: r, lambda r, c: c, lambda r, c: (r // side, c // side))[way % 6 // 2]
        for line in sorted({line_of(*p) for p in places}):
            lines.append(sorted(at for p, tokens in places.items() if line_of(*p) == line for at in tokens))
    return [line[::-1] if way % 2 else line for line in lines if line]


def kda_by_lines(mixer, h, first_head, idx):
    """Each head has read each line as a sequence of its own: the layer on that line, of which this head's part is kept."""
    H, K = mixer.num_heads, mixer.head_dim
    out, projection = torch.zeros_like(h), mixer.o_proj
    mixer.o_proj = torch.nn.Identity()  # heads apart
    for way in range(8):
        keep = torch.tensor([(first_head + i) % 8 == way for i in range(H)])
        by_length = {}  # lines as long as each other go through the layer together
        for b, row in enumerate(idx.tolist() if keep.any() else ()):
            for line in lines_by_hand(row[: row.index(tok.PAD)] if tok.PAD in row else row, way):
                by_length.setdefault(len(line), []).append((b, line))
        for lines in by_length.values():
            b, line = torch.tensor([b for b, _ in lines])[:, None], torch.tensor([line for _, line in lines])
            read = mixer(h[b, line])[0].unflatten(-1, (H, K)) * keep[:, None]
            out = out.index_put((b, line), projection(read.flatten(2)), accumulate=True)
    mixer.o_proj = projection
    return out


def core_by_hand(model, h, rope, seen, idx):
    """The core f: post-norm blocks, one after the other. In puzzles, KDA reads lines."""

    def norm(x, m):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight

    heads = 0
    for block in model.blocks:
        if block.kind == "a":
            mixed = block.mixer(h, rope, None, seen)[0]
        else:
            mixed = block.mixer(h)[0] if seen is None else kda_by_lines(block.mixer, h, heads, idx)
            heads += block.mixer.num_heads
        h = norm(h + mixed, block.norm_1)
        gate, up = (h @ block.mlp.up_proj.weight.T).chunk(2, -1)
        h = norm(h + (gate * torch.sigmoid(gate) * up) @ block.mlp.down_proj.weight.T, block.norm_2)
    return h


def trm_by_hand(model, idx, n, T, n_sup, seen, n_grad=1):
    """
    The published pseudocode: yields y, z after each supervision step, with the gradient it trains with: of the last recursion, or of
    the last n_grad. seen None: text.
    """
    d = model.config.n_embd
    rope = rope_3d(arc.positions(idx), d // model.config.n_head, model.config.rope_base)
    given = (
        None if seen is None else torch.stack([canvas_by_hand(row) for row in idx]) & (idx != tok.BLANK)
    )  # the test input's cells

    def embed():
        x = model.wte.weight[idx]
        return (x if seen is None else x + model.wte.weight[tok.BLANK] * given[..., None]) * math.sqrt(d)

    y, z = model.y_init.expand(*idx.shape, d), model.z_init.expand(*idx.shape, d)

    def recursion(y, z):
        for _ in range(n):
            z = core_by_hand(model, x + y + z, rope, seen, idx)
        return core_by_hand(model, y + z, rope, seen, idx), z

    for _ in range(n_sup):
        x, y, z = embed(), y.detach(), z.detach()
        with torch.no_grad():
            for _ in range(T - n_grad):
                y, z = recursion(y, z)
        for _ in range(n_grad):
            y, z = recursion(y, z)
        yield y, z


def canvas_loss_by_hand(model, y, idx, targets):
    """Mean over rows of the mean over canvas cells; plus half of whether the halting head knew that all is right."""
    head = model.wte.weight[torch.tensor(ANSWER_IDS)]
    answer, halting = [], []
    for b in range(len(idx)):
        cells = [i for i in range(idx.shape[1]) if targets[b, i] != IGNORE]
        logits = y[b, cells] @ head.T
        wanted = torch.tensor([ANSWER_IDS.index(targets[b, i]) for i in cells])
        answer.append(F.cross_entropy(logits, wanted))
        right = torch.equal(logits.argmax(-1), wanted)
        q = y[b, 0] @ model.q_head.weight[0] + model.q_head.bias[0]
        halting.append(-torch.log(torch.sigmoid(q if right else -q)))
    return sum(answer) / len(answer), sum(halting) / len(halting)


@pytest.mark.parametrize(
    "n, T, n_grad, n_sup, n_head",
    ((2, 2, 1, 3, 2), (1, 1, 1, 2, 4), (1, 3, 1, 1, 2), (3, 1, 1, 2, 1), (2, 2, 2, 2, 2), (1, 3, 2, 2, 4)),
)
def test_training_is_the_published_recursion(n, T, n_grad, n_sup, n_head):
    model = trm(n_latent=n, n_recursion=T, n_grad=n_grad, n_sup=n_sup, n_head=n_head, halt_exploration=0.0)
    with torch.no_grad():
        model.q_head.bias -= 100  # never halts early
    model.train()
    idx, targets = puzzle_batch("canvas", range(3))
    seen = (idx != tok.PAD)[:, None, None, :]
    carry = None
    for y, z in trm_by_hand(model, idx, n, T, n_sup, seen, n_grad):
        answer, halting = canvas_loss_by_hand(model, y, idx, targets)
        want = answer + 0.5 * halting
        logits, got, carry = model(idx, targets, mode="puzzle", carry=carry)
        assert logits is None
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        real = idx != tok.PAD
        torch.testing.assert_close(carry["y"][real], y.detach()[real], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(carry["z"][real], z.detach()[real], rtol=1e-3, atol=1e-4)
        assert not carry["y"].requires_grad and not carry["z"].requires_grad
        grads = torch.autograd.grad(got, list(model.parameters()), allow_unused=True)
        wanted = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
        for (name, _), a, b in zip(model.named_parameters(), grads, wanted):
            a, b = (torch.zeros(1) if t is None else t for t in (a, b))
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6, name
    assert carry["halted"].all() and (carry["steps"] == n_sup).all()


def test_text_is_the_same_recursion_with_its_own_numbers():
    model = trm(**TEXT_RECURSION)
    idx, targets = text(2, 9), text(2, 9, seed=1)
    losses = []
    for y, _ in trm_by_hand(model, idx, 2, 2, 2, None):
        logits = y @ model.wte.weight.T
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model(idx, targets)[1], losses[-1], rtol=1e-4, atol=1e-4)
    model.train()
    got, want = model(idx, targets)[1], sum(losses) / 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(got, list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), grads, wanted):
        a, b = (torch.zeros(1) if t is None else t for t in (a, b))
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6, name


@torch.no_grad()
def test_evaluation_takes_all_steps():
    model = trm()
    idx, targets = puzzle_batch("canvas", range(3))
    *_, (y, _) = trm_by_hand(model, idx, 2, 2, 3, (idx != tok.PAD)[:, None, None, :])
    logits, loss, carry = model(idx, mode="puzzle")
    assert logits.shape == (*idx.shape, 11) and loss is None and carry is None
    want = y @ model.wte.weight[torch.tensor(ANSWER_IDS)].T
    torch.testing.assert_close(logits[idx != tok.PAD], want[idx != tok.PAD], rtol=1e-3, atol=1e-3)
    nothing, loss, carry = model(idx, targets, mode="puzzle")
    assert nothing is None and carry is None
    torch.testing.assert_close(loss, canvas_loss_by_hand(model, y, idx, targets)[0], rtol=1e-4, atol=1e-4)


# ---- Route B: the carry


def test_rows_stay_until_they_halt_and_are_then_refilled():
    model = trm(n_sup=3, halt_exploration=0.0).train()
    old, new = puzzle_batch("canvas", range(4), 96), puzzle_batch("canvas", range(10, 14), 96)
    _, _, carry = model(*old, mode="puzzle")
    assert torch.equal(carry["idx"], old[0]) and torch.equal(carry["targets"], old[1])
    assert (carry["steps"] == 1).all()
    carry["halted"] = torch.tensor([False, True, False, True])
    kept = {k: v.clone() for k, v in carry.items()}
    _, loss, after = model(*new, mode="puzzle", carry=carry)
    assert all(torch.equal(carry[k], kept[k]) for k in kept)  # what came in is not written over
    for b, halted in enumerate(kept["halted"].tolist()):
        source = new if halted else old
        assert torch.equal(after["idx"][b], source[0][b]) and torch.equal(after["targets"][b], source[1][b])
        assert after["steps"][b] == (1 if halted else 2)
    _, _, fresh = model(*new, mode="puzzle")  # a refilled row starts as if nothing had been there
    torch.testing.assert_close(after["y"][1], fresh["y"][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["z"][3], fresh["z"][3], rtol=1e-4, atol=1e-5)
    assert (after["y"][0] - fresh["y"][0]).abs().max() > 1e-3


def test_never_more_than_n_sup_steps():
    model = trm(n_sup=3, halt_exploration=0.5).train()
    carry, seen = None, []
    for step in range(7):
        with torch.no_grad():
            _, _, carry = model(
                *puzzle_batch("canvas", range(10 * step, 10 * step + 5), 96), mode="puzzle", carry=carry
            )
        assert carry["steps"].min() >= 1 and carry["steps"].max() <= 3
        assert carry["halted"][carry["steps"] == 3].all()
        seen.append(carry["steps"].max().item())
    assert max(seen) == 3


def test_the_halting_head_decides():
    batch = puzzle_batch("canvas", range(10), 96)
    for bias, halts in ((100.0, True), (-100.0, False)):
        model = trm(n_sup=8, halt_exploration=0.0).train()
        with torch.no_grad():
            model.q_head.bias.fill_(bias)
            _, _, carry = model(*batch, mode="puzzle")
        assert carry["halted"].tolist() == [halts] * 10


@torch.no_grad()
def test_exploration_keeps_a_tenth_of_the_rows_for_a_while():
    model = trm(n_sup=8)
    idx = torch.randint(tok.CELL0, tok.CELL0 + 10, (3000, 40), generator=torch.Generator().manual_seed(0))
    begun = torch.arange(3000) % 7 + 1
    steps = model.steps_to_stay(idx, begun)
    assert torch.equal(steps, model.steps_to_stay(idx, begun))
    some = model.steps_to_stay(idx[5:9], begun[5:9])
    assert torch.equal(steps[5:9], some)  # a row's own, whoever is beside it
    assert 0.07 < (steps > 1).float().mean() < 0.13
    stay = steps[steps > 1]
    assert stay.min() == 2 and stay.max() == 8
    assert torch.bincount(stay).tolist()[2:] == pytest.approx([len(stay) / 7] * 7, rel=0.6)
    model = trm(n_sup=1)
    _, _, carry = model.train()(*puzzle_batch("canvas", range(30)), mode="puzzle")
    assert carry["halted"].all()


def test_explored_rows_go_on_though_the_head_says_stop():
    model = trm(n_sup=4, halt_exploration=1.0).train()
    batch = puzzle_batch("canvas", range(20), 96)
    must = model.steps_to_stay(batch[0], torch.ones(20, dtype=torch.long))
    assert len(must.unique()) > 1
    with torch.no_grad():
        model.q_head.bias.fill_(100.0)
        carry = None
        for step in (1, 2, 3, 4):
            if carry is not None:
                carry["halted"] = torch.zeros_like(carry["halted"])
            _, _, carry = model(*batch, mode="puzzle", carry=carry)
            assert torch.equal(carry["halted"], must <= step)


@torch.no_grad()
def test_a_row_that_comes_again_explores_anew():
    model = trm(n_sup=4, halt_exploration=0.2, n_latent=1, n_recursion=1, n_layer=1).train()
    idx, targets = puzzle_batch("canvas", range(10), 96)
    for row in idx:  # every one in about the configured share of its starts
        stay = model.steps_to_stay(row.expand(500, -1), torch.arange(500))
        assert 0.15 < (stay > 1).float().mean() < 0.25
        assert stay.unique().tolist() == [1, 2, 3, 4]

    def decisions(rows, calls, carry=None):
        found = []
        for _ in range(calls):
            _, _, carry = model(idx[rows], targets[rows], mode="puzzle", carry=carry)
            found.append(carry["halted"])
        return torch.stack(found, 1), carry

    model.q_head.bias.fill_(100.0)  # stops as soon as it may; the next call begins another row there
    halted, carry = decisions(slice(None), 40)
    assert torch.equal(carry["begun"], 1 + halted[:, :-1].sum(1))
    both = [not row.all() and row.any() for row in halted]  # none always goes on, or never
    assert sum(both) >= 9
    halves = [decisions(rows, 40)[0] for rows in (slice(0, 5), slice(5, 10))]
    assert torch.equal(torch.cat(halves), halted)
    first, carry = decisions(slice(None), 15)  # what was saved and loaded goes on as it would have
    rest, _ = decisions(slice(None), 25, {k: v.clone() for k, v in carry.items()})
    assert torch.equal(torch.cat([first, rest], 1), halted)


@torch.no_grad()
def test_a_carry_that_does_not_count_its_rows_goes_on():
    model = trm(n_sup=3).train()
    batch = puzzle_batch("canvas", range(4), 96)
    _, _, carry = model(*batch, mode="puzzle")
    del carry["begun"]  # as an older checkpoint holds it
    carry["halted"] = torch.tensor([True, False, False, True])
    assert model(*batch, mode="puzzle", carry=carry)[2]["begun"].tolist() == [1, 0, 0, 1]


def test_a_carry_of_another_shape_is_refused():
    model = trm().train()
    _, _, carry = model(*puzzle_batch("canvas", range(4), 96), mode="puzzle")
    for other in (puzzle_batch("canvas", range(3), 96), puzzle_batch("canvas", range(4), 128)):
        with pytest.raises(ValueError, match="carry") as e:
            model(*other, mode="puzzle", carry=carry)
        assert "\n" not in str(e.value)


@torch.no_grad()
def test_padding_changes_nothing():
    for name, model in routes():
        for seed in (1, 2):
            idx, targets = puzzle_batch(model.puzzle_format, [seed])
            padded, padded_targets = puzzle_batch(model.puzzle_format, [seed], 128)
            a, b = model(idx, mode="puzzle")[0], model(padded, mode="puzzle")[0]
            torch.testing.assert_close(
                b[:, : idx.shape[1], -60:], a[..., -60:], rtol=1e-3, atol=1e-3, msg=name
            )
            a, b = model(idx, targets, mode="puzzle")[1], model(padded, padded_targets, mode="puzzle")[1]
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
        model.train()
        a = model(idx, targets, mode="puzzle")[1]
        b = model(padded, padded_targets, mode="puzzle")[1]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
def test_rows_of_a_puzzle_batch_do_not_mix():
    for name, model in routes():
        idx, _ = puzzle_batch(model.puzzle_format, range(4))
        together = model(idx, mode="puzzle")[0]
        for b in range(4):
            alone = model(idx[b : b + 1], mode="puzzle")[0][0]
            real = idx[b] != tok.PAD
            torch.testing.assert_close(
                alone[real, -60:], together[b, real, -60:], rtol=1e-3, atol=1e-3, msg=name
            )


def test_puzzle_loss_is_the_mean_over_rows():
    """Two processes with half the rows each then agree with one."""
    for name, model in routes():
        idx, targets = puzzle_batch(model.puzzle_format, range(4), 96)
        with torch.no_grad():
            parts = [model(idx[b : b + 1], targets[b : b + 1], mode="puzzle")[1] for b in range(4)]
            torch.testing.assert_close(
                model(idx, targets, mode="puzzle")[1], sum(parts) / 4, rtol=1e-4, atol=1e-4, msg=name
            )


# ---- Route B: answers


@torch.no_grad()
def trm_answers_by_hand(model, task, test_input):
    """What stands on the canvas after each supervision step, and the halting head's probability."""
    H, W = arc.canvas_shape(task.train, test_input)
    idx = torch.from_numpy(
        arc.encode_prompt(task.kind, task.train, test_input, canvas=(H, W)).astype(np.int64)
    )[None]
    c, everyone = model.config, torch.ones(1, 1, 1, idx.shape[1]).bool()
    for y, _ in trm_by_hand(model, idx, c.n_latent, c.n_recursion, c.n_sup, everyone):
        choice = (y[0, -H * (W + 1) :] @ model.wte.weight[torch.tensor(ANSWER_IDS)].T).argmax(-1)
        p = torch.sigmoid(y[0, 0] @ model.q_head.weight[0] + model.q_head.bias[0])
        yield arc.read_canvas(np.array([ANSWER_IDS[c] for c in choice]), (H, W)), p.item()


def same(a, b):
    return (a is None) == (b is None) and (a is None or np.array_equal(a, b))


def test_trm_answers_step_by_step_alone_and_in_batches():
    model = trm(3, n_sup=4)
    tasks = TASKS[:3]
    trace, answers = model.answer(tasks, trace=True), model.answer(tasks)
    for i, task in enumerate(tasks):
        alone = model.answer([task], trace=True)[0]
        for j, (test_input, _) in enumerate(task.test):
            want = list(trm_answers_by_hand(model, task, test_input))
            assert len(want) == len(trace[i][j]) == len(alone[j]) == 4
            for (g, p), (g1, p1), (g2, p2) in zip(want, trace[i][j], alone[j]):
                assert same(g, g1) and same(g, g2) and abs(p - p1) < 1e-3 and abs(p - p2) < 1e-3
            kept = []  # the surest first; this model's probabilities differ from step to step
            for g, p in sorted((s for s in want if s[0] is not None), key=lambda s: -s[1]):
                if not any(np.array_equal(g, k) for k, _ in kept):
                    kept.append((g, p))
            assert len(kept) == len(answers[i][j])
            for (g, p), (k, pk) in zip(answers[i][j], kept):
                assert np.array_equal(g, k) and abs(p - pk) < 1e-3


def test_the_surest_answer_comes_first():
    a, b, c = (np.array([[i]], np.uint8) for i in range(3))
    thoughts = [(a, 0.5), (b, 0.9), (None, 1.0), (b, 0.2), (c, 0.5), (a, 0.4)]
    assert [(g.item(), p) for g, p in model_trm.surest(thoughts)] == [(1, 0.9), (0, 0.5), (2, 0.5)]
    assert model_trm.surest([(a, 0.5), (b, 0.5)])[0][0] is b  # of equally sure ones the latest
    assert model_trm.surest([(None, 0.7)]) == [] == model_trm.surest([])


def test_number_of_steps_when_answering():
    model = trm(n_sup=3)
    for n in (1, 5):
        assert len(model.answer(TASKS[:1], n_sup=n, trace=True)[0][0]) == n
    first = model.answer(TASKS[:1], n_sup=1)[0][0]
    assert same(first[0][0], model.answer(TASKS[:1], trace=True)[0][0][0][0])


@torch.no_grad()
def test_trm_answer_logits_are_those_of_the_forward():
    model = trm(2)
    rng = np.random.default_rng(0)
    shapes = [[arc.canvas_shape(t.train, x) for x, _ in t.test] for t in TASKS]
    answers = [[grid(rng, *rng.integers(1, np.array(s) + 1)) for s in per_task] for per_task in shapes]
    answers[1][0] = None
    answers[3][0] = grid(rng, shapes[3][0][0] + 1, 1)  # higher than the canvas
    out = model.answer_logits(TASKS, answers)
    assert out[1][0] is None and out[3][0] is None
    for task, per_task, given, got in zip(TASKS, shapes, answers, out):
        for (test_input, _), (H, W), answer, log_p in zip(task.test, per_task, given, got):
            if log_p is None:
                continue
            idx = torch.from_numpy(
                arc.encode_prompt(task.kind, task.train, test_input, canvas=(H, W)).astype(np.int64)
            )[None]
            want = model(idx, mode="puzzle")[0][0].log_softmax(-1)[-H * (W + 1) :]
            assert log_p.shape == answer.shape and log_p.dtype == np.float32
            for r in range(answer.shape[0]):
                for c in range(answer.shape[1]):
                    assert abs(log_p[r, c] - want[r * (W + 1) + c, int(answer[r, c])].item()) < 1e-3


# ---- learning


def learn(route, mode, make_batch, steps):
    """A model as it is initialised, trained on one batch -> model, losses."""
    torch.manual_seed(0)
    shape = {**SHAPE, "n_layer": 2, "layer_pattern": "ka", "n_embd": 48, "n_head": 4}
    model = (
        model_dense.Model(model_dense.Config(**shape))
        if route == "dense"
        else model_trm.Model(model_trm.Config(**shape, **RECURSION))
    ).train()
    batch = make_batch(model.puzzle_format)
    optimizer = model.configure_optimizer(0.0, 5e-3, (0.9, 0.95))
    losses, carry = [], None
    for _ in range(steps):
        _, loss, carry = model(*batch, mode=mode, carry=carry)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


@pytest.mark.parametrize("route", ("dense", "trm"))
@pytest.mark.parametrize("mode", ("text", "puzzle"))
def test_overfits_one_batch(route, mode):
    def make_batch(puzzle_format):
        return (text(2, 12), text(2, 12, seed=1)) if mode == "text" else puzzle_batch(puzzle_format, range(4))

    _, losses = learn(route, mode, make_batch, 30)
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])
    if mode == "text":
        assert abs(losses[0] - math.log(tok.VOCAB_SIZE)) < 1.5  # it starts by knowing nothing


def test_a_solved_puzzle_is_answered():
    """Trained on a single puzzle until it is right, both routes give its answer, and Route B's halting head says so."""
    task = make_task(11, side=4)
    assert task.test[0][1].size > 3
    document = arc.encode("arc", [*task.train, *task.test])
    for route in ("dense", "trm"):
        model, _ = learn(route, "puzzle", lambda how: pad_rows([puzzle_row(document, how, "none")], 80), 80)
        # Route B as it was trained: a row whose answer it believes in is not thought about any further
        answer, score = model.answer([task], **({"halt": 0.5} if route == "trm" else {}))[0][0][0]
        assert np.array_equal(answer, task.test[0][1]), route
        assert score > (0.5 if route == "trm" else -3), route
