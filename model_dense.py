"""
Route A: a decoder that reads left to right. Three layers of Kimi Delta Attention, one of full attention,
and again.

KDA carries the order of text in its decay, so full attention has no position encoding for text (NoPE).
Cells of a grid are different: two cells in one column are far apart as tokens. Full attention therefore
rotates queries and keys by (row, column, grid number), which follow from the tokens alone (arc.positions).

A row of text holds many documents, and each is read as if it were alone: KDA forgets at <|endoftext|>, and
full attention looks no further back than that.

The file in order: settings, the block, the loss, costs, the model. `python model_dense.py` describes the
100M model. Before this: kda.py, and smol/engine.py for decoding. Read next: model_trm.py or train.py.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch.utils.checkpoint import checkpoint

from kda import KimiDeltaAttention
from smol import arc, engine, runtime
from smol import tokenizer as tok
from smol.tokenizer import IGNORE

KINDS = {"k": "k (KDA)", "a": "a (full attention)", "m": "m (MLP along lines)"}  # of layers; m: Route B
LOGITS_AT_ONCE = 2**23  # the loss is computed in slices of this many logits: 32 MB in float32


@dataclass
class Config:
    """The defaults are the 100M model."""

    block_size: int = 1024  # longest row
    vocab_size: int = tok.VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 10  # in KDA and in full attention
    n_embd: int = 640
    n_ff: int = 1984  # hidden width of the SwiGLU
    layer_pattern: str = "kkka"  # repeated over the depth; k is KDA, a is full attention
    rope_base: float = 100.0  # grids have at most 30 rows: low frequencies would never turn
    norm_eps: float = 1e-5
    recompute: bool = False  # keep only the input of each block for the backward, and compute the rest again


def check_config(config, kinds="ka"):
    """Raises ValueError, in one line, for a shape that cannot be built. kinds: of layers that there are."""
    for name, value in vars(config).items():
        if type(value) is int and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if config.vocab_size <= tok.END:
        raise ValueError(f"vocab_size={config.vocab_size} leaves out reserved ids: at least {tok.END + 1}")
    head_dim = config.n_embd / config.n_head
    if head_dim < 6 or head_dim % 2:
        raise ValueError(
            f"n_embd / n_head is {head_dim:g}: three axes of rotation need an even size, 6 or more"
        )
    if not config.layer_pattern or set(config.layer_pattern) - set(kinds):
        known = ", ".join(KINDS[kind] for kind in kinds)
        raise ValueError(f"layer_pattern={config.layer_pattern!r} may only hold {known}")


def layer_kinds(config):
    """The pattern repeated over n_layer layers."""
    return [config.layer_pattern[i % len(config.layer_pattern)] for i in range(config.n_layer)]


# -----------------------------------------------------------------------------
# the block: norm, mixer, SwiGLU


def rope_3d(positions, head_dim, base):
    """
    positions (B, T, 3) of integers -> cos, sin (B, 1, T, head_dim / 2). Frequencies go in turn to row,
    column and grid number. A token at the origin, as all text is, is not rotated.
    """
    half = head_dim // 2
    axis = torch.arange(half, device=positions.device) % 3
    level = torch.arange(half, device=positions.device) // 3
    angle = positions[..., axis] * base ** (-level / (half / 3))
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def rotate(x, rope):
    """x (B, H, T, D) rotated in pairs of (first half, second half)."""
    cos, sin = (t.to(x.dtype) for t in rope)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class RMSNorm(nn.RMSNorm):
    """With its weight in x's dtype: under autocast, mixed ones would keep PyTorch from its fused kernel."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Full attention with normalised queries and keys."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps)

    def empty_cache(self, batch_size, length):
        """Room for keys and values (B, H, length, head_dim), in the dtype that autocast gives them."""
        weight = self.o_proj.weight
        half = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if half else weight.dtype
        shape = batch_size, self.n_head, length, self.head_dim
        return weight.new_empty(shape, dtype=dtype), weight.new_empty(shape, dtype=dtype)

    def forward(self, x, rope, attn_mask=None, cache=None, length=0):
        """
        x (B, T, n_embd) -> y (B, T, n_embd). attn_mask: None is causal, else bool (B, 1, T or 1, length + T),
        True where a query sees a key. cache: keys and values of `length` tokens, to which those of x are
        added.
        """
        B, T, D = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.n_head, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, head_dim) each
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if cache is not None:
            for kept, new in zip(cache, (k, v)):
                kept[:, :, length : length + T] = new
            k, v = (kept[:, :, : length + T] for kept in cache)
        is_causal = True if attn_mask is None and T > 1 else False  # a bool to the compiler as well
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)  # (B, H, T, K)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, 2 * config.n_ff, bias=False)
        self.down_proj = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """A mixer (KDA or full attention) and a SwiGLU, each pre-norm on the residual stream."""

    def __init__(self, config, kind):
        super().__init__()
        self.kind = kind
        if kind == "k":
            head_dim = config.n_embd // config.n_head
            self.mixer = KimiDeltaAttention(config.n_embd, config.n_head, head_dim, norm_eps=config.norm_eps)
        else:
            self.mixer = Attention(config)
        self.mlp = SwiGLU(config)
        self.norm_1 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.norm_2 = RMSNorm(config.n_embd, eps=config.norm_eps)

    def forward(self, x, rope, attn_mask=None, starts=None, cache=None, length=0):
        h = self.norm_1(x)
        if self.kind == "k":
            h, cache = self.mixer(h, cache, starts)
        else:
            h = self.mixer(h, rope, attn_mask, cache, length)
        x = x + h
        return x + self.mlp(self.norm_2(x)), cache


