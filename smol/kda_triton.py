"""
Triton kernels for the chunked form of Kimi Delta Attention: forward, backward, and one decoding step. kda.py explains the mathematics.

One program works on one chunk of 64 tokens of one head, except where the state has to pass from chunk to chunk: there one program
walks through one sequence. Tokens of all sequences stand back to back; a table says where chunks start and end, so a batch of equal
sequences and a row of packed ones are the same thing. With S the state at a chunk's start, and letters as in kda.py:

    forward     pairs     Q and X = (I + beta P)^-1
                prepare   U = X beta v,  W = X beta k e^G,  qG = scale q e^G,  kE = k e^(sum of g to the chunk's end)
                states    new = U - W S,  S <- e^(G_C) S + kE^T new         sequential
                outputs   o = qG S + Q new
    backward    prepare   again: only X, Q and S are kept
                renew     new again, but in parallel this time, S being known;  Q^T dO
                dstates   dnew = Q^T dO + kE dS,  dS <- e^(G_C) dS + qG^T dO - W^T dnew         sequential
                dsolve    dR = X^T dnew, the gradient of beta (v - k e^G S);  gradients of P, Q, v
                dpairs    gradients of q, k, g, beta through P and Q
                dinputs   and through the states

Tensor cores take what they multiply as float16, for bfloat16 inputs too: those lose nothing by it (`low_dtype`). Where beta = 2 and
nothing decays, no rounding is ever forgotten; the inverse X needs more bits than float16 has, so it is made and kept as two of them.

`python -m pytest tests/test_kda_triton.py` runs all of it on a CPU, in Triton's interpreter, and compiles it for GPUs that are not there.
Before this: kda.py.
"""

import functools
import math
import os
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: kda.py has other backends
    triton = None
if os.environ.get("TRITON_INTERPRET") == "1" and triton is not None:
    from triton.runtime.interpreter import InterpreterBuilder

    if not hasattr(InterpreterBuilder, "get_int1_ty"):  # Triton 3.2 forgot it, and cannot interpret `flag & tensor` without
        InterpreterBuilder.get_int1_ty = lambda self: tl.int1

CHUNK = 64


class ChunkTable(NamedTuple):
    start: torch.Tensor  # (n_chunks,) int32: first token of each chunk, counted over all sequences
    end: torch.Tensor  # (n_chunks,) int32: one past its last token
    first: torch.Tensor  # (N + 1,) int32: first chunk of each sequence

    def to(self, device):
        return ChunkTable(*(t.to(device) for t in self))


def chunk_table(cu_seqlens, C=CHUNK):
    """
    cu_seqlens (N + 1,), integers, on the CPU or a GPU: where sequences start, and the end of the last. Returns a ChunkTable on the
    same device. On a GPU, this waits for it (the number of chunks is a shape): make the table once per batch, not once per layer.
    """
    cu = cu_seqlens.long()
    count = (cu.diff() + C - 1) // C
    first = torch.cat([cu.new_zeros(1), count.cumsum(0)])
    sequence = torch.repeat_interleave(torch.arange(len(count), device=cu.device), count)
    start = cu[sequence] + C * (torch.arange(len(sequence), device=cu.device) - first[sequence])
    end = torch.minimum(start + C, cu[sequence + 1])
    return ChunkTable(start.int(), end.int(), first.int())


# Launch parameters by compute capability: (channels of K or V per step, warps, pipeline stages), chosen so that nothing spills and
# shared memory stays under 64 KB on a T4 (7.5) and 99 KB on an RTX 30, 40 or 50 (8.6, 8.9, 12.0); tests/test_kda_triton.py looks at both.
# A capability that is not in the table uses the next lower one. float32 inputs, and K above 128, take half the channels, no pipelining,
# and on 10.x, whose tensor cores serve all warps at once, eight warps; elsewhere some registers spill even so.
LAUNCH = {
    #        pairs       prepare     states      outputs     renew       dstates     dsolve      dpairs      dinputs
    (7, 5): ((16, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1), (16, 4, 1), (16, 4, 1)),
    (8, 0): ((16, 4, 1), (32, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 2), (16, 4, 2), (32, 4, 2), (16, 8, 1), (16, 4, 2)),
    (8, 6): ((16, 4, 1), (32, 4, 1), (32, 4, 2), (32, 4, 1), (32, 4, 1), (16, 4, 2), (32, 4, 1), (16, 4, 1), (16, 4, 1)),
    (9, 0): ((16, 4, 1), (32, 4, 1), (32, 4, 2), (64, 4, 2), (64, 4, 2), (32, 4, 2), (32, 4, 2), (16, 4, 1), (16, 4, 2)),
    (10, 0): ((16, 4, 1), (32, 4, 1), (32, 4, 2), (64, 4, 2), (64, 4, 2), (32, 4, 2), (32, 4, 2), (32, 8, 1), (16, 4, 2)),
    (12, 0): ((16, 4, 1), (32, 4, 1), (32, 4, 2), (32, 4, 1), (32, 4, 1), (16, 4, 2), (32, 4, 1), (16, 4, 1), (16, 4, 1)),
}
KERNELS = ("pairs", "prepare", "states", "outputs", "renew", "dstates", "dsolve", "dpairs", "dinputs")


def padded(width):
    """Channels are padded to a power of two that a tensor core can take."""
    return max(16, 1 << (width - 1).bit_length())


