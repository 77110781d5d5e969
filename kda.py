"""
Kimi Delta Attention (KDA): linear attention that decays its memory channel by channel and overwrites instead of only adding.

The file reads top to bottom as an explanation:
  1. recurrent_kda        the definition, one token at a time, and kda_step, which decoding runs
  2. chunk_forward        the same numbers from matrix products, a chunk of tokens at a time, and chunk_backward; what training runs
     smol/kda_triton.py   the same once more as Triton kernels, for GPUs that Triton knows; a file of its own because it is optional
  3. kda                  the operator: checks its arguments and picks one of the three; works under torch.compile
  4. KimiDeltaAttention   the layer around it: projections, short convolutions, gates, output norm

Per head, with a state S of shape (K, V) and t = 1..T (Kimi Linear, arXiv 2510.26692):

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

In words: forget a little of every channel, erase what the memory still holds along k_t, write v_t there, read with q_t.

Run `python kda.py` to see which form was chosen on this machine and why, and whether it is right.
Read next: model_dense.py, which stacks the layer.
"""

import contextlib
import functools
import math
import os
import re
import sys
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from smol import kda_triton

BACKEND = os.environ.get("KDA_BACKEND", "auto")  # what backend="auto" means; "auto" itself: what suits the device best
CHUNK = 64  # tokens per chunk: the (C, C) products inside a chunk against T / C sequential state updates
AT_ONCE = 1 << 21  # numbers in one tensor on a CPU: 8 MB
FEW = 4  # tokens in the smallest blocks, whose pairs are computed one by one
MILD = 120.0  # a chunk whose total log-decay stays above -MILD may use factors up to exp(MILD / 2) = 1e26, safe in float32

# -----------------------------------------------------------------------------
# 1. the definition


def recurrent_kda(q, k, v, g, beta, scale, state):
    """The recurrence over T steps. Shapes as in `kda`; state (B, H, K, V). Returns o (B, T, H, V) and the final state."""
    outputs = []
    for q_t, k_t, v_t, g_t, beta_t in zip(*(t.unbind(1) for t in (q, k, v, g, beta))):
        state = state * g_t.exp().unsqueeze(-1)
        held = torch.einsum("bhk,bhkv->bhv", k_t, state)  # what the memory answers to k_t now, and should no longer
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, beta_t.unsqueeze(-1) * (v_t - held))
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t * scale, state))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


@torch.no_grad()
def kda_step(q, k, v, g, beta, state, scale=None):
    """
    One token of the recurrence for a whole batch, without gradients: q, k, g (B, H, K); v (B, H, V); beta (B, H). The state
    (B, H, K, V), float32 or float64, is updated in place. Returns o (B, H, V) in v's dtype.
    """
    B, H, K, V = state.shape
    scale = K**-0.5 if scale is None else scale
    if state.is_cuda and state.dtype == torch.float32 and choose_backend(state.device, q.dtype)[0] == "triton" and max(K, V) <= 128:
        return kda_triton.triton_step(q, k, v, g, beta, state, scale)
    q, k, g, beta, row = (t.to(state.dtype).reshape(B * H, 1, -1) for t in (q, k, g, beta, v))
    S = state.view(B * H, K, V)
    S.mul_(g.exp().mT)
    S.baddbmm_(k.mT, beta * torch.baddbmm(row, k, S, alpha=-1))
    return torch.bmm(q * scale, S).view(B, H, V).to(v.dtype)


# -----------------------------------------------------------------------------
# 2. the chunked form
#
# Unroll the recurrence inside a chunk of C tokens that starts with the state S. With G_i the sum of g up to and including token i:
#     P_ij = sum_c k_ic k_jc exp(G_ic - G_jc)  for j < i       how much of what token j wrote is still there along k_i
#     Q_ij = the same with q_i for k_i, for j <= i
# What token i really writes, new_i = beta_i (v_i minus what is there already), then solves a unit lower-triangular system, and
# everything else is a product:
#     X = (I + beta P)^-1        new = X beta (v - (k e^G) S)        o = (q e^G) S + Q new        S' = e^{G_C} S + (k e^{G_C - G})^T new
#
# The one difficulty is exp(G_i - G_j) under a sum over channels: as a product of two factors, exp(G_i - ref) exp(ref - G_j), it is a
# matmul, but the second factor overflows where a chunk forgets a lot. So P and Q are built in one of two ways:
#   - `mild_factors`, for chunks whose whole decay is mild: one matmul, with ref half-way;
#   - `steep_factors`, for any: pairs of tokens in different blocks, by merging neighbouring blocks. A pair across a border decays from j
#     to the border, then from the border to i. Both factors are <= 1. The exponents are sums, never differences, so nothing cancels, and
#     g = -inf (a reset) gives exp(-inf) = 0 exactly, never inf - inf. The few pairs in the smallest blocks are computed one by one.
# On a CPU the gates are looked at, and nearly all chunks are mild. Looking would make a GPU wait, so there all chunks count as steep.
#
# Tensors of chunks are (M, C, D): the first chunks of all sequences and heads, then the second ones, so that a step of the loop over
# sequences, all of one length, works on one slice. `low` is the type of the factors of matrix products: float16 where tensor cores want it.


