"""kda.py against the recurrence as matrices in float64: values and gradients, any length, any gate."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import kda as kda_file
from kda import KimiDeltaAttention, ShortConvFunction, kda, kda_step

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
FLOAT32 = (1e-5, 1e-4)  # tolerance of outputs and of gradients
LENGTHS = (1, 2, 7, 8, 9, 12, 13, 17, 43, 64, 65, 100, 257)


def reference(q, k, v, g, beta, state=None):
    """S_t = (I - beta k k^T) Diag(alpha) S + beta k v^T, o = scale S^T q, with the matrices themselves."""
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    I = torch.eye(K, dtype=q.dtype)
    outputs = []
    for t in range(T):
        kt, vt, bt = k[:, t, :, :, None], v[:, t, :, None, :], beta[:, t, :, None, None]
        S = (I - bt * kt * kt.transpose(-1, -2)) @ (g[:, t].exp()[..., None] * S) + bt * kt * vt
        outputs.append((S.transpose(-1, -2) @ q[:, t, :, :, None])[..., 0] * K**-0.5)
    return torch.stack(outputs, 1), S


def clamped_reference(q, k, v, g, beta, state=None):
    return reference(q, k, v, g.clamp(min=-128 / 11 if q.shape[1] == 12 else -16), beta, state)


def make_gate(kind, B, T, H, K, rng):
    u = torch.rand(B, T, H, K, dtype=torch.float64, generator=rng)
    mild, at = -0.1 * u, torch.rand(u.shape, generator=rng)
    return {
        "none": 0 * u,
        "mild": mild,
        "uneven": -u * torch.logspace(-3, 1.5, K, dtype=torch.float64),  # to full reset in a few tokens
        "strong": -16 * F.softplus(6 * u - 3),  # a layer's largest A_log
        "strongest": 0 * u - 15.9,  # the most that is not clamped
        "-50": 0 * u - 50,
        "-1e4": -1e4 * u,
        "resets": mild.masked_fill(at < 0.05, -math.inf),
        "documents": mild.masked_fill(at[:, :, :1, :1] < 0.1, -math.inf),  # all heads forget everything
        "all -inf": torch.full_like(u, -math.inf),
    }[kind]


GATES = ("none", "mild", "uneven", "strong", "strongest", "-50", "-1e4", "resets", "documents", "all -inf")


def make(gate, T, H=2, K=8, V=5, seed=0, keys="random", state=True):
    """float64 inputs of four rows, with beta random, 0, 1 and 2."""
    rng, B = torch.Generator().manual_seed(1000 * seed + T), 4

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    q, k = (F.normalize(normal(B, T, H, K), dim=-1) for _ in "qk")
    v, beta = normal(B, T, H, V), torch.rand(B, T, H, dtype=torch.float64, generator=rng)
    beta[1], beta[2], beta[3] = 0, 1, 2
    if keys == "same":
        k = k[:, :1].expand(B, T, H, K).contiguous()
    elif keys == "long":  # beta |k|^2 stays below 2: beyond, the recurrence itself explodes
        k, beta = 30 * k, beta / 900
    elif keys == "zero":
        k = k * 0
    g = make_gate(gate, B, T, H, K, rng)
    # rounded to float32, so that the reference sees what the float32 computation sees
    return [t.float().double() for t in (q, k, v, g, beta, normal(B, H, K, V))][: None if state else 5]


def run(function, inputs, dtype=torch.float32, final=True):
    """-> (outputs, gradients) of the sum of o, and of the final state where `final`, with random weights."""
    rng = torch.Generator().manual_seed(0)
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    o, S = function(*inputs)
    loss = (o.double() * torch.randn(o.shape, dtype=torch.float64, generator=rng)).sum()
    if final:
        loss = loss + (S.double() * torch.randn(S.shape, dtype=torch.float64, generator=rng)).sum()
    grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
    outputs = {"o": o.detach(), "state": S.detach()} if final else {"o": o.detach()}
    return outputs, {"d" + name: d for name, d in zip(NAMES, grads)}


def by_kda(q, k, v, g, beta, state=None, final=True, backend="chunk"):
    return kda(q, k, v, g, beta, initial_state=state, output_final_state=final, backend=backend)


def check(got, want, tolerance, what, floor=1e-32):
    """A relative error, except of what float32 holds no longer."""
    for name in want:
        a, b = got[name].double(), want[name].double()
        assert a.isfinite().all(), f"{what}: {name} is not finite"
        error, size = (a - b).norm().item(), b.norm().item()
        assert error <= tolerance * size + floor, f"{what}: {name} is off by {error:.1e} of {size:.1e}"


def compare(what, inputs, final=True, backend="chunk", dtype=torch.float32, against=None, tolerance=FLOAT32):
    outputs, gradients = run(against or clamped_reference, inputs, torch.float64, final)
    got, d_got = run(lambda *i: by_kda(*i, final=final, backend=backend), inputs, dtype, final)
    assert got["o"].dtype == dtype
    check(got, outputs, tolerance[0], what)
    check(d_got, gradients, tolerance[1], what)


# ---- the operator


@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_form_is_the_recurrence(T):
    for i, gate in enumerate(GATES):
        # state in and out, out only, none at all: the last takes a way of its own in short sequences
        which = (i + LENGTHS.index(T)) % 3
        compare(f"{gate}, T={T}", make(gate, T, state=which == 0), final=which != 2)


@pytest.mark.parametrize("gate", ("none", "resets", "strong"))
def test_hard_keys(gate):
    for keys in ("long", "zero"):
        compare(f"{keys} keys", make(gate, 100, K=6, V=9, H=1, keys=keys))
    compare("same keys", [t[:3] for t in make(gate, 100, K=6, V=9, H=1, keys="same")])
    # Where beta is 2 and nothing decays, reflections must cancel, and the rounding of one key adds up over
    # all of them.
    inputs = [t[3:] for t in make(gate, 100, K=6, V=9, H=1, keys="same")]
    compare("reflections", inputs, tolerance=(5e-5, 5e-4))


def test_the_worst_case_is_as_documented():
    """kda()'s docstring: up to 5e-4 for 4,096 equal keys at beta = 2 without decay."""
    q, k, v, g, beta = (t[3:].float() for t in make("none", 4096, K=16, V=16, H=1, keys="same")[:5])
    with torch.no_grad():
        want, _ = by_kda(q.double(), k.double(), v.double(), g.double(), beta.double(), backend="recurrent")
        got, _ = by_kda(q, k, v, g, beta)
    assert 1e-6 < (got - want).norm() / want.norm() < 5e-4


