"""
Kimi Delta Attention (KDA): linear attention that decays its memory channel by channel, and overwrites.

The file reads top to bottom as an explanation:
  1. the recurrence    the definition, one token at a time, and kda_step, which decoding runs
  2. a chunk           the same numbers from matrix products, 64 tokens at a time
  3. blocks            where those products come from, whatever the gates are
  4. the backward      written out by hand
  5. kernels           steps 2 to 4 once more for GPUs, in Triton
  6. the operator      kda(), which checks its arguments and works under torch.compile
  7. the layer         projections, short convolutions, gates, output norm

Per head, with a state S of shape (K, V) and t = 1..T (Kimi Linear, arXiv 2510.26692):

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

In words: forget a little of every channel, erase what the memory still holds along k_t, write v_t there, and
read with q_t.

`python kda.py` says which form was chosen on this machine, and whether it is right. Read next:
model_dense.py.
"""

import contextlib
import functools
import math
import os
import sys
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: the PyTorch form runs there
    triton = None

# What backend="auto" means: "recurrent", "chunk", "triton", or "auto" for what suits the device best.
BACKEND = os.environ.get("KDA_BACKEND", "auto")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton on a CPU, in tests
# Tokens per chunk at most: the (C, C) products inside a chunk against T / C state updates, one after the
# other.
CHUNK = 64
CPU_CHUNK = 32  # one merge of blocks less
CPU_AT_ONCE = 1 << 19  # B * T * H * K that a CPU works on at once, to use what its caches hold again
# Where gates are clamped: exp(-16) is 1e-7, one unit of float32, and exp(-80) is nothing to float64.
FLOOR = {torch.float32: -16.0, torch.float64: -80.0}
BLOCK = 8  # tokens per block at most, in a chunk of several blocks
SHORT = 12  # tokens of a chunk that is one block
CONV = 4  # taps of the layer's short convolutions

# -----------------------------------------------------------------------------
# 1. the recurrence


def recurrent_kda(q, k, v, g, beta, scale, state):
    """T steps. Shapes as in `kda`; state (B, H, K, V). Returns o (B, T, H, V) and the final state."""
    outputs = []
    for q_t, k_t, v_t, g_t, beta_t in zip(*(t.unbind(1) for t in (q, k, v, g, beta))):
        state = state * g_t.exp().unsqueeze(-1)
        # what the memory answers to k_t now, and should no longer
        held = torch.einsum("bhk,bhkv->bhv", k_t, state)
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, beta_t.unsqueeze(-1) * (v_t - held))
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t * scale, state))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


@torch.no_grad()
def kda_step(q, k, v, g, beta, state):
    """
    One token for a whole batch, without gradients: q, k, g (B, H, K); v (B, H, V); beta (B, H). The state
    (B, H, K, V), float32 or float64, is updated in place. Returns o (B, H, V) in v's dtype.
    """
    B, H, K, V = state.shape
    q, k, g, beta, row = (t.to(state.dtype).reshape(B * H, 1, -1) for t in (q, k, g, beta, v))
    S = state.view(B * H, K, V)
    with torch.autocast(state.device.type, enabled=False):
        S.mul_(g.exp().mT)
        S.baddbmm_(k.mT, beta * torch.baddbmm(row, k, S, alpha=-1))
        return torch.bmm(q * K**-0.5, S).view(B, H, V).to(v.dtype)


# -----------------------------------------------------------------------------
# 2. a chunk
#
# Unroll the recurrence inside a chunk of C tokens that starts with the state S. G_i is the sum of g up to and
# including token i; e = -beta k is what erases, and below, q stands for scale q. How much of what token j
# wrote is still there along e_i, q_i:
#     P_ij = sum_c e_ic k_jc exp(G_ic - G_jc)  for j < i
#     Q_ij = sum_c q_ic k_jc exp(G_ic - G_jc)  for j <= i
# What token i really writes, new_i = beta_i (v_i minus what is there already), solves a unit lower-triangular
# system, and everything else is a product:
#     e_in = e exp(G)        q_in = q exp(G)        k_out = k exp(G_C - G)        total = exp(G_C)
#     X = (I - P)^-1         new = X (beta v + e_in S)
#     o = q_in S + Q new     S' = total S + k_out^T new
#
# Tensors of chunks are (M, C, D): the first chunks of all sequences and heads, then the second ones, so that
# a step of the loop over chunks works on one slice of `heads` = B * H of them. States are (M + heads, K, V):
# before each chunk, and after the last ones. What is done to e and to q alike is done to x = (e, q), and
# X and Q are kept as XQ.


def chunk_forward(q, k, v, g, beta, scale, state, form):
    """
    q, k, g (M, C, K), g clamped; v (M, C, V); beta (M, C, 1); state (heads, K, V), or None if there is one
    chunk of each head, with nothing before it and nothing to come. Returns o (M, C, V), and for the backward
    XQ (2, M, C, C) and the states S (M + heads, K, V), none of them where the state was None.
    """
    x, d, new = erase_and_read(q, k, beta, scale), form.decays(g), beta * v
    X, Q = XQ = form.pairs(x, k, d)
    if state is None:
        return torch.bmm(Q, torch.bmm(X, new)), XQ, v.new_empty(0, k.shape[-1], v.shape[-1])
    (_, start, end, total), heads = d, len(state)
    e_in, q_in = x * start
    S = state.new_zeros(len(X) + heads, *state.shape[1:])
    S[:heads] = state
    form.states(X, e_in, k * end, total, new, S)
    return torch.bmm(Q, new).baddbmm_(q_in, S[:-heads]), XQ, S


def erase_and_read(q, k, beta, scale):
    """x (2, M, C, K): e and scale q."""
    x = q.new_empty(2, *q.shape)
    torch.mul(k, -beta, out=x[0])
    torch.mul(q, scale, out=x[1])
    return x


