"""
Kimi Delta Attention (KDA): linear attention that decays its memory channel by channel and overwrites instead of only adding.

The file reads top to bottom as an explanation:
  1. recurrent_kda    the definition, one token at a time; also what decoding runs
  2. chunk_kda        the same numbers from matrix products, a chunk of tokens at a time; what training runs
  3. kda              the operator: checks its arguments and picks one of the two
  4. KimiDeltaAttention   the layer around it: projections, short convolutions, gates, output norm

Per head, with a state S of shape (K, V) and t = 1..T (Kimi Linear, arXiv 2510.26692):

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

In words: forget a little of every channel, erase what the memory still holds along k_t, write v_t there, read with q_t.

Run `python kda.py` to compare the two forms on this machine. Next to read: model_dense.py, which stacks the layer.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

CHUNK = 64  # tokens per chunk: the (C, C) products inside a chunk against T / C sequential state updates
MILD = 120.0  # a chunk whose total log-decay stays above -MILD may use factors up to exp(MILD / 2) = 1e26, safe in float32

# -----------------------------------------------------------------------------
# 1. the definition


def kda_step(q, k, v, g, beta, state, scale):
    """
    One token of the recurrence. q, k, g (B, H, K); v (B, H, V); beta (B, H); state (B, H, K, V).
    Returns o (B, H, V) and the new state. All in the state's dtype.
    """
    state = state * g.exp().unsqueeze(-1)
    held = torch.einsum("bhk,bhkv->bhv", k, state)  # what the memory answers to k_t now, and should no longer
    state = state + torch.einsum("bhk,bhv->bhkv", k, beta.unsqueeze(-1) * (v - held))
    return torch.einsum("bhk,bhkv->bhv", q * scale, state), state


def recurrent_kda(q, k, v, g, beta, scale, state):
    """The recurrence over T steps. Shapes as in `kda`; state (B, H, K, V). Returns o (B, T, H, V) and the final state."""
    outputs = []
    for t in range(q.shape[1]):
        o, state = kda_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state, scale)
        outputs.append(o)
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


# -----------------------------------------------------------------------------
# 2. the chunked form
#
# Unroll the recurrence inside a chunk. With G_i the sum of g up to and including token i, write
#     P_ij = sum_c k_ic k_jc exp(G_ic - G_jc)  for j < i       how much of what token j wrote is still there along k_i
# Then the "new" value u_i that token i really writes (v_i minus what was there already) solves a unit lower-triangular system
#     (I + beta_i P_ij) u = beta (v - (k e^G) S)
# with S the state at the chunk's start. Everything else is a product: o = (q e^G) S + Q u, S' = e^{G_C} S + (k e^{G_C - G})^T u.
#
# The one difficulty is exp(G_i - G_j) under a sum over channels: as a product of two factors, exp(G_i - ref) exp(ref - G_j),
# it is a matmul, but the second factor overflows where a chunk forgets a lot. So P and Q are built in two ways at once:
#   - blocks of tokens on the diagonal whose whole decay is mild: one matmul each, with ref half-way;
#   - pairs of tokens in different blocks, by merging neighbouring blocks: a pair across a border decays from j to the border, then
#     from the border to i. Both factors are <= 1. The exponents are sums, never differences, so nothing cancels, and g = -inf
#     (a reset) gives exp(-inf) = 0 exactly, never inf - inf.
# On a CPU the gates are looked at and the blocks made as large as they allow, usually the whole chunk. Looking would make a GPU
# wait, so there, as after a reset, blocks are single tokens, which have no decay inside them.


def decay_to_end(g):
    """(..., C, K) -> exp of the sum of g over the tokens after each one, to the end: what survives until the chunk is over."""
    after = F.pad(g[..., 1:, :], (0, 0, 0, 1))
    return after.flip(-2).cumsum(-2).flip(-2).exp()


def pairwise(xs, k, g, block):
    """
    For each x of xs: M_ij = sum_c x_ic k_jc exp(g_{j+1,c} + ... + g_ic) for j <= i. Above the diagonal: anything, inf included.
    x, k and g (..., C, K) -> list of (..., C, C), with C a power of two times block, and the decay inside each block above -MILD,
    or block = 1.
    """
    if block > 1:
        G = g.unflatten(-2, (-1, block)).cumsum(-2)
        G = G - G[..., -1:, :] / 2
        decay = G.exp()
        early = (k.unflatten(-2, (-1, block)) * (-G).exp()).transpose(-1, -2)  # not k / decay: its gradient squares the decay
        Ms = [x.unflatten(-2, (-1, block)) * decay @ early for x in xs]
    else:
        Ms = [(x * k).sum(-1)[..., None, None] for x in xs]
    while block < k.shape[-2]:  # Ms hold the blocks on the diagonal, (..., C / block, block, block): merge them two by two
        first, second = (t.squeeze(-3) for t in g.unflatten(-2, (-1, 2, block)).split(1, -3))  # (..., C / 2block, block, K)
        decay = second.cumsum(-2).exp()
        early = (k.unflatten(-2, (-1, 2, block))[..., 0, :, :] * decay_to_end(first)).transpose(-1, -2)
        for i, (x, M) in enumerate(zip(xs, Ms)):
            across = x.unflatten(-2, (-1, 2, block))[..., 1, :, :] * decay @ early
            Ms[i] = torch.cat([F.pad(M[..., 0::2, :, :], (0, block)), torch.cat([across, M[..., 1::2, :, :]], -1)], -2)
        block *= 2
    return [M.squeeze(-3) for M in Ms]


def choose_blocks(g, T):
    """
    g (B, T, H, K) -> (C, block): the chunk length for sequences of T tokens, and the length of the blocks on the diagonal.
    C is at least min(T, CHUNK) and a power of two times a few tokens: 43 tokens make a chunk of 16 * 3, with little padding.
    """
    C = min(T, CHUNK)
    few, doublings = C, 0
    while few > 4:
        few, doublings = -(-C // 2 ** (doublings + 1)), doublings + 1
    if not g.is_cuda:
        for i in range(doublings + 1):
            block = few << (doublings - i)
            if F.pad(g, (0, 0, 0, 0, 0, -g.shape[1] % block)).unflatten(1, (-1, block)).sum(2).amin() > -MILD:
                return few << doublings, block
    return 1 << (C - 1).bit_length(), 1


def unit_lower_inverse(P):
    """
    (I + P)^-1 for strictly lower-triangular P (..., C, C), by merging: if X1 and X2 invert the blocks on the diagonal and L stands
    below them, then [[X1, 0], [-X2 L X1, X2]] inverts the whole. As exact as substitution, but all matmuls. C as in choose_blocks.
    """
    C = size = P.shape[-1]
    while size > 4:
        size //= 2

    def on_diagonal(size, below):  # (..., C / size, size, size) blocks of P on the diagonal, or every second of those one below
        blocks = P.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).transpose(-2, -3)  # (..., C/size, C/size, size, size)
        blocks = blocks[..., 1::2, 0::2, :, :] if below else blocks
        return blocks.diagonal(dim1=-4, dim2=-3).movedim(-1, -3)

    A, eye = on_diagonal(size, below=False), torch.eye(size, dtype=P.dtype, device=P.device)
    X = eye - A  # at most 4 x 4: A^4 = 0, so (I + A)^-1 = (I - A)(I + A^2)
    if size > 2:
        X = X @ (eye + A @ A)
    while size < C:
        X1, X2 = X[..., 0::2, :, :], X[..., 1::2, :, :]
        low = -(X2 @ on_diagonal(size, below=True) @ X1)
        X = torch.cat([F.pad(X1, (0, size)), torch.cat([low, X2], -1)], -2)
        size *= 2
    return X.squeeze(-3)


class SolveUnitLower(torch.autograd.Function):
    """U = (I + P)^-1 R for strictly lower-triangular P (..., C, C) and R (..., C, D). The inverse is kept for the backward."""

    @staticmethod
    def forward(ctx, P, R):
        X = unit_lower_inverse(P)
        U = X @ R
        ctx.save_for_backward(X, U)
        return U

    @staticmethod
    def backward(ctx, dU):
        X, U = ctx.saved_tensors
        dR = X.transpose(-1, -2) @ dU
        return -(dR @ U.transpose(-1, -2)).tril(-1), dR


def chunk_kda(q, k, v, g, beta, scale, state, need_state):
    """
    The chunked form. Shapes as in `kda`, computed in float32 (float64 for float64 inputs). `state` (B, H, K, V) or None for zero.
    Returns o (B, T, H, V) and the final state, None when `need_state` is False and it was not needed on the way.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    C, block = choose_blocks(g, T)
    N = -(-T // C)
    pad = N * C - T

    def chunks(t):  # (B, T, H, D) -> (B, H, N, C, D); padding tokens have k = beta = g = 0 and leave the state alone
        return F.pad(t.transpose(1, 2), (0, 0, 0, pad)).view(B, H, N, C, -1)

    q, k, v, g, beta = chunks(q), chunks(k), chunks(v), chunks(g), chunks(beta.unsqueeze(-1))
    P, Q = pairwise([k, q * scale], k, g, block)
    P, Q = beta * P.tril(-1), Q.tril()

    if N == 1 and state is None:  # short sequences: no state comes in, so half of the work is not there
        u = SolveUnitLower.apply(P, beta * v)
        o = Q @ u
        if need_state:
            state = ((k * decay_to_end(g)).transpose(-1, -2) @ u).squeeze(2)
    else:
        from_start = g.cumsum(-2).exp()
        k_start, q_start = k * from_start, q * from_start * scale
        uw = SolveUnitLower.apply(P, beta * torch.cat([v, k_start], -1))
        u, w = uw.split([V, K], -1)
        k_end, decay = (k * decay_to_end(g)).transpose(-1, -2), from_start[..., -1, :].unsqueeze(-1)
        state = q.new_zeros(B, H, K, V) if state is None else state
        outputs = []
        # unbind, not [:, :, n]: the gradient of an index is a tensor of zeros as long as the whole sequence, for every chunk
        for u_n, w_n, q_n, Q_n, k_n, decay_n in zip(*(t.unbind(2) for t in (u, w, q_start, Q, k_end, decay))):
            new = u_n - w_n @ state
            outputs.append(q_n @ state + Q_n @ new)
            state = decay_n * state + k_n @ new
        o = torch.stack(outputs, 2)
    return o.reshape(B, H, N * C, V)[:, :, :T].transpose(1, 2), state


# -----------------------------------------------------------------------------
# 3. the operator


def kda(q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False, backend="auto"):
    """
    Kimi Delta Attention with precomputed gates, differentiable in every input.

    q, k (B, T, H, K)    queries and keys; keys are expected to have unit length (the layer normalises both)
    v    (B, T, H, V)    values
    g    (B, T, H, K)    log-decay, in [-inf, 0]; -inf forgets a channel completely before token t is written
    beta (B, T, H)       how much of the old value is replaced, in [0, 1] (up to 2 is allowed: a reflection)
    scale                multiplies q, default K ** -0.5
    initial_state        (B, H, K, V) or None for zero
    backend              "recurrent" (the definition), "chunk" (matrix products) or "auto": recurrent for one token, else chunk

    Returns o (B, T, H, V) in v's dtype, and the final state (B, H, K, V) in float32 (float64 for float64 inputs), or None
    unless output_final_state. Raises ValueError naming the argument whose shape or dtype does not fit.
    """
    if q.ndim != 4:
        raise ValueError(f"q must be (B, T, H, K), got shape {tuple(q.shape)}")
    B, T, H, K = q.shape
    for name, t, shape in (("k", k, (B, T, H, K)), ("g", g, (B, T, H, K)), ("beta", beta, (B, T, H)), ("v", v, (B, T, H, v.shape[-1]))):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {shape} to go with q {tuple(q.shape)}")
    for name, t in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta), ("initial_state", initial_state)):
        if t is not None and not t.is_floating_point():
            raise ValueError(f"{name} has dtype {t.dtype}, expected a floating point type")
    V = v.shape[-1]
    if initial_state is not None and tuple(initial_state.shape) != (B, H, K, V):
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}, expected {(B, H, K, V)}")
    if backend not in ("auto", "recurrent", "chunk"):
        raise ValueError(f"backend must be 'auto', 'recurrent' or 'chunk', got {backend!r}")

    scale = K**-0.5 if scale is None else scale
    dtype = torch.promote_types(torch.promote_types(q.dtype, g.dtype), torch.float32)  # gates and state never in half precision
    out_dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g, beta = (t.to(dtype) for t in (q, k, v, g, beta))
        state = None if initial_state is None else initial_state.to(dtype)
        if backend == "recurrent" or q.numel() == 0 or (backend == "auto" and T == 1):
            state = q.new_zeros(B, H, K, V) if state is None else state
            o, state = recurrent_kda(q, k, v, g, beta, scale, state)
        else:
            o, state = chunk_kda(q, k, v, g, beta, scale, state, output_final_state)
    return o.to(out_dtype), state if output_final_state else None