def chunk_length(T, device):
    """
    (C, few): tokens per chunk for sequences of up to T tokens, and in the smallest blocks; C = few * a power of two. 43 tokens make
    one chunk of 3 * 16 with little padding, 96 two of 3 * 16; tensor cores want powers of two.
    """
    C = -(-T // max(1, -(-T // CHUNK)))
    if device.type != "cpu":
        C = max(16, 1 << (C - 1).bit_length())
    few, doublings = C, 0
    while few > FEW:
        doublings += 1
        few = -(-C // 2**doublings)
    return few << doublings, few


def sequence_bounds(cu_seqlens, T):
    """cu_seqlens as a list, checked: this makes a GPU wait once."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(a > b for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, got {bounds if len(bounds) < 9 else f'{bounds[:8]} ...'}")
    return bounds


def to_chunks(t, C):
    """(B, T, H, D) -> (M, C, D). Padding tokens are all zeros: with k = beta = g = 0 they leave the state alone."""
    B, T, H, D = t.shape
    N = -(-T // C)
    t = F.pad(t, (0, 0, 0, 0, 0, N * C - T)) if N * C > T else t
    return t.reshape(B, N, C, H, D).permute(1, 0, 3, 2, 4).reshape(N * B * H, C, D)


def from_chunks(x, B, T, H):
    """The inverse: (M, C, D) -> (B, T, H, D)."""
    _, C, D = x.shape
    return x.view(-1, B, H, C, D).permute(1, 0, 3, 2, 4).reshape(B, -1, H, D)[:, :T]


def mm(a, b, low):
    """a @ b with factors rounded to `low`."""
    return (a.to(low) @ b.to(low)).to(a.dtype)


def addmm_(c, a, b, low, alpha=1):
    """c += alpha a @ b for (M, ., .) tensors, the sum in c's type."""
    if low == c.dtype:
        return c.baddbmm_(a, b, alpha=alpha)
    return c.add_(torch.bmm(a.to(low), b.to(low)), alpha=alpha)


def to_end(g):
    """(..., C, K) -> the sum of g over the tokens after each one: its exp is what survives until the end."""
    return F.pad(g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def on_diagonal(A, block):
    """View of A (..., C, C) as its C / block blocks on the diagonal: (..., C / block, block, block)."""
    A = A.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))  # (..., n, block, n, block)
    return A.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def below(A, block):
    """View of A (..., C, C): of each two neighbouring blocks, the pairs (second, first): (..., C / 2block, block, block)."""
    A = A.unflatten(-1, (-1, 2, block))[..., 0, :].unflatten(-3, (-1, 2, block))[..., 1, :, :, :]  # (..., n, block, n, block)
    return A.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def halves(t, block):
    """Views of t (..., C, D): the first and the second of each two neighbouring blocks, both (..., C / 2block, block, D)."""
    return t.unflatten(-2, (-1, 2, block)).unbind(-3)


def from_here(t):
    """(..., C, K) -> sums over each token and all after it."""
    return t.flip(-2).cumsum(-2).flip(-2)


def before_here(t):
    """(..., C, K) -> sums over all tokens before each one."""
    return F.pad(t[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def mild_and_steep(g):
    """
    g (M, C, K) -> [(which chunks, whether they are mild, resets)]; `which` indexes the first dimension. Tokens that forget everything, as
    where a document starts, do not keep a chunk from being mild: resets is None or (which of the mild chunks have them, booleans (., C)).
    """
    everything = slice(None)
    if g.is_cuda or g.shape[1] <= FEW:
        return [(everything, False, None)]
    mild, resets = g.sum(1).amin(1) > -MILD, None
    if not mild.all():
        steep = (~mild).nonzero().squeeze(1)
        all_gone = g[steep].amax(-1) == -math.inf
        only_resets = g[steep].masked_fill(all_gone.unsqueeze(-1), 0).sum(1).amin(1) > -MILD
        if only_resets.any():
            mild[steep[only_resets]] = True
            # all of them, and no index: the usual case where each line of a grid starts with one
            resets = everything if only_resets.sum() == len(g) else (mild.cumsum(0) - 1)[steep[only_resets]], all_gone[only_resets]
    if mild.all() or not mild.any():
        return [(everything, bool(mild.all()), resets)]
    return [(mild.nonzero().squeeze(1), True, resets), ((~mild).nonzero().squeeze(1), False, None)]


class Factors(NamedTuple):
    """
    What a chunk's gates make of x = (beta k, scale q) and k. The state at the chunk's start S is read by x_in @ (pre * S), and the
    state at its end is decay * (pre * S) + k_out^T new. `groups` and `exps` are for the backward.
    """

    A: torch.Tensor  # (M, 2, C, C): sum_c x_ic k_jc exp(g_{j+1,c} + ... + g_ic) for j < i, else zero
    x_in: torch.Tensor  # (M, 2, C, K)
    k_out: torch.Tensor  # (M, C, K)
    pre: torch.Tensor  # (M, K, 1)
    decay: torch.Tensor  # (M, K, 1)
    groups: list
    exps: list


def factors(x, k, g, few, low, pairs=True):
    """x (M, 2, C, K), k and g (M, C, K) -> Factors, with A None unless `pairs`."""
    groups, parts, exps = mild_and_steep(g), [], []
    for which, mild, resets in groups:
        own = x[which], k[which], g[which]
        *part, e = mild_factors(*own, resets, pairs) if mild else steep_factors(*own, few, low, pairs)
        parts.append(part)
        exps.append(e)
    return Factors(*all_chunks(parts, groups), groups, exps)


def factors_grad(x, k, g, few, low, f, dA, dx_in, dk_out, d_decay):
    """
    Gradients (dx, dk, dg) of `factors` from those of its parts; dA is zero where A is, d_decay (M, 1, K) multiplied by decay
    already. dx_in, dk_out and d_decay may be None.
    """
    parts = []
    for (which, mild, resets), exps in zip(f.groups, f.exps):
        own = [None if t is None else t[which] for t in (x, k, g, f.x_in, f.k_out, dA, dx_in, dk_out, d_decay)]
        parts.append(mild_factors_grad(resets, exps, *own) if mild else steep_factors_grad(few, low, exps, *own))
    return all_chunks(parts, f.groups)


def all_chunks(parts, groups):
    """parts[i]: some tensors for the chunks of groups[i] -> the same for all chunks."""
    if len(groups) == 1:
        return parts[0]
    at = torch.cat([which for which, *_ in groups]).argsort()
    return [None if t[0] is None else torch.cat(t)[at] for t in zip(*parts)]


def between_resets(resets):
    """resets (M, C) -> 1 where two tokens have no reset between them (M, 1, C, C), before the first and from the last on (M, C, 1)."""
    n = resets.cumsum(1)
    same = n.unsqueeze(2) == n.unsqueeze(1)
    return same.unsqueeze(1).float(), (n == 0).unsqueeze(-1).float(), (n == n[:, -1:]).unsqueeze(-1).float()


def mild_factors(x, k, g, resets, pairs):
    """A, x_in, k_out, pre, decay, and the exps that the backward uses again."""
    M, R, C, K = x.shape
    if resets is not None:
        which, gone = resets
        g = g.clone()
        g[which] = g[which].masked_fill(gone.unsqueeze(-1), 0)
    G = g.cumsum(1)
    half = G[:, -1:] / 2
    late = (G - half).exp_()
    early, half = late.reciprocal(), half.exp_()
    x_in, k_mid = x * late.unsqueeze(1), k * early
    A = torch.bmm(x_in.view(M, R * C, K), k_mid.mT).view(M, R, C, C).tril_(-1) if pairs else None
    k_out, decay = k_mid.mul_(half), half.mT
    pre = decay
    if resets is not None:  # nothing passes from before a reset to after it
        same, in_first, in_last = between_resets(gone)
        if pairs:
            A[which] *= same
        x_in[which] *= in_first.unsqueeze(1)
        k_out[which] *= in_last
        decay = decay.clone()
        decay[which] = 0
    return A, x_in, k_out, pre, decay, (late, early, half)


def mild_factors_grad(resets, exps, x, k, g, x_in, k_out, dA, dx_in, dk_out, d_decay):
    """x_in and k_mid carry exp(G) and exp(-G), so x_in dx_in - k_mid dk_mid is the gradient of G, whatever they were used for."""
    M, R, C, K = x.shape
    late, early, half = exps
    if resets is not None:
        which, gone = resets
        same, in_first, in_last = between_resets(gone)
        x_in[which] = x[which] * late[which].unsqueeze(1)
        dA[which] *= same
        if dx_in is not None:
            dx_in[which] *= in_first.unsqueeze(1)
            dk_out[which] *= in_last
    dA, k_mid, x_in = dA.view(M, R * C, C), k * early, x_in.view(M, R * C, K)
    dx_in = torch.bmm(dA, k_mid) if dx_in is None else dx_in.view(M, R * C, K).baddbmm_(dA, k_mid)
    dk_mid = torch.bmm(dA.mT, x_in)
    dG = (x_in * dx_in).view(M, R, C, K).sum(1).addcmul_(k_mid, dk_mid, value=-1)
    dg = from_here(dG)
    if dk_out is not None:  # apart: what k_out leaves to later chunks is large, what it has of the gates before may be e^-50
        dg += d_decay
        dg[:, 1:] += (dk_out * k_out)[:, :-1].cumsum(1)
        dk_mid.addcmul_(dk_out, half)
    if resets is not None:
        dg[which] = dg[which].masked_fill_(gone.unsqueeze(-1), 0)
    return dx_in.view(M, R, C, K).mul_(late.unsqueeze(1)), dk_mid.mul_(early), dg


def steep_factors(x, k, g, few, low, pairs):
    """A, x_in, k_out, pre, decay, and the exps that the backward uses again."""
    start, end = g.cumsum(1).exp_(), to_end(g).exp_()
    A = steep_pairs(x, k, g, few, low) if pairs else None
    return A, x * start.unsqueeze(1), k * end, torch.ones_like(start[:, -1, :, None]), start[:, -1, :, None], (start, end)


def steep_factors_grad(few, low, exps, x, k, g, x_in, k_out, dA, dx_in, dk_out, d_decay):
    dx, dk, dg = steep_pairs_grad(x, k, g, few, low, dA)
    if dx_in is not None:
        start, end = exps
        dg += from_here((x_in * dx_in).sum(1)) + before_here(k_out * dk_out) + d_decay
        dx.addcmul_(dx_in, start.unsqueeze(1))
        dk.addcmul_(dk_out, end)
    return dx, dk, dg


def steep_pairs(x, k, g, few, low):
    M, R, C, K = x.shape
    A = x.new_zeros(M, R, C, C)
    x_b, k_b, g_b = (t.unflatten(-2, (-1, few)) for t in (x, k, g))  # (M, n, few, K)
    diagonal, decay = on_diagonal(A, few), torch.zeros_like(g_b)
    for d in range(1, few):  # pairs of tokens that are d apart; decay (M, n, few - d, K) goes with the later token
        decay = decay[..., :-1, :] + g_b[..., d:, :]
        pairs = (x_b[..., d:, :] * (k_b[..., : few - d, :] * decay.exp()).unsqueeze(1)).sum(-1)
        diagonal.diagonal(-d, -2, -1).copy_(pairs)
    block = few
    while block < C:
        first, second = halves(g, block)
        late = halves(x, block)[1] * second.cumsum(-2).exp_().unsqueeze(1)  # (M, R, n, block, K)
        early = halves(k, block)[0] * to_end(first).exp_()
        below(A, block).copy_(mm(late, early.mT.unsqueeze(1), low))
        block *= 2
    return A


def steep_pairs_grad(x, k, g, few, low, dA):
    dx, dk, dg = torch.zeros_like(x), torch.zeros_like(k), torch.zeros_like(g)
    x_b, k_b, g_b, dx_b, dk_b, dg_b = (t.unflatten(-2, (-1, few)) for t in (x, k, g, dx, dk, dg))
    diagonal, decay = on_diagonal(dA, few), torch.zeros_like(g_b)
    for d in range(1, few):
        decay = decay[..., :-1, :] + g_b[..., d:, :]
        k_now = k_b[..., : few - d, :] * decay.exp()
        d_pairs = diagonal.diagonal(-d, -2, -1).unsqueeze(-1)  # (M, R, n, few - d, 1)
        dx_b[..., d:, :] += d_pairs * k_now.unsqueeze(1)
        dk_now = (d_pairs * x_b[..., d:, :]).sum(1)
        dk_b[..., : few - d, :] += dk_now * decay.exp()
        for i in range(1, d + 1):  # every gate between the two tokens, the later one's included
            dg_b[..., i : few - d + i, :] += dk_now * k_now
    block = few
    while block < x.shape[-2]:
        (first, second), (dg_first, dg_second) = halves(g, block), halves(dg, block)
        (k_first, _), (dk_first, _) = halves(k, block), halves(dk, block)
        (_, x_second), (_, dx_second) = halves(x, block), halves(dx, block)
        late, early = second.cumsum(-2).exp_(), to_end(first).exp_()
        d_across = below(dA, block)
        dx_now = mm(d_across, (k_first * early).unsqueeze(1), low) * late.unsqueeze(1)
        dk_now = mm(d_across.mT, x_second * late.unsqueeze(1), low).sum(1) * early
        dx_second += dx_now
        dk_first += dk_now
        dg_second += from_here((x_second * dx_now).sum(1))
        dg_first += before_here(k_first * dk_now)
        block *= 2
    return dx, dk, dg


def unit_lower_inverse(P, few, low):
    """
    (I + P)^-1 for strictly lower-triangular P (M, C, C), by merging: if X1 and X2 invert the blocks on the diagonal and L stands
    below them, then [[X1, 0], [-X2 L X1, X2]] inverts the whole. As exact as substitution, but all matmuls.
    """
    C = P.shape[-1]
    X, size = P.new_zeros(P.shape), few
    X.diagonal(dim1=-2, dim2=-1).fill_(1)
    A, blocks = on_diagonal(P, few), on_diagonal(X, few)
    for i in range(1, few):  # at most 4 x 4: row by row
        for j in range(i):
            blocks[..., i, : j + 1].addcmul_(A[..., i, j, None], blocks[..., j, : j + 1], value=-1)
    while size < C:
        narrow = P.dtype if size < 16 else low
        for border in range(size, C, 2 * size):
            first, second = slice(border - size, border), slice(border, border + size)
            X[:, second, first] = mm(mm(X[:, second, second], P[:, second, first], narrow), X[:, first, first], narrow).neg_()
        size *= 2
    return X


def side_by_side(q, k, beta, scale):
    """beta k and scale q as (M, 2, C, K), since all that gates do to one they do to the other. Without the copies of torch.stack."""
    M, C, K = k.shape
    x = k.new_empty(M, 2, C, K)
    torch.mul(k, beta, out=x[:, 0])
    torch.mul(q, scale, out=x[:, 1])
    return x


def chunk_forward(q, k, v, g, beta, scale, state, want_state, heads, low):
    """
    q, k, g (M, C, K); v (M, C, V); beta (M, C, 1), all float32 or float64; state (heads, K, V) or None for zeros, `heads` being those of
    all sequences together. Returns o (M, C, V), the final state or None, and for the backward X, Q (M, C, C) and the state that every
    chunk reads (M, K, V), None if there is only one chunk and no state before it.
    """
    M, C, K = q.shape
    V, few = v.shape[-1], chunk_length(C, q.device)[1]
    x = side_by_side(q, k, beta, scale)
    f = factors(x, k, g, few, low)
    X, Q = unit_lower_inverse(f.A[:, 0], few, low).to(low), f.A[:, 1].to(low, copy=True)
    Q.diagonal(dim1=-2, dim2=-1).copy_((x[:, 1] * k).sum(-1))
    new = beta * v
    if state is None and M == heads:
        new = mm(X, new, low)
        return mm(Q, new, low), torch.bmm(f.k_out.mT, new) if want_state else None, X, Q, None
    state = q.new_zeros(heads, K, V) if state is None else state
    k_in, q_in, k_out, S = f.x_in[:, 0].to(low), f.x_in[:, 1], f.k_out.mT.to(low), q.new_empty(M, K, V)
    for a in range(0, M, heads):
        b = a + heads
        read = torch.mul(f.pre[a:b], state, out=S[a:b])
        new[a:b] = mm(X[a:b], addmm_(new[a:b], k_in[a:b], read, low, alpha=-1), low)
        state = addmm_(f.decay[a:b] * read, k_out[a:b], new[a:b], low)
    return addmm_(mm(Q.to(v.dtype), new, low), q_in, S, low), state, X, Q, S


def chunk_backward(q, k, v, g, beta, scale, heads, low, X, Q, S, do, d_state):
    """
    Gradients of `chunk_forward` in q, k, v, g, beta and the initial state (None if S is), from do (M, C, V) and d_state (heads, K, V)
    or None for zeros. With dR the gradient of R = beta (v - (k e^G) S), which X was multiplied by:

        d_new = Q^T do + k_out dS'        dR = X^T d_new        dS = decay dS' + q_in^T do - k_in^T dR        last chunk to first
        d(beta P) = -dR new^T below the diagonal        dQ = do new^T        and the rest follows from `factors_grad`

    because X = (I + beta P)^-1 gives dX = X^T (..) X^T: the gradient of beta P is -X^T (d_new R^T) X^T = -dR new^T.
    """
    M, C, K = q.shape
    V, few = v.shape[-1], chunk_length(C, q.device)[1]
    x = side_by_side(q, k, beta, scale)
    f = factors(x, k, g, few, low, pairs=False)
    X, Q = X.to(v.dtype), Q.to(v.dtype)
    new = beta * v  # becomes what it was in the forward
    if S is not None:
        addmm_(new, f.x_in[:, 0], S, low, alpha=-1)
    new = mm(X, new, low)
    dR = mm(Q.mT, do, low)  # becomes the gradient of what X was multiplied by

    dx_in = dk_out = d_decay = None
    if S is None:
        if d_state is not None:
            addmm_(dR, f.k_out, d_state, low)
            dk_out, dx_in, d_decay = mm(new, d_state.mT, low), torch.zeros_like(x), torch.zeros_like(k[:, :1])
        d_first, dR = None, mm(X.mT, dR, low)
    else:  # from the last chunk to the first; d_state is the gradient of the state that leaves a chunk
        k_in, k_out, Xt, dS = f.x_in[:, 0].mT.to(low), f.k_out.to(low), X.mT.to(low), torch.empty_like(S)
        d_read = mm(f.x_in[:, 1].mT, do, low)
        d_state = q.new_zeros(heads, K, V) if d_state is None else d_state
        for a in range(M - heads, -1, -heads):
            b = a + heads
            dS[a:b] = d_state
            dR[a:b] = mm(Xt[a:b], addmm_(dR[a:b], k_out[a:b], d_state, low), low)
            d_state = addmm_(d_read[a:b].addcmul_(f.decay[a:b], d_state), k_in[a:b], dR[a:b], low, alpha=-1).mul_(f.pre[a:b])
        d_first = d_state
    rows = torch.cat((-dR, do), 1)  # (M, 2C, V): the factors that meet the same other ones
    if S is not None:
        dx_in, dk_out = mm(rows, S.mT, low).view(M, 2, C, K), mm(new, dS.mT, low)
        d_decay = (dS.mul_(S) @ torch.ones_like(S[0, 0, :, None])).mul_(f.decay).mT

    dA = mm(rows, new.mT, low).view(M, 2, C, C).tril_(-1)
    dx, dk, dg = factors_grad(x, k, g, few, low, f, dA, dx_in, dk_out, d_decay)
    d_bk, dq = dx.unbind(1)
    # Q's diagonal has no decay, and is by far its largest part where gates are strong: apart from the rest, it cannot spoil dg.
    diagonal = (do * new).sum(-1, keepdim=True)
    dq.addcmul_(diagonal, k)
    dk.addcmul_(diagonal, x[:, 1])
    d_beta = (dR * v).sum(-1, keepdim=True) + (d_bk * k).sum(-1, keepdim=True)
    return dq.mul_(scale), dk.addcmul_(d_bk, beta), dR.mul_(beta), dg, d_beta, d_first


# -----------------------------------------------------------------------------
# 3. the operator
#
# Registered with torch.library, so that torch.compile sees one opaque operation with known shapes instead of tracing into loops
# and choices that depend on data. The backward is an operation of its own for the same reason.
# PyTorch has one table of operators for the whole process. Their names follow the module's, so that a changed
# copy of this file can be imported beside it.

OPERATORS = "smol_llm_" + re.sub(r"\W", "_", __name__)


def precision(q, k, v, g, beta):
    """
    (what sums and states are in, what the factors of matrix products are rounded to). bfloat16 is too coarse for them: with beta = 2 and
    no decay, nothing forgets their rounding. So it is multiplied as float32, on tensor cores as TF32 (`as_tf32`). float16 is fine
    enough from 64 channels on; with fewer, thousands of keys are more alike, and what tensor cores would save is little (LOG.md).
    """
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype, g.dtype, beta.dtype) else torch.float32
    return wide, torch.float16 if v.is_cuda and v.dtype == torch.float16 and q.shape[-1] >= 64 else wide


def only_reflects(g, beta):
    """
    Whether many tokens of one head have beta near 2 and forget next to nothing. Each then reflects the state along its key, and where keys
    are alike, reflections must cancel: that the length of a key is rounded adds up over all of them, and float32 is too coarse (LOG.md).
    """
    return bool(beta.amax() > 1.9) and bool(((beta > 1.9) & (g.amax(-1) > -0.2)).sum(1).amax() >= CHUNK // 2)


@contextlib.contextmanager
def as_tf32(v):
    """float32 products on a GPU use tensor cores here if v is bfloat16, whatever the process wants elsewhere."""
    if not (v.is_cuda and v.dtype == torch.bfloat16):
        yield
        return
    settings = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(settings, "fp32_precision") else ("allow_tf32", True)  # PyTorch before 2.9
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


def saved_chunks(B, T, C, cu_seqlens):
    """Chunks of which something is kept for the backward. Packed sequences may need fewer: how many is not known from the shapes."""
    return B * -(-T // C) if cu_seqlens is None else T // C + len(cu_seqlens) - 1


def known_backend(backend):
    """backend, or what the environment variable has for "auto". ValueError if there is no such."""
    backend = BACKEND if backend == "auto" else backend
    if backend not in ("auto", "recurrent", "chunk", "triton"):
        what = "the environment variable KDA_BACKEND" if backend == BACKEND else "backend"
        raise ValueError(f"{what} must be 'auto', 'recurrent', 'chunk' or 'triton', got {backend!r}")
    return backend


@functools.cache
def choose_backend(device, dtype):
    """What backend="auto" means for queries of this torch.device and dtype: (its name, why)."""
    if BACKEND != "auto":
        return BACKEND, "KDA_BACKEND says so"
    if device.type != "cuda":
        return "chunk", "it is the fastest there is without a GPU"
    if dtype == torch.float64:
        return "chunk", "the kernels have no float64"
    if kda_triton.triton is None:
        return "chunk", "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    card = f"{torch.cuda.get_device_name(device)} (capability {capability[0]}.{capability[1]})"
    if capability >= (8, 0):
        return "triton", f"Triton knows this {card}"
    if capability < (7, 5):
        return "chunk", f"Triton has no tensor cores for this {card}"
    if dtype != torch.float16:
        return "chunk", f"on this {card} only float16 reaches tensor cores"
    if kda_triton.tensor_cores_on_turing():
        return "triton", f"Triton {kda_triton.triton.__version__} still compiles for the tensor cores of this {card}"
    return "chunk", f"Triton {kda_triton.triton.__version__} no longer compiles for the tensor cores of this {card}, cuBLAS does"


def resolve(backend, q, v):
    """The backend that runs for these tensors. ValueError if it cannot."""
    if backend == "auto":
        backend, _ = choose_backend(q.device, q.dtype)
        return "chunk" if backend == "triton" and max(q.shape[-1], v.shape[-1]) > 128 else backend
    if backend == "triton":
        if kda_triton.triton is None:
            raise ValueError("backend='triton', but Triton is not installed: use 'chunk'")
        if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"backend='triton' needs a GPU, and q is on {q.device.type}: use 'chunk', or TRITON_INTERPRET=1 for tests")
        if q.dtype == torch.float64 or max(q.shape[-1], v.shape[-1]) > 128:
            what = f"q is {q.dtype} with {q.shape[-1]} channels, v has {v.shape[-1]}"
            raise ValueError(f"{what}: backend='triton' has no float64, and at most 128 channels")
    return backend


@functools.lru_cache(maxsize=32)
def equal_sequences(B, T, device):
    """The kernels' table of chunks for B sequences of T tokens, kept: every layer needs the same."""
    return kda_triton.chunk_table(torch.arange(B + 1) * T).to(device)


def kernel_table(B, T, device, cu_seqlens):
    if cu_seqlens is None:
        return equal_sequences(B, T, device)
    return kda_triton.chunk_table(torch.tensor(sequence_bounds(cu_seqlens, T))).to(device)


@torch.library.custom_op(f"{OPERATORS}::kda", mutates_args=())
def kda_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, want_state: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> o, the final state (empty unless `want_state`), and for the backward X, Q and the states that chunks read (or empty)."""
    B, T, H, K = q.shape
    if resolve(backend, q, v) == "triton":
        table = kernel_table(B, T, q.device, cu_seqlens)
        o, final, (X, Q, S) = kda_triton.triton_forward(q.to(v.dtype), k.to(v.dtype), v, g, beta, scale, initial_state, table)
        S = F.pad(S, (0, 0, 0, 0, 0, 0, 0, saved_chunks(B, T, CHUNK, cu_seqlens) - len(S))) if cu_seqlens is not None else S
        return o, final if want_state else final.new_empty(0), X, Q, S
    return chunk_op(q, k, v, g, beta, initial_state, cu_seqlens, scale, want_state)


def parts_of(q, v, C, cu_seqlens):
    """
    What is worked through one after the other: [(tokens, sequences, chunks)]. t[tokens] is (b, L, H, D) of the inputs, state[sequences] are
    the b states that go with them, X[chunks] is what is kept for the backward. Packed sequences are sorted by their number of chunks; where
    they end before others of their part, there is padding, token T. Otherwise a part is a stretch of tokens of all sequences: on
    a CPU, where a tensor from 32 MB on is fresh pages from the system every time, long inputs have several.
    """
    B, T, H, K = q.shape
    if cu_seqlens is None:
        n = max(1, AT_ONCE // (B * C * H * max(K, v.shape[-1]))) if q.device.type == "cpu" else -(-T // C)
        starts = range(0, T, n * C)
        return [((slice(None), slice(a, min(a + n * C, T))), slice(None), slice(a // C * B * H, (a // C + n) * B * H)) for a in starts]
    bounds, parts, first = torch.tensor(sequence_bounds(cu_seqlens, T)), [], 0
    chunks = (bounds.diff() + C - 1) // C
    for n in chunks[chunks > 0].unique().tolist():
        sequences = (chunks == n).nonzero().squeeze(1)
        tokens = bounds[sequences, None] + torch.arange(n * C)
        tokens[tokens >= bounds[sequences + 1, None]] = T
        own = slice(first, first + len(sequences) * n * H)
        parts.append(((0, tokens.to(q.device)), sequences.to(q.device), own))
        first = own.stop
    return parts


def with_padding(t, cu_seqlens):
    """(B, T, H, D), and after packed sequences a token of zeros."""
    return t if cu_seqlens is None else F.pad(t, (0, 0, 0, 0, 0, 1))


def put_together(pieces, parts, T, cu_seqlens):
    """pieces[i] (b, L, H, D), what parts[i] made of its tokens -> (B, T, H, D)."""
    if cu_seqlens is None:
        return pieces[0] if len(parts) == 1 else torch.cat(pieces, 1)
    whole = pieces[0].new_empty(1, T + 1, *pieces[0].shape[2:])
    for (tokens, *_), piece in zip(parts, pieces):
        whole[tokens] = piece
    return whole[:, :T]


def chunk_op(q, k, v, g, beta, initial_state, cu_seqlens, scale, want_state):
    """`kda_op` in the chunked form."""
    B, T, H, K = q.shape
    V, (wide, low), (C, _) = v.shape[-1], precision(q, k, v, g, beta), chunk_length(T, q.device)
    parts, outputs, saved = parts_of(q, v, C, cu_seqlens), [], []
    inputs = [with_padding(t, cu_seqlens) for t in (q, k, v, g, beta.unsqueeze(-1))]
    nothing_before = initial_state is None and cu_seqlens is None and T <= C  # then no chunk reads a state, and S is empty
    state = None if initial_state is None else initial_state.to(wide, copy=True)
    if state is None and (want_state or not nothing_before):
        state = q.new_zeros(B if cu_seqlens is None else len(cu_seqlens) - 1, H, K, V, dtype=wide)
    with torch.autocast(q.device.type, enabled=False), as_tf32(v):
        for tokens, sequences, _ in parts:
            part = [t[tokens].to(wide) for t in inputs]
            b, L = part[0].shape[:2]
            before = None if nothing_before else state[sequences].flatten(0, 1)
            o, after, X, Q, S = chunk_forward(*(to_chunks(t, C) for t in part), scale, before, state is not None, b * H, low)
            if state is not None:
                state[sequences] = after.unflatten(0, (b, H))
            outputs.append(from_chunks(o, b, L, H).to(v.dtype))
            saved.append((X, Q, q.new_empty(0, dtype=wide) if S is None else S))
    o = put_together(outputs, parts, T, cu_seqlens).contiguous()
    X, Q, S = saved[0] if len(saved) == 1 else map(torch.cat, zip(*saved))
    if cu_seqlens is not None:
        X, Q, S = (F.pad(t, (0, 0, 0, 0, 0, saved_chunks(B, T, C, cu_seqlens) * H - len(t))) for t in (X, Q, S))
    return o, state if want_state else q.new_empty(0, dtype=wide), X, Q, S


@kda_op.register_fake
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, want_state, backend):
    B, T, H, K = q.shape
    V, N = v.shape[-1], B if cu_seqlens is None else len(cu_seqlens) - 1
    wide, low = precision(q, k, v, g, beta)
    final = q.new_empty((N, H, K, V) if want_state else (0,), dtype=wide)
    if resolve(backend, q, v) == "triton":
        X = v.new_empty(B, T, H, CHUNK, dtype=kda_triton.low_dtype(v.dtype))
        return v.new_empty(v.shape), final, X, X.new_empty(X.shape), X.new_empty(saved_chunks(B, T, CHUNK, cu_seqlens), H, K, V)
    C, _ = chunk_length(T, q.device)
    M = saved_chunks(B, T, C, cu_seqlens) * H
    X = q.new_empty(M, C, C, dtype=low)
    S = q.new_empty((0,) if initial_state is None and cu_seqlens is None and T <= C else (M, K, V), dtype=wide)
    return v.new_empty(v.shape), final, X, torch.empty_like(X), S


@torch.library.custom_op(f"{OPERATORS}::kda_backward", mutates_args=())
def kda_backward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, backend: str, X: torch.Tensor, Q: torch.Tensor, S: torch.Tensor,
    do: torch.Tensor, d_final: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> gradients in q, k, v, g, beta and the initial state (empty if there was none)."""
    B, T, H, K = q.shape
    if resolve(backend, q, v) == "triton":
        table = kernel_table(B, T, q.device, cu_seqlens)
        saved = X, Q, S[: len(table.start)]
        inputs = q.to(v.dtype), k.to(v.dtype), v, g, beta, scale, initial_state, table
        *grads, d_state = kda_triton.triton_backward(*inputs, saved, do, d_final)
        d_state = q.new_empty(0) if initial_state is None else d_state.to(initial_state.dtype)
        return *(d.to(t.dtype) for d, t in zip(grads, (q, k, v, g, beta))), d_state
    return chunk_backward_op(q, k, v, g, beta, initial_state, cu_seqlens, scale, X, Q, S, do, d_final)


def chunk_backward_op(q, k, v, g, beta, initial_state, cu_seqlens, scale, X, Q, S, do, d_final):
    """`kda_backward_op` in the chunked form."""
    B, T, H, K = q.shape
    (wide, low), (C, _) = precision(q, k, v, g, beta), chunk_length(T, q.device)
    parts, pieces = parts_of(q, v, C, cu_seqlens), []
    *inputs, do = (with_padding(t, cu_seqlens) for t in (q, k, v, g, beta.unsqueeze(-1), do))
    d_state = None if d_final is None else d_final.to(wide, copy=True)
    if d_state is None and S.numel():
        d_state = q.new_zeros(B if cu_seqlens is None else len(cu_seqlens) - 1, H, K, v.shape[-1], dtype=wide)
    with torch.autocast(q.device.type, enabled=False), as_tf32(v):
        for tokens, sequences, own in reversed(parts):
            *part, d_o = (t[tokens].to(wide) for t in (*inputs, do))
            b, L = d_o.shape[:2]
            d_after = None if d_state is None else d_state[sequences].flatten(0, 1)
            if low == torch.float16:
                # A scaled loss makes large gradients, and the backward is linear in them: near one, float16 neither overflows nor vanishes.
                size = d_o.abs().amax()
                size = (size if d_after is None else torch.maximum(size, d_after.abs().amax())).clamp(min=1e-30)
                d_o, d_after = d_o / size, None if d_after is None else d_after / size
            saved = X[own], Q[own], S[own] if S.numel() else None
            *grads, d_before = chunk_backward(*(to_chunks(t, C) for t in part), scale, b * H, low, *saved, to_chunks(d_o, C), d_after)
            if low == torch.float16:
                grads, d_before = [t * size for t in grads], None if d_before is None else d_before * size
            if d_before is not None:
                d_state[sequences] = d_before.unflatten(0, (b, H))
            pieces.append([from_chunks(d, b, L, H).to(t.dtype) for d, t in zip(grads, inputs)])
    grads = [put_together(d, parts, T, cu_seqlens) for d in zip(*reversed(pieces))]
    grads[4] = grads[4].squeeze(-1)
    d_state = q.new_empty(0) if initial_state is None else d_state.to(initial_state.dtype)
    return *(t.contiguous() for t in grads), d_state


@kda_backward_op.register_fake
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, backend, X, Q, S, do, d_final):
    d_state = q.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return *(t.new_empty(t.shape) for t in (q, k, v, g, beta)), d_state


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.scale, ctx.want_state, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def kda_gradients(ctx, do, d_final, *_):
    tensors = ctx.saved_tensors
    do = torch.zeros_like(tensors[2]) if do is None else do
    grads = kda_backward_op(*tensors[:7], ctx.scale, ctx.backend, *tensors[7:], do, d_final if ctx.want_state else None)
    return *grads[:5], None if tensors[5] is None else grads[5], None, None, None, None


kda_op.register_autograd(kda_gradients, setup_context=save_for_backward)


def kda(q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, backend="auto"):
    """
    Kimi Delta Attention with precomputed gates, differentiable in every tensor. Arguments as in flash-linear-attention's chunk_kda.

    q, k (B, T, H, K)    queries and keys; keys are expected to have unit length (the layer normalises both)
    v    (B, T, H, V)    values
    g    (B, T, H, K)    log-decay, in [-inf, 0]; -inf forgets a channel completely before token t is written
    beta (B, T, H)       how much of the old value is replaced, in [0, 1] (up to 2 is allowed: a reflection)
    scale                multiplies q, default K ** -0.5
    initial_state        (N, H, K, V) or None for zero; N is B, or the number of packed sequences
    cu_seqlens           (N + 1,) integers from 0 to T, B = 1: sequence n is made of the tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1
    backend              "recurrent" (the definition), "chunk" (matrix products), "triton", or "auto" (see `choose_backend`)

    On a CPU, outside torch.compile, float32 inputs that `only_reflects` recognises are computed in float64.

    Returns o (B, T, H, V) in v's dtype, and the final state (N, H, K, V) in float32 (float64 for float64 inputs), or None
    unless output_final_state. Raises ValueError naming the argument whose shape or dtype does not fit.
    """
    if q.ndim != 4:
        raise ValueError(f"q must be (B, T, H, K), got shape {tuple(q.shape)}")
    B, T, H, K = q.shape
    for name, t, shape in (("k", k, (B, T, H, K)), ("g", g, (B, T, H, K)), ("beta", beta, (B, T, H)), ("v", v, (B, T, H, *v.shape[-1:]))):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {shape} to go with q {tuple(q.shape)}")
    for name, t in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta), ("initial_state", initial_state)):
        if t is not None and not t.is_floating_point():
            raise ValueError(f"{name} has dtype {t.dtype}, expected a floating point type")
    V, N = v.shape[-1], B
    if cu_seqlens is not None:
        if B != 1 or cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
            got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, B = {B}"
            raise ValueError(f"cu_seqlens must be (N + 1,) integers, and go with B = 1; got {got}")
        N = len(cu_seqlens) - 1
    if initial_state is not None and tuple(initial_state.shape) != (N, H, K, V):
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}, expected {(N, H, K, V)}")
    backend = known_backend(backend)
    scale = K**-0.5 if scale is None else scale
    wide, _ = precision(q, k, v, g, beta)
    looks = q.device.type == "cpu" and backend != "triton" and not torch.compiler.is_compiling()  # looking makes a GPU wait
    if looks and v.dtype == torch.float32 and T > CHUNK // 2 and q.numel() and only_reflects(g, beta):
        beta = beta.double()  # then everything is computed in float64
    if backend != "recurrent" and q.numel() and V and (T > 1 or backend != "auto"):
        o, state, *_ = kda_op(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, backend)
        return o, state.to(wide) if output_final_state else None
    with torch.autocast(q.device.type, enabled=False):
        dtype, _ = precision(q, k, v, g, beta)
        inputs = [t.to(dtype) for t in (q, k, v, g, beta)]
        state = q.new_zeros(N, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        if cu_seqlens is None:
            o, state = recurrent_kda(*inputs, scale, state)
        else:
            bounds = sequence_bounds(cu_seqlens, T)
            parts = []
            for n, (a, b) in enumerate(zip(bounds, bounds[1:])):
                parts.append(recurrent_kda(*(t[:, a:b] for t in inputs), scale, state[n : n + 1]))
            o, state = torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])
    return o.to(v.dtype), state.to(wide) if output_final_state else None