def states(X, read, write, total, rows, S, backwards=False):
    """
    The loop over chunks, in place: rows = X (rows + read S), and S' += total S + write^T rows is the next
    state. `backwards` goes from the last chunk to the first, with X^T.
    """
    heads = len(S) - len(X)
    S = S.split(heads)
    steps = list(zip(*(t.split(heads) for t in (X, read, write, total, rows)), S[:-1], S[1:]))
    for X, read, write, total, rows, S, S_next in reversed(steps) if backwards else steps:
        if backwards:
            X, S, S_next = X.mT, S_next, S
        rows.copy_(torch.bmm(X, rows.baddbmm_(read, S)))
        S_next.addcmul_(total, S).baddbmm_(write.mT, rows)


# -----------------------------------------------------------------------------
# 3. blocks
#
# The one difficulty is exp(G_i - G_j) under a sum over channels. As a product of two factors, exp(G_i - ref)
# and exp(ref - G_j), it is a matmul, but one of them overflows where a chunk forgets a lot. So a chunk is cut
# into blocks of up to 8 tokens. With gates of at least -16 a block forgets at most exp(-112) from its first
# token to its last, and with ref half-way, both factors are within exp(+-56): float32 has exp(88), and the
# rest is room for what they are multiplied by. Only a chunk of up to 12 tokens is one block, because it pays:
# of 12 tokens, gates are clamped at -128 / 11 then, which leaves 9e-6 of what should be forgotten.
#
# Tokens of different blocks meet where neighbouring blocks merge into one of twice the length. Token i in the
# second and token j in the first decay from j to the border, and from the border to i. Both factors are <= 1,
# and exponents are sums over tokens, never differences. After two or three merges the chunk is one block.
# Nothing here depends on what the gates are.
#
# The inverse is merged with them: if X1 and X2 invert I - P within two neighbouring blocks, and L is what P
# has below them, then [[X1, 0], [X2 L X1, X2]] inverts both together.


def decays(g):
    """
    g (M, C, K) -> levels, start, end (M, C, K), total (M, K, 1).

    levels: (late, early) for blocks of s tokens, which double from level to level. late (., s, K) goes with
    the later tokens of pairs, early with the earlier ones. At level 0 the pairs are within each block, and
    late is the decay from the middle of the block. At others late is for each second block and early for each
    first. start, end: decay from the chunk's start to a token, and from a token to the chunk's end.
    """
    (M, C, K), merges = g.shape, merges_of(g.shape[1])
    G = g.view(M << merges, C >> merges, K).cumsum(1)
    middle = (G[:, :1] + G[:, -1:]) / 2
    before, after = middle.exp(), (G[:, -1:] - middle).exp()
    late = G.sub_(middle).exp_()
    early = late.reciprocal()
    levels = [(late, early)]
    start, end, total = late * before, early * after, before * after
    for _ in range(merges):
        # from the borders of blocks to those of pairs: second blocks start earlier, first ones end later
        (_, start2), (end1, _), (total1, total2) = halves(start), halves(end), halves(total)
        levels.append((start2.clone(), end1.clone()))
        start2.mul_(total1)
        end1.mul_(total2)
        start, end, total = (t.view(len(total1), -1, K) for t in (start, end, total1 * total2))
    return levels, start.view_as(g), end.view_as(g), total.mT


def merges_of(C):
    """How often neighbouring blocks of a chunk of C tokens merge until one is left."""
    return 0 if C <= SHORT else math.ceil(math.log2(C / BLOCK))


def halves(t):
    """(2N, ...) -> the first and the second of each two, (N, ...)."""
    return t.unflatten(0, (-1, 2)).unbind(1)


def sides(t, s, level):
    """Views of t (M, C, D) as blocks (., s, D): the earlier and the later ones of pairs, all at level 0."""
    t = t.view(-1, s, t.shape[-1])
    return halves(t) if level else (t, t)