def test_long_sequences_and_other_sizes():
    compare("T=1000", make("mild", 1000, H=1, K=16, V=16))
    for K, V, H, T in ((32, 64, 1, 65), (128, 32, 3, 17), (24, 80, 3, 65)):
        compare(f"K={K}, V={V}", [t[:2] for t in make("uneven", T, H=H, K=K, V=V)])


def test_the_recurrent_form_and_float64_are_exact_for_any_gate():
    for gate in GATES:
        compare(gate, make(gate, 17), backend="recurrent", against=reference)
        compare(gate, make(gate, 70), dtype=torch.float64, against=reference, tolerance=(1e-12, 1e-11))


def test_what_the_clamp_costs():
    """A document knows 1e-7 of the one before, and gates that forget more than that have no gradient."""
    a, b = make("mild", 90), make("mild", 90, seed=5)
    for x, y in zip(a[:5], b[:5]):
        x[:, 40:] = y[:, 40:]
    a[3][:, 40] = b[3][:, 40] = -math.inf
    (o_a, S_a), (o_b, S_b) = (by_kda(*(t.float() for t in i)) for i in (a, b))
    assert (o_a[:, :40] - o_b[:, :40]).abs().max() > 0.1
    assert (o_a[:, 40:] - o_b[:, 40:]).abs().max() < 1e-6 and (S_a - S_b).abs().max() < 3e-6
    for gate in ("-50", "-1e4", "resets", "all -inf"):
        inputs = make(gate, 70)
        got, want = run(by_kda, inputs), run(reference, inputs, torch.float64)
        check(got[0], want[0], 1e-5, gate)
        check(got[1], want[1], 1e-4, gate, floor=1e-6 * inputs[0].numel() ** 0.5)
        assert got[1]["dg"][inputs[3] < -16].abs().max() == 0