# -----------------------------------------------------------------------------
# 4. the layer


class ShortConvFunction(torch.autograd.Function):
    """
    Causal depthwise convolution as W shifted multiply-adds, written out because autograd through them, or through
    a grouped conv1d, is slower on a CPU.
    """

    @staticmethod
    def forward(ctx, x, taps, reach, past):
        """
        x (B, past + T, D), the first `past` tokens only to look back at; what is before x is zero. taps (W, D) contiguous; reach (B, T, G)
        how many tokens back each may look, in G groups of channels, or None -> (B, T, D).
        """
        ctx.save_for_backward(x, taps, reach)
        ctx.past = past
        y = x[:, past:] * taps[-1]
        for n, tap in enumerate(taps[:-1].flip(0), 1):
            by, seen = n_back(n, past, y.shape[1])
            y[:, by].addcmul_(within(x[:, seen], reach, n), tap)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, taps, reach = ctx.saved_tensors
        dx, d_taps = torch.empty_like(x), torch.empty_like(taps)
        dx[:, : ctx.past] = 0
        torch.mul(dy, taps[-1], out=dx[:, ctx.past :])
        for n, tap in enumerate(taps.flip(0)):
            by, seen = n_back(n, ctx.past, dy.shape[1])
            d = within(dy[:, by], reach, n)
            if n:
                dx[:, seen].addcmul_(d, tap)
            d_taps[-1 - n] = (d * x[:, seen]).sum((0, 1))
        return dx, d_taps, None, None


