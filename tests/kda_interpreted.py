"""
kda_triton.py in Triton's interpreter, on a CPU, against the recurrence in float64 and autograd. test_kda_triton.py runs this file in a
process of its own: Triton looks for TRITON_INTERPRET when it is imported, and other tests need it without.

    TRITON_INTERPRET=1 python -m pytest tests/kda_interpreted.py
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

import kda
import model_dense
from smol import engine
from smol import kda_triton as kt

torch.set_num_threads(1)
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dstate")


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch):
    """The interpreter keeps bfloat16 as uint16: it multiplies those integers in tl.dot, and cuts off where hardware rounds."""
    builder, bf16 = interpreter.InterpreterBuilder, interpreter.tl.bfloat16
    dot, cast = builder.create_dot, builder.cast_impl

    def widen(x):
        if x.dtype.scalar != bf16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    def rounding_cast(self, src, dst_type):
        if src.dtype.scalar == interpreter.tl.float32 and dst_type.scalar == bf16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(rounded, bf16)
        return cast(self, src, dst_type)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest))
    monkeypatch.setattr(builder, "cast_impl", rounding_cast)


def recurrence(q, k, v, g, beta, scale, state, cu):
    """Token by token, for sequences back to back: q, k, g (T, H, K), v (T, H, V), beta (T, H), state (N, H, K, V)."""
    o, finals = [], []
    for n in range(len(cu) - 1):
        S = state[n]
        for t in range(cu[n], cu[n + 1]):
            S = g[t].exp()[..., None] * S
            S = S + k[t][..., None] * (beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], S)))[:, None, :]
            o.append(torch.einsum("hk,hkv->hv", q[t] * scale, S))
        finals.append(S)
    return torch.stack(o), torch.stack(finals)


def make(lengths, H, K, V, gate, beta, seed=0):
    rng = torch.Generator().manual_seed(seed)
    T, N = sum(lengths), len(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    u = torch.rand(T, H, K, generator=rng, dtype=torch.float64)
    g = {
        "none": 0 * u,
        "mild": -0.1 * u,
        "strong": -8 * u,
        "largest A": -16 * F.softplus(6 * u - 3),
        "uneven": -u * torch.logspace(-3, 1.5, K, dtype=torch.float64),
        "-50": 0 * u - 50,
        "resets": (-0.1 * u).masked_fill(torch.rand(u.shape, generator=rng) < 0.05, -math.inf),
        "whole resets": (-0.1 * u).masked_fill(torch.rand(T, H, 1, generator=rng) < 0.1, -math.inf),
        "all -inf": 0 * u - math.inf,
    }[gate]
    beta = torch.rand(T, H, generator=rng, dtype=torch.float64) if beta == "random" else torch.full((T, H), beta, dtype=torch.float64)
    inputs = [normal(T, H, K), F.normalize(normal(T, H, K), dim=-1), normal(T, H, V), g, beta, normal(N, H, K, V)]
    return inputs, (normal(T, H, V), normal(N, H, K, V)), [0, *np.cumsum(lengths).tolist()]


def run(lengths, H, K, V, dtype, gate="mild", beta="random", times=1.0):
    """Relative error of every output and gradient, by name."""
    inputs, gradients, cu = make(lengths, H, K, V, gate, beta)
    inputs = [t.to(dtype).double() if i < 3 else t.float().double() for i, t in enumerate(inputs)]
    gradients = [(times * gradients[0]).to(dtype).double(), times * gradients[1]]
    leaves = [t.clone().requires_grad_() for t in inputs]
    outputs = recurrence(*leaves[:5], K**-0.5, leaves[5], cu)
    want = [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]

    q, k, v = (t.to(dtype)[None] for t in inputs[:3])
    rest = (inputs[3].float()[None], inputs[4].float()[None], K**-0.5, inputs[5].float(), kt.chunk_table(torch.tensor(cu)))
    o, final, saved = kt.triton_forward(q, k, v, *rest)
    *grads, dstate = kt.triton_backward(q, k, v, *rest, saved, gradients[0].to(dtype)[None], gradients[1].float())
    got = [o[0], final, *(t[0] for t in grads), dstate]
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype, dtype, dtype, *[torch.float32] * 3]
    errors = {}
    for name, a, b in zip(NAMES, got, want):
        assert a.isfinite().all(), name
        # where nothing is left but what -50 a step leaves, 1e-9 of the usual size counts as zero
        errors[name] = ((a.double() - b).norm() / max(b.norm().item(), 1e-9 * times * b.numel() ** 0.5)).item()
    assert (got[5][inputs[3] == -math.inf] == 0).all()
    return errors


def check(errors, dtype):
    for name, error in errors.items():
        limit = 1e-2 if dtype != torch.float32 else 1e-5 if name in NAMES[:2] else 1e-4
        assert error <= limit, (name, errors)


# The interpreter takes half a second for a chunk of a head: tests are few chunks, and every one tries several things at once.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "gate, beta",
    [("none", 2.0), ("mild", "random"), ("strong", 1.0), ("largest A", "random"), ("uneven", 2.0), ("-50", "random"), ("resets", "random"),
     ("whole resets", 2.0), ("all -inf", 0.0)],
)  # fmt: skip
def test_gates_and_beta(gate, beta, dtype):
    two = gate in ("none", "resets")  # chunks
    check(run([70 if two else 40], 1, 16, 16, dtype, gate, beta), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lengths(dtype):
    check(run([1, 0, 65, 1, 2], 1, 16, 32, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["no state", "state"])
def test_through_the_operator(dtype, with_state):
    """As the layer calls it: training has no initial state and wants no final one, a prefill has both."""
    inputs, (do, dstate), _ = make([40], 1, 16, 16, "mild", "random")
    inputs = [t.to(dtype if i < 3 else torch.float32) for i, t in enumerate(inputs)]
    results = []
    for backend, convert in (("triton", lambda t: t), ("recurrent", torch.Tensor.double)):
        leaves = [convert(t).requires_grad_() for t in (inputs if with_state else inputs[:5])]
        state = leaves[5] if with_state else None
        o, final = kda.kda(*(t[None] for t in leaves[:5]), initial_state=state, output_final_state=with_state,
                           backend=backend)  # fmt: skip
        assert (final is None) != with_state
        loss = (o[0].double() * do).sum() + ((final.double() * dstate).sum() if with_state else 0)
        results.append([t for t in (o[0], final) if t is not None] + [*torch.autograd.grad(loss, leaves)])
    names = NAMES if with_state else [name for name in NAMES if "state" not in name]
    errors = {}
    for name, got, want in zip(names, *results, strict=True):
        errors[name] = ((got.double() - want).norm() / want.norm()).item()
    check(errors, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_training_step_of_a_model(dtype, monkeypatch):
    """Under autocast, as in train.py; then prefill and one token with caches. Against the chunked form."""
    config = model_dense.Config(block_size=32, n_layer=2, n_head=1, n_embd=16, n_ff=16, layer_pattern="ka")
    idx = torch.arange(16)[None] + 5
    losses, gradients, logits = [], [], []
    for backend in ("triton", "chunk"):
        monkeypatch.setattr(kda, "BACKEND", backend)
        kda.choose_backend.cache_clear()
        torch.manual_seed(0)
        model = model_dense.Model(config)
        for name, p in model.named_parameters():
            if name.endswith("o_proj.weight"):  # zeros, behind which nothing would have a gradient
                torch.nn.init.normal_(p, std=0.25)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(idx, idx.roll(-1, 1))[1]
            with torch.no_grad():
                x, cache = engine.prefill(model, idx, 1)
                logits.append(torch.stack([x, engine.decode_step(model, idx[:, -1], cache)]).float())
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    kda.choose_backend.cache_clear()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    torch.testing.assert_close(*logits, rtol=tolerance, atol=tolerance)
    for name, want in gradients[1].items():
        assert (gradients[0][name] - want).norm() <= 3 * tolerance * want.norm() + 1e-6, name


def test_heads_and_many_chunks():
    check(run([17, 64], 3, 16, 16, torch.float32), torch.float32)
    check(run([150], 1, 16, 16, torch.float32, "none", 2.0), torch.float32)
    check(run([130], 1, 32, 32, torch.bfloat16, "none", 2.0), torch.bfloat16)
    check(run([130], 1, 32, 32, torch.float16, "none", 2.0), torch.float16)


@pytest.mark.parametrize("K, V", [(32, 16), (24, 40), (128, 64)])
def test_sizes(K, V):
    check(run([20], 1, K, V, torch.float32, "uneven"), torch.float32)
    check(run([20], 1, K, V, torch.bfloat16, "mild", 2.0), torch.bfloat16)


def test_turing_inverts_in_float16(monkeypatch):
    constants = kt.launch_constants
    monkeypatch.setattr(kt, "launch_constants", lambda capability, *rest: constants((7, 5), *rest))
    assert kt.launch_constants((9, 0), torch.float16, 1, 16, 16)["MERGE"] == "fp16"
    check(run([60], 1, 32, 16, torch.float16, "uneven"), torch.float16)
    errors = run([130], 1, 16, 16, torch.float16, "none", 2.0)  # nothing forgets a rounding: what is left grows with the length
    assert max(errors.values()) < 3e-3, errors  # with an inverse of single float16 4.4e-3, and more than 1e-2 at 4,096 tokens


def test_float16_gradients_of_any_size():
    """dq .. dv may leave float16 by themselves; dg, dbeta and dstate are float32 and must be right however do is scaled."""
    inputs, (do, dstate), cu = make([40], 1, 16, 16, "mild", "random")
    low = [t.half()[None] for t in inputs[:3]] + [t.float()[None] for t in inputs[3:5]]
    low += [0.25, inputs[5].float(), kt.chunk_table(torch.tensor(cu))]
    _, _, saved = kt.triton_forward(*low)
    do = do.half()
    want = kt.triton_backward(*low, saved, do[None], None)
    for times in (1e-6, 3e4 / 4):
        got = kt.triton_backward(*low, saved, (times * do.double()).half()[None], (0 * dstate).float())
        for a, b in zip(got[3:], want[3:]):
            assert a.isfinite().all()
            assert (a / times - b).norm() <= (5e-2 if times < 1 else 5e-3) * b.norm()  # 1e-6 is a subnormal: do itself lost bits


def test_bfloat16_of_any_size():
    """Inside, they become float16, near 1: powers of two change nothing but exponents, and zeros are not divided by."""
    (q, k, v, g, beta, state), (do, dstate), cu = make([20], 1, 16, 16, "mild", 2.0)
    rest, table = [t.float()[None] for t in (g, beta)], kt.chunk_table(torch.tensor(cu))

    def both(*powers):
        a, b, c, d = (t.bfloat16()[None] * 2.0**n for t, n in zip((q, k, v, do), powers))
        inputs = a, b, c, *rest, 0.25, state.float() * 2.0 ** powers[2], table
        o, final, saved = kt.triton_forward(*inputs)
        return o, final, *kt.triton_backward(*inputs, saved, d, dstate.float() * 2.0 ** (powers[0] + powers[3]))

    for a, b, n in zip(both(40, 0, -20, -50), both(0, 0, 0, 0), (20, -20, -70, -30, -10, -30, -30, -10)):
        assert b.any() and torch.equal(a, b * 2.0**n)
    nothing = [0 * t.bfloat16()[None] for t in (q, k, v)]
    o, final, saved = kt.triton_forward(*nothing, *rest, 0.25, 0 * state.float(), table)
    grads = kt.triton_backward(*nothing, *rest, 0.25, 0 * state.float(), table, saved, 0 * o, None)
    assert not any(t.any() for t in (o, final, *grads))


def test_batch_is_sequences_back_to_back():
    inputs, (do, dstate), _ = make([20, 20], 2, 16, 16, "mild", "random")
    rows = [t.float().view(2, 20, *t.shape[1:]) for t in inputs[:5]]
    packed = [t.float()[None] for t in inputs[:5]]
    rest = (0.25, inputs[5].float(), kt.chunk_table(torch.tensor([0, 20, 40])))
    a, b = kt.triton_forward(*rows, *rest), kt.triton_forward(*packed, *rest)
    assert torch.equal(a[0].view(-1), b[0].view(-1)) and torch.equal(a[1], b[1])
    da = kt.triton_backward(*rows, *rest, a[2], do.float().view_as(a[0]), dstate.float())
    db = kt.triton_backward(*packed, *rest, b[2], do.float()[None], dstate.float())
    assert all(torch.equal(x.view(-1), y.view(-1)) for x, y in zip(da, db))


def test_split_and_pass_on_the_state():
    inputs, _, _ = make([70], 1, 16, 16, "resets", "random")
    x = [t.float()[None] for t in inputs[:5]]
    whole, final, _ = kt.triton_forward(*x, 0.25, None, kt.chunk_table(torch.tensor([0, 70])))
    a, state, _ = kt.triton_forward(*(t[:, :37] for t in x), 0.25, None, kt.chunk_table(torch.tensor([0, 37])))
    b, state, _ = kt.triton_forward(*(t[:, 37:] for t in x), 0.25, state, kt.chunk_table(torch.tensor([0, 33])))
    assert torch.allclose(torch.cat([a, b], 1), whole, atol=1e-5)
    assert torch.allclose(state, final, atol=1e-5)


def test_no_tokens():
    x = [torch.zeros(2, 0, 1, 16) for _ in range(4)] + [torch.zeros(2, 0, 1)]
    state = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    table = kt.chunk_table(torch.tensor([0, 0, 0]))
    o, final, saved = kt.triton_forward(*x, 1.0, state, table)
    assert o.shape == (2, 0, 1, 16) and torch.equal(final, state)
    assert torch.equal(kt.triton_backward(*x, 1.0, state, table, saved, o, 3 * state)[5], 3 * state)


def test_chunk_table():
    table = kt.chunk_table(torch.tensor([0, 130, 130, 131, 195]))
    assert table.start.tolist() == [0, 64, 128, 130, 131]
    assert table.end.tolist() == [64, 128, 130, 131, 195]
    assert table.first.tolist() == [0, 3, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_step(dtype):
    inputs, _, _ = make([1, 1, 1], 2, 24, 40, "resets", "random")
    q, k, v = (t.to(dtype) for t in inputs[:3])
    g, beta, state = (t.float() for t in inputs[3:])
    want, want_state = recurrence(*(t.double() for t in (q, k, v, g, beta)), 0.3, state.double(), [0, 1, 2, 3])
    o = kt.triton_step(q, k, v, g, beta, state, 0.3)
    assert o.dtype == dtype
    assert (o.double() - want).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * want.norm()
    assert (state.double() - want_state).norm() <= 1e-6 * want_state.norm()