def test_flash_linear_attention_means_the_same():
    """Its definition of KDA, where it is installed: the same arguments in, the same outputs and state out."""
    naive = pytest.importorskip("fla.ops.kda.naive")
    inputs = [t.float() for t in make("mild", 70)]
    want = naive.naive_recurrent_kda(*inputs[:5], initial_state=inputs[5], output_final_state=True)
    check(dict(zip(("o", "state"), by_kda(*inputs))), dict(zip(("o", "state"), want)), 1e-5, "FLA")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_inputs(dtype):
    assert by_kda(*(t.to(dtype) for t in make("mild", 5)))[1].dtype == torch.float32
    for gate in ("mild", "strong", "resets"):
        inputs = [t.to(dtype).double() for t in make(gate, 100)]
        compare(gate, inputs, dtype=dtype, tolerance=(1e-2, 1e-2))


def test_large_inputs_and_gradients_stay_finite():
    for gate, T in itertools.product(GATES, (8, 12, 100)):
        q, k, v, g, beta, S = (t.float() for t in make(gate, T))
        leaves = [t.requires_grad_() for t in (1e4 * q, k, 1e4 * v, g, beta, 1e4 * S)]
        o, final = by_kda(*leaves)
        grads = torch.autograd.grad((65536 * o.sum(), 65536 * final.sum()), leaves)
        assert all(t.isfinite().all() for t in (o, final, *grads)), (gate, T)


def test_under_autocast_nothing_is_rounded():
    inputs = [t.float() for t in make("strong", 43)]
    want = by_kda(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = by_kda(*inputs)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    *inputs, state = (t.float() for t in make("strong", 1))
    outputs = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs.append(kda_step(*(t[:, 0] for t in inputs), S := state.clone()))
        outputs.append(S)
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_views_and_expanded_inputs_are_read_and_left_alone():
    q, k, v, g, beta, S = (t.float() for t in make("resets", 70))
    plain = q[:, :, :1].expand_as(q).contiguous(), k[:1].expand_as(k).contiguous(), v, g, beta, S
    twisted = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (v, g, beta)]
    state = S.transpose(2, 3).contiguous().transpose(2, 3)
    views = (q[:, :, :1].expand_as(q), k[:1].expand_as(k), *twisted, state)
    before = [t.clone() for t in views]
    for a, b in zip(by_kda(*views), by_kda(*plain)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(views, before))


@pytest.mark.parametrize("backend", ("auto", "recurrent"))
def test_no_tokens_scale_and_a_final_state_when_asked_for(backend):
    *inputs, S = (t.float() for t in make("mild", 20))
    nothing = [t[:, :0] for t in inputs]
    o, state = kda(*nothing, initial_state=S, output_final_state=True, backend=backend)
    assert o.shape == (4, 0, 2, 5) and torch.equal(state, S)
    o, state = kda(*inputs, backend=backend)
    doubled, _ = kda(*inputs, scale=2 * 8**-0.5, initial_state=0 * S, backend=backend)
    assert state is None
    torch.testing.assert_close(doubled, 2 * o)


