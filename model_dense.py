"""
Route A: a decoder that reads left to right. Three layers of Kimi Delta Attention, one of full attention, and again.

KDA layers carry the position of text in their decay, so full attention needs no position encoding for text (NoPE). Cells of a
grid are different: two cells in one column are far apart as tokens, so full attention rotates queries and keys by (row, column,
grid number), which follow from the tokens alone (arc.positions).

A row of text is many documents, and each is read as if it were alone: KDA forgets and full attention looks no further back than the
<|endoftext|> before it. The same serves decoding: prompts of any lengths are padded on the left, and padding is another document.
Decoding keeps a state of constant size in each KDA layer, and keys and values in every fourth layer only.

The file in order: the block; what both routes share besides it (loss, optimizers, sampling, costs); decoding; the model.

Run `python model_dense.py` to see the 100M model described. Before this: kda.py. Read next: model_trm.py, which builds its
recursive core out of the same Block, then train.py.
"""

import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import configurator
from kda import GridKDA
from smol import arc, runtime
from smol import tokenizer as tok
from smol.muon import split_parameters
from smol.tokenizer import IGNORE

LOGITS_AT_ONCE = (
    2**23
)  # the loss over the vocabulary is computed in slices of this many logits (32 MB in float32)
CACHE_ROOM = 256  # tokens by which the memory for keys and values grows
ANSWER_TOKENS = 2**15  # tokens per batch when answering: memory stays the same for short and long tasks


@dataclass
class Config:
    """The defaults are the 100M model."""

    block_size: int = 1024  # longest row it is asked to read
    vocab_size: int = tok.VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 10  # of n_embd / n_head dimensions each, in KDA and in full attention
    n_kv_head: int | None = (
        None  # full attention: heads of keys and values, shared by groups of query heads (None: n_head)
    )
    n_embd: int = 640
    n_ff: int = 1984  # hidden width of the SwiGLU
    layer_pattern: str = "kkka"  # tiled over the depth: k is KDA, a is full attention
    rope_base: float = 100.0  # grids have at most 30 rows: low frequencies would never turn
    norm_eps: float = 1e-5
    separate_documents: bool = (
        True  # text: what comes after an <|endoftext|> knows nothing of what came before it
    )
    recompute: bool = (
        False  # training keeps only the input of each block, and goes through it again in the backward
    )