def run_blocks(blocks, x, layout, cache=None, length=0, recompute=False):
    """
    x (B, T, n_embd) through all blocks. layout: what a block is told of the row besides x (rope, attn_mask,
    starts, ...). cache: list with one tuple per block, whose entries are replaced, after `length` tokens;
    or None.
    """
    for i, block in enumerate(blocks):
        if cache is not None:
            x, cache[i] = block(x, *layout, cache=cache[i], length=length)
        elif recompute and torch.is_grad_enabled():
            x, _ = checkpoint(block, x, *layout, use_reentrant=False, preserve_rng_state=False)
        else:
            x, _ = block(x, *layout)
    return x


def document_starts(idx):
    """
    idx (B, T) -> bool (B, T), where a document begins: at <|endoftext|>, which is read as the first token
    of what follows. None if every row is one document: attention takes its flash kernel only without a
    mask.
    """
    starts = idx == tok.EOT
    return starts if starts[:, 1:].any() else None


def document_mask(starts):
    """starts (B, T) -> attn_mask (B, 1, T, T): a query sees the keys of its own document up to itself."""
    if starts is None:
        return None
    t = torch.arange(starts.shape[1], device=starts.device)
    first = torch.where(starts, t, 0).cummax(1).values
    return ((t <= t[:, None]) & (t >= first[:, :, None])).unsqueeze(1)


# -----------------------------------------------------------------------------
# the loss