def n_back(n, past, T):
    """Slices: which of T tokens have an n-th before them, and where those are among the past and the T."""
    first = min(max(0, n - past), T)
    return slice(first, None), slice(first + past - n, past + T - n)


def within(x, reach, n):
    """x (B, t, D), the last of T tokens, zero where the n-th before is out of reach (B, T, G); None: nowhere."""
    if reach is None:
        return x
    reach = reach[:, reach.shape[1] - x.shape[1] :]
    return (x.unflatten(-1, (reach.shape[-1], -1)) * (reach >= n).unsqueeze(-1)).flatten(-2)


class Pick(torch.autograd.Function):
    """x (N, K)[rows], every row once: back undoes it, and so does the backward, without adding anything up."""

    @staticmethod
    def forward(ctx, x, rows, back):
        ctx.save_for_backward(rows, back)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy):
        rows, back = ctx.saved_tensors
        return dy.contiguous().index_select(0, back), None, None


def reorder(x, order, back):
    """x (B, T, n * H, K): of each head its token order[b, t, h] as the t-th; order and back (B, T, H) undo each other."""
    B, T, H = order.shape
    n, K = x.shape[2] // H, x.shape[3]
    first, part, head = (torch.arange(m, device=x.device) for m in (B, n, H))
    rows, back = ((((first[:, None, None] * T + o).unsqueeze(2) * n + part[:, None]) * H + head).flatten() for o in (order, back))
    return Pick.apply(x.reshape(-1, K), rows, back).view(B, T, n * H, K)