def check_config(config):
    """Raises ValueError, in one line, for a shape that cannot be built."""
    for name in ("n_layer", "n_head", "n_embd", "n_ff", "block_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.vocab_size <= tok.END:
        raise ValueError(
            f"vocab_size={config.vocab_size} leaves out reserved ids: at least {tok.END + 1}, usually {tok.VOCAB_SIZE}"
        )
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
    if config.n_embd // config.n_head < 6 or (config.n_embd // config.n_head) % 2:
        raise ValueError(
            f"n_embd / n_head is {config.n_embd // config.n_head}: grid positions need an even head size of at least 6"
        )
    if config.n_kv_head is not None and (config.n_kv_head < 1 or config.n_head % config.n_kv_head):
        raise ValueError(
            f"n_head={config.n_head} query heads cannot be shared evenly by n_kv_head={config.n_kv_head}"
        )
    if not config.layer_pattern or set(config.layer_pattern) - set("ka"):
        raise ValueError(
            f"layer_pattern={config.layer_pattern!r} may only hold 'k' (KDA) and 'a' (full attention)"
        )


# -----------------------------------------------------------------------------
# the block: norm, mixer, SwiGLU


def rope_3d(positions, head_dim, base):
    """
    positions (B, T, 3) of integers -> cos, sin (B, 1, T, head_dim / 2). The frequencies are dealt out in turn to row, column
    and grid number; a token at the origin (all text) is not rotated at all.
    """
    half = head_dim // 2
    axis = torch.arange(half, device=positions.device) % 3
    level = torch.arange(half, device=positions.device) // 3
    freq = base ** (-level / (half / 3))
    angle = positions[..., axis] * freq
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def rotate(x, rope):
    """x (B, H, T, D) turned by rope, in pairs of (first half, second half)."""
    cos, sin = (t.to(x.dtype) for t in rope)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class RMSNorm(nn.RMSNorm):
    """With its weight in x's dtype: under autocast, mixed ones would keep PyTorch from its fused kernel."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def append(cache, k, v):
    """
    A cache of full attention (keys, values, n) with k, v (B, H, T, head_dim) after the n tokens that are in it. Where there is room
    this happens in place; room grows CACHE_ROOM tokens at a time, so that a token costs 1 / CACHE_ROOM of a copy of everything.
    """
    keys, values, n = cache
    stop = n + k.shape[2]
    if stop > keys.shape[2]:
        room = k.new_empty(*k.shape[:2], -(-stop // CACHE_ROOM) * CACHE_ROOM - n, k.shape[3])
        keys, values = (torch.cat([old[:, :, :n].to(k.dtype), room], 2) for old in (keys, values))
    keys[:, :, n:stop], values[:, :, n:stop] = k, v
    return keys, values, stop


class Attention(nn.Module):
    """Full attention with normalised queries and keys; text gets no position, cells of grids get three."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.qkv_proj = nn.Linear(
            config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=False
        )
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps)

    def empty_cache(self, batch_size):
        """What the layer remembers before the first token: keys and values (B, n_kv_head, room, head_dim), of which 0 tokens are taken."""
        nothing = self.o_proj.weight.new_zeros(batch_size, self.n_kv_head, 0, self.head_dim)
        return nothing, nothing, 0

    def forward(self, x, rope, cache=None, visible=None):
        """
        x (B, T, n_embd). visible: None for causal attention, else bool, broadcast to (B, 1, T, tokens so far): who sees whom.
        Returns y (B, T, n_embd) and the cache with this call's keys and values appended (None when none came in); the cache that
        came in is used up.
        """
        B, T, D = x.shape
        heads = self.qkv_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), 1)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        past = 0
        if cache is not None:
            past = cache[2]
            cache = append(cache, k, v)
            k, v = (t[:, :, : past + T] for t in cache[:2])
        if visible is None and past and T > 1:
            visible = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            is_causal=visible is None and T > 1,
            enable_gqa=self.n_kv_head != self.n_head,
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D)), cache


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, 2 * config.n_ff, bias=False)
        self.down_proj = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """
    A mixer (KDA or full attention) and a SwiGLU, each on a residual stream. Pre-norm, x + f(norm(x)), for a stack that is gone
    through once; post-norm, norm(x + f(x)), for a core that is gone through again and again and must not grow (post=True).
    """

    def __init__(self, config, kind, post=False, first_way=0):
        super().__init__()
        self.kind, self.post, self.first_way = kind, post, first_way
        if kind == "k":
            head_dim = config.n_embd // config.n_head
            self.mixer = GridKDA(config.n_embd, config.n_head, head_dim, norm_eps=config.norm_eps)
        else:
            self.mixer = Attention(config)
        self.mlp = SwiGLU(config)
        self.norm_1 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.norm_2 = RMSNorm(config.n_embd, eps=config.norm_eps)

    def forward(self, x, rope, cache=None, visible=None, starts=None, lines=None):
        h = x if self.post else self.norm_1(x)
        if self.kind == "a":
            h, cache = self.mixer(h, rope, cache, visible)
        else:
            if (
                lines is not None
            ):  # the ways to read a grid go round among the heads, and on from one KDA layer to the next
                ways = (self.first_way + torch.arange(self.mixer.num_heads, device=x.device)) % arc.WAYS
                lines = [t[..., ways] for t in lines]
            h, cache = self.mixer(h, cache, starts, lines)
        x = self.norm_1(x + h) if self.post else x + h
        return (self.norm_2(x + self.mlp(x)) if self.post else x + self.mlp(self.norm_2(x))), cache


def document_starts(idx):
    """
    idx (B, T) -> bool (B, T): where a document begins. The <|endoftext|> between two documents is read as the
    beginning of the second: what is predicted there is the second's first token. None where every row is one
    document: without a mask, attention takes its flash kernel. To know that, a GPU is waited for once per
    forward; the loss, which counts its targets, waits for it as well.
    """
    starts = idx == tok.EOT
    return starts if starts[:, 1:].any() else None


def same_document(starts):
    """starts (B, T) -> bool (B, 1, T, T): may query i see key j? Not later ones, nor those of other documents."""
    t = torch.arange(starts.shape[1], device=starts.device)
    first = torch.where(starts, t, 0).cummax(1).values
    return ((t <= t[:, None]) & (t >= first[:, :, None])).unsqueeze(1)


def make_blocks(config, post=False):
    """n_layer blocks with layer_pattern tiled over them."""
    kinds = [config.layer_pattern[i % len(config.layer_pattern)] for i in range(config.n_layer)]
    heads_before = [kinds[:i].count("k") * config.n_head for i in range(config.n_layer)]
    return nn.ModuleList(
        Block(config, kind, post, heads % arc.WAYS) for kind, heads in zip(kinds, heads_before)
    )


