"""
Route A: a decoder that reads left to right. Three layers of Kimi Delta Attention, one of full attention, and again.

KDA layers carry the position of text in their decay, so full attention needs no position encoding for text (NoPE). Cells of a
grid are different: two cells in one column are far apart as tokens, so full attention rotates queries and keys by (row, column,
grid number), which follow from the tokens alone (arc.positions).

Run `python model_dense.py` to see the 100M model described. Before this: kda.py. Next to read: model_trm.py, which builds its
recursive core out of the same Block, then train.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import arc
import tokenizer as tok
from kda import KimiDeltaAttention

LOGITS_AT_ONCE = 2**23  # the loss over the vocabulary is computed in slices of this many logits (32 MB in float32)
IGNORE = -100  # target of positions that carry no loss (cross_entropy's own default)


@dataclass
class Config:
    """The defaults are the 100M model."""

    block_size: int = 1024  # longest row it is asked to read
    vocab_size: int = tok.VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 10  # of n_embd / n_head dimensions each, in KDA and in full attention
    n_embd: int = 640
    n_ff: int = 1984  # hidden width of the SwiGLU
    layer_pattern: str = "kkka"  # tiled over the depth: k is KDA, a is full attention
    rope_base: float = 100.0  # grids have at most 30 rows: low frequencies would never turn
    norm_eps: float = 1e-5


def check_config(config):
    """Raises ValueError, in one line, for a shape that cannot be built."""
    for name in ("n_layer", "n_head", "n_embd", "n_ff", "block_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.vocab_size <= tok.END:
        raise ValueError(f"vocab_size={config.vocab_size} leaves out reserved ids: at least {tok.END + 1}, usually {tok.VOCAB_SIZE}")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
    if config.n_embd // config.n_head < 6 or (config.n_embd // config.n_head) % 2:
        raise ValueError(f"n_embd / n_head is {config.n_embd // config.n_head}: grid positions need an even head size of at least 6")
    if not config.layer_pattern or set(config.layer_pattern) - set("ka"):
        raise ValueError(f"layer_pattern={config.layer_pattern!r} may only hold 'k' (KDA) and 'a' (full attention)")


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


class Attention(nn.Module):
    """Full attention with normalised queries and keys; text gets no position, cells of grids get three."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.q_norm = RMSNorm(config.n_embd // config.n_head, eps=config.norm_eps)
        self.k_norm = RMSNorm(config.n_embd // config.n_head, eps=config.norm_eps)

    def empty_cache(self, batch_size):
        """Keys and values (B, n_head, 0, head_dim) before the first token."""
        nothing = self.o_proj.weight.new_zeros(batch_size, self.n_head, 0, self.o_proj.weight.shape[0] // self.n_head)
        return nothing, nothing

    def forward(self, x, rope, cache=None, visible=None):
        """
        x (B, T, n_embd). visible: None for causal attention, else (B, 1, 1, T) bool: who may be seen, by everyone.
        Returns y (B, T, n_embd) and the cache with this call's keys and values appended (None when none came in).
        """
        B, T, D = x.shape
        q, k, v = self.qkv_proj(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        past = 0
        if cache is not None:
            past = cache[0].shape[2]
            k, v = torch.cat([cache[0].to(k.dtype), k], 2), torch.cat([cache[1].to(v.dtype), v], 2)
            cache = (k, v)
        if visible is None and past and T > 1:
            visible = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None and T > 1)
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

    def __init__(self, config, kind, post=False, right_to_left=False):
        super().__init__()
        self.kind, self.post = kind, post
        self.right_to_left = right_to_left  # KDA only, and only where everyone may see everyone
        if kind == "k":
            self.mixer = KimiDeltaAttention(config.n_embd, config.n_head, config.n_embd // config.n_head)
        else:
            self.mixer = Attention(config)
        self.mlp = SwiGLU(config)
        self.norm_1 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.norm_2 = RMSNorm(config.n_embd, eps=config.norm_eps)

    def forward(self, x, rope, cache=None, visible=None):
        h = x if self.post else self.norm_1(x)
        if self.kind == "a":
            h, cache = self.mixer(h, rope, cache, visible)
        elif self.right_to_left and visible is not None:
            # Padding now comes first. As zeros it gives keys of zero, which write nothing: as if it were not there.
            h = self.mixer((h * visible[:, 0, 0, :, None]).flip(1))[0].flip(1)
        else:
            h, cache = self.mixer(h, cache)
        x = self.norm_1(x + h) if self.post else x + h
        return (self.norm_2(x + self.mlp(x)) if self.post else x + self.mlp(self.norm_2(x))), cache


def make_blocks(config, post=False, right_to_left=False):
    """n_layer blocks with layer_pattern tiled over them. With right_to_left, the second of every three KDA layers can turn round."""
    kinds = [config.layer_pattern[i % len(config.layer_pattern)] for i in range(config.n_layer)]
    turned = [kind == "k" and kinds[:i].count("k") % 3 == 1 and right_to_left for i, kind in enumerate(kinds)]
    return nn.ModuleList(Block(config, kind, post, turn) for kind, turn in zip(kinds, turned))


def run_blocks(blocks, x, rope, caches=None, visible=None):
    """x through all blocks. caches: a list with one cache per block, replaced in place, or None."""
    for i, block in enumerate(blocks):
        x, cache = block(x, rope, None if caches is None else caches[i], visible)
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
            x, weight = x.to(torch.get_autocast_dtype(x.device.type)), weight.to(torch.get_autocast_dtype(x.device.type))
        relative = share * N  # about 1: half precision would lose shares of 1 / N
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        d_x = torch.empty_like(x) if need_grad else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_grad else None
        rows = max(1, LOGITS_AT_ONCE // len(weight))
        buffer = x.new_empty(min(rows, N), len(weight))  # one for all slices: fresh memory is slow to touch on a CPU
        for a in range(0, N, rows):
            part, wanted = slice(a, min(a + rows, N)), targets[a : a + rows].unsqueeze(1)
            logits = torch.mm(x[part], weight.t(), out=buffer[: len(wanted)])
            logits = logits if logits.dtype == torch.float32 else logits.float()
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
        d_x, d_weight = ctx.saved_tensors
        d_loss = d_loss / max(1, ctx.N)
        return d_x * d_loss.to(d_x.dtype), d_weight * d_loss, None, None


def row_shares(rows, n_rows):
    """
    rows (N,): the row of a batch that each answer token belongs to -> its share (N,) of a loss that is the mean over rows of each
    row's mean. A big grid then counts as much as a small one, and two processes with half the rows each agree with one.
    """
    return 1.0 / (torch.bincount(rows, minlength=n_rows)[rows] * n_rows)


def split_parameters(model, weight_decay):
    """Two groups for an optimizer: matrices are decayed; embeddings, norms, gates' A_log and dt_bias, short convolutions not."""
    decayed, kept = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and not name.startswith("wte")
        (decayed if matrix else kept).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def sample(logits, temperature, top_k, generator=None):
    """logits (B, V) -> ids (B,). temperature 0 is greedy; ids that name nothing are never drawn."""
    logits = logits[:, : tok.END + 1].float()
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)


def core_flops_per_token(config, context):
    """
    Forward FLOPs (2 per multiply-add) of one token through all blocks at a context of `context` tokens: the matrices, the scores
    of full attention (half of them, causal), and the chunked KDA products at 64 tokens a chunk.
    """
    d, per_head = config.n_embd, config.n_embd // config.n_head
    total = 0
    for i in range(config.n_layer):
        total += 2 * 3 * d * config.n_ff
        if config.layer_pattern[i % len(config.layer_pattern)] == "a":
            total += 2 * 4 * d * d + 2 * d * context
        else:
            total += 2 * (4 * d * d + 4 * d * per_head + 12 * d + d * config.n_head)
            total += 2 * d * (4 * 64 + 4 * per_head)
    return total


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
        # All weights in one place: matrices N(0, 1 / fan_in), embedding N(0, 0.02), every branch starts by adding nothing, and
        # KDA forgets at the pace of its dt_bias alone until it has learned better.
        for name, p in self.named_parameters():
            if name.startswith("wte"):
                nn.init.normal_(p, std=0.02)
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
        return torch.optim.AdamW(split_parameters(self, weight_decay), lr=learning_rate, betas=betas, fused=True)

    def hidden(self, idx, positions=None, caches=None):
        """idx (B, T) -> what the head reads (B, T, n_embd). positions (B, T, 3) when idx alone does not tell them (decoding)."""
        rope = rope_3d(arc.positions(idx) if positions is None else positions, self.config.n_embd // self.config.n_head,
                       self.config.rope_base)  # fmt: skip
        return self.norm_f(run_blocks(self.blocks, self.wte(idx), rope, caches))

    def forward(self, idx, targets=None, *, mode="text", carry=None):
        """
        idx (B, T) of token ids; targets (B, T), IGNORE where there is no loss.
        Without targets: logits (B, T, vocab_size), None, None. With targets: None, the loss, None: logits of 50,304 words are the
        largest tensor of a training step and nobody reads them. The loss is the mean over tokens in mode "text", and over rows of
        each row's mean in mode "puzzle". carry is for Route B.
        """
        x = self.hidden(idx)
        if targets is None:
            return F.linear(x, self.wte.weight), None, None
        keep = targets != IGNORE
        x, targets = x[keep], targets[keep]
        share = row_shares(keep.nonzero()[:, 0], len(idx)) if mode == "puzzle" else torch.ones_like(x[:, 0]).float() / len(x)
        return None, LinearCrossEntropy.apply(x, self.wte.weight, targets, share), None

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=(tok.EOT,), generator=None):
        """
        Continue idx (B, T), a token at a time: yields (B,) ids as they are drawn, and ends when row 0 draws one of `stop`.
        The state is O(1) in the KDA layers; full-attention layers keep keys and values.
        """
        caches = [block.mixer.empty_cache(len(idx)) for block in self.blocks]
        new = idx
        for _ in range(max_new_tokens):
            positions = arc.positions(idx)[:, -new.shape[1] :]
            logits = F.linear(self.hidden(new, positions, caches)[:, -1], self.wte.weight)
            drawn = sample(logits, temperature, top_k, generator)
            yield drawn
            if drawn[0].item() in stop:
                return
            new = drawn.unsqueeze(1)
            idx = torch.cat([idx, new], 1)

    @torch.no_grad()
    def answer(self, tasks):
        """
        Solve tasks greedily, left to right, under the grammar of grids: only tokens that can follow are allowed, so every answer
        parses. tasks: list of arc.Task, whose test outputs are not read. Returns for each task, for each of its test inputs, a
        list of (grid, log-probability), best first; None where prompt and answer do not fit into block_size.
        """
        answers = [[None] * len(task.test) for task in tasks]
        groups = {}  # prompts of one length are decoded together
        for i, task in enumerate(tasks):
            for j, (test_input, _) in enumerate(task.test):
                prompt = arc.encode_prompt(task.kind, task.train, test_input)
                limit = arc.canvas_shape(task.train, test_input)
                if len(prompt) + limit[0] * (limit[1] + 1) <= self.config.block_size:
                    groups.setdefault(len(prompt), []).append((i, j, prompt, limit))
        for group in groups.values():
            for start in range(0, len(group), 64):
                part = group[start : start + 64]
                for (i, j, _, _), candidate in zip(part, self._decode_grids(part)):
                    answers[i][j] = [candidate]
        return answers

    def _decode_grids(self, part):
        """part: list of (_, _, prompt, (most rows, most columns)), prompts of one length -> list of (grid, log-probability)."""
        device = self.wte.weight.device
        ids = torch.arange(tok.CELL0, tok.ROW + 1, device=device).tolist() + [tok.EOT]  # ten colours, then these two
        ROW, END = 10, 11
        idx = torch.from_numpy(np.stack([p for _, _, p, _ in part]).astype(np.int64)).to(device)
        caches = [block.mixer.empty_cache(len(part)) for block in self.blocks]
        rows = [[[]] for _ in part]  # of each answer; the last one is being written
        score = [0.0] * len(part)
        done = [False] * len(part)
        new = idx
        while True:
            positions = arc.positions(idx)[:, -new.shape[1] :]
            logits = F.linear(self.hidden(new, positions, caches)[:, -1], self.wte.weight[ids]).float().cpu()
            allowed = torch.full_like(logits, -torch.inf)
            for b, (_, _, _, (most_rows, most_columns)) in enumerate(part):
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
            log_p, drawn = (logits + allowed).log_softmax(-1).max(-1)
            for b, choice in enumerate(drawn.tolist()):
                if done[b]:
                    continue
                score[b] += log_p[b].item()
                if choice == END:
                    done[b] = True
                elif choice == ROW:
                    rows[b].append([])
                else:
                    rows[b][-1].append(choice)
            if all(done):
                return [(np.array(r[:-1], dtype=np.uint8), s) for r, s in zip(rows, score)]
            new = torch.tensor([ids[c] for c in drawn.tolist()], device=device).unsqueeze(1)
            idx = torch.cat([idx, new], 1)

    @torch.no_grad()
    def answer_logits(self, tasks, answers):
        """
        Log-probabilities of given answers, by teacher forcing. answers: for each task, for each test input, a grid or None.
        Returns the same nesting of float32 arrays (h, w), the log-probability of each cell given all before it; None where the
        answer is None or the row longer than block_size.
        """
        out = []
        for task, grids in zip(tasks, answers):
            out.append([])
            for (test_input, _), grid in zip(task.test, grids):
                if grid is None:
                    out[-1].append(None)
                    continue
                ids = arc.encode(task.kind, [*task.train, (test_input, grid)])
                h, w = grid.shape
                n = h * (w + 1)  # answer tokens; the EOT comes after them
                if len(ids) - 2 > self.config.block_size:  # neither the last ROW nor the EOT has to be read
                    out[-1].append(None)
                    continue
                idx = torch.from_numpy(ids.astype(np.int64)).to(self.wte.weight.device).unsqueeze(0)
                logits = F.linear(self.hidden(idx[:, :-2])[0, -n:], self.wte.weight).float()
                log_p = logits.log_softmax(-1).gather(1, idx[0, -n - 1 : -1, None])
                out[-1].append(log_p.view(h, w + 1)[:, :w].cpu().numpy())
        return out


def describe(model):
    """Print parameters by part, and FLOPs per token."""
    parts = {}
    for name, p in model.named_parameters():
        part = "embedding and head" if name.startswith("wte") else next((s for s in ("mixer", "mlp") if s in name), "norms and the rest")
        parts[part] = parts.get(part, 0) + p.numel()
    print(f"{model.__class__.__name__}: {model.config}")
    for part, n in parts.items():
        print(f"  {part:20s} {n / 1e6:8.2f} M")
    print(f"  {'parameters':20s} {model.num_params() / 1e6:8.2f} M")
    for context in (1024, 4096):
        print(f"  forward FLOPs per token of text at context {context}: {model.flops_per_token(context) / 1e6:.0f} M")


if __name__ == "__main__":
    describe(Model(Config()))