def test_packed_sequences_are_the_sequences_alone():
    lengths = (5, 130, 1, 0, 64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    *row, _ = (t[:1] for t in make("uneven", sum(lengths)))
    inputs = [*row, torch.cat([make("mild", 1, seed=i)[5][:1] for i in range(len(lengths))])]

    def alone(*inputs):
        parts, states = [t.split(lengths, 1) for t in inputs[:5]], inputs[5].split(1)
        out = [reference(*(p[n] for p in parts), states[n]) for n in range(5) if n != 3]
        states = [s for _, s in out]
        return torch.cat([o for o, _ in out], 1), torch.cat([*states[:3], inputs[5][3:4], states[3]])

    def packed(*inputs):
        return kda(*inputs[:5], initial_state=inputs[5], output_final_state=True, cu_seqlens=cu_seqlens)

    for got, want, tolerance in zip(run(packed, inputs), run(alone, inputs, torch.float64), (1e-5, 1e-4)):
        check(got, want, tolerance, "packed")
    for bad in ([0, 3, 5], [1, 200], [0, 4, 3, 200], [0], [0.0, 200.0]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            kda(*row, cu_seqlens=torch.tensor(bad))


def test_long_rows_are_worked_through_in_pieces(monkeypatch):
    monkeypatch.setattr(kda_file, "CPU_AT_ONCE", 1)
    calls, apply = [], kda_file.KDAFunction.apply
    monkeypatch.setattr(kda_file.KDAFunction, "apply", lambda *args: calls.append(1) or apply(*args))
    for more, pieces in ((kda_file.SHORT, 3), (kda_file.SHORT + 1, 4)):  # so few are not left to themselves
        inputs = make("uneven", 3 * kda_file.CHUNK + more)
        wanted = run(reference, inputs, torch.float64)
        calls.clear()
        for got, want, tolerance in zip(run(by_kda, inputs), wanted, (1e-5, 1e-4)):
            check(got, want, tolerance, "pieces")
        assert len(calls) == pieces


@pytest.mark.parametrize("at, name", list(enumerate(NAMES)))
def test_a_wrong_argument_is_named(at, name):
    good = [t.float() for t in make("mild", 6)]
    for bad in (good[at][..., 0], good[at].long(), good[at][:2] if name != "q" else good[at][0]):
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            by_kda(*(bad if i == at else t for i, t in enumerate(good)))


def test_backends_are_named_and_python_kda_py_checks(monkeypatch, capsys):
    with pytest.raises(ValueError, match="KDA_BACKEND"):
        by_kda(*(t.float() for t in make("mild", 3)), backend="cuda")
    kda_file.check()
    assert "backend on cpu: chunk" in capsys.readouterr().out
    monkeypatch.setattr(kda_file, "BACKEND", "triton")
    with pytest.raises(ValueError, match="GPU"):
        kda_file.check()
    monkeypatch.setattr(kda_file, "BACKEND", "auto")
    monkeypatch.setattr(kda_file.TORCH, "states", lambda X, *rest, **_: kda_file.states(-X, *rest, **_))
    with pytest.raises(SystemExit, match="KDA_BACKEND=chunk"):
        kda_file.check()


def test_backward_keeps_little():
    """Kept for the backward, beside the inputs: two C x C matrices and a state per chunk, the last state."""
    q, k, v, g, beta = (t[:3].float().requires_grad_() for t in make("mild", 512, H=2, K=64, V=64)[:5])
    sizes = {}

    def count(t):
        sizes[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        kda(q, k, v, g, beta)
    inputs = sum(t.nbytes for t in (q, k, v, g, beta))
    assert sum(sizes.values()) <= inputs + 3 * v.nbytes + 3 * 2 * 64 * 64 * 4


def test_operator_is_registered_as_torch_wants_it():
    """Also with tensors that have no values, forward and backward: on a GPU nothing waits for one."""
    q, k, v, g, beta, S = (t.float() for t in make("mild", 20))
    for state, want_state in ((S, True), (None, False)):
        torch.library.opcheck(kda_file.kda_op, (q, k, v, g, beta, state, 0.3, want_state, "chunk"))


def test_one_step_in_place_is_the_recurrence():
    for dtype in (torch.float32, torch.float64):
        q, k, v, g, beta, S = (t.to(dtype) for t in make("resets", 9))
        state = S.clone()
        outputs = [kda_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state) for t in range(9)]
        want, final = reference(*(t.double() for t in (q, k, v, g, beta, S)))
        check({"o": torch.stack(outputs, 1), "state": state}, {"o": want, "state": final}, 1e-6, str(dtype))


# ---- the layer


def make_layer(D=12, H=3, K=4, seed=0, **options):
    """A layer whose every parameter matters (at initialisation some are zero or one)."""
    torch.manual_seed(seed)
    layer = KimiDeltaAttention(D, H, K, **options)
    for p in layer.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return layer


def test_parameters_are_named_and_shaped_as_in_fla():
    D, H, K = 12, 3, 4
    shapes = {"A_log": (H,), "dt_bias": (H * K,), "b_proj.weight": (H, D), "o_norm.weight": (K,)}
    shapes |= {"o_proj.weight": (D, H * K), "f_proj.0.weight": (K, D), "f_proj.1.weight": (H * K, K)}
    shapes |= {"g_proj.0.weight": (K, D), "g_proj.1.weight": (H * K, K), "g_proj.1.bias": (H * K,)}
    for x in "qkv":
        shapes |= {f"{x}_proj.weight": (H * K, D), f"{x}_conv1d.weight": (H * K, 1, 4)}
    assert {name: tuple(t.shape) for name, t in KimiDeltaAttention(D, H, K).state_dict().items()} == shapes


def layer_by_hand(p, x, H, K, lower_bound=None, allow_neg_eigval=False):
    """The layer's formula, literally, from its state dict p."""
    B, T, _ = x.shape
    heads = {}
    for n in "qkv":
        h = (x @ p[f"{n}_proj.weight"].T).transpose(1, 2)
        h = F.conv1d(F.pad(h, (3, 0)), p[f"{n}_conv1d.weight"], groups=H * K).transpose(1, 2)
        heads[n] = (h * torch.sigmoid(h)).reshape(B, T, H, K)
    q, k = (heads[n] / (heads[n].pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for n in "qk")
    raw = (x @ p["f_proj.0.weight"].T @ p["f_proj.1.weight"].T + p["dt_bias"]).reshape(B, T, H, K)
    A, beta = p["A_log"].exp()[:, None], torch.sigmoid(x @ p["b_proj.weight"].T)
    g = -A * (1 + raw.exp()).log() if lower_bound is None else lower_bound * torch.sigmoid(A * raw)
    o, _ = clamped_reference(q, k, heads["v"], g, 2 * beta if allow_neg_eigval else beta)
    o = o / (o.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p["o_norm.weight"]
    gate = x @ p["g_proj.0.weight"].T @ p["g_proj.1.weight"].T + p["g_proj.1.bias"]
    return (o * torch.sigmoid(gate.reshape(B, T, H, K))).reshape(B, T, H * K) @ p["o_proj.weight"].T


@pytest.mark.parametrize("options", ({}, {"lower_bound": -5.0, "allow_neg_eigval": True}))
def test_layer_is_its_formula(options):
    layer = make_layer(**options)
    for T in (1, 2, 5, 70):
        x, weight = torch.randn(2, 2, T, 12).unbind()
        p = {n: t.detach().double().requires_grad_() for n, t in layer.state_dict().items()}
        want, (got, cache) = layer_by_hand(p, x.double(), 3, 4, **options), layer(x)
        assert cache is None
        check({"y": got.detach()}, {"y": want.detach()}, 1e-5, f"T={T}")
        grads = torch.autograd.grad((got * weight).sum(), list(layer.parameters()))
        names = [n for n, _ in layer.named_parameters()]
        loss = (want * weight.double()).sum()
        wanted = torch.autograd.grad(loss, [p[n] for n in names], materialize_grads=True)
        check(dict(zip(names, grads)), dict(zip(names, wanted)), 2e-4, f"T={T}")


@pytest.mark.parametrize("grad", (False, True))
def test_prefill_and_decoding_equal_the_full_forward(grad):
    layer = make_layer()
    x = torch.randn(2, 75, 12)
    with torch.set_grad_enabled(grad):  # without, the state is updated in place
        want = layer(x)[0]
        for prefill in (0, 1, 3, 64, 74):
            parts, cache = [], layer.empty_cache(2)
            if prefill:
                y, cache = layer(x[:, :prefill], cache)
                parts.append(y)
            for t in range(prefill, 75):
                before = cache[1]
                y, cache = layer(x[:, t : t + 1], cache)
                assert (cache[1] is before) != grad
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)
        _, cache = layer(x[:, :20], layer.empty_cache(2))
        torch.testing.assert_close(layer(x[:, 20:], cache)[0], want[:, 20:], rtol=1e-4, atol=1e-5)


def test_layer_in_half_precision():
    layer, x = make_layer(), torch.randn(2, 40, 12)
    want = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)[0]
        got.float().sum().backward()
    assert ((got - want).norm() / want.norm()) < 0.03
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_float64_layer_computes_in_float64_and_its_gradients_are_right_within_documents():
    layer = make_layer(D=6, H=2, K=3).double()
    x = torch.randn(1, 7, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters())
    starts = torch.arange(7)[None] == 4

    def read(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x, None, starts))[0]

    assert read(x, *parameters).dtype == torch.float64
    assert torch.autograd.gradcheck(read, (x, *parameters))
    want = layer_by_hand(layer.state_dict(), x[:, :4], 2, 3)
    torch.testing.assert_close(layer(x[:, :4])[0], want, rtol=1e-10, atol=1e-10)


def test_documents_in_a_row_know_nothing_of_each_other():
    layer = make_layer()
    for lengths in ((1, 2, 3, 4, 60), (30, 1, 64)):
        x = torch.randn(2, sum(lengths), 12, requires_grad=True)
        starts = torch.zeros(2, sum(lengths), dtype=torch.bool)
        starts[:, [sum(lengths[:i]) for i in range(len(lengths))]] = True
        alone = torch.cat([layer(part)[0] for part in x.split(lengths, 1)], 1)
        packed = layer(x, starts=starts)[0]
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
        weight, inputs = torch.randn_like(alone), [x, *layer.parameters()]
        grads = [torch.autograd.grad((y * weight).sum(), inputs) for y in (packed, alone)]
        for a, b in zip(*grads):
            check({"gradient": a}, {"gradient": b}, 1e-4, str(lengths))
    x = torch.randn(2, 30, 12)  # a document may also go on from a cache, and be followed by another
    _, cache = layer(x[:, :10], layer.empty_cache(2))
    y, cache = layer(x[:, 10:], cache, torch.arange(20).expand(2, 20) == 19)
    torch.testing.assert_close(y[:, :19], layer(x)[0][:, 10:29], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[:, 19:], layer(x[:, 29:])[0], rtol=1e-4, atol=1e-5)
    more = torch.randn(2, 3, 12)
    want = layer(torch.cat((x[:, 29:], more), 1))[0][:, 1:]
    torch.testing.assert_close(layer(more, cache)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_a_layer_is_one_graph(dtype):
    """What train.py compiles: under autocast, recomputed, documents apart. A break would be an error."""
    layer, x = make_layer(), torch.randn(2, 70, 12, requires_grad=True)
    starts = torch.arange(70).expand(2, 70) % 30 == 0

    def read(x):
        return torch.utils.checkpoint.checkpoint(lambda x: layer(x, starts=starts)[0], x, use_reentrant=False)

    torch._dynamo.reset()
    results = []
    for forward in (read, torch.compile(read, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            y = forward(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 if dtype == torch.float32 else 5e-2)


def test_initial_gates_forget_slowly():
    layer = KimiDeltaAttention(12, 3, 4)
    A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 1 <= A.min() and A.max() <= 16
    assert 0.000999 <= dt.min() and dt.max() <= 0.1001


def test_a_second_derivative_is_refused_and_not_wrong():
    layer, x = make_layer(), torch.randn(1, 5, 12, requires_grad=True)
    taps = torch.randn(3, 12, requires_grad=True)
    for y in (ShortConvFunction.apply(x, taps, None), layer(x)[0]):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.square().sum().backward()