def launch_constants(capability, dtype, H, K, V):
    """
    Constants of the kernels that follow from sizes and hardware. float32 inputs are multiplied as three tf32 products, which are as good
    as one in float32. Otherwise the inverse is made of bfloat16 halves (`add_product`); Turing has no bfloat16, and takes float16 ones.
    Blocks of 2^LEVEL tokens that forget less than exp(-MILD) take a short way in `pairs`, with factors up to exp(MILD / 2). bfloat16
    and tf32 reach as far as float32; float16 does not, so for float16 inputs it is short blocks that may forget little.
    """
    exact, half = dtype == torch.float32, dtype == torch.float16
    exact_dot = "tf32x3" if capability >= (8, 0) else "ieee"
    return {
        "H": H, "K": K, "V": V, "C": CHUNK, "WIDTH": padded(K), "DOT": exact_dot if exact else "tf32",
        "MERGE": exact_dot if exact else "bf16" if capability >= (8, 0) else "fp16",
        "LEVEL": 4 if half else 6, "MILD": 12.0 if half else 120.0,
    }  # fmt: skip


def launch_parameters(kernel, capability, dtype, constants):
    """The constants that this kernel, a Python function, asks for, and its launch options."""
    if kernel.__name__ == "one_step":  # nothing but loads and stores
        step, warps, stages = 32, 4, 1
    else:
        row = LAUNCH[max((c for c in LAUNCH if c <= capability), default=(7, 5))]
        step, warps, stages = row[KERNELS.index(kernel.__name__)]
        if dtype == torch.float32 or constants["WIDTH"] > 128:  # twice the registers and shared memory for the same number of columns
            step, stages = step // 2, 1
            warps = 8 if (10, 0) <= capability < (12, 0) and kernel.__name__ != "dinputs" else warps
    width = constants["K"] if kernel.__name__ in ("pairs", "dpairs", "dinputs") else constants["V"]
    constants = constants | {"STEP": max(16, min(step, padded(width))), "STEP_V": max(16, min(step, padded(constants["V"])))}
    return {name: constants[name] for name in kernel.__code__.co_varnames[: kernel.__code__.co_argcount] if name in constants}, {
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


if triton is not None:
    # -------------------------------------------------------------------------
    # pieces

    @triton.jit
    def tile(ptr, rows, heads, h, cols, width: tl.constexpr, inside):
        """Pointers to and mask of rows x cols of head h in a (tokens, heads, width) tensor."""
        return ptr + (rows.to(tl.int64) * heads + h)[:, None] * width + cols[None, :], inside[:, None] & (cols < width)[None, :]

    @triton.jit
    def read(ptr, rows, heads, h, cols, width: tl.constexpr, inside):
        p, mask = tile(ptr, rows, heads, h, cols, width, inside)
        return tl.load(p, mask=mask, other=0.0)

    @triton.jit
    def write(ptr, rows, heads, h, cols, width: tl.constexpr, inside, x):
        p, mask = tile(ptr, rows, heads, h, cols, width, inside)
        tl.store(p, x.to(ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def read_state(ptr, index, ks, vs, K: tl.constexpr, V: tl.constexpr):
        """Rows ks and columns vs of the index-th (K, V) matrix."""
        p = ptr + index.to(tl.int64) * (K * V) + ks[:, None] * V + vs[None, :]
        return tl.load(p, mask=(ks < K)[:, None] & (vs < V)[None, :], other=0.0)

    @triton.jit
    def write_state(ptr, index, ks, vs, K: tl.constexpr, V: tl.constexpr, x):
        p = ptr + index.to(tl.int64) * (K * V) + ks[:, None] * V + vs[None, :]
        tl.store(p, x.to(ptr.dtype.element_ty), mask=(ks < K)[:, None] & (vs < V)[None, :])

    @triton.jit
    def gates_as_operand(g, like):
        """
        Sums of g over runs of tokens are products of g with a matrix of zeros and ones. For bfloat16 inputs g is rounded to it there, but
        before it is summed, so exp(a sum of g) is off by 2^-9 / e at most. 0 times -inf would be NaN, and exp(-10000) is 0 already.
        """
        return tl.maximum(g, -10000.0).to(like.dtype.element_ty)

    @triton.jit
    def as_factor(x, dtype: tl.constexpr):
        """
        float32 x as a factor of a product, for inputs of this dtype. For bfloat16 inputs that is TF32, float32 without its last 13 bits.
        Tensor cores cut them off; where errors add up, as with beta = 2, a common sign is far worse than their size: round first.
        """
        if dtype == tl.bfloat16:
            x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        else:
            x = x.to(dtype)
        return x

    @triton.jit
    def halves(x, dtype: tl.constexpr):
        """float32 x as the sum of two numbers of half the width, for products at full speed."""
        high = x.to(dtype)
        return high, (x - high.to(tl.float32)).to(dtype)

    @triton.jit
    def add_product(c, a, b, MERGE: tl.constexpr):
        """c + a @ b, all float32; factors in halves of bfloat16 or float16, or as `input_precision` says."""
        if MERGE == "bf16" or MERGE == "fp16":
            half: tl.constexpr = tl.bfloat16 if MERGE == "bf16" else tl.float16
            a, a_rest = halves(a, half)
            b, b_rest = halves(b, half)
            c = tl.dot(a, b_rest, tl.dot(a, b, tl.dot(a_rest, b, c)))  # most other orders spill registers, on 7.5 or on 8.0
        else:
            c = tl.dot(a, b, c, input_precision=MERGE)
        return c

    @triton.jit
    def write_inverse(X_ptr, rows, h, inside, X, H: tl.constexpr, C: tl.constexpr):
        """
        float16 has too few bits for X where beta is near 2: its signs alternate there, and its rounding is what is left of sums that
        cancel. What float16 rounds away stands mirrored above the diagonal, where X has nothing. The diagonal is exactly 1.
        """
        c = tl.arange(0, C)
        p, mask = tile(X_ptr, rows, H, h, c, C, inside)
        if X_ptr.dtype.element_ty == tl.float16:
            X = tl.minimum(tl.maximum(X, -65504.0), 65504.0)  # entries beyond 2 are for keys of very different lengths only
            rest = tl.trans(X - X.to(tl.float16).to(tl.float32))
            above = c[:, None] < c[None, :]
            tl.store(p, rest.to(tl.float16), mask=mask & above)
            mask = mask & (c[:, None] >= c[None, :])  # not ~above, which Triton 3.2 cannot interpret
        tl.store(p, X.to(X_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def read_inverse(X_ptr, rows, h, inside, H: tl.constexpr, C: tl.constexpr):
        """X in two parts, for `times`."""
        c = tl.arange(0, C)
        X = read(X_ptr, rows, H, h, c, C, inside)
        rest = X
        if X.dtype == tl.float16:
            above = c[:, None] < c[None, :]
            X, rest = tl.where(above, 0.0, X).to(X.dtype), tl.trans(tl.where(above, X, 0.0).to(X.dtype))
        return X, rest

    @triton.jit
    def times(X, rest, r, DOT: tl.constexpr):
        r = r.to(X.dtype)
        y = tl.dot(X, r, input_precision=DOT)
        if X.dtype == tl.float16:
            y = tl.dot(rest, r, y)
        return y

    @triton.jit
    def neighbours(level, block, C: tl.constexpr, dtype: tl.constexpr):
        """
        Parts of 2^level tokens, and exponents that are sums of g: exponent_i = sum_s runs[s, i] g_s. -> runs (C, C), pairs (C, C) bool.
        Without block: from the border that an odd part has before it up to token i, or from token i + 1 to the border after an even
        part; pairs (i, j) have i in an odd part and j in the even one before it. With block: from the part's start to token i, less
        half of the part's total (so that either sign has an exp in float32); pairs (i, j) are in the same part, any of them.
        """
        i, s = tl.arange(0, C), tl.arange(0, C)[:, None]
        part = i >> level
        odd = part % 2 == 1
        up_to_i = tl.where(block, 0.5, tl.where(odd, 1.0, 0.0))[None, :]
        from_i = tl.where(block, -0.5, tl.where(odd, 0.0, 1.0))[None, :]
        first = (part << level)[None, :]
        inside = (first <= s) & (s < first + (1 << level))
        runs = tl.where(inside, tl.where(s <= i[None, :], up_to_i, from_i), 0.0).to(dtype)
        partner = tl.where(block, part, tl.where(odd, part - 1, -1))
        return runs, partner[:, None] == part[None, :]

    @triton.jit
    def first_level(g, C: tl.constexpr, STEP: tl.constexpr, LEVEL: tl.constexpr, MILD: tl.constexpr):
        """
        Where to start: 0, the borders between single tokens, or LEVEL - 1, standing for blocks of 2^LEVEL tokens as a whole, if all of
        them are mild. The second takes one product where the first takes LEVEL of them. g (C, STEP).
        """
        totals = tl.sum(tl.reshape(g, (C >> LEVEL, 1 << LEVEL, STEP)), 1)
        return tl.where(tl.min(totals) > -MILD, LEVEL - 1, 0)

    # -------------------------------------------------------------------------
    # forward

    @triton.jit
    def pairs(
        q_ptr, k_ptr, g_ptr, beta_ptr, start_ptr, end_ptr, units_ptr, X_ptr, Q_ptr,
        H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
        LEVEL: tl.constexpr, MILD: tl.constexpr, DOT: tl.constexpr, MERGE: tl.constexpr,
    ):  # fmt: skip
        """
        Q and X, both (tokens, H, C). A pair (i, j) with j < i meets exactly once as "j before, i after a border" when segments of
        2, 4, .. C tokens are halved. There it decays from j to the border, and from the border to i: two factors <= 1, one product.
        """
        chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
        start, end = tl.load(start_ptr + chunk), tl.load(end_ptr + chunk)
        c = tl.arange(0, C)
        rows, inside = start + c, start + c < end
        dtype = q_ptr.dtype.element_ty
        P, Q = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        diagonal = tl.zeros((C,), tl.float32)
        for step in range(0, K, STEP):
            ks = step + tl.arange(0, STEP)
            q = read(q_ptr, rows, H, h, ks, K, inside).to(tl.float32) * tl.load(units_ptr)
            k = read(k_ptr, rows, H, h, ks, K, inside).to(tl.float32)
            g = read(g_ptr, rows, H, h, ks, K, inside)
            first = first_level(g, C, STEP, LEVEL, MILD)
            g = gates_as_operand(g, q_ptr)
            diagonal += tl.sum(q * k, 1)
            for level in range(first, 6):
                block = (level == LEVEL - 1) & (first > 0)
                runs, here = neighbours(level + block.to(tl.int32), block, C, dtype)
                E = tl.dot(tl.trans(runs), g, input_precision=DOT)
                late = tl.exp(E)
                early = tl.trans(as_factor(k * tl.exp(tl.where(block, -E, E)), dtype))
                P += tl.where(here, tl.dot(as_factor(k * late, dtype), early, input_precision=DOT), 0.0)
                Q += tl.where(here, tl.dot(as_factor(q * late, dtype), early, input_precision=DOT), 0.0)
        i, j = c[:, None], c[None, :]
        write(Q_ptr, rows, H, h, c, C, inside, tl.where(i > j, Q, tl.where(i == j, diagonal[:, None], 0.0)))

        # If X1 and X2 invert the halves of a segment and L stands below them, [[X1, 0], [-X2 L X1, X2]] inverts the segment.
        A = -tl.where(i > j, P, 0.0) * tl.load(beta_ptr + rows * H + h, mask=inside, other=0.0)[:, None]
        X = tl.where(i == j, 1.0, tl.where(neighbours(0, False, C, dtype)[1], A, 0.0))
        for level in range(1, 6):
            L = tl.where(neighbours(level, False, C, dtype)[1], A, 0.0)
            X = add_product(X, add_product(tl.zeros((C, C), tl.float32), X, L, MERGE), X, MERGE)
        write_inverse(X_ptr, rows, h, inside, X, H, C)

    @triton.jit
    def prepare(
        q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, start_ptr, end_ptr, units_ptr, X_ptr, U_ptr, W_ptr, qG_ptr, kE_ptr, decay_ptr,
        H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr,
    ):  # fmt: skip
        """U (tokens, H, V); W, qG, kE (tokens, H, K); decay (chunks, H, K), float32."""
        chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
        start, end = tl.load(start_ptr + chunk), tl.load(end_ptr + chunk)
        c = tl.arange(0, C)
        rows, inside = start + c, start + c < end
        scale, shrink = tl.load(units_ptr), tl.load(units_ptr + 1)
        beta = tl.load(beta_ptr + rows * H + h, mask=inside, other=0.0)[:, None]
        X, rest = read_inverse(X_ptr, rows, h, inside, H, C)
        for step in range(0, V, STEP):
            vs = step + tl.arange(0, STEP)
            v = read(v_ptr, rows, H, h, vs, V, inside).to(tl.float32) * shrink
            write(U_ptr, rows, H, h, vs, V, inside, times(X, rest, beta * v, DOT))
        for step in range(0, K, STEP):
            ks = step + tl.arange(0, STEP)
            q = read(q_ptr, rows, H, h, ks, K, inside).to(tl.float32) * scale
            k = read(k_ptr, rows, H, h, ks, K, inside).to(tl.float32)
            g = read(g_ptr, rows, H, h, ks, K, inside)
            after = read(g_ptr, rows + 1, H, h, ks, K, rows + 1 < end)
            from_start = tl.exp(tl.cumsum(g, 0))
            write(W_ptr, rows, H, h, ks, K, inside, times(X, rest, beta * k * from_start, DOT))
            write(qG_ptr, rows, H, h, ks, K, inside, q * from_start)
            write(kE_ptr, rows, H, h, ks, K, inside, k * tl.exp(tl.cumsum(after, 0, reverse=True)))
            tl.store(decay_ptr + (chunk * H + h) * K + ks, tl.exp(tl.sum(g, 0)), mask=ks < K)

    @triton.jit
    def states(
        U_ptr, W_ptr, kE_ptr, decay_ptr, start_ptr, end_ptr, first_ptr, initial_ptr, S_ptr, new_ptr, final_ptr,
        H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr,
    ):  # fmt: skip
        """S (chunks, H, K, V) before each chunk; new (tokens, H, V); final (sequences, H, K, V), float32. WIDTH is K, padded."""
        sequence, h = tl.program_id(0) // H, tl.program_id(0) % H
        first, last = tl.load(first_ptr + sequence), tl.load(first_ptr + sequence + 1)
        bos = tl.load(start_ptr + first, mask=first < last, other=0)  # a sequence without tokens has no chunk to ask
        eos = tl.load(end_ptr + last - 1, mask=first < last, other=0)
        dtype = U_ptr.dtype.element_ty
        ks, vs = tl.arange(0, WIDTH), tl.program_id(1) * STEP + tl.arange(0, STEP)
        c = tl.arange(0, C)
        S = read_state(initial_ptr, sequence * H + h, ks, vs, K, V)
        for chunk in range(first, last):
            rows = bos + (chunk - first) * C + c
            inside = rows < eos
            before = S.to(dtype)
            write_state(S_ptr, chunk * H + h, ks, vs, K, V, before)
            W = read(W_ptr, rows, H, h, ks, K, inside)
            new = read(U_ptr, rows, H, h, vs, V, inside).to(tl.float32) - tl.dot(W, before, input_precision=DOT)
            write(new_ptr, rows, H, h, vs, V, inside, new)
            kE = read(kE_ptr, rows, H, h, ks, K, inside)
            decay = tl.load(decay_ptr + (chunk * H + h) * K + ks, mask=ks < K, other=0.0)
            S = S * decay[:, None] + tl.dot(tl.trans(kE), new.to(dtype), input_precision=DOT)
        write_state(final_ptr, sequence * H + h, ks, vs, K, V, S)

    @triton.jit
    def outputs(
        qG_ptr, Q_ptr, S_ptr, new_ptr, start_ptr, end_ptr, units_ptr, o_ptr,
        H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr,
    ):  # fmt: skip
        chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
        start, end = tl.load(start_ptr + chunk), tl.load(end_ptr + chunk)
        c, ks = tl.arange(0, C), tl.arange(0, WIDTH)
        rows, inside = start + c, start + c < end
        vs = tl.program_id(1) * STEP + tl.arange(0, STEP)
        qG = read(qG_ptr, rows, H, h, ks, K, inside)
        o = tl.dot(qG, read_state(S_ptr, chunk * H + h, ks, vs, K, V), input_precision=DOT)
        Q = read(Q_ptr, rows, H, h, c, C, inside)
        o += tl.dot(Q, read(new_ptr, rows, H, h, vs, V, inside), input_precision=DOT)
        write(o_ptr, rows, H, h, vs, V, inside, o * tl.load(units_ptr + 2))

    # -------------------------------------------------------------------------
    # backward

    @triton.jit
    def renew(
        U_ptr, W_ptr, Q_ptr, S_ptr, do_ptr, start_ptr, end_ptr, new_ptr, Qdo_ptr,
        H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr,
    ):  # fmt: skip
        """new and Q^T dO, both (tokens, H, V)."""
        chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
        start, end = tl.load(start_ptr + chunk), tl.load(end_ptr + chunk)
        c, ks = tl.arange(0, C), tl.arange(0, WIDTH)
        rows, inside = start + c, start + c < end
        vs = tl.program_id(1) * STEP + tl.arange(0, STEP)
        W = read(W_ptr, rows, H, h, ks, K, inside)
        WS = tl.dot(W, read_state(S_ptr, chunk * H + h, ks, vs, K, V), input_precision=DOT)
        write(new_ptr, rows, H, h, vs, V, inside, read(U_ptr, rows, H, h, vs, V, inside).to(tl.float32) - WS)
        Q = tl.trans(read(Q_ptr, rows, H, h, c, C, inside))
        do = read(do_ptr, rows, H, h, vs, V, inside)
        write(Qdo_ptr, rows, H, h, vs, V, inside, tl.dot(Q, do, input_precision=DOT))

    @triton.jit
    def dstates(
        W_ptr, qG_ptr, kE_ptr, decay_ptr, do_ptr, Qdo_ptr, start_ptr, end_ptr, first_ptr, dfinal_ptr, dS_ptr, dnew_ptr, dinitial_ptr,
        H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr,
    ):  # fmt: skip
        """dS (chunks, H, K, V): gradient of the state after each chunk; dnew (tokens, H, V); dinitial (sequences, H, K, V)."""
        sequence, h = tl.program_id(0) // H, tl.program_id(0) % H
        first, last = tl.load(first_ptr + sequence), tl.load(first_ptr + sequence + 1)
        bos = tl.load(start_ptr + first, mask=first < last, other=0)
        eos = tl.load(end_ptr + last - 1, mask=first < last, other=0)
        dtype = W_ptr.dtype.element_ty
        ks, vs = tl.arange(0, WIDTH), tl.program_id(1) * STEP + tl.arange(0, STEP)
        c = tl.arange(0, C)
        dS = read_state(dfinal_ptr, sequence * H + h, ks, vs, K, V)
        for back in range(0, last - first):
            chunk = last - 1 - back
            rows = bos + (chunk - first) * C + c
            inside = rows < eos
            after = dS.to(dtype)
            write_state(dS_ptr, chunk * H + h, ks, vs, K, V, after)
            kE = read(kE_ptr, rows, H, h, ks, K, inside)
            dnew = read(Qdo_ptr, rows, H, h, vs, V, inside).to(tl.float32) + tl.dot(kE, after, input_precision=DOT)
            dnew = dnew.to(dtype)
            write(dnew_ptr, rows, H, h, vs, V, inside, dnew)
            decay = tl.load(decay_ptr + (chunk * H + h) * K + ks, mask=ks < K, other=0.0)
            qG = read(qG_ptr, rows, H, h, ks, K, inside)
            W = read(W_ptr, rows, H, h, ks, K, inside)
            dS = dS * decay[:, None] + tl.dot(tl.trans(qG), read(do_ptr, rows, H, h, vs, V, inside), input_precision=DOT)
            dS -= tl.dot(tl.trans(W), dnew, input_precision=DOT)
        write_state(dinitial_ptr, sequence * H + h, ks, vs, K, V, dS)

    @triton.jit
    def dsolve(
        v_ptr, beta_ptr, X_ptr, new_ptr, do_ptr, dnew_ptr, start_ptr, end_ptr, units_ptr, dR_ptr, dP_ptr, dQ_ptr, dv_ptr, dbeta_ptr,
        H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr,
    ):  # fmt: skip
        """dR (tokens, H, V), the gradient of beta (v - k e^G S); of beta P and Q, (tokens, H, C); of v; of beta, as far as v goes."""
        chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
        start, end = tl.load(start_ptr + chunk), tl.load(end_ptr + chunk)
        c = tl.arange(0, C)
        rows, inside = start + c, start + c < end
        shrink, unit = tl.load(units_ptr + 1), tl.load(units_ptr + 2)
        beta = tl.load(beta_ptr + rows * H + h, mask=inside, other=0.0)[:, None]
        X, rest = read_inverse(X_ptr, rows, h, inside, H, C)
        X, rest = tl.trans(X), tl.trans(rest)
        dP, dQ = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        dbeta = tl.zeros((C,), tl.float32)
        for step in range(0, V, STEP):
            vs = step + tl.arange(0, STEP)
            dR = times(X, rest, read(dnew_ptr, rows, H, h, vs, V, inside), DOT)
            v = read(v_ptr, rows, H, h, vs, V, inside).to(tl.float32) * shrink
            write(dR_ptr, rows, H, h, vs, V, inside, dR)
            write(dv_ptr, rows, H, h, vs, V, inside, dR * (beta * (shrink * unit)))
            dbeta += tl.sum(dR * v, 1)
            new = tl.trans(read(new_ptr, rows, H, h, vs, V, inside))
            dP -= tl.dot(dR.to(new.dtype), new, input_precision=DOT)
            dQ += tl.dot(read(do_ptr, rows, H, h, vs, V, inside), new, input_precision=DOT)
        i, j = c[:, None], c[None, :]
        write(dP_ptr, rows, H, h, c, C, inside, tl.where(i > j, dP, 0.0))
        write(dQ_ptr, rows, H, h, c, C, inside, tl.where(i >= j, dQ, 0.0))
        tl.store(dbeta_ptr + rows * H + h, dbeta, mask=inside)

    @triton.jit
    def through_pairs(M, x, k, g, first, dx, dk, dg, C: tl.constexpr, LEVEL: tl.constexpr, DOT: tl.constexpr):
        """
        Adds to the gradients of x, k, g those through M_ij = sum_c x_ic k_jc e^(..), given the gradient M of that. The levels are those of
        `pairs`. As e = exp(runs^T @ g), with de the gradient of e, g gets runs @ (e de): sums over runs of tokens, nothing cancels.
        """
        dtype: tl.constexpr = g.dtype
        for level in range(first, 6):
            block = (level == LEVEL - 1) & (first > 0)
            runs, here = neighbours(level + block.to(tl.int32), block, C, dtype)
            E = tl.dot(tl.trans(runs), g, input_precision=DOT)
            late, early = tl.exp(E), tl.exp(tl.where(block, -E, E))
            N = tl.where(here, M, 0.0).to(tl.float32 if dtype == tl.bfloat16 else dtype)  # float16 is exact in TF32
            row = late * tl.dot(N, as_factor(k * early, dtype), input_precision=DOT)
            column = early * tl.dot(tl.trans(N), as_factor(x * late, dtype), input_precision=DOT)
            dx += row
            dk += column
            dE = x * row + k * tl.where(block, -column, column)
            if dtype == tl.bfloat16:
                dE, rest = halves(dE, dtype)
                dg += tl.dot(runs, rest)
            dg += tl.dot(runs, dE.to(dtype), input_precision=DOT)
        return dx, dk, dg

    @triton.jit
    def dpairs(
        q_ptr, k_ptr, g_ptr, beta_ptr, dP_ptr, dQ_ptr, start_ptr, end_ptr, units_ptr, dq_ptr, dk_ptr, dg_ptr, dbeta_ptr, tokens,
        H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
        LEVEL: tl.constexpr, MILD: tl.constexpr, DOT: tl.constexpr,
    ):  # fmt: skip
        """
        What P and Q contribute to the gradients of scale q, k, g and beta. One program for STEP channels: dbeta (steps, tokens, H) is
        summed later.
        """
        chunk, h, step = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
        start, end = tl.load(start_ptr + chunk), tl.load(end_ptr + chunk)
        c, ks = tl.arange(0, C), step * STEP + tl.arange(0, STEP)
        rows, inside = start + c, start + c < end
        k = read(k_ptr, rows, H, h, ks, K, inside).to(tl.float32)
        g = read(g_ptr, rows, H, h, ks, K, inside)
        first = first_level(g, C, STEP, LEVEL, MILD)
        g = gates_as_operand(g, q_ptr)
        zero = tl.zeros((C, STEP), tl.float32)

        beta = tl.load(beta_ptr + rows * H + h, mask=inside, other=0.0)[:, None]
        dP = read(dP_ptr, rows, H, h, c, C, inside)
        row, dk, dg = through_pairs(dP, beta * k, k, g, first, zero, zero, zero, C, LEVEL, DOT)
        tl.store(dbeta_ptr + (step * tokens + rows).to(tl.int64) * H + h, tl.sum(k * row, 1), mask=inside)
        dk += beta * row

        q = read(q_ptr, rows, H, h, ks, K, inside).to(tl.float32) * tl.load(units_ptr)
        dQ = read(dQ_ptr, rows, H, h, c, C, inside)
        diagonal = tl.load(dQ_ptr + (rows.to(tl.int64) * H + h) * C + c, mask=inside, other=0.0).to(tl.float32)
        diagonal = tl.where(first > 0, 0.0, diagonal)[:, None]  # a token and itself: no border between them, but one block
        dq, dk, dg = through_pairs(dQ, q, k, g, first, diagonal * k, dk + diagonal * q, dg, C, LEVEL, DOT)
        write(dq_ptr, rows, H, h, ks, K, inside, dq)
        write(dk_ptr, rows, H, h, ks, K, inside, dk)
        write(dg_ptr, rows, H, h, ks, K, inside, dg)

    @triton.jit
    def dinputs(
        q_ptr, k_ptr, g_ptr, beta_ptr, S_ptr, new_ptr, do_ptr, dS_ptr, dR_ptr, start_ptr, end_ptr, units_ptr,
        dq_ptr, dk_ptr, dg_ptr, dbeta_ptr,
        H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, STEP_V: tl.constexpr, DOT: tl.constexpr,
    ):  # fmt: skip
        """What the states contribute, added to what `dpairs` left there: the gradients of q, k, g, beta."""
        chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
        start, end = tl.load(start_ptr + chunk), tl.load(end_ptr + chunk)
        c = tl.arange(0, C)
        rows, inside = start + c, start + c < end
        scale, unit = tl.load(units_ptr), tl.load(units_ptr + 2)
        beta = tl.load(beta_ptr + rows * H + h, mask=inside, other=0.0)[:, None]
        dbeta = tl.zeros((C,), tl.float32)
        for step in range(0, K, STEP):
            ks = step + tl.arange(0, STEP)
            Z, dqG, dkE = tl.zeros((C, STEP), tl.float32), tl.zeros((C, STEP), tl.float32), tl.zeros((C, STEP), tl.float32)
            ddecay = tl.zeros((STEP,), tl.float32)
            for step_v in range(0, V, STEP_V):
                vs = step_v + tl.arange(0, STEP_V)
                S = read_state(S_ptr, chunk * H + h, ks, vs, K, V)
                dS = read_state(dS_ptr, chunk * H + h, ks, vs, K, V)
                ddecay += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
                Z -= tl.dot(read(dR_ptr, rows, H, h, vs, V, inside), tl.trans(S), input_precision=DOT)
                dqG += tl.dot(read(do_ptr, rows, H, h, vs, V, inside), tl.trans(S), input_precision=DOT)
                dkE += tl.dot(read(new_ptr, rows, H, h, vs, V, inside), tl.trans(dS), input_precision=DOT)
            q = read(q_ptr, rows, H, h, ks, K, inside).to(tl.float32) * scale
            k = read(k_ptr, rows, H, h, ks, K, inside).to(tl.float32)
            g = read(g_ptr, rows, H, h, ks, K, inside)
            from_start = tl.exp(tl.cumsum(g, 0))
            dq, dk = dqG * from_start, Z * from_start
            dbeta += tl.sum(k * dk, 1)
            dk *= beta
            dg = tl.cumsum(q * dq + k * dk, 0, reverse=True)
            after = read(g_ptr, rows + 1, H, h, ks, K, rows + 1 < end)
            dkE *= tl.exp(tl.cumsum(after, 0, reverse=True))
            dg += tl.cumsum(k * dkE, 0) - k * dkE + (ddecay * tl.exp(tl.sum(g, 0)))[None, :]
            dq += read(dq_ptr, rows, H, h, ks, K, inside).to(tl.float32)
            dk += read(dk_ptr, rows, H, h, ks, K, inside).to(tl.float32) + dkE
            dg += read(dg_ptr, rows, H, h, ks, K, inside)
            write(dq_ptr, rows, H, h, ks, K, inside, dq * (scale * unit))
            write(dk_ptr, rows, H, h, ks, K, inside, dk * unit)
            write(dg_ptr, rows, H, h, ks, K, inside, tl.where(g == float("-inf"), 0.0, dg * unit))
        tl.store(dbeta_ptr + rows * H + h, dbeta, mask=inside)

    # -------------------------------------------------------------------------
    # decoding

    @triton.jit
    def one_step(
        q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, o_ptr, scale,
        K: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """The recurrence itself, for the heads of all sequences at once; the state is read and written once."""
        head = tl.program_id(0).to(tl.int64)
        ks, vs = tl.arange(0, WIDTH), tl.program_id(1) * STEP + tl.arange(0, STEP)
        q = tl.load(q_ptr + head * K + ks, mask=ks < K, other=0.0).to(tl.float32) * scale
        k = tl.load(k_ptr + head * K + ks, mask=ks < K, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + head * K + ks, mask=ks < K, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + head * V + vs, mask=vs < V, other=0.0).to(tl.float32)
        S = read_state(state_ptr, head, ks, vs, K, V) * tl.exp(g)[:, None]
        new = tl.load(beta_ptr + head).to(tl.float32) * (v - tl.sum(k[:, None] * S, 0))
        S += k[:, None] * new[None, :]
        write_state(state_ptr, head, ks, vs, K, V, S)
        tl.store(o_ptr + head * V + vs, tl.sum(q[:, None] * S, 0).to(o_ptr.dtype.element_ty), mask=vs < V)


    @triton.jit
    def one_product(x_ptr):
        """x <- x @ x for a (16, 16) matrix: see `tensor_cores_on_turing`."""
        p = x_ptr + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        x = tl.load(p)
        tl.store(p, tl.dot(x, x).to(tl.float16))


# -----------------------------------------------------------------------------
# what kda.py calls


class Launcher:
    """Launches kernels on the chunks of one call: the sizes, the table and the settings that all launches share."""

    def __init__(self, q, v, table):
        self.H, self.K, self.V, self.dtype, self.table = q.shape[2], q.shape[3], v.shape[3], q.dtype, table
        self.capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
        self.constants = launch_constants(self.capability, q.dtype, q.shape[2], q.shape[3], v.shape[3])

    def parameters(self, kernel):
        return launch_parameters(kernel.fn, self.capability, self.dtype, self.constants)

    def __call__(self, kernel, *args):
        constants, options = self.parameters(kernel)
        steps = -(-(self.K if kernel is dpairs else self.V) // constants["STEP"])
        if kernel in (states, dstates):
            grid = ((len(self.table.first) - 1) * self.H, steps)
        else:
            grid = (len(self.table.start) * self.H, steps if kernel in (outputs, renew, dpairs) else 1)
        kernel[grid](*args, **constants, **options)


def low_dtype(dtype):
    """
    What is kept, and multiplied, by the kernels. For bfloat16 inputs that is float16: as fast, and with eight times the resolution. Its
    range is no limit, since q, v, the states and their gradients are brought near 1 first (`find_units`), and k has unit length.
    """
    return torch.float16 if dtype == torch.bfloat16 else dtype


def largest(t):
    return torch.linalg.vector_norm(t, math.inf, dtype=torch.float32)


def power_of_two(size):
    """The next one above each of `size`; 1 for zero. Between 2^-100 and 2^60, so that quotients of a few are float32."""
    return torch.exp2(torch.frexp(size).exponent.clamp(-100, 60))


def find_units(q, v, state):
    """
    Powers of two that q, and v and the initial states (or None), are divided by. o is linear in q, and in v
    and the initial states together, so bfloat16 inputs of any size make states that fit in float16.
    1 for inputs of other dtypes.
    """
    if q.dtype != torch.bfloat16 or not q.numel():
        return torch.ones(2, device=q.device).unbind()
    largest_v = largest(v) if state is None else torch.maximum(largest(v), largest(state))
    return power_of_two(torch.stack((largest(q), largest_v))).unbind()


def _prepare(run, q, k, v, g, beta, units, X):
    """Launch `prepare` -> U, W, qG, kE, decay."""
    low = X.dtype
    U, W, qG, kE = (torch.empty_like(t, dtype=low) for t in (v, k, q, k))
    decay = torch.empty(len(run.table.start), run.H, run.K, dtype=torch.float32, device=q.device)
    run(prepare, q, k, v, g, beta, run.table.start, run.table.end, units, X, U, W, qG, kE, decay)
    return U, W, qG, kE, decay


def triton_forward(q, k, v, g, beta, scale, state, table):
    """
    q, k (B, T, H, K), v (B, T, H, V) of one dtype, float16, bfloat16 or float32; g (B, T, H, K), beta (B, T, H); K and V at most 256;
    state (N, H, K, V) or None for zero; table from `chunk_table`, for the B * T tokens back to back: a batch of B equal sequences has
    cu_seqlens 0, T, 2T, .. Returns o (B, T, H, V) in v's dtype, the final states (N, H, K, V) in float32, and the tensors to keep for
    the backward. Nothing waits for the GPU.
    """
    q, k, v = (t.contiguous() for t in (q, k, v))
    g, beta = g.float().contiguous(), beta.float().contiguous()
    run, (start, end, first) = Launcher(q, v, table), table
    shape = (len(first) - 1, run.H, run.K, run.V)
    state = torch.zeros(shape, device=q.device) if state is None else state.float().contiguous()
    final = torch.empty_like(state)
    low, (unit_q, unit_v) = low_dtype(q.dtype), find_units(q, v, state)
    units = torch.stack([scale / unit_q, 1 / unit_v, unit_q * unit_v])
    X, Q = (q.new_empty(*q.shape[:3], CHUNK, dtype=low) for _ in "XQ")
    S = q.new_empty(len(start), run.H, run.K, run.V, dtype=low)
    new, o = torch.empty_like(v, dtype=low), torch.empty_like(v)
    with torch.cuda.device_of(q):
        run(pairs, q, k, g, beta, start, end, units, X, Q)
        U, W, qG, kE, decay = _prepare(run, q, k, v, g, beta, units, X)
        run(states, U, W, kE, decay, start, end, first, state / unit_v, S, new, final)
        run(outputs, qG, Q, S, new, start, end, units, o)
    return o, final * unit_v, (X, Q, S)


def triton_backward(q, k, v, g, beta, scale, state, table, saved, do, dstate):
    """
    Arguments and `saved` as given to and returned by `triton_forward`; do (B, T, H, V) and dstate (N, H, K, V), either may be None for
    zero. Returns dq, dk, dv in the dtype of q, dg, dbeta and the gradient of the initial states in float32. float16 gradients reach
    neither 65504 nor zero on the way: the backward is linear in (do, dstate), so both are divided by one power of two, which comes
    back at the end. -inf gates have a gradient of exactly zero.
    """
    q, k, v = (t.contiguous() for t in (q, k, v))
    g, beta = g.float().contiguous(), beta.float().contiguous()
    run, (start, end, first) = Launcher(q, v, table), table
    X, Q, S = saved
    low, (unit_q, unit_v) = X.dtype, find_units(q, v, state)
    unit = unit_q * unit_v
    do = torch.zeros_like(v) if do is None else do
    dstate = torch.zeros(len(first) - 1, run.H, run.K, run.V, device=q.device) if dstate is None else dstate.float()
    if low == torch.float16 and do.numel():
        unit = (unit_v * power_of_two(torch.maximum(unit_q * largest(do), largest(dstate)))).clamp(min=2.0**-120)
        do, dstate = do.float() * (unit_q * unit_v / unit), dstate * (unit_v / unit)
    units = torch.stack([scale / unit_q, 1 / unit_v, unit])
    do, dstate = do.to(low).contiguous(), dstate.contiguous()

    with torch.cuda.device_of(q):
        U, W, qG, kE, decay = _prepare(run, q, k, v, g, beta, units, X)
        new, Qdo = torch.empty_like(U), torch.empty_like(U)
        run(renew, U, W, Q, S, do, start, end, new, Qdo)
        del U
        dS, dnew, dinitial = torch.empty_like(S), torch.empty_like(new), torch.empty_like(dstate)
        run(dstates, W, qG, kE, decay, do, Qdo, start, end, first, dstate, dS, dnew, dinitial)
        del W, qG, kE, Qdo
        dR, dv, dP, dQ = torch.empty_like(new), torch.empty_like(v), torch.empty_like(Q), torch.empty_like(Q)
        steps = -(-run.K // run.parameters(dpairs)[0]["STEP"])
        dbeta = beta.new_empty(steps + 2, *beta.shape)  # from each step of dpairs, dsolve, dinputs
        run(dsolve, v, beta, X, new, do, dnew, start, end, units, dR, dP, dQ, dv, dbeta[steps])
        del dnew
        dq, dk, dg = torch.empty_like(q), torch.empty_like(k), torch.empty_like(g)
        run(dpairs, q, k, g, beta, dP, dQ, start, end, units, dq, dk, dg, dbeta, beta.shape[0] * beta.shape[1])
        run(dinputs, q, k, g, beta, S, new, do, dS, dR, start, end, units, dq, dk, dg, dbeta[steps + 1])
    return dq, dk, dv, dg, dbeta.sum(0) * unit, dinitial * (unit / unit_v)


def triton_step(q, k, v, g, beta, state, scale):
    """
    One token for a whole batch: q, k, g (B, H, K), v (B, H, V), beta (B, H), any floating point dtypes; state (B, H, K, V), float32 and
    contiguous, updated in place. Returns o (B, H, V) in v's dtype.
    """
    q, k, v, g, beta = (t.contiguous() for t in (q, k, v, g, beta))
    (B, H, K), V = q.shape, v.shape[-1]
    o = torch.empty_like(v)
    step = min(padded(V), 32)
    with torch.cuda.device_of(q):
        one_step[(B * H, -(-V // step))](q, k, v, g, beta, state, o, scale, K=K, V=V, STEP=step, WIDTH=padded(K), num_warps=4)
    return o


@functools.cache
def tensor_cores_on_turing():
    """
    Does the installed Triton compile a float16 product for a T4 (compute capability 7.5) to tensor core instructions? Up to 3.2 it did,
    3.3 crashes, later ones fall back to multiply-adds. Compiles a tiny kernel; needs no GPU, and under a second.
    """
    if triton is None or not isinstance(one_product, triton.JITFunction):
        return False
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        signature = {"x_ptr": "*fp16"}
        if "constants" in ASTSource.__init__.__code__.co_varnames:  # before 3.3, constants were named differently
            source = ASTSource(one_product, signature, constants={})
        else:
            source = ASTSource(one_product, signature, constexprs={})
        return "mma.sync" in triton.compile(source, target=GPUTarget("cuda", 75, 32)).asm["ptx"]
    except Exception:  # whatever a compiler that does not know Turing falls over
        return False