def widened(t):
    """In float32 where t is in less, else as it is: a float64 layer stays in float64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class ShortConv(nn.Module):
    """The taps of a convolution (D, 1, width): a Conv1d's shape, so that checkpoints of FLA load. The layer applies three at once."""

    def __init__(self, dim, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, width).uniform_(-(width**-0.5), width**-0.5))


class UnitLength(torch.autograd.Function):
    """
    x (..., K) divided by its length over K, computed in float32 at least, in x's dtype. Its backward is two
    lines, autograd's twelve calls.
    """

    @staticmethod
    def forward(ctx, x):
        wide = widened(x)
        one_over = torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
        y = (wide * one_over).to(x.dtype)
        ctx.save_for_backward(y, one_over)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y, one_over = ctx.saved_tensors
        along = (y * dy).sum(-1, keepdim=True, dtype=one_over.dtype)
        return torch.addcmul(widened(dy), y, along, value=-1).mul_(one_over).to(dy.dtype)


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
        """What the layer remembers before the first token: the convolution's last inputs (B, W - 1, 3 * H * K), a state (B, H, K, K)."""
        H, K, W = self.num_heads, self.head_dim, self.q_conv1d.weight.shape[-1]
        new = self.A_log.new_zeros
        return new(batch_size, W - 1, 3 * H * K), widened(new(batch_size, H, K, K))

    def forward(self, x, cache=None, starts=None, lines=None):
        """
        x (B, T, hidden_size) -> y of the same shape, and the cache after the last token: None when none came in.
        Training passes no cache; prefill and decoding pass `empty_cache` or what the previous call returned, which is used up:
        its state is updated in place where no gradient is wanted.
        starts (B, T) bool: tokens at which a new document begins, that knows nothing of what was before. None: none.
        lines: None, or (order, back, starts), each (B, T, H), for heads that do not all read from the first token to the last: head h reads
        token order[b, t, h] as its t-th (back is the inverse), and there are the starts of what it reads. With neither cache nor starts.
        """
        B, T, _ = x.shape
        H, K, W = self.num_heads, self.head_dim, self.q_conv1d.weight.shape[-1]
        tail, state = (None, None) if cache is None else cache
        # One product for nearly all that x is multiplied by, one convolution for q, k and v: a fraction of the calls, and x is read once.
        # b_proj stays apart: with its few columns, rows would no longer be multiples of 16 bytes, which tensor cores want. For one token,
        # putting the weights together would cost more than multiplying by them.
        of_x = (self.q_proj, self.k_proj, self.v_proj, self.f_proj[0], self.g_proj[0])
        if T > 1:
            projected = F.linear(x, torch.cat([m.weight for m in of_x]))
        else:
            projected = torch.cat([m(x) for m in of_x], -1)
        qkv, f, gate = projected.split((3 * H * K, K, K), -1)
        taps = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight]).squeeze(1)
        taps = taps.t().contiguous().to(qkv.dtype)  # (3HK, W) would be read with a stride
        f, beta = self.f_proj[1](f).view(B, T, H, K), self.b_proj(x)
        if lines is not None:
            order, back, starts = lines
            qkv = reorder(qkv.unflatten(-1, (3 * H, K)), order, back).flatten(2)
            f, beta = reorder(f, order, back), beta.gather(1, order)
        reach = None
        if starts is not None:
            starts = starts.view(B, T, -1)
            t = torch.arange(T, device=x.device)[:, None]
            reach = (t - torch.where(starts, t, -W).cummax(1).values).repeat(1, 1, 3)  # q, k and v alike
        past = 0
        if cache is not None:
            past, qkv = W - 1, torch.cat([tail.to(qkv.dtype), qkv], 1)
            tail = qkv[:, T:]
            if starts is not None:  # what a document's next tokens may look back to ends where it began
                tail = tail * (torch.arange(W - 2, -1, -1, device=x.device)[:, None] <= reach[:, -1:, :1])
        qk, v = F.silu(ShortConvFunction.apply(qkv, taps, reach, past)).view(B, T, 3 * H, K).split([2 * H, H], 2)
        q, k = UnitLength.apply(qk).chunk(2, 2)
        g = -widened(self.A_log).exp()[:, None] * F.softplus(widened(f) + widened(self.dt_bias).view(H, K))
        beta = widened(beta).sigmoid()
        if starts is not None:
            g = g.masked_fill(starts.unsqueeze(-1), -math.inf)
        if T == 1 and cache is not None and not torch.is_grad_enabled():
            o = kda_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state).unsqueeze(1)
        else:
            o, state = kda(q, k, v, g, beta, initial_state=state, output_final_state=cache is not None)
        o = o if lines is None else reorder(o, back, order)
        o = self.o_norm(o.to(x.dtype), self.g_proj[1](gate).view(B, T, H, K))
        return self.o_proj(o.flatten(2)), None if cache is None else (tail, state)


