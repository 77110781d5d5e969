"""
Route B: a Tiny Recursive Model. One small core, applied over and over to its own answer.

From "Less is More: Recursive Reasoning with Tiny Networks" (arXiv 2510.04871). There are three sequences of
vectors, one vector per token: x the embedded input, y the current answer, z a latent. With f the core,
which has Route A's mixers, three of KDA to one of full attention, but post-norm:

    latent recursion    n times  z = f(x + y + z),   then  y = f(y + z)
    deep recursion      T latent recursions, of which the last n_grad (published: 1) have a gradient
    training            up to n_sup supervision steps per puzzle: a deep recursion, a loss on y, an optimizer
                        step; y and z are carried on, detached
    answering           n_sup deep recursions, or fewer if the halting head says that the answer is right: it
                        judges each cell, and the answer is as sure as its least sure cell

Puzzles are answered on a canvas: a grid that has the test input on it, and blank cells where the answer may
be larger. Every cell of the answer is predicted at once, again and again. Full attention sees both ways.
KDA reads in one direction, so its heads take eight (grid_lines). For puzzles alone an MLP along lines can
take its place (LineMLP). Text is causal and goes through the core twice per token: z = f(x + y + z), y =
f(y + z).

The published model learns an embedding per task, and cannot answer a task that it was not trained on. Here
the task is in the row.

The file in order: settings, how KDA and the MLP read grids, the block, the model: recursion, text, learning
puzzles, answering them. `python model_trm.py` describes the 100M model. Before this: model_dense.py. Read
next: train.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import model_dense
from kda import KimiDeltaAttention
from model_dense import Attention, HubMixin, RMSNorm, SwiGLU, linear_cross_entropy, row_shares, run_blocks
from smol import arc, engine
from smol import tokenizer as tok
from smol.engine import ANSWER_IDS, NOISE
from smol.tokenizer import IGNORE

ANSWER_ROWS = [i - tok.EOT for i in ANSWER_IDS]  # their rows in Model.puzzle_words
WAYS = 8  # to read grids
SHORT = 16  # tokens of lines that are sequences of their own on a CPU


@dataclass
class Config(model_dense.Config):
    """Route A's, and: the defaults are the 100M model with the published recursion for puzzles."""

    n_layer: int = 8
    n_head: int = 12
    n_embd: int = 768
    n_ff: int = 2208
    n_line: int = 64  # hidden width of an MLP along lines: layer_pattern may have m, see LineMLP
    n_latent: int = 6  # n: updates of z per latent recursion
    n_recursion: int = 3  # T: latent recursions per supervision step
    n_grad: int = 1  # of them with gradient, the last ones; each costs as much memory again
    n_sup: int = 16  # supervision steps per puzzle, at most
    halt_exploration: float = 0.1  # share of puzzles that go on for a random number of steps, whatever q says


def check_config(config):
    """Raises ValueError, in one line, for a model that cannot be built."""
    model_dense.check_config(config, kinds="kam")
    if config.n_grad > config.n_recursion:
        raise ValueError(f"n_grad={config.n_grad} is more than n_recursion={config.n_recursion}")


# -----------------------------------------------------------------------------
# how KDA reads grids