def corners(A, s, level):
    """View of A (M, C, C) as the blocks (M, n, s, s) that later and earlier tokens make there."""
    M, C, _ = A.shape
    if level == 0:
        A = A.view(M, C // s, s, C // s, s)
    else:
        A = A.view(M, C // (2 * s), 2, s, C // (2 * s), 2, s)[:, :, 1, :, :, 0]
    return A.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def pairs(x, k, d):
    """x (2, M, C, K), k (M, C, K) and their decays -> XQ (2, M, C, C)."""
    XQ = x.new_zeros(*x.shape[:3], x.shape[2])
    for level, (late, early) in enumerate(d[0]):
        s = late.shape[1]
        k_early = (sides(k, s, level)[0] * early).mT
        P, Q = (torch.bmm(sides(t, s, level)[1] * late, k_early) for t in x)
        if level == 0:  # what is dropped may be inf
            I = torch.eye(s, dtype=P.dtype, device=P.device).expand_as(P)
            P = torch.linalg.solve_triangular(-P.tril_(-1), I, upper=False, unitriangular=True)
            Q.tril_()
        else:
            X1, X2 = halves(corners(XQ[0], s, 0).reshape(-1, s, s))
            P = torch.bmm(torch.bmm(X2, P), X1)
        for whole, block in zip(XQ, (P, Q)):
            corner = corners(whole, s, level)
            corner.copy_(block.view(corner.shape))
    return XQ


# -----------------------------------------------------------------------------
# 4. the backward
#
# With dR the gradient of beta v + e_in S, which X was multiplied by, from the last chunk to the first:
#     dR = X^T (Q^T do + k_out dS')          dS = q_in^T do + total dS' + e_in^T dR
#     dQ = do new^T                          dP = dR new^T
# The last one because X = (I - P)^-1 gives dP = X^T dX X^T. The first line is the loop of the forward, from
# the end, with X^T and with e_in and k_out exchanged.
#
# The gates: x_ic always comes with exp(G_ic), and k_jc with exp(-G_jc). So G_ic has the gradient x_ic dx_ic
# and G_jc has -k_jc dk_jc, whatever they are used for. g_t is in every G_i from t on, and has the sum over i
# >= t.


def chunk_backward(q, k, v, g, beta, scale, XQ, S, do, d_state, form):
    """
    Gradients of `chunk_forward` in q, k, v, g, beta and the initial state, from do (M, C, V) and d_state
    (heads, K, V), which is None where the state was.
    """
    x, d, new = erase_and_read(q, k, beta, scale), form.decays(g), beta * v
    (X, Q), (_, start, end, total) = XQ, d
    dR = torch.bmm(Q.mT, do)
    if d_state is None:
        new, dR = torch.bmm(X, new), torch.bmm(X.mT, dR)
    else:
        x_in, k_out, heads = x * start, k * end, len(d_state)
        dS, S = torch.empty_like(S), S[:-heads]
        new = torch.bmm(X, new.baddbmm_(x_in[0], S))
        torch.bmm(x_in[1].mT, do, out=dS[:-heads])
        dS[-heads:] = d_state
        form.states(X, k_out, x_in[0], total, dR, dS, backwards=True)
        d_state, dS = dS[:heads], dS[heads:]
    dA = torch.empty_like(XQ)
    torch.bmm(dR, new.mT, out=dA[0])
    torch.bmm(do, new.mT, out=dA[1])
    dx, dk = form.pairs_grad(x, k, d, dA)
    if d_state is not None:
        for t, dt in zip((dR, do), dx):
            dt.addcmul_(torch.bmm(t, S.mT), start)
    dG = (x[0] * dx[0]).addcmul_(x[1], dx[1]).addcmul_(k, dk, value=-1)
    dg = dG.flip(1).cumsum(1).flip(1)
    if d_state is not None:
        # k_out has the gates after its token. Apart, because it may be large where dG is e^-50.
        dk_out = torch.bmm(new, dS.mT).mul_(end)
        dg += (total * (S * dS).sum(-1, keepdim=True)).mT
        dg[:, 1:] += (k * dk_out)[:, :-1].cumsum(1)
        dk += dk_out
    # Q's diagonal has no decay, and is by far its largest part where gates are strong. It must not spoil dg.
    (de, dq), diagonal = dx, dA[1].diagonal(dim1=1, dim2=2).unsqueeze(-1)
    dq.addcmul_(diagonal, k).mul_(scale)
    dk.addcmul_(diagonal, x[1]).addcmul_(de, beta, value=-1)
    d_beta = (dR * v).sum(-1, keepdim=True) - (de * k).sum(-1, keepdim=True)
    return dq, dk, dR.mul_(beta), dg, d_beta, d_state


def pairs_grad(x, k, d, dA):
    """Gradients of P and Q in x (2, M, C, K) and k (M, C, K). dA (2, M, C, C): theirs, diagonals left out."""
    dx, dk = torch.zeros_like(x), torch.zeros_like(k)
    for level, (late, early) in enumerate(d[0]):
        s = late.shape[1]
        k_early = sides(k, s, level)[0] * early
        d_early = torch.zeros_like(k_early)
        for t, dt, dA_t in zip(x, dx, dA):
            block = corners(dA_t, s, level).reshape(-1, s, s)
            block = block if level else block.tril(-1)
            sides(dt, s, level)[1].addcmul_(torch.bmm(block, k_early), late)
            d_early.baddbmm_(block.mT, sides(t, s, level)[1] * late)
        sides(dk, s, level)[0].addcmul_(d_early, early)
    return dx, dk


# the steps of which there are also kernels
TORCH = SimpleNamespace(decays=decays, pairs=pairs, states=states, pairs_grad=pairs_grad)

# -----------------------------------------------------------------------------
# 5. kernels
#
# The products inside chunks and the loop over chunks in Triton; all else is left to PyTorch and cuBLAS. One
# program works on one chunk of CHUNK tokens of one head, but the loop is one program for a head and some
# columns of its state.
# All tensors are float32, and as in the PyTorch form. Where the inputs were in half precision, tensor cores
# multiply them as TF32, since half precision has no exp(64). A level of `decays` is here one whole (C, C)
# product, of which those pairs are taken that the level is about.

# Channels per step (or columns of the state per program), and warps. With half precision hardly a register is
# spilled on 8.0, 8.6, 9.0 and 10.0 (8 bytes on 8.6), and shared memory stays under 64 KB.
LAUNCH = {"pairs_kernel": (32, 4), "states_kernel": (32, 8), "pairs_grad_kernel": (16, 8)}

if triton is not None:
    constexpr = tl.constexpr
    C = CHUNK if INTERPRETED else constexpr(CHUNK)

    @triton.jit
    def load(p, m, rows, height, columns, width):
        """Rows and columns of the m-th (height, width) matrix, zeros outside."""
        p += m.to(tl.int64) * (height * width) + rows[:, None] * width + columns[None, :]
        return tl.load(p, mask=(rows < height)[:, None] & (columns < width)[None, :], other=0.0)

    @triton.jit
    def store(p, m, rows, height, columns, width, x):
        p += m.to(tl.int64) * (height * width) + rows[:, None] * width + columns[None, :]
        tl.store(p, x, mask=(rows < height)[:, None] & (columns < width)[None, :])

    @triton.jit
    def product(a, b, DOT: constexpr):
        """
        a @ b. Tensor cores cut off the last 13 bits of a float32. Where errors add up, a common sign is far
        worse than their size: round first.
        """
        if DOT == "tf32":
            a = ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            b = ((b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.dot(a, b, input_precision=DOT)

    @triton.jit
    def next_to_each_other(s):
        """(C, C) bool: token i is in the second and j in the first of two neighbouring blocks of s tokens."""
        i, j = tl.arange(0, C)[:, None] // s, tl.arange(0, C)[None, :] // s
        return (i % 2 == 1) & (j == i - 1)

    @triton.jit
    def level_decays(g, level: constexpr, STEP: constexpr):
        """g (C, STEP) -> late, early, and which pairs of tokens the level is about (C, C)."""
        s: constexpr = 8 if level == 0 else 4 << level
        blocks = tl.reshape(g, (C // s, s, STEP))
        G = tl.cumsum(blocks, 1)
        if level == 0:
            G -= tl.sum(blocks, 1, keep_dims=True) / 2
            late, early = tl.exp(G), tl.exp(-G)
            i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
            here = (i // s == j // s) & (i >= j)
        else:
            late, early = tl.exp(G), tl.exp(tl.cumsum(blocks, 1, reverse=True) - blocks)
            here = next_to_each_other(s)
        return tl.reshape(late, (C, STEP)), tl.reshape(early, (C, STEP)), here

    @triton.jit
    def inverse(P, DOT: constexpr):
        """(I - P)^-1, merged from blocks of one token on. Only what P has below its diagonal is read."""
        c = tl.arange(0, C)
        X = tl.where(c[:, None] == c[None, :], 1.0, tl.where(next_to_each_other(1), P, 0.0))
        for level in range(1, 6):
            L = tl.where(next_to_each_other(1 << level), P, 0.0)
            X += product(product(X, L, DOT), X, DOT)
        return X

    @triton.jit
    def pairs_kernel(x_p, k_p, g_p, XQ_p, K, STEP: constexpr, DOT: constexpr):
        """`pairs`, one program for what comes from e, one for what comes from q."""
        m, of_q, c = tl.program_id(0), tl.program_id(1), tl.arange(0, C)
        xm, A = of_q * tl.num_programs(0) + m, tl.zeros((C, C), tl.float32)
        for step in range(0, K, STEP):
            ks = step + tl.arange(0, STEP)
            x, k, g = load(x_p, xm, c, C, ks, K), load(k_p, m, c, C, ks, K), load(g_p, m, c, C, ks, K)
            for level in tl.static_range(4):
                late, early, here = level_decays(g, level, STEP)
                A += tl.where(here, product(x * late, tl.trans(k * early), DOT), 0.0)
        if of_q == 0:
            A = inverse(A, DOT)
        store(XQ_p, xm, c, C, c, C, A)

    @triton.jit
    def states_kernel(
        X_p,
        read_p,
        write_p,
        total_p,
        rows_p,
        S_p,
        N,
        K,
        V,
        KPAD: constexpr,
        STEP: constexpr,
        BACK: constexpr,
        DOT: constexpr,
    ):
        """`states`, over N chunks, for STEP columns of a head. KPAD: `padded(K)`."""
        h, heads, c = tl.program_id(0), tl.num_programs(0), tl.arange(0, C)
        ks, vs = tl.arange(0, KPAD), tl.program_id(1) * STEP + tl.arange(0, STEP)
        S = load(S_p, h + (N * heads if BACK else 0), ks, K, vs, V)
        for step in range(N):
            m = h + heads * (N - 1 - step if BACK else step)
            rows = load(rows_p, m, c, C, vs, V) + product(load(read_p, m, c, C, ks, K), S, DOT)
            X = load(X_p, m, c, C, c, C)
            rows = product(tl.trans(X) if BACK else X, rows, DOT)
            store(rows_p, m, c, C, vs, V, rows)
            total = tl.load(total_p + m * K + ks, mask=ks < K, other=0.0)
            after = m if BACK else m + heads
            S = total[:, None] * S + load(S_p, after, ks, K, vs, V)
            S += product(tl.trans(load(write_p, m, c, C, ks, K)), rows, DOT)
            store(S_p, after, ks, K, vs, V, S)

    @triton.jit
    def pairs_grad_kernel(x_p, k_p, g_p, dA_p, dx_p, dk_p, K, STEP: constexpr, DOT: constexpr):
        """`pairs_grad`, one program for STEP channels of a chunk."""
        m, c, ks = tl.program_id(0), tl.arange(0, C), tl.program_id(1) * STEP + tl.arange(0, STEP)
        k, g, dk = load(k_p, m, c, C, ks, K), load(g_p, m, c, C, ks, K), tl.zeros((C, STEP), tl.float32)
        for which in range(2):
            xm = which * tl.num_programs(0) + m
            x, dx = load(x_p, xm, c, C, ks, K), tl.zeros((C, STEP), tl.float32)
            dA = tl.where(c[:, None] > c[None, :], load(dA_p, xm, c, C, c, C), 0.0)
            for level in tl.static_range(4):
                late, early, here = level_decays(g, level, STEP)
                block = tl.where(here, dA, 0.0)
                dx += late * product(block, k * early, DOT)
                dk += early * product(tl.trans(block), x * late, DOT)
            store(dx_p, xm, c, C, ks, K, dx)
        store(dk_p, m, c, C, ks, K, dk)


def padded(width):
    """Channels are padded to a power of two that a tensor core can take."""
    return max(16, 1 << (width - 1).bit_length())


def launch(kernel, programs, columns, dot, *args, **constants):
    """`programs` by 2 of them, or by one for every STEP of `columns`."""
    step, warps = LAUNCH[kernel.__name__]
    step = min(step, padded(columns))
    grid = programs, 2 if kernel is pairs_kernel else -(-columns // step)
    kernel[grid](*args, STEP=step, DOT=dot, num_warps=warps, num_stages=1, **constants)


def form_of(backend, dtype):
    """The steps in PyTorch, or by the kernels for inputs v of this dtype. Shapes are the same."""
    if backend == "chunk":
        return TORCH
    dot = "ieee" if dtype == torch.float32 else "tf32"

    def decays(g):  # the kernels count those of blocks themselves, from g
        G = g.cumsum(1)
        return g, G.exp(), (g.flip(1).cumsum(1).flip(1) - g).exp_(), G[:, -1:].exp().mT

    def pairs(x, k, d):
        (M, _, K), XQ = k.shape, x.new_empty(*x.shape[:3], x.shape[2])
        launch(pairs_kernel, M, K, dot, x, k, d[0], XQ, K)
        return XQ

    def states(X, read, write, total, rows, S, backwards=False):
        heads, (K, V) = len(S) - len(X), S.shape[1:]
        args = X, read, write, total, rows, S, len(X) // heads, K, V
        launch(states_kernel, heads, V, dot, *args, KPAD=padded(K), BACK=backwards)

    def pairs_grad(x, k, d, dA):
        (M, _, K), dx, dk = k.shape, torch.empty_like(x), torch.empty_like(k)
        launch(pairs_grad_kernel, M, K, dot, x, k, d[0], dA, dx, dk, K)
        return dx, dk

    return SimpleNamespace(decays=decays, pairs=pairs, states=states, pairs_grad=pairs_grad)


# -----------------------------------------------------------------------------
# 6. the operator
#
# Registered with torch.library, so that torch.compile sees one operation with known shapes instead of tracing
# into the loops, and another one for the backward.


def choose_backend(device, dtype, channels=0, backend="auto"):
    """
    What computes on this torch.device, in this dtype -> (its name, why). ValueError for a backend that there
    is not, or that cannot.
    """
    asked = BACKEND if backend == "auto" else backend
    if asked not in ("auto", "recurrent", "chunk", "triton"):
        raise ValueError(f"backend or KDA_BACKEND is {asked!r}, not auto, recurrent, chunk or triton")
    on_gpu = device.type == "cuda"
    possible = triton is not None and (on_gpu or INTERPRETED) and dtype != torch.float64 and channels <= 128
    needs = "Triton, a GPU, no float64 and at most 128 channels"
    if asked == "triton" and not possible:
        raise ValueError(f"backend 'triton' needs {needs}: use 'chunk'")
    if asked != "auto":
        return asked, "it was asked for"
    if not on_gpu:
        return "chunk", "it is the fastest there is without a GPU"
    if not possible:
        return "chunk", f"the kernels need {needs}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "chunk", "Triton has no tensor cores for this GPU, cuBLAS does"
    return "triton", "Triton knows this GPU"


def widest(*tensors):
    """What everything is computed in: float32, or float64 if any of the tensors is."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


@contextlib.contextmanager
def computing(v):
    """
    On v's device, nothing is rounded by autocast. If v is in half precision on a GPU, float32 products use
    tensor cores, whatever the process wants elsewhere.
    """
    settings = torch.backends.cuda.matmul
    new = hasattr(settings, "fp32_precision")  # since PyTorch 2.9
    name, value = ("fp32_precision", "tf32") if new else ("allow_tf32", True)
    before = getattr(settings, name)
    try:
        if v.is_cuda and v.dtype in (torch.float16, torch.bfloat16):
            setattr(settings, name, value)
        with torch.cuda.device_of(v), torch.autocast(v.device.type, enabled=False):
            yield
    finally:
        setattr(settings, name, before)


def chunk_length(T, backend, device):
    """Tokens per chunk: as many blocks of equal length as fit, with little padding."""
    if backend == "triton":
        return CHUNK
    chunks = -(-T // (CPU_CHUNK if device.type == "cpu" else CHUNK))
    blocks = 1 << merges_of(-(-T // chunks))
    return blocks * -(-T // (chunks * blocks))


def floor_of(C, dtype):
    """Where the gates of chunks of C tokens are clamped."""
    return BLOCK / (C - 1) * FLOOR[dtype] if BLOCK < C <= SHORT else FLOOR[dtype]


def to_chunks(t, C, dtype):
    """
    (B, T, H, D) -> (M, C, D). Padding tokens are all zeros: with k = beta = g = 0 they leave the state alone.
    """
    B, T, H, D = t.shape
    t = F.pad(t, (0, 0, 0, 0, 0, -T % C)) if T % C else t
    return t.reshape(B, -1, C, H, D).permute(1, 0, 3, 2, 4).to(dtype).reshape(-1, C, D).contiguous()


def from_chunks(x, like):
    """The inverse: x (M, C, D) -> (B, T, H, D), shaped and typed as `like`."""
    B, T, H, D = like.shape
    x = x.view(-1, B, H, x.shape[1], D).permute(1, 0, 3, 2, 4)
    return x.to(like.dtype).reshape(B, -1, H, D)[:, :T].contiguous()


def stands_alone(T, C, initial_state, want_state):
    """Is there one chunk, with nothing before it, and nobody who asks for the final state?"""
    return T <= C and initial_state is None and not want_state


def chunk_op(q, k, v, g, beta, initial_state, scale, want_state, backend):
    """
    -> o, the final state (B * H, K, V), and what is kept for the backward: XQ and S. There are no states for
    a chunk that stands alone.
    """
    (B, T, H, K), V, wide = q.shape, v.shape[-1], widest(q, k, v, g, beta)
    C, state, heads = chunk_length(T, backend, q.device), None, 0
    if not stands_alone(T, C, initial_state, want_state):
        heads = B * H
        state = q.new_zeros(heads, K, V, dtype=wide)
        if initial_state is not None:
            state.copy_(initial_state.flatten(0, 1))
    with computing(v):
        *qkv, g, beta = (to_chunks(t, C, wide) for t in (q, k, v, g, beta.unsqueeze(-1)))
        g = g.clamp(floor_of(C, wide))
        o, XQ, S = chunk_forward(*qkv, g, beta, scale, state, form_of(backend, v.dtype))
    return from_chunks(o, v), S[len(S) - heads :].clone(), XQ, S


def chunk_backward_op(q, k, v, g, beta, initial_state, scale, backend, XQ, S, do, d_final):
    """-> gradients in q, k, v, g, beta and the initial state (empty if there was none)."""
    C, wide = XQ.shape[-1], XQ.dtype
    form = form_of(backend, v.dtype)
    inputs = q, k, v, g, beta.unsqueeze(-1)
    if len(S) and d_final is None:
        d_final = torch.zeros_like(S[XQ.shape[1] :])
    with computing(v):
        *qkv, g, beta, do = (to_chunks(t, C, wide) for t in (*inputs, do))
        clamped = g.clamp(floor_of(C, wide))
        *grads, d_state = chunk_backward(*qkv, clamped, beta, scale, XQ, S, do, d_final, form)
        grads[3].masked_fill_(g < clamped, 0)
    dq, dk, dv, dg, d_beta = (from_chunks(d, t) for d, t in zip(grads, inputs))
    d_state = q.new_empty(0) if initial_state is None else d_state.view_as(initial_state).to(initial_state)
    return dq, dk, dv, dg, d_beta.squeeze(-1), d_state


# Named after the module, so that a changed copy of this file can be imported beside it.
NAME = __name__.strip("_").replace(".", "_") + "_operators"
ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, float scale, "
kda_op = torch.library.custom_op(
    f"{NAME}::kda",
    chunk_op,
    mutates_args=(),
    schema=f"({ARGUMENTS} bool want_state, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
kda_backward_op = torch.library.custom_op(
    f"{NAME}::kda_backward",
    chunk_backward_op,
    mutates_args=(),
    schema=f"({ARGUMENTS} str backend, Tensor XQ, Tensor S, Tensor do, Tensor? d_final) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@kda_op.register_fake
def _(q, k, v, g, beta, initial_state, scale, want_state, backend):
    (B, T, H, K), V, wide = q.shape, v.shape[-1], widest(q, k, v, g, beta)
    C = chunk_length(T, backend, q.device)
    M, heads = B * H * -(-T // C), 0 if stands_alone(T, C, initial_state, want_state) else B * H
    shapes = (heads, K, V), (2, M, C, C), (M + heads if heads else 0, K, V)
    return v.new_empty(v.shape), *(q.new_empty(shape, dtype=wide) for shape in shapes)


@kda_backward_op.register_fake
def _(q, k, v, g, beta, initial_state, *rest):
    d_state = q.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    return *(t.new_empty(t.shape) for t in (q, k, v, g, beta)), d_state


class KDAFunction(torch.autograd.Function):
    """As operators for the compiler. Without it as functions, which saves a third of a millisecond."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial_state, scale, want_state, backend):
        """-> o and the final state (B * H, K, V), which is anything unless `want_state`."""
        op = kda_op if torch.compiler.is_compiling() else chunk_op
        o, state, XQ, S = op(q, k, v, g, beta, initial_state, scale, want_state, backend)
        ctx.save_for_backward(q, k, v, g, beta, initial_state, XQ, S)
        ctx.scale, ctx.want_state, ctx.backend = scale, want_state, backend
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_final):
        *inputs, XQ, S = ctx.saved_tensors
        do = torch.zeros_like(inputs[2]) if do is None else do
        op = kda_backward_op if torch.compiler.is_compiling() else chunk_backward_op
        *grads, d_state = op(*inputs, ctx.scale, ctx.backend, XQ, S, do, d_final if ctx.want_state else None)
        return *grads, None if inputs[5] is None else d_state, None, None, None


def kda(
    q,
    k,
    v,
    g,
    beta,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    backend="auto",
):
    """
    Kimi Delta Attention with precomputed gates, differentiable in every tensor. Arguments as in FLA's
    chunk_kda.

    q, k (B, T, H, K)    queries and keys; keys are expected to have unit length (the layer normalises both)
    v    (B, T, H, V)    values
    g    (B, T, H, K)    log-decay, in [-inf, 0]
    beta (B, T, H)       how much of the old value is replaced, in [0, 1] (up to 2 is allowed: a reflection)
    scale                multiplies q, default K ** -0.5
    initial_state        (N, H, K, V) or None for zero; N is B, or the number of packed sequences
    cu_seqlens           (N + 1,) integers from 0 to T, B = 1: sequence n is made of tokens cu_seqlens[n] to
                         cu_seqlens[n + 1] - 1. They are computed one after the other
    backend              "recurrent" (the definition), "chunk" (PyTorch), "triton", or "auto"

    Returns o (B, T, H, V) in v's dtype, and the final state (N, H, K, V) in float32 (float64 for float64
    inputs), or None unless output_final_state. Raises ValueError naming the argument whose shape or dtype
    does not fit.

    Except in "recurrent", gates are clamped at -16 (-80 in float64): what should be forgotten completely
    leaves 1e-7 of it, in sequences of 10 to 12 tokens up to 9e-6, and gates below have no gradient. Errors
    are 3e-6 of the result at most, but up to 5e-4 for 4,096 equal keys at beta = 2 without decay, where
    nothing forgets a rounding.
    """
    if q.ndim != 4:
        raise ValueError(f"q must be (B, T, H, K), got shape {tuple(q.shape)}")
    B, T, H, K = q.shape
    V, N = v.shape[-1] if v.ndim == 4 else 0, B if cu_seqlens is None else len(cu_seqlens) - 1
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "g": (B, T, H, K), "beta": (B, T, H)}
    shapes["initial_state"] = N, H, K, V
    for t, (name, shape) in zip((q, k, v, g, beta, initial_state), shapes.items()):
        if t is not None and (tuple(t.shape) != shape or not t.is_floating_point()):
            raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)}, expected floating point {shape}")
    inputs, how = (q, k, v, g, beta), {"scale": scale, "output_final_state": True, "backend": backend}
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        rising = N > 0 and bounds[0] == 0 and bounds[-1] == T and bounds == sorted(bounds)
        if B != 1 or not rising or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be integers rising from 0 to T = {T}, B = 1, got {bounds[:8]}, B = {B}"
            )
        states = [None] * N if initial_state is None else initial_state.split(1)
        lengths = [end - start for start, end in zip(bounds, bounds[1:])]
        own = zip(*(t.split(lengths, 1) for t in inputs), states)
        parts = [kda(*some, initial_state=state, **how) for *some, state in own]
        o, state = (torch.cat(t, dim) for t, dim in zip(zip(*parts), (1, 0)))
        return o, state if output_final_state else None
    scale, wide = K**-0.5 if scale is None else scale, widest(*inputs)
    backend, _ = choose_backend(q.device, wide, max(K, V), backend)
    at_once = max(CHUNK, CPU_AT_ONCE // max(1, B * H * K) // CHUNK * CHUNK)
    if backend == "chunk" and q.device.type == "cpu" and T > 2 * at_once:
        parts, state = [], initial_state
        n = (T - SHORT - 1) // at_once  # a shorter last piece would clamp its gates sooner
        lengths = [at_once] * n + [T - n * at_once]
        for some in zip(*(t.split(lengths, 1) for t in inputs)):
            o, state = kda(*some, initial_state=state, **how)
            parts.append(o)
        return torch.cat(parts, 1), state if output_final_state else None
    if backend != "recurrent" and q.numel() and V:
        o, state = KDAFunction.apply(*inputs, initial_state, scale, output_final_state, backend)
        state = state.view(B, H, K, V) if output_final_state else None
    else:
        state = q.new_zeros(B, H, K, V) if initial_state is None else initial_state
        with torch.autocast(q.device.type, enabled=False):
            o, state = recurrent_kda(*(t.to(wide) for t in inputs), scale, state.to(wide))
        o = o.to(v.dtype)
    return o, state if output_final_state else None


# -----------------------------------------------------------------------------
# 7. the layer


class ShortConvFunction(torch.autograd.Function):
    """
    Causal depthwise convolution as W shifted multiply-adds. Written out because autograd through them, or
    through a grouped conv1d, is slower on a CPU.
    """

    @staticmethod
    def forward(ctx, x, taps, reach):
        """
        x (B, W - 1 + T, D), T tokens after the last W - 1 before them; taps (W, D); reach (B, T, G) how many
        tokens back each may look, in G groups of channels, or None -> (B, T, D).
        """
        ctx.save_for_backward(x, taps, reach)
        last = len(taps) - 1
        y = x[:, last:] * taps[-1]
        for n in range(1, last + 1):
            y.addcmul_(within(x[:, last - n : -n], reach, n), taps[last - n])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, taps, reach = ctx.saved_tensors
        dx, d_taps, last = torch.zeros_like(x), torch.empty_like(taps), len(taps) - 1
        for n in range(last + 1):
            seen = slice(last - n, last - n + dy.shape[1])
            d = within(dy, reach, n)
            dx[:, seen].addcmul_(d, taps[last - n])
            d_taps[last - n] = (d * x[:, seen]).sum((0, 1))
        return dx, d_taps, None


def within(x, reach, n):
    """x (B, T, D), zero where the n-th token before is out of reach."""
    if reach is None:
        return x
    return (x.unflatten(-1, (reach.shape[-1], -1)) * (reach >= n).unsqueeze(-1)).flatten(-2)


def widened(t):
    """In float32 where t is in less, else as it is: a float64 layer stays in float64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def unit_length(x):
    """x (..., K) divided by its length, computed in float32 at least, in x's dtype."""
    wide = widened(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ShortConv(nn.Module):
    """The taps of a convolution (D, 1, CONV), shaped as a Conv1d's, so that checkpoints of FLA load."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, CONV).uniform_(-(CONV**-0.5), CONV**-0.5))


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
    The KDA layer. Parameters are named and shaped as in flash-linear-attention's, so its state dicts load.

        q, k, v = SiLU(ShortConv(W x)), q and k of unit length per head
        g = -exp(A_log) * softplus(low-rank(x) + dt_bias)      per head and channel: how fast to forget
            with lower_bound:  lower_bound * sigmoid(exp(A_log) * (low-rank(x) + dt_bias))
        beta = sigmoid(W_b x)                                  per head: how much to overwrite
            with allow_neg_eigval:  twice that
        y = W_o (RMSNorm(o) * sigmoid(low-rank(x)))
    """

    def __init__(
        self, hidden_size, num_heads, head_dim, norm_eps=1e-5, lower_bound=None, allow_neg_eigval=False
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.lower_bound, self.allow_neg_eigval = lower_bound, allow_neg_eigval
        inner = num_heads * head_dim
        linear = functools.partial(nn.Linear, bias=False)
        self.q_proj, self.k_proj, self.v_proj = (linear(hidden_size, inner) for _ in "qkv")
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConv(inner) for _ in "qkv")
        self.f_proj = nn.Sequential(linear(hidden_size, head_dim), linear(head_dim, inner))
        self.b_proj = linear(hidden_size, num_heads)
        # Heads start with time scales from a few tokens to a few thousand: A is in [1, 16], and
        # softplus(dt_bias) in [0.001, 0.1].
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        dt = torch.empty(inner).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.g_proj = nn.Sequential(linear(hidden_size, head_dim), nn.Linear(head_dim, inner))
        self.o_norm = GatedRMSNorm(head_dim, norm_eps)
        self.o_proj = linear(inner, hidden_size)

    def empty_cache(self, batch_size, length=None):
        """
        Before the first token: the convolution's last inputs (B, CONV - 1, 3HK), and a state (B, H, K, K),
        whatever length they are for.
        """
        H, K = self.num_heads, self.head_dim
        new = self.A_log.new_zeros
        return new(batch_size, CONV - 1, 3 * H * K), widened(new(batch_size, H, K, K))

    def forward(self, x, cache=None, starts=None):
        """
        x (B, T, hidden_size) -> y of the same shape, and the cache after the last token: None when none came
        in. Training passes no cache. Prefill and decoding pass `empty_cache` or what the previous call
        returned, which is used up: its state is updated in place where no gradient is wanted. starts (B, T)
        bool: tokens at which a new document begins, that knows nothing of what was before, or None.
        """
        qkv, f, beta, gate = self.project(x)
        o, cache = self.mix(qkv, f, beta, cache, starts)
        return self.output(o.to(x.dtype), gate), cache

    def project(self, x):
        """
        -> q, k, v before the convolution (B, T, 3HK), and what f (B, T, H, K), beta and the gate come from.
        """
        H, K = self.num_heads, self.head_dim
        # One product for nearly all that x is multiplied by. b_proj stays apart: with its few columns, rows
        # would no longer be multiples of 16 bytes, which tensor cores want. For one token, putting the
        # weights together would cost more than multiplying by them.
        of_x = (self.q_proj, self.k_proj, self.v_proj, self.f_proj[0], self.g_proj[0])
        if x.shape[1] > 1:
            projected = F.linear(x, torch.cat([m.weight for m in of_x]))
        else:
            projected = torch.cat([m(x) for m in of_x], -1)
        qkv, f, gate = projected.split((3 * H * K, K, K), -1)
        return qkv, self.f_proj[1](f).unflatten(-1, (H, K)), self.b_proj(x), gate

    def mix(self, qkv, f, beta, cache, starts):
        """
        What looks at other tokens -> o (B, T, H, K) and the cache. starts (B, T), or (B, T, H) for each head.
        """
        (B, T, H, K), W = f.shape, CONV
        reach = None
        if starts is not None:
            starts = starts.view(B, T, -1)
            t = torch.arange(T, device=f.device)[:, None]
            reach = (t - torch.where(starts, t, -W).cummax(1).values).repeat(1, 1, 3)  # q, k and v alike
        if cache is None:
            tail = state = None
            qkv = F.pad(qkv, (0, 0, W - 1, 0))
        else:
            tail, state = cache
            qkv = torch.cat([tail.to(qkv.dtype), qkv], 1)
            tail = qkv[:, T:].clone()  # a view would keep all of qkv
            if starts is not None:  # what a document's next tokens may look back to ends where it began
                tail = tail * (torch.arange(W - 2, -1, -1, device=f.device)[:, None] <= reach[:, -1:, :1])
        taps = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight]).squeeze(1)
        taps = taps.t().contiguous().to(qkv.dtype)  # (3HK, W) would be read with a stride
        qk, v = F.silu(ShortConvFunction.apply(qkv, taps, reach)).view(B, T, 3 * H, K).split([2 * H, H], 2)
        q, k = unit_length(qk).chunk(2, 2)
        g, beta = self.gates(widened(f)), widened(beta).sigmoid()
        beta = 2 * beta if self.allow_neg_eigval else beta
        if starts is not None:
            g = g.masked_fill(starts.unsqueeze(-1), -math.inf)
        if T == 1 and cache is not None and not torch.is_grad_enabled():
            o = kda_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state).unsqueeze(1)
        else:
            o, state = kda(q, k, v, g, beta, initial_state=state, output_final_state=cache is not None)
        return o, None if cache is None else (tail, state)

    def gates(self, f):
        """g (B, T, H, K), in float32 at least."""
        A, f = widened(self.A_log).exp()[:, None], f + widened(self.dt_bias).view(f.shape[2:])
        return -A * F.softplus(f) if self.lower_bound is None else self.lower_bound * torch.sigmoid(A * f)

    def output(self, o, gate):
        return self.o_proj(self.o_norm(o, self.g_proj[1](gate).view(o.shape)).flatten(2))


def check():
    """What was chosen here and why, and whether it agrees with the recurrence in float64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, why = choose_backend(device, torch.float32)
    print(f"backend on {device}: {backend}, because {why}")
    torch.manual_seed(0)
    for name, strength in (("mild gates", 0.1), ("strong gates", 16.0)):
        q, k, v, u = torch.rand(4, 1, 70, 1, 32, device=device).unbind(0)  # a chunk and a bit
        results = []
        for dtype, how in ((torch.float64, "recurrent"), (torch.float32, "auto")):
            inputs = q, F.normalize(k, dim=-1), v, -strength * u, u[..., 0]
            leaves = [t.to(dtype).requires_grad_() for t in inputs]
            o, _ = kda(*leaves, backend=how)
            results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
        errors = [((got - want).norm() / want.norm()).item() for want, got in zip(*results)]
        print(f"{name}: outputs are off by {errors[0]:.1e}, gradients by at most {max(errors[1:]):.1e}")
        if not max(errors) < 1e-4:
            sys.exit(f"error: {backend} is wrong on this machine; KDA_BACKEND=chunk chooses another")


if __name__ == "__main__":
    try:
        check()
    except ValueError as e:
        sys.exit(f"error: {e}")