# -----------------------------------------------------------------------------
# 4. the layer


class ShortConvFunction(torch.autograd.Function):
    """
    Causal depthwise convolution as W shifted multiply-adds. Written out because both autograd through the multiply-adds and
    the backward of a grouped conv1d are slow on CPU (figures in LOG.md).
    """

    @staticmethod
    def forward(ctx, padded, taps):  # padded (B, W - 1 + T, D), taps (W, D), contiguous -> (B, T, D)
        ctx.save_for_backward(padded, taps)
        T = padded.shape[1] - len(taps) + 1
        y = padded[:, :T] * taps[0]
        for i in range(1, len(taps)):
            y.addcmul_(padded[:, i : i + T], taps[i])
        return y

    @staticmethod
    def backward(ctx, dy):
        padded, taps = ctx.saved_tensors
        T = padded.shape[1] - len(taps) + 1
        d_padded = torch.zeros_like(padded)
        for i, tap in enumerate(taps):
            d_padded[:, i : i + T].addcmul_(dy, tap)
        return d_padded, torch.stack([(dy * padded[:, i : i + T]).sum((0, 1)) for i in range(len(taps))])


class ShortConv(nn.Module):
    """Each channel mixes its last `width` inputs. The weight has a Conv1d's shape (D, 1, width), so that checkpoints of FLA load."""

    def __init__(self, dim, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x, tail=None):
        """x (B, T, D), tail (B, width - 1, D) the inputs before x (None: zeros) -> SiLU of the mix (B, T, D), and the new tail."""
        W = self.weight.shape[-1]
        padded = F.pad(x, (0, 0, W - 1, 0)) if tail is None else torch.cat([tail.to(x.dtype), x], 1)
        y = ShortConvFunction.apply(padded, self.weight.squeeze(1).t().contiguous().to(x.dtype))  # (D, W) would be read with a stride
        return F.silu(y), padded[:, padded.shape[1] - (W - 1) :]