def run_blocks(blocks, x, rope, caches=None, visible=None, recompute=False, starts=None, lines=None):
    """
    x through all blocks. caches: a list with one cache per block, replaced in place, or None. visible is for full attention, starts
    for KDA (as there), and so is lines: arc.grid_lines, the eight ways to read grids, or None, from the first token to the last.
    recompute: as in Config.
    """
    for i, block in enumerate(blocks):
        if recompute and caches is None and torch.is_grad_enabled():
            # nothing in a block is random, so there is no generator's state to bring back
            x, cache = checkpoint(
                block, x, rope, None, visible, starts, lines, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x, cache = block(x, rope, None if caches is None else caches[i], visible, starts, lines)
        if caches is not None:
            caches[i] = cache
    return x


# -----------------------------------------------------------------------------
# what both routes share besides the block


class LinearCrossEntropy(torch.autograd.Function):
    """
    sum_i share_i * cross_entropy(weight @ x_i, targets_i), without ever holding all logits: 50,304 words make them the largest
    tensor of a training step by far. A slice of rows at a time, the loss and both gradients are computed while its logits are
    there. x (N, D), weight (V, D), targets (N,) long, share (N,) float32, summing to about 1.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, share):
        N, need_grad = len(x), any(ctx.needs_input_grad)
        if torch.is_autocast_enabled(x.device.type):
            x, weight = (
                x.to(torch.get_autocast_dtype(x.device.type)),
                weight.to(torch.get_autocast_dtype(x.device.type)),
            )
        relative = share * N  # about 1: half precision would lose shares of 1 / N
        wide = torch.promote_types(x.dtype, torch.float32)  # of sums
        loss = torch.zeros((), dtype=wide, device=x.device)
        d_x = torch.empty_like(x) if need_grad else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_grad else None
        rows = max(1, LOGITS_AT_ONCE // len(weight))
        buffer = x.new_empty(
            min(rows, N), len(weight)
        )  # one for all slices: fresh memory is slow to touch on a CPU
        for a in range(0, N, rows):
            part, wanted = slice(a, min(a + rows, N)), targets[a : a + rows].unsqueeze(1)
            logits = torch.mm(x[part], weight.t(), out=buffer[: len(wanted)])
            logits = logits.to(wide)
            log_sum = logits.logsumexp(1, keepdim=True)
            loss += ((log_sum - logits.gather(1, wanted)).squeeze(1) * share[part]).sum()
            if need_grad:
                d_logits = logits.sub_(log_sum).exp_()  # softmax, minus one at the target
                d_logits.scatter_add_(1, wanted, torch.full_like(log_sum, -1.0).to(d_logits.dtype))
                d_logits = d_logits.to(x.dtype)
                d_x[part] = (d_logits @ weight) * relative[part, None].to(x.dtype)
                d_weight += d_logits.t() @ (x[part] * relative[part, None].to(x.dtype))
        ctx.save_for_backward(d_x, d_weight)
        ctx.N = N
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        if torch.is_grad_enabled():  # once_differentiable would miss it where d_loss is a constant, as usual
            raise RuntimeError("LinearCrossEntropy has no second derivative: do without create_graph=True")
        d_x, d_weight = ctx.saved_tensors
        d_loss = d_loss / max(1, ctx.N)
        return d_x * d_loss.to(d_x.dtype), d_weight * d_loss, None, None


def linear_cross_entropy(x, weight, targets, share):
    """LinearCrossEntropy, without its gradients where nobody asks for them: under no_grad a weight still says that it needs one."""
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    return LinearCrossEntropy.apply(x, weight, targets, share)


def row_shares(rows, n_rows):
    """
    rows (N,): the row of a batch that each answer token belongs to -> its share (N,) of a loss that is the mean over rows of each
    row's mean. A big grid then counts as much as a small one, and two processes with half the rows each agree with one.
    """
    return 1.0 / (torch.bincount(rows, minlength=n_rows)[rows] * n_rows)


def sample(logits, temperature, top_k=None, top_p=None, generator=None):
    """
    logits (B, V) -> ids (B,). temperature 0 is greedy; top_k draws from the k likeliest ids, top_p from the fewest likeliest ids that
    have a probability of top_p together (of those that top_k leaves). Ids that name nothing are never drawn.
    ValueError where logits are NaN or infinite.
    """
    logits = logits[:, : tok.END + 1].float()
    if not logits.amax(-1).isfinite().all():
        raise ValueError("the model's logits are not finite: training diverged, take an earlier checkpoint")
    if temperature == 0:
        return logits.argmax(-1)
    logits = (
        logits - logits.amax(-1, keepdim=True)
    ) / temperature  # the largest is 0: no temperature is too low
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    p = logits.softmax(-1)
    if top_p is not None:
        likeliest, order = p.sort(-1, descending=True)
        before = likeliest.cumsum(-1) - likeliest  # what the likelier ones have without this one
        p = p.masked_fill((before >= top_p).scatter(1, order, before >= top_p), 0.0)
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


def core_flops_per_token(config, context):
    """
    Forward FLOPs (2 per multiply-add) of one token through all blocks at a context of `context` tokens: the matrices, the scores
    of full attention (half of them, causal), and the chunked KDA products at 64 tokens a chunk.
    """
    d, per_head = config.n_embd, config.n_embd // config.n_head
    d_kv = (config.n_kv_head or config.n_head) * per_head
    total = 0
    for i in range(config.n_layer):
        total += 2 * 3 * d * config.n_ff
        if config.layer_pattern[i % len(config.layer_pattern)] == "a":
            total += 2 * (2 * d * d + 2 * d * d_kv) + 2 * d * context
        else:
            total += 2 * (4 * d * d + 4 * d * per_head + 12 * d + d * config.n_head)
            total += 2 * d * (4 * 64 + 4 * per_head)
    return total


def batches_by_length(items, length, tokens=None):
    """items in batches of similar length(item), about `tokens` (None: ANSWER_TOKENS) with padding, short ones first."""
    items, batch = sorted(items, key=length), []
    for item in items:
        if batch and (len(batch) + 1) * length(item) > (tokens or ANSWER_TOKENS):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def cache_bytes(config, context, bytes_per_number=4):
    """What one row of `context` tokens leaves in the caches of one pass through the blocks: keys and values; KDA's tails and states."""
    head_dim, total = config.n_embd // config.n_head, 0
    for i in range(config.n_layer):
        if config.layer_pattern[i % len(config.layer_pattern)] == "a":
            total += 2 * context * (config.n_kv_head or config.n_head) * head_dim * bytes_per_number
        else:
            total += (
                3 * 3 * config.n_embd * bytes_per_number + config.n_embd * head_dim * 4
            )  # the state is always float32
    return total


def tokens_at_once(config, free):
    """
    How many tokens of prompts and answers are written together, where a GPU has `free` bytes left: up to four times ANSWER_TOKENS, as long
    as their caches take a quarter of that. A step of decoding takes a GPU as long as starting its operations does, however many rows
    there are. On a CPU (0 bytes) it takes as long as the arithmetic, and larger batches would bring nothing.
    """
    tokens = ANSWER_TOKENS
    while (
        tokens < 4 * ANSWER_TOKENS and 4 * (2 * tokens / 1024) * cache_bytes(config, 1024) <= free
    ):  # counted in rows of 1,024
        tokens *= 2
    return tokens


# -----------------------------------------------------------------------------
# decoding: one token at a time, after prompts of any lengths


@dataclass
class Past:
    """What is kept of the tokens that B rows have read. Shorter prompts have padding before them, which counts as a document of its own."""

    caches: list  # one per block: keys and values in full attention, O(1) in KDA
    length: int  # tokens read, padding included
    first: torch.Tensor  # (B,) where the current document of each row begins
    masked: bool  # whether that is later than 0 in any row
    token: torch.Tensor  # (B,) the last token, and its position (B, 3)
    place: torch.Tensor
    grids: torch.Tensor  # (B,) grids opened in the current document

    def repeat(self, n):
        """What B rows have read, as B * n rows, each n times in turn: a prompt is read once, and continued n times."""

        def rows(value):
            if isinstance(value, torch.Tensor):
                return value.repeat_interleave(n, 0)
            return tuple(map(rows, value)) if isinstance(value, tuple) else value

        return Past(
            *(([rows(c) for c in v] if isinstance(v, list) else rows(v)) for v in vars(self).values())
        )

    @staticmethod
    def join(parts):
        """What several lots of rows have read, all up to the same length, as one."""

        def rows(values):
            if isinstance(values[0], torch.Tensor):
                return torch.cat(values)
            return (
                type(values[0])(map(rows, zip(*values)))
                if isinstance(values[0], (tuple, list))
                else max(values)
            )

        return Past(*map(rows, zip(*(vars(part).values() for part in parts))))


def next_place(grids, place, before, token):
    """
    arc.positions of one more token per row, without going through the row again. grids (B,) opened in the document so far; place (B, 3)
    and before (B,) the position and the id of the last token; token (B,) the new one -> the new (grids, place).
    """
    mark, after_mark = ((t == tok.INPUT) | (t == tok.OUTPUT) for t in (token, before))
    begins = (token == tok.EOT) | ((token >= tok.ARC) & (token <= tok.PROGRAM))
    of_grid = (
        ((token >= tok.CELL0) & (token < tok.CELL0 + 10))
        | (token == tok.BLANK)
        | (token == tok.VOID)
        | (token == tok.ROW)
    )
    grids = torch.where(begins, 0, grids + mark)
    row = torch.where(mark, 0, place[:, 0] + (before == tok.ROW))
    column = torch.where(mark | after_mark | (before == tok.ROW), 0, place[:, 1] + 1)
    inside = mark | (of_grid & (place[:, 2] > 0))
    return grids, torch.stack([row, column, grids], 1) * inside[:, None]


GRID_IDS = [
    *range(tok.CELL0, tok.CELL0 + 10),
    tok.ROW,
    tok.EOT,
]  # what an answer is written with, by the grammar of grids


def write_grids(logits, read_on, limits, temperature=1.0, noise=None):
    """
    Write grids under their grammar: only what can follow is allowed, so every answer parses. logits (B, 12): of GRID_IDS after the
    prompts; read_on: drawn (B,), numbers into GRID_IDS -> the next logits; limits: for each row (most rows, most columns); noise: for
    each row a np.random.Generator to draw with at `temperature`, or None to take the likeliest (noise=None: all rows do).
    -> list of (grid, log-probability under the grammar), None for a row whose logits were not finite. Ends
    after as many tokens as the largest grid has, whatever the logits are.
    """
    ROW, END = 10, 11
    rows = [[[]] for _ in limits]  # of each answer; the last one is being written
    score, done = [0.0] * len(limits), [False] * len(limits)
    for _ in range(max((h * (w + 1) + 1 for h, w in limits), default=0)):
        logits = logits.float().cpu()
        allowed = torch.full_like(logits, -torch.inf)
        for b, (most_rows, most_columns) in enumerate(limits):
            first, last = rows[b][0], rows[b][-1]
            if len(rows[b]) == 1:  # the first row chooses the width
                allowed[b, :ROW] = 0 if len(last) < most_columns else -torch.inf
                allowed[b, ROW] = 0 if last else -torch.inf
            elif last:
                allowed[b, :ROW] = 0 if len(last) < len(first) else -torch.inf
                allowed[b, ROW] = 0 if len(last) == len(first) else -torch.inf
            else:  # between rows: stop, or begin another
                allowed[b, END] = 0
                allowed[b, :ROW] = 0 if len(rows[b]) <= most_rows else -torch.inf
        log_p = (logits + allowed).log_softmax(-1)
        drawn = log_p
        if (
            noise is not None
        ):  # the largest of log p / temperature + Gumbel noise is a draw from that distribution
            gumbel = [
                np.zeros(len(GRID_IDS)) if rng is None else temperature * rng.gumbel(size=len(GRID_IDS))
                for rng in noise
            ]
            drawn = log_p + torch.from_numpy(np.stack(gumbel))
        drawn = drawn.argmax(-1)
        for b, (choice, unknown) in enumerate(zip(drawn.tolist(), log_p.isnan().any(-1).tolist())):
            if done[b]:
                continue
            if unknown:
                score[b], done[b] = None, True
                continue
            score[b] += log_p[b, choice].item()
            if choice == END:
                done[b] = True
            elif choice == ROW:
                rows[b].append([])
            else:
                rows[b][-1].append(choice)
        if all(done):
            break
        logits = read_on(drawn)
    return [None if s is None else (np.array(r[:-1], dtype=np.uint8), s) for r, s in zip(rows, score)]


# -----------------------------------------------------------------------------
# the model


class Model(nn.Module):
    Config = Config
    puzzle_format = "autoregressive"

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = make_blocks(config)
        self.norm_f = RMSNorm(config.n_embd, eps=config.norm_eps)
        # All weights in one place: matrices N(0, 1 / fan_in), every branch starts by adding nothing, and KDA forgets at the pace of its
        # dt_bias alone until it has learned better. The embedding is GPT-2's N(0, 0.02), but less where a model is wide: the tied head
        # reads back the token it has just been given, with a logit of std * n_embd, and at 12.8 it would bet on that (loss 12.9); at 6.4
        # among 50,304 words it knows nothing (10.8).
        for name, p in self.named_parameters():
            if name.startswith("wte"):
                nn.init.normal_(p, std=min(0.02, 6.4 / config.n_embd))
            elif name.endswith(("o_proj.weight", "down_proj.weight", "f_proj.1.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name.endswith("bias") and not name.endswith("dt_bias"):
                nn.init.zeros_(p)

    def num_params(self):
        """All of them; the embedding is also the output head and counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context, mode="text", training=False):
        """FLOPs per token, forward, or forward and backward. The head is left out of puzzles, where it runs on few positions."""
        head = 2 * self.config.n_embd * self.config.vocab_size if mode == "text" else 0
        return (core_flops_per_token(self.config, context) + head) * (3 if training else 1)

    def configure_optimizer(self, weight_decay, learning_rate, betas):
        return torch.optim.AdamW(
            split_parameters(self, weight_decay), lr=learning_rate, betas=betas, fused=True
        )

    def hidden(self, idx, positions=None, caches=None, visible=None, starts=None):
        """
        idx (B, T) -> what the head reads (B, T, n_embd). positions (B, T, 3) when idx alone does not tell them (decoding); visible and
        starts as in run_blocks.
        """
        rope = rope_3d(
            arc.positions(idx) if positions is None else positions,
            self.config.n_embd // self.config.n_head,
            self.config.rope_base,
        )
        return self.norm_f(
            run_blocks(self.blocks, self.wte(idx), rope, caches, visible, self.config.recompute, starts)
        )

    def forward(self, idx, targets=None, *, mode="text", carry=None):
        """
        idx (B, T) of token ids; targets (B, T), IGNORE where there is no loss. In mode "text" a row may hold many documents, in mode
        "puzzle" it is one.
        Without targets: logits (B, T, vocab_size), None, None. With targets: None, the loss, None: logits of 50,304 words are the
        largest tensor of a training step and nobody reads them. The loss is the mean over tokens in mode "text", and over rows of
        each row's mean in mode "puzzle". carry is for Route B.
        """
        starts = document_starts(idx) if mode == "text" and self.config.separate_documents else None
        x = self.hidden(idx, visible=None if starts is None else same_document(starts), starts=starts)
        if targets is None:
            return F.linear(x, self.wte.weight), None, None
        keep = targets != IGNORE
        x, targets = x[keep], targets[keep]
        share = (
            row_shares(keep.nonzero()[:, 0], len(idx))
            if mode == "puzzle"
            else torch.ones_like(x[:, 0]).float() / len(x)
        )
        return None, linear_cross_entropy(x, self.wte.weight, targets, share), None

    # -------------------------------------------------------------------------
    # decoding

    def empty_caches(self, batch_size):
        """For each block, what it remembers before the first token."""
        return [block.mixer.empty_cache(batch_size) for block in self.blocks]

    def read(self, prompts):
        """
        prompts: (B, T) long, or a list of (T_b,) long -> what the head reads after their last tokens
        (B, n_embd), a Past. About ANSWER_TOKENS are read at a time: that takes ten times the memory of what
        is kept of them. ValueError if a prompt is empty, or there is none.
        """
        if not min(map(len, prompts), default=0):
            raise ValueError("a prompt is empty: begin it with <|endoftext|>, as every document does")
        T = max(map(len, prompts))
        rows = max(1, ANSWER_TOKENS // T)
        parts = [self.read_padded(prompts[start : start + rows], T) for start in range(0, len(prompts), rows)]
        return (
            parts[0]
            if len(parts) == 1
            else (torch.cat([x for x, _ in parts]), Past.join([past for _, past in parts]))
        )

    def read_padded(self, prompts, T):
        """`read`, all of them at once, padded to T tokens."""
        device = self.wte.weight.device
        idx = torch.full((len(prompts), T), tok.PAD, device=device)
        for row, p in zip(idx, prompts):
            row[T - len(p) :] = p
        starts = idx == tok.EOT if self.config.separate_documents else torch.zeros_like(idx, dtype=torch.bool)
        begin = torch.tensor([T - len(p) for p in prompts], device=device)
        starts[torch.arange(len(prompts), device=device), begin] = True
        masked = bool(starts[:, 1:].any())
        caches = self.empty_caches(len(idx))
        positions = arc.positions(idx)
        x = self.hidden(idx, positions, caches, *((same_document(starts), starts) if masked else ()))
        first = torch.where(starts, torch.arange(T, device=device), 0).amax(1)
        another = torch.cat(
            [idx, torch.full_like(idx[:, :1], tok.INPUT)], 1
        )  # a grid opened here would have the next number
        past = Past(
            caches, T, first, masked, idx[:, -1], positions[:, -1], arc.positions(another)[:, -1, 2] - 1
        )
        return x[:, -1], past

    def read_on(self, token, past):
        """token (B,) -> what the head reads after it (B, n_embd). past is brought up to date."""
        starts, visible = token == tok.EOT, None
        if self.config.separate_documents and starts.any():
            past.first, past.masked = torch.where(starts, past.length, past.first), True
        else:
            starts = None
        if past.masked:
            visible = (torch.arange(past.length + 1, device=token.device) >= past.first[:, None])[
                :, None, None
            ]
        past.grids, past.place = next_place(past.grids, past.place, past.token, token)
        past.token, past.length = token, past.length + 1
        starts = None if starts is None else starts[:, None]
        x = self.hidden(token[:, None], past.place[:, None], past.caches, visible, starts)
        return x[:, -1]

    @torch.no_grad()
    def generate(
        self,
        prompts,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        stop=(tok.EOT,),
        generator=None,
    ):
        """
        Continue prompts, (B, T) long or a list of (T_b,) long, a token at a time: yields (B,) ids as they are drawn. A row that has
        drawn one of `stop` yields PAD from then on; ends when all have. temperature, top_k, top_p as in `sample`.
        The state is O(1) in the KDA layers; full-attention layers keep keys and values.
        """
        x, past = self.read(prompts)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        stop = torch.tensor(tuple(stop), dtype=torch.long, device=x.device)
        for i in range(max_new_tokens):
            drawn = sample(F.linear(x, self.wte.weight), temperature, top_k, top_p, generator).masked_fill(
                done, tok.PAD
            )
            yield drawn
            done = done | torch.isin(drawn, stop)
            if done.all() or i == max_new_tokens - 1:
                return
            x = self.read_on(drawn, past)

    @torch.no_grad()
    def answer(self, tasks, samples=1, temperature=1.0, seed=0):
        """
        Solve tasks left to right, under the grammar of grids: only tokens that can follow are allowed, so every answer parses.
        tasks: list of arc.Task, whose test outputs are not read. Returns for each task, for each of its test inputs, a list of
        `samples` (grid, log-probability), the likeliest token at every place first, then drawn at `temperature` from one reading of the
        prompt, without those for which the model's logits were not finite; None where prompt and answer do
        not fit into block_size. A draw depends on seed and prompt, not on what else is asked.
        """
        answers = [[None] * len(task.test) for task in tasks]
        questions = []
        for i, task in enumerate(tasks):
            for j, (test_input, _) in enumerate(task.test):
                prompt = arc.encode_prompt(task.kind, task.train, test_input)
                limit = arc.canvas_shape(task.train, test_input)
                if len(prompt) + limit[0] * (limit[1] + 1) <= self.config.block_size:
                    questions.append((i, j, torch.from_numpy(prompt.astype(np.int64)), limit))
        tokens = tokens_at_once(self.config, runtime.free_memory(self.wte.weight.device))
        for part in batches_by_length(
            questions, lambda q: samples * (len(q[2]) + q[3][0] * (q[3][1] + 1)), tokens
        ):
            noise = [
                None
                if n == 0
                else np.random.default_rng(
                    [seed, n, *np.frombuffer(hashlib.sha256(q[2].numpy()).digest(), "<u4")]
                )
                for q in part
                for n in range(samples)
            ]
            drawn = self.decode_grids([q[2] for q in part], [q[3] for q in part], samples, temperature, noise)
            for n, (i, j, _, _) in enumerate(part):
                answers[i][j] = [a for a in drawn[n * samples : (n + 1) * samples] if a is not None]
        return answers

    @torch.no_grad()
    def decode_grids(self, prompts, limits, samples=1, temperature=1.0, noise=None):
        """
        prompts: list of (T_b,) long, each read once and answered `samples` times; limits: for each (most rows, most columns);
        temperature and noise as in `write_grids`, and so are the len(prompts) * samples that come back.
        """
        ids = torch.tensor(GRID_IDS, device=self.wte.weight.device)
        head = self.wte.weight[ids]
        x, past = self.read(prompts)
        if samples > 1:
            x, past = x.repeat_interleave(samples, 0), past.repeat(samples)
        return write_grids(
            F.linear(x, head),
            lambda drawn: F.linear(self.read_on(ids[drawn.to(ids.device)], past), head),
            [limit for limit in limits for _ in range(samples)],
            temperature,
            noise,
        )

    def place_logits(self, documents, shapes):
        """
        What the model makes of given answers, place by place, with gradient where gradients are on (distill.py). documents: list of
        (T_b,) long as arc.encode makes them; shapes: the (h, w) of their answers. Returns (N, 11) float32: for one document after the
        other, at each of the h * (w + 1) + 1 tokens of its answer (the EOT after it counts), the logits of the ten colours and of "it
        ends here": of ROW, in the first column of EOT.
        """
        device = self.wte.weight.device
        idx = torch.nn.utils.rnn.pad_sequence(
            [ids[:-1] for ids in documents], batch_first=True, padding_value=tok.PAD
        )
        x = self.hidden(idx.to(device))
        x = torch.cat(
            [
                x[b, len(ids) - 2 - h * (w + 1) : len(ids) - 1]
                for b, (ids, (h, w)) in enumerate(zip(documents, shapes))
            ]
        )
        logits = F.linear(x, self.wte.weight[torch.tensor(GRID_IDS, device=device)]).float()
        first = torch.cat([torch.arange(h * (w + 1) + 1) % (w + 1) == 0 for h, w in shapes]).to(device)
        return torch.cat([logits[:, :10], torch.where(first, logits[:, 11], logits[:, 10])[:, None]], 1)

    @torch.no_grad()
    def answer_logits(self, tasks, answers):
        """
        Log-probabilities of given answers, by teacher forcing. answers: for each task, for each test input, a grid or None.
        Returns the same nesting of float32 arrays (h, w), the log-probability of each cell given all before it; None where the
        answer is None or the row longer than block_size.
        """
        out = [[None] * len(task.test) for task in tasks]
        rows = []
        for i, (task, grids) in enumerate(zip(tasks, answers)):
            for j, ((test_input, _), grid) in enumerate(zip(task.test, grids)):
                if grid is not None:
                    ids = torch.from_numpy(
                        arc.encode(task.kind, [*task.train, (test_input, grid)]).astype(np.int64)
                    )
                    if (
                        len(ids) - 2 <= self.config.block_size
                    ):  # neither the last ROW nor the EOT has to be read
                        rows.append((i, j, ids, grid.shape))
        for part in batches_by_length(rows, lambda row: len(row[2])):
            idx = torch.nn.utils.rnn.pad_sequence(
                [ids[:-2] for _, _, ids, _ in part], batch_first=True, padding_value=tok.PAD
            )
            for x, (i, j, ids, (h, w)) in zip(self.hidden(idx.to(self.wte.weight.device)), part):
                n = h * (w + 1)  # answer tokens; the EOT comes after them
                log_p = F.linear(x[len(ids) - 2 - n : len(ids) - 2], self.wte.weight).float().log_softmax(-1)
                log_p = log_p.gather(1, ids[-n - 1 : -1, None].to(log_p.device))
                out[i][j] = log_p.view(h, w + 1)[:, :w].cpu().numpy()
        return out


def describe(model, passes=1):
    """Print parameters by part, FLOPs per token, and what caches hold. passes: how often decoding goes through the blocks per token."""
    config, n = model.config, model.num_params()
    parts = {"embedding and head": model.wte.weight.numel()}
    for block in model.blocks:
        for what, module in (
            (f"{'KDA' if block.kind == 'k' else 'full attention'}", block.mixer),
            ("SwiGLU", block.mlp),
        ):
            parts[what] = parts.get(what, 0) + sum(p.numel() for p in module.parameters())
    parts["norms and the rest"] = n - sum(parts.values())
    print(f"{model.__class__.__name__}: {config}")
    print("layers: " + " ".join(block.kind for block in model.blocks) + "   (k: KDA, a: full attention)\n")
    for part, count in [*parts.items(), ("all parameters", n)]:
        print(f"  {part:24s} {count:13,}  {count / n:6.1%}")
    print(
        "\n   context   MFLOP per token, forward   training   MB of cache   per 1,024 tokens   with full attention everywhere"
    )
    plain = dataclasses.replace(config, layer_pattern="a", n_kv_head=None)
    for context in (1024, 4096, 16384, 32768):
        held, all_full = (passes * cache_bytes(c, context) / 1e6 for c in (config, plain))
        forward, training = (model.flops_per_token(context, training=t) / 1e6 for t in (False, True))
        per_1k, full_per_1k = (1024 * x / context for x in (held, all_full))
        print(
            f"  {context:8,} {forward:26,.0f} {training:10,.0f} {held:13.1f} {per_1k:18.2f} {full_per_1k:30.2f}"
        )


if __name__ == "__main__":
    configurator.help_only(__doc__)
    describe(Model(Config()))