class LinearCrossEntropy(torch.autograd.Function):
    """
    sum_i share_i * cross_entropy(weight @ x_i, targets_i), without ever holding all logits: over 50,304
    words they would be the largest tensor of a training step by far. The loss and both gradients are
    computed a slice of rows at a time. x (N, D), weight (V, D), targets (N,) long, share (N,) float32,
    summing to about 1. No second derivative.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, share, need_grad):
        N, kind = len(x), x.device.type
        if torch.is_autocast_enabled(kind):
            x, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight))
        relative = share * N  # about 1: half precision would lose shares of 1 / N
        wide = torch.promote_types(x.dtype, torch.float32)  # of sums
        loss = torch.zeros((), dtype=wide, device=x.device)
        d_x = torch.empty_like(x) if need_grad else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_grad else None
        n_rows = max(1, LOGITS_AT_ONCE // len(weight))
        buffer = x.new_empty(min(n_rows, N), len(weight))  # for all slices: fresh memory is slow on a CPU
        for i in range(0, N, n_rows):
            rows = slice(i, min(i + n_rows, N))
            wanted = targets[rows].unsqueeze(1)
            logits = torch.mm(x[rows], weight.t(), out=buffer[: len(wanted)]).to(wide)
            # The softmax is one fused pass and logsumexp is four. The largest probability is
            # e^(top - log_sum), which never underflows.
            p = torch.softmax(logits, 1)
            log_sum = logits.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
            loss += ((log_sum - logits.gather(1, wanted)).squeeze(1) * share[rows]).sum()
            if need_grad:
                d_logits = p.scatter_add_(1, wanted, torch.full_like(log_sum, -1.0)).to(x.dtype)
                scale = relative[rows, None].to(x.dtype)
                d_x[rows] = (d_logits @ weight) * scale
                if wide == x.dtype:
                    torch.addmm(d_weight, d_logits.t(), x[rows] * scale, out=d_weight)
                else:
                    d_weight += d_logits.t() @ (x[rows] * scale)
        ctx.save_for_backward(d_x, d_weight)
        ctx.N = N
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_x, d_weight = ctx.saved_tensors
        d_loss = d_loss / max(1, ctx.N)
        return d_x * d_loss.to(d_x.dtype), d_weight * d_loss, None, None, None


def linear_cross_entropy(x, weight, targets, share):
    """LinearCrossEntropy; without gradients, only the logits are computed."""
    return LinearCrossEntropy.apply(x, weight, targets, share, torch.is_grad_enabled())


def row_shares(rows, n_rows):
    """
    rows (N,): the row of the batch that each token belongs to -> its share (N,) of a loss that is the mean
    over rows of each row's mean. A large grid then counts as much as a small one, and two processes with
    half the rows each agree with one.
    """
    return 1.0 / (torch.bincount(rows, minlength=n_rows)[rows] * n_rows)


# -----------------------------------------------------------------------------
# costs


def core_flops_per_token(config, context):
    """
    Forward FLOPs (2 per multiply-add) of a token through all blocks, with `context` tokens in its row: the
    matrices, the causal half of full attention, and the products of KDA at 64 tokens a chunk.
    """
    d, head_dim = config.n_embd, config.n_embd // config.n_head
    full = 2 * 4 * d * d + 2 * d * context
    kda = 2 * (4 * d * d + 4 * d * head_dim + 12 * d + d * config.n_head) + 2 * d * (4 * 64 + 4 * head_dim)
    mixer = {"a": full, "k": kda, "m": 2 * 3 * d * getattr(config, "n_line", 0)}
    return sum(2 * 3 * d * config.n_ff + mixer[kind] for kind in layer_kinds(config))


def cache_bytes(config, context):
    """Of the caches of one row in float32, for one pass through the blocks."""
    full = 4 * 2 * context * config.n_embd
    kda = 4 * (3 * 3 * config.n_embd + config.n_embd * (config.n_embd // config.n_head))
    return sum({"a": full, "k": kda, "m": 0}[kind] for kind in layer_kinds(config))


# -----------------------------------------------------------------------------
# the model


def init_weights(model):
    """
    Matrices are N(0, 1 / fan_in), every branch starts by adding nothing, and KDA forgets at the pace of its
    dt_bias alone. The embedding is GPT-2's N(0, 0.02), or less where a model is wide: the tied head reads
    back the token it was given with a logit of std * n_embd, and at 12.8 it bets on that (loss 12.9); at
    6.4 it knows nothing (10.8 over 50,304 words).
    """
    nn.init.normal_(model.wte.weight, std=min(0.02, 6.4 / model.config.n_embd))
    for block in model.blocks:
        init_linears(block)
        nn.init.zeros_(block.mixer.o_proj.weight)
        nn.init.zeros_(block.mlp.down_proj.weight)


def init_linears(block):
    """N(0, 1 / fan_in), and zeros for biases and for what makes KDA's decay depend on its input."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if block.kind == "k":
        nn.init.zeros_(block.mixer.f_proj[1].weight)


class HubMixin(PyTorchModelHubMixin):
    """Model.from_pretrained refuses a file that does not have all weights, where the hub's own does not."""

    @classmethod
    def _from_pretrained(cls, *, model_id, strict=True, **options):
        if "config" not in options:  # the hub's own goes on without
            raise ValueError(f"{model_id} has no config.json, or there is no such repository or revision")
        try:
            return super()._from_pretrained(model_id=model_id, strict=strict, **options)
        except RuntimeError as e:
            if "state_dict" not in str(e):
                raise
            raise ValueError(f"{model_id} does not fit this model: {one_line(e)}") from None


def one_line(error):
    """What PyTorch says of weights that do not fit, without its first line, which only says that."""
    return " ".join(" ".join(str(error).splitlines()[1:]).split())[:300]