class GatedRMSNorm(nn.Module):
    """RMSNorm over the head dimension, then a sigmoid gate (Kimi Linear, section 4)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x, gate):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps) * torch.sigmoid(gate)


class KimiDeltaAttention(nn.Module):
    """
    The KDA layer. Parameter names and shapes are those of flash-linear-attention's layer of the same name, so its state dicts load.

        q, k, v = SiLU(ShortConv(W x)), q and k of unit length per head
        g = -exp(A_log) * softplus(low-rank(x) + dt_bias)      per head and channel: how fast to forget
        beta = sigmoid(W_b x)                                  per head: how much to overwrite
        y = W_o (RMSNorm(o) * sigmoid(low-rank(x)))
    """

    def __init__(self, hidden_size, num_heads, head_dim, conv_size=4, norm_eps=1e-5):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(hidden_size, inner, bias=False)
        self.q_conv1d = ShortConv(inner, conv_size)
        self.k_conv1d = ShortConv(inner, conv_size)
        self.v_conv1d = ShortConv(inner, conv_size)
        self.f_proj = nn.Sequential(nn.Linear(hidden_size, head_dim, bias=False), nn.Linear(head_dim, inner, bias=False))
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        # Heads start with time scales from a few tokens to a few thousand: A in [1, 16], softplus(dt_bias) in [0.001, 0.1].
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        dt = torch.empty(inner).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.g_proj = nn.Sequential(nn.Linear(hidden_size, head_dim, bias=False), nn.Linear(head_dim, inner, bias=True))
        self.o_norm = GatedRMSNorm(head_dim, norm_eps)
        self.o_proj = nn.Linear(inner, hidden_size, bias=False)

    def empty_cache(self, batch_size):
        """What the layer remembers before the first token: three convolution tails (B, W - 1, H * K) and a state (B, H, K, K)."""
        inner, W = self.num_heads * self.head_dim, self.q_conv1d.weight.shape[-1]
        tail = self.A_log.new_zeros(batch_size, W - 1, inner)
        return tail, tail, tail, self.A_log.new_zeros(batch_size, self.num_heads, self.head_dim, self.head_dim, dtype=torch.float32)

    def forward(self, x, cache=None):
        """
        x (B, T, hidden_size) -> y of the same shape, and the cache after the last token: None when none came in.
        Training passes no cache; prefill and decoding pass `empty_cache` or what the previous call returned.
        """
        B, T, _ = x.shape
        tails = cache[:3] if cache is not None else (None, None, None)
        q, q_tail = self.q_conv1d(self.q_proj(x), tails[0])
        k, k_tail = self.k_conv1d(self.k_proj(x), tails[1])
        v, v_tail = self.v_conv1d(self.v_proj(x), tails[2])
        q, k, v = (t.view(B, T, self.num_heads, self.head_dim) for t in (q, k, v))
        q, k = (F.normalize(t.float(), dim=-1, eps=1e-6) for t in (q, k))
        g = F.softplus(self.f_proj(x).float() + self.dt_bias.float()).view(B, T, self.num_heads, self.head_dim)
        g = -self.A_log.float().exp()[:, None] * g
        beta = self.b_proj(x).float().sigmoid()
        o, state = kda(
            q, k, v, g, beta, initial_state=None if cache is None else cache[3], output_final_state=cache is not None
        )
        o = self.o_norm(o.to(x.dtype), self.g_proj(x).view(B, T, self.num_heads, self.head_dim))
        return self.o_proj(o.flatten(2)), None if cache is None else (q_tail, k_tail, v_tail, state)


if __name__ == "__main__":
    torch.manual_seed(0)
    print("chunked form against the float64 recurrence: relative error, and the length of the blocks that the gates allowed")
    for name, gate in (("mild", 0.1), ("strong", 8.0), ("resets", None)):
        q, k, v = torch.randn(3, 2, 300, 2, 32).unbind(0)
        k = F.normalize(k, dim=-1)
        g = -torch.rand(2, 300, 2, 32) * (gate or 0.1)
        if gate is None:
            g = g.masked_fill(torch.rand_like(g) < 0.05, -math.inf)
        beta = torch.rand(2, 300, 2)
        want, _ = kda(*(t.double() for t in (q, k, v, g, beta)), backend="recurrent")
        got, _ = kda(q, k, v, g, beta, backend="chunk")
        print(f"  gates {name:8s} {((got - want).norm() / want.norm()).item():.1e}   {choose_blocks(g, 300)[1]} tokens")