def grid_lines(idx, positions):
    """
    Eight ways to read grids: rows, columns, tiles and pairs, each forwards and backwards. idx (B, T) long,
    positions (B, T, 3) as in arc.positions -> (order, back, starts), each (B, T, 8): the token that is read
    as the t-th, when token t is read, and whether a line starts with the t-th that is read.

    rows, columns     each of one grid
    tiles             squares from the upper left corner on, of about as many cells as the grid's longer side
                      has: a sudoku's boxes
    pairs             one line through all grids: a cell of the first input and right after it the output's at
                      the same place, cell by cell; then the next pair, and last the canvas

    In a line of pairs, what a demonstration does to a cell stands in two neighbours. Backwards, its cells
    come from the last to the first, but inputs still before outputs and demonstrations before the canvas.
    Without demonstrations, pairs are read as rows. What is in no grid is a line of its own, and so are every
    eight tokens of padding.
    """
    B, T = idx.shape
    row, column, grid = positions.unbind(-1)
    pad = idx == tok.PAD
    alone = grid.amax(1, keepdim=True) < 2  # no demonstrations
    grid = torch.where(pad, T, grid)
    side = tile_sides(row, column, grid)

    def key(a, b, c):
        """To sort by a, then b, then c: a grid has at most 30 rows, and 30 columns and a <|row|>."""
        return (a * 64 + b) * 64 + c

    in_row, in_column = key(grid, 0, row), key(grid, 0, column)
    in_tile = key(grid, row // side, column // side)
    pair = (grid + 1) // 2
    at = torch.arange(T, device=idx.device).expand_as(idx)
    down = (in_column * 64 + row).argsort(dim=1, stable=True)
    by_tile = in_tile.argsort(dim=1, stable=True)
    by_cell = torch.where(alone, at, key(pair, row, column).argsort(dim=1, stable=True))
    from_last = key(pair, 63 - row, 63 - column).argsort(dim=1, stable=True)
    by_cell_back = torch.where(alone, at.flip(1), from_last)
    in_pairs = torch.where(alone, in_row, pad)
    orders = [at, at.flip(1), down, down.flip(1), by_tile, by_tile.flip(1), by_cell, by_cell_back]
    lines = [in_row, in_row, in_column, in_column, in_tile, in_tile, in_pairs, in_pairs]
    order = torch.stack(orders, -1)
    line = torch.where(pad.unsqueeze(-1), -1 - at.unsqueeze(-1) // 8, torch.stack(lines, -1)).gather(1, order)
    starts = torch.ones_like(line, dtype=torch.bool)
    starts[:, 1:] = line[:, 1:] != line[:, :-1]
    return order, order.argsort(dim=1), starts


def tile_sides(row, column, grid):
    """row, column, grid (B, T) long, grid at most T -> (B, T): the side of the tiles of each token's grid."""
    B, T = grid.shape
    sides = grid.new_zeros(B, T + 1).scatter_reduce(1, grid, torch.maximum(row + 1, column), "amax")
    return sides.sqrt().round().long().gather(1, grid)


class Lines(NamedTuple):
    """
    How the heads of a layer read: tokens (B, T) become sequences (N, S). take: the token that comes to each
    place, as numbers of rows of K in (B, T, H, K); take_qkv: in (B, T, 3H, K). slots: the place of each token
    in (N, S, H, K). starts (N, S, H) bool, or None: every sequence is a line.
    """

    shape: tuple
    take: torch.Tensor
    take_qkv: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor


def lay_out(order, back, starts):
    """
    What grid_lines returned, for the heads of a layer (B, T, H) -> Lines. Once a step: all passes read alike.
    On a CPU, short lines are sequences of their own, with less for kda to do and nothing to forget.
    """
    B, T, H = order.shape
    row, at, head = (torch.arange(n, device=order.device) for n in (B, T, H))
    row, at, shape = row[:, None, None], at[:, None], (B, T)
    place = (row * T + at).expand(B, T, H)
    if order.device.type == "cpu":
        within = at - torch.where(starts, at, 0).cummax(1).values
        n_lines, longest = int(starts.sum(1).max()), int(within.max()) + 1
        if longest <= SHORT and n_lines * longest <= 2 * T:
            place = (row * n_lines + starts.cumsum(1) - 1) * longest + within
            shape, starts = (B * n_lines, longest), None
    take = place.new_zeros(shape[0] * shape[1], H)  # a place without a token has the first: nobody reads it
    take.scatter_(0, place.flatten(0, 1), (row * T + order).flatten(0, 1))
    take_qkv = (take[:, None] * 3 + torch.arange(3, device=head.device)[:, None]) * H + head
    slots = place.gather(1, back) * H + head
    return Lines(shape, (take * H + head).flatten(), take_qkv.flatten(), slots.flatten(), starts)


class GridKDA(KimiDeltaAttention):
    """KDA whose heads take turns in the eight ways to read grids, and so on in the next such layer."""

    def __init__(self, config, number):
        head_dim = config.n_embd // config.n_head
        super().__init__(config.n_embd, config.n_head, head_dim, norm_eps=config.norm_eps)
        self.first_way = number * config.n_head % WAYS

    def forward(self, x, cache=None, starts=None, lines=None):
        """lines: {first way: Lines}, with neither cache nor starts; None: text is read as it stands."""
        if lines is None:
            return super().forward(x, cache, starts)
        way, (H, K) = lines[self.first_way], (self.num_heads, self.head_dim)
        qkv, f, beta, gate = self.project(x)
        qkv = qkv.reshape(-1, K).index_select(0, way.take_qkv).view(*way.shape, 3 * H * K)
        f = f.reshape(-1, K).index_select(0, way.take).view(*way.shape, H, K)
        beta = beta.flatten().index_select(0, way.take).view(*way.shape, H)
        o, _ = self.mix(qkv, f, beta, None, way.starts)
        o = o.reshape(-1, K).index_select(0, way.slots).view(*x.shape[:2], H, K)
        return self.output(o.to(x.dtype), gate), None


class LineMLP(nn.Module):
    """
    A SwiGLU over the cells of each line: of rows, of columns or of tiles, by turns from one such layer to the
    next. All lines and all channels have the same weights, by a cell's place in its line. TRM has one over
    all cells at once (its mixer for sudokus), which knows grids of one size only. What is in no grid gets
    nothing: text is left to the other layers.
    """

    def __init__(self, config, number):
        super().__init__()
        self.way = number % 3  # of the three that cell_lines lays out
        self.up_proj = nn.Linear(arc.MAX_SIDE, 2 * config.n_line, bias=False)
        self.down_proj = nn.Linear(config.n_line, arc.MAX_SIDE, bias=False)

    def empty_cache(self, batch_size, length):
        return ()

    def forward(self, x, cells):
        """x (B, T, D), cells as cell_lines made them, or None in text -> (B, T, D)."""
        if cells is None:  # DDP waits for a gradient of every parameter
            return torch.zeros_like(x) + 0.0 * (self.up_proj.weight.sum() + self.down_proj.weight.sum())
        (N, S), take, slots = cells[self.way]
        lines = F.pad(x.flatten(0, 1), (0, 0, 0, 1)).index_select(0, take).view(N, S, x.shape[-1]).mT
        gate, up = F.linear(lines, self.up_proj.weight[:, :S]).chunk(2, -1)  # (N, D, S) to (N, D, n_line)
        lines = F.linear(F.silu(gate) * up, self.down_proj.weight[:S]).mT.flatten(0, 1)  # (N * S, D)
        return F.pad(lines, (0, 0, 0, 1)).index_select(0, slots).view_as(x)


def cell_lines(idx, positions):
    """
    idx (B, T) long, positions (B, T, 3) -> for rows, columns and tiles (see grid_lines): the shape (N, S) of
    N lines of up to S cells, take (N * S,), the token of each place, B * T where there is none, and slots
    (B * T,), the place of each token, N * S for what is no cell.
    """
    (B, T), (row, column, grid) = idx.shape, positions.unbind(-1)
    cell, side, n_grids = arc.grid_cells(idx, positions), tile_sides(row, column, grid), int(grid.max())
    in_a_row = int((column // side).max()) + 1  # tiles
    tile, within = row // side * in_a_row + column // side, row % side * side + column % side
    token, out = torch.arange(B * T, device=idx.device).view(B, T), []
    for line, place in ((row, column), (column, row), (tile, within)):
        n_lines, S = (int(torch.where(cell, t, 0).max()) + 1 for t in (line, place))
        N = B * n_grids * n_lines
        slot = (((token // T) * n_grids + grid - 1) * n_lines + line) * S + place
        take = token.new_full((N * S,), B * T)
        take[slot[cell]] = token[cell]
        out.append(((N, S), take, torch.where(cell, slot, N * S).flatten()))
    return out


MIXERS = {"k": GridKDA, "m": LineMLP}  # besides attention

# -----------------------------------------------------------------------------
# the block


class Block(nn.Module):
    """
    A mixer and a SwiGLU, post-norm: norm(x + f(x)). The core reads its own output again and again, and no
    vector may grow.
    """

    def __init__(self, config, kind, number):
        super().__init__()
        self.kind = kind
        self.mixer = Attention(config) if kind == "a" else MIXERS[kind](config, number)
        self.mlp = SwiGLU(config)
        self.norm_1 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.norm_2 = RMSNorm(config.n_embd, eps=config.norm_eps)

    def forward(self, x, rope, attn_mask=None, starts=None, lines=None, cells=None, cache=None, length=0):
        if self.kind == "k":
            h, cache = self.mixer(x, cache, starts, lines)
        elif self.kind == "m":
            h = self.mixer(x, cells)
        else:
            h = self.mixer(x, rope, attn_mask, cache, length)
        x = self.norm_1(x + h)
        return self.norm_2(x + self.mlp(x)), cache


# -----------------------------------------------------------------------------
# the model


def init_weights(model):
    """
    Matrices are N(0, 1 / fan_in). Post-norm keeps vectors at length sqrt(n_embd), but a branch as large as
    the stream it joins makes the gradient grow. The last matrix of each branch is therefore smaller, and
    smaller in a deeper core: then a pass hands on about as much gradient as it gets.
    """
    c = model.config
    nn.init.normal_(model.wte.weight, std=c.n_embd**-0.5)  # scaled to unit size when it is looked up
    nn.init.zeros_(model.q_head.weight)
    nn.init.zeros_(model.q_head.bias)
    for block in model.blocks:
        model_dense.init_linears(block)
        mixed = block.mixer.down_proj if block.kind == "m" else block.mixer.o_proj
        for last in (mixed, block.mlp.down_proj):
            nn.init.normal_(last.weight, std=(2 / c.n_layer / last.in_features) ** 0.5)


class Model(nn.Module, HubMixin, library_name="smol-llm", license="mit"):
    Config = Config
    puzzle_format = "canvas"

    def __init__(self, config: Config):
        super().__init__()
        check_config(config)
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # the output head as well
        kinds = model_dense.layer_kinds(config)
        numbers = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]  # among the layers of a kind
        self.blocks = nn.ModuleList(Block(config, *one) for one in zip(kinds, numbers))
        self.first_ways = [block.mixer.first_way for block in self.blocks if block.kind == "k"]
        self.q_head = nn.Linear(config.n_embd, 1)  # halting: is the answer right in this cell?
        self.register_buffer("y_init", torch.randn(config.n_embd).clamp(-2, 2))
        self.register_buffer("z_init", torch.randn(config.n_embd).clamp(-2, 2))
        init_weights(self)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def passes(self, mode):
        """Passes through the core of a text token, or of a supervision step: (all, those with gradient)."""
        if mode == "text":
            return 2, 2
        n, T, n_grad = self.config.n_latent, self.config.n_recursion, self.config.n_grad
        return T * (n + 1), n_grad * (n + 1)

    def flops_per_token(self, context, mode="text", training=False):
        """
        FLOPs per token, forward, or forward and backward; in puzzles of one supervision step, without the
        head, which runs on few positions. A canvas sees both ways, which is twice the attention of Route A.
        """
        forward, with_gradient = self.passes(mode)
        passes = forward + 2 * with_gradient if training else forward
        core = model_dense.core_flops_per_token(self.config, context if mode == "text" else 2 * context)
        head = 2 * self.config.n_embd * self.config.vocab_size if mode == "text" else 0
        return passes * core + head * (3 if training else 1)

    def forward(self, idx, targets=None, *, mode="text", carry=None):
        """
        idx (B, T). In mode "text" a row holds many documents; in mode "puzzle" it is one, right-padded with
        PAD. Returns (logits, None, None), (B, T, vocab_size) or in puzzles (B, T, 11) over ANSWER_IDS. With
        targets (B, T), IGNORE where there is no loss: (None, loss, carry). In training, a puzzle takes one
        supervision step, on the rows that the carry holds, and on rows of idx in place of those that have
        halted. Otherwise it takes all n_sup.
        """
        if mode == "text":
            return self.forward_text(idx, targets)
        if targets is not None and self.training:
            return self.forward_carried(idx, targets, carry)
        for _, y, _ in self.answer_steps(idx):  # the last one's
            pass
        if targets is None:
            return F.linear(y, self.wte.weight[ANSWER_IDS]), None, None
        return None, self.canvas_loss(y, targets, targets != IGNORE, self.puzzle_words())[0], None

    # ---- the recursion

    def deep_recursion(self, x, y, z, layout):
        """x, y, z (B, T, n_embd), layout as in run_blocks -> y, z. A supervision step, but for the loss."""
        c, with_grad = self.config, torch.is_grad_enabled()

        def core(h):
            return run_blocks(self.blocks, h, layout, recompute=c.recompute)

        for i in range(c.n_recursion):
            if with_grad and 0 < i == c.n_recursion - c.n_grad:
                # older PyTorch would take weights again that autocast cast without gradient (pytorch#65766)
                torch.clear_autocast_cache()
            with torch.set_grad_enabled(with_grad and i >= c.n_recursion - c.n_grad):
                for _ in range(c.n_latent):
                    z = core(x + y + z)
                y = core(y + z)
        return y, z

    def start(self, idx):
        """The first y and z (B, T, n_embd) for idx (B, T), the same at every position."""
        return self.y_init.expand(*idx.shape, -1), self.z_init.expand(*idx.shape, -1)

    def rope(self, positions):
        c = self.config
        return model_dense.rope_3d(positions, c.n_embd // c.n_head, c.rope_base)

    # ---- text

    def empty_cache(self, batch_size, length):
        """For both passes: what a token was in the second, later tokens look up in the second."""
        return [block.mixer.empty_cache(batch_size, length) for _ in range(2) for block in self.blocks]

    def hidden(self, idx, starts=None, attn_mask=None, positions=None, cache=None, length=0):
        """As in Route A: idx (B, T) of text -> y (B, T, n_embd), which the head reads."""
        positions = arc.positions(idx) if positions is None else positions
        attn_mask = model_dense.document_mask(starts) if attn_mask is None else attn_mask
        layout, recompute = (self.rope(positions), attn_mask, starts), self.config.recompute
        half = len(self.blocks)
        first, second = (None, None) if cache is None else (cache[:half], cache[half:])
        x = self.wte(idx) * self.config.n_embd**0.5
        y, z = self.start(idx)
        z = run_blocks(self.blocks, x + y + z, layout, first, length, recompute)
        y = run_blocks(self.blocks, y + z, layout, second, length, recompute)
        if cache is not None:
            cache[:] = first + second
        return y

    def forward_text(self, idx, targets):
        y = self.hidden(idx, model_dense.document_starts(idx))
        if targets is None:
            return F.linear(y, self.wte.weight), None, None
        keep = targets != IGNORE
        share = torch.ones_like(targets[keep]) / keep.sum()
        loss = linear_cross_entropy(y[keep], self.wte.weight, targets[keep], share)
        # DDP waits for a gradient of every parameter, and text has none for the halting head.
        return None, loss + 0.0 * sum(p.sum() for p in self.q_head.parameters()), None

    # ---- learning puzzles

    def puzzle_words(self):
        """
        (number of reserved ids, n_embd): the embedding of what puzzles are made of, <|endoftext|> first.
        Taken once a step: every look-up in the embedding itself would have a gradient of 50,304 rows.
        """
        return self.wte.weight[tok.EOT : tok.END + 1]

    def embed_canvas(self, idx, words):
        """
        idx (B, T), words as in puzzle_words -> x (B, T, n_embd) of about unit size per channel, the layout
        for run_blocks, and the cells of the canvas (B, T) bool. A cell of the test input lies where its
        answer goes, which halves the row of a sudoku. It also gets the embedding of a blank cell: it is to be
        answered.
        """
        positions = arc.positions(idx)
        canvas = arc.canvas_cells(idx, positions)
        given = canvas & (idx != tok.BLANK)
        x = F.embedding(idx - tok.EOT, words) + given.unsqueeze(-1) * words[tok.BLANK - tok.EOT]
        attn_mask = (idx != tok.PAD)[:, None, None, :]  # all but padding; never None, which is causal
        cells = cell_lines(idx, positions) if any(block.kind == "m" for block in self.blocks) else None
        layout = self.rope(positions), attn_mask, None, self.lines(idx, positions), cells
        return x * self.config.n_embd**0.5, layout, canvas

    def lines(self, idx, positions):
        """{first way of a KDA layer: how its heads read the grids}."""
        if not self.first_ways:
            return None
        every, H = grid_lines(idx, positions), self.config.n_head
        ways = {first: [(first + i) % WAYS for i in range(H)] for first in self.first_ways}
        return {first: lay_out(*(t[..., heads] for t in every)) for first, heads in ways.items()}

    def halt_logit(self, y, canvas):
        """
        y (B, T, n_embd), canvas (B, T) bool -> (B,): above 0, the answer is taken for all correct. It is as
        sure as the least sure of its cells.
        """
        return self.q_head(y).squeeze(-1).float().masked_fill(~canvas, torch.inf).amin(1)

    def canvas_loss(self, y, targets, canvas, words):
        """The mean over rows of the mean over their canvas cells, and whether each cell is right (N,)."""
        logits = F.linear(y[canvas], words[ANSWER_ROWS])  # (N, 11)
        wanted = torch.where(targets[canvas] == tok.VOID, 10, targets[canvas] - tok.CELL0)
        loss = F.cross_entropy(logits.float(), wanted, reduction="none")
        share = row_shares(canvas.nonzero()[:, 0], len(y))
        return (loss * share).sum(), logits.argmax(-1) == wanted

    def halting_loss(self, y, canvas, right):
        """Of the head that says of each cell whether it is right; right (N,) bool. Weighed like the cells."""
        loss = F.binary_cross_entropy_with_logits(
            self.q_head(y[canvas]).squeeze(-1).float(), right.float(), reduction="none"
        )
        return 0.5 * (loss * row_shares(canvas.nonzero()[:, 0], len(y))).sum()

    def forward_carried(self, idx, targets, carry):
        """A supervision step of training."""
        words = self.puzzle_words()
        y, carry = self.carried_step({"idx": idx, "targets": targets}, carry, words)
        canvas = carry["targets"] != IGNORE
        loss, right = self.canvas_loss(y, carry["targets"], canvas, words)
        loss = loss + self.halting_loss(y, canvas, right)
        return None, loss, {**carry, "halted": self.halts(self.halt_logit(y, canvas), carry)}

    def carried_step(self, fresh, carry, words):
        """
        The recursion of a supervision step. fresh: tensors (B, ...) with a puzzle per row, "idx" (B, T)
        among them. carry: None, or what the step before left of them, with y, z, steps (B,), begun (B,),
        which counts the puzzles that each row has had, and halted (B,). Rows that have halted are replaced
        by those of fresh. Returns y (B, T, n_embd) with gradient, and the new carry, all but `halted`.
        ValueError if the carry has another shape than idx.
        """
        idx, (y, z) = fresh["idx"], self.start(fresh["idx"])
        zeros = torch.zeros(len(idx), dtype=torch.long, device=idx.device)
        fresh = {**fresh, "y": y, "z": z, "steps": zeros}
        if carry is None:
            carry = {**fresh, "begun": zeros, "halted": zeros == 0}
        if carry["idx"].shape != idx.shape:
            held, asked = tuple(carry["idx"].shape), tuple(idx.shape)
            raise ValueError(f"the carry holds rows of shape {held}, not {asked}: keep one per shape")
        new = carry["halted"]
        rows = {k: torch.where(new.view(-1, *[1] * (v.ndim - 1)), v, carry[k]) for k, v in fresh.items()}
        x, layout, _ = self.embed_canvas(rows["idx"], words)
        y, z = self.deep_recursion(x, rows["y"], rows["z"], layout)
        # y and z are kept in float16 under autocast, which has room for them: nothing is beyond sqrt(n_embd).
        # A run holds a carry for every micro-batch and every length: gigabytes.
        dtype = torch.float16 if torch.is_autocast_enabled(x.device.type) else x.dtype
        kept = {"y": y.detach().to(dtype), "z": z.detach().to(dtype), "steps": rows["steps"] + 1}
        return y, {**rows, **kept, "begun": carry["begun"] + new}

    @torch.no_grad()
    def halts(self, q, carry):
        """Halting logits q (B,), the carry after a step -> (B,) bool: which rows are done."""
        may_halt = carry["steps"] >= self.min_steps(carry["idx"], carry["begun"])
        return (carry["steps"] >= self.config.n_sup) | ((q > 0) & may_halt)

    def min_steps(self, idx, begun):
        """
        Exploration: (B,) the fewest steps that each row takes. 1 for most; uniform in 2..n_sup for a share
        of halt_exploration. A hash of the row and of begun (B,): one process or two, resumed or not, draw
        the same, and a row that comes again draws anew.
        """
        prime = 2**31 - 1
        weights = torch.arange(1, idx.shape[1] + 1, device=idx.device) * 2654435761 % prime
        draw = ((idx * weights).sum(1) + begun * 1640531527) % prime * 48271 % prime
        steps = 2 + (draw * 16807 % prime) % max(self.config.n_sup - 1, 1)
        return torch.where(draw < math.ceil(self.config.halt_exploration * prime), steps, 1)

    # ---- answering puzzles

    def answer_steps(self, idx, n_sup=None, halt=None, n_rollouts=1, noise=NOISE, seed=0):
        """
        Yields after each supervision step on puzzles idx (B, T): the rows (R,) still worked on, each as often
        as it has rollouts, y (R, T, n_embd), and the halting probability (R,). A row leaves the batch once
        the probability of one of its rollouts has passed `halt`; with None, all take n_sup steps (None: as
        configured). The first rollout is the plain answer; the others have Gaussian noise of this size added
        to z before each step.
        """
        words, rows = self.puzzle_words(), torch.arange(len(idx), device=idx.device)
        rows, rngs = rows.repeat_interleave(n_rollouts), engine.rollout_rngs(idx, n_rollouts, seed)
        x, layout, canvas = self.embed_canvas(idx[rows], words)
        y, z = self.start(idx[rows])
        for _ in range(n_sup or self.config.n_sup):
            if n_rollouts > 1:
                z = z + noise * engine.normal_like(z, rngs)
            y, z = self.deep_recursion(x, y, z, layout)
            p = self.halt_logit(y, canvas).sigmoid()
            yield rows, y, p
            sure = (p > (2 if halt is None else halt)).view(-1, n_rollouts).any(1)
            if sure.all():
                return
            if sure.any():
                left = ~sure.repeat_interleave(n_rollouts)
                rows, y, z = rows[left], y[left], z[left]
                rngs = [one for one, stays in zip(rngs, left.tolist()) if stays]
                x, layout, canvas = self.embed_canvas(idx[rows], words)

    def answer(self, tasks, n_sup=None, trace=False, halt=None, n_rollouts=1, noise=NOISE, seed=0):
        """Solve tasks, whose test outputs are not read: engine.answer_canvases."""
        how = {"n_sup": n_sup, "halt": halt, "n_rollouts": n_rollouts, "noise": noise, "seed": seed}
        return engine.answer_canvases(self, tasks, trace, **how)


if __name__ == "__main__":
    print(__doc__)
    model_dense.describe(Model(Config()), passes=2)