# -----------------------------------------------------------------------------
# and whether all of it is right here


def check():
    """What was chosen here and why, and whether it agrees with the recurrence."""
    known_backend("auto")  # a misspelt one is an error before anything is said
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16):
        backend, why = choose_backend(device, dtype)
        print(f"backend on {device} for {str(dtype).removeprefix('torch.')}: {backend}, because {why}")
    print("against the float64 recurrence, relative error of outputs and gradients:")
    torch.manual_seed(0)
    for name, gate in (("mild gates", 0.1), ("strong gates", 8.0), ("resets", None)):
        q, k, v = torch.randn(3, 1, 70, 1, 32, device=device).unbind(0)  # a chunk and a bit
        k, g, beta = F.normalize(k, dim=-1), -torch.rand(1, 70, 1, 32, device=device) * (gate or 0.1), torch.rand(1, 70, 1, device=device)
        if gate is None:
            g = g.masked_fill(torch.rand_like(g) < 0.05, -math.inf)
        results = []
        for dtype, how in ((torch.float64, "recurrent"), (torch.float32, "auto")):
            inputs = [t.to(dtype).requires_grad_() for t in (q, k, v, g, beta)]
            o, _ = kda(*inputs, backend=how)
            results.append([o, *torch.autograd.grad(o.square().sum(), inputs)])
        errors = [((got - want).norm() / want.norm()).item() for want, got in zip(*results)]
        print(f"  {name:12s} o {errors[0]:.1e}, " + ", ".join(f"d{n} {e:.1e}" for n, e in zip(("q", "k", "v", "g", "beta"), errors[1:])))
        if not max(errors) < 1e-4:
            sys.exit(f"error: {backend} is wrong on this machine: choose another one with KDA_BACKEND=chunk or KDA_BACKEND=recurrent")


if __name__ == "__main__":
    import configurator  # here, so that the file itself needs no other than kda_triton.py

    configurator.help_only(__doc__)
    try:
        check()
    except ValueError as e:
        sys.exit(f"error: {e}")