class Model(nn.Module, HubMixin, library_name="smol-llm", license="mit"):
    Config = Config
    puzzle_format = "autoregressive"

    def __init__(self, config: Config):
        super().__init__()
        check_config(config)
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # the output head as well
        self.blocks = nn.ModuleList(Block(config, kind) for kind in layer_kinds(config))
        self.norm_f = RMSNorm(config.n_embd, eps=config.norm_eps)
        init_weights(self)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context, mode="text", training=False):
        """Forward, or forward and backward. In puzzles the head runs on few positions and is left out."""
        head = 2 * self.config.n_embd * self.config.vocab_size if mode == "text" else 0
        return (core_flops_per_token(self.config, context) + head) * (3 if training else 1)

    def empty_cache(self, batch_size, length):
        """For each block a tuple of tensors (B, ...): room for `length` keys and values, or KDA's state."""
        return [block.mixer.empty_cache(batch_size, length) for block in self.blocks]

    def hidden(self, idx, starts=None, attn_mask=None, positions=None, cache=None, length=0):
        """
        idx (B, T) -> what the head reads (B, T, n_embd). starts (B, T) bool: where documents begin;
        attn_mask: of full attention, else it follows from starts. In decoding, idx follows `length` tokens
        in the cache and has `positions` (B, T, 3).
        """
        c = self.config
        positions = arc.positions(idx) if positions is None else positions
        attn_mask = document_mask(starts) if attn_mask is None else attn_mask
        layout = rope_3d(positions, c.n_embd // c.n_head, c.rope_base), attn_mask, starts
        return self.norm_f(run_blocks(self.blocks, self.wte(idx), layout, cache, length, c.recompute))

    def forward(self, idx, targets=None, *, mode="text", carry=None):
        """
        idx (B, T). In mode "text" a row holds many documents, in mode "puzzle" one. Returns (logits (B, T,
        vocab_size), None, None), or with targets (B, T), IGNORE where there is no loss, (None, loss, None).
        The loss is the mean over tokens in mode "text", and over rows of each row's mean in mode "puzzle",
        where it is among GRID_IDS alone: an answer is written with nothing else. carry is Route B's.
        """
        x = self.hidden(idx, document_starts(idx) if mode == "text" else None)
        if targets is None:
            return F.linear(x, self.wte.weight), None, None
        keep = targets != IGNORE
        x, targets, rows = x[keep], targets[keep], keep.nonzero()[:, 0]  # (N, n_embd), (N,), (N,)
        if mode == "text":
            share = torch.ones_like(rows) / len(rows)
            return None, linear_cross_entropy(x, self.wte.weight, targets, share), None
        ids = torch.tensor(engine.GRID_IDS, device=x.device)
        logits = F.linear(x, self.wte.weight[ids]).float()  # (N, 12)
        loss = F.cross_entropy(logits, (targets[:, None] == ids).long().argmax(1), reduction="none")
        return None, (loss * row_shares(rows, len(idx))).sum(), None

    def answer(self, tasks, samples=1, temperature=1.0, seed=0):
        """Solve tasks, whose test outputs are not read: engine.answer_tasks."""
        # On a GPU a step of decoding takes as long for few rows as for many: up to four times as many tokens
        # as otherwise, if their caches take a quarter of the memory that is free (0 on a CPU).
        fit = runtime.free_memory(self.wte.weight.device) / 4 / cache_bytes(self.config, 1024) * 1024
        tokens = int(min(max(fit, engine.BATCH_TOKENS), 4 * engine.BATCH_TOKENS))
        return engine.answer_tasks(self, tasks, samples, temperature, seed, tokens)

    def score_answers(self, tasks, answers):
        """Log-probabilities of given answers: engine.score_answers."""
        return engine.score_answers(self, tasks, answers)


def describe(model, passes=1):
    """Print parameters by part, FLOPs per token and sizes of caches, for `passes` through the blocks."""
    config, n = model.config, model.num_params()
    parts = {"embedding and head": model.wte.weight.numel()}
    for block in model.blocks:
        for part, module in ((KINDS[block.kind], block.mixer), ("SwiGLU", block.mlp)):
            parts[part] = parts.get(part, 0) + sum(p.numel() for p in module.parameters())
    parts["norms and the rest"] = n - sum(parts.values())
    print(f"{config}\nlayers: {' '.join(layer_kinds(config))}\n")
    for part, count in [*parts.items(), ("all parameters", n)]:
        print(f"  {part:24s} {count:13,}  {count / n:6.1%}")
    print("\n   context   MFLOP per token   in training   MB of cache   with full attention everywhere")
    for context in (1024, 4096, 16384, 32768):
        forward, training = (model.flops_per_token(context, training=t) / 1e6 for t in (False, True))
        full = dataclasses.replace(config, layer_pattern="a")
        held, all_full = (passes * cache_bytes(c, context) / 1e6 for c in (config, full))
        print(f"  {context:8,} {forward:17,.0f} {training:13,.0f} {held:13.1f} {all_full:32.1f}")


if __name__ == "__main__":
    print(__doc__)
    describe(Model(Config()))
