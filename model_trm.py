"""
Route B: a Tiny Recursive Model. One small core, applied over and over to its own answer.

From "Less is More: Recursive Reasoning with Tiny Networks" (arXiv 2510.04871). There are three sequences of vectors, one vector
per token: x the embedded input, y the current answer, z a latent scratchpad. With f the core (blocks of Route A, post-norm, three
of KDA to one of full attention):

    recursion           n times  z = f(x + y + z),   then  y = f(y + z)
    supervision step    T recursions, of which the last n_grad (published: 1) have a gradient; then a loss on what y says
    training            up to n_sup supervision steps per puzzle, an optimizer step after each; y and z are carried on, detached
    answering           n_sup supervision steps, or fewer for a puzzle whose answer the halting head believes in

So a puzzle gets n_sup * T * (n + 1) passes through the core, and training keeps the activations of only n_grad * (n + 1) of them.

Puzzles are answered on a canvas: a grid that has the test input on it, and blank cells where the answer may be larger; what is to
stand there is predicted for every cell at once, again and again. Full attention then sees both ways. KDA, which can only read in one
direction, reads in eight: its heads take the rows, columns and square tiles of each grid in turn, forwards and backwards, each line for
itself, and the pairs of input and output, each cell of the output after the one it came from, which is where a rule shows. Text is
causal and asks for the next token, as in Route A; each of the passes through the core keeps its own cache, so decoding works token by
token as well.

The published model learns an embedding per task, and cannot touch a task it was not trained on. Here the task is in the row.

The file in order: settings; the recursion; reading text; learning puzzles; answering them.

Run `python model_trm.py` to see the 100M model described, and what a token costs. Before this: model_dense.py. Read next: train.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import configurator
from model_dense import (
    IGNORE,
    check_config,
    core_flops_per_token,
    describe,
    document_starts,
    linear_cross_entropy,
    make_blocks,
    rope_3d,
    row_shares,
    run_blocks,
    same_document,
)
from model_dense import Model as RouteA
from smol import arc
from smol import tokenizer as tok
from smol.muon import split_parameters

ANSWER_IDS = [*range(tok.CELL0, tok.CELL0 + 10), tok.VOID]  # what a canvas cell can become
ANSWER_ROWS = [i - tok.EOT for i in ANSWER_IDS]  # their rows in Model.puzzle_words
ANSWER_TOKENS = 8192  # positions per batch when answering: memory stays the same for short and long tasks


@dataclass
class Config:
    """The defaults are the 100M model with the published recursion settings for puzzles."""

    block_size: int = 1024
    vocab_size: int = tok.VOCAB_SIZE
    n_layer: int = 8
    n_head: int = 12
    n_kv_head: int | None = None
    n_embd: int = 768
    n_ff: int = 2208
    layer_pattern: str = "kkka"
    rope_base: float = 100.0
    norm_eps: float = 1e-5
    n_latent: int = 6  # n: latent updates per recursion, in puzzles
    n_recursion: int = 3  # T: recursions per supervision step
    n_grad: int = 1  # of them with gradient, the last ones; more is truncated backpropagation further back, and as much more memory
    n_sup: int = 16  # supervision steps per puzzle, at most
    text_n_latent: int = 1  # the same four for text, where all but the third multiply the cost of a token
    text_n_recursion: int = 1
    text_n_grad: int = 1
    text_n_sup: int = 1
    separate_documents: bool = True  # text: as in Route A
    recompute: bool = False  # as in Route A
    halt_exploration: float = (
        0.1  # share of puzzles that must go on for a random number of steps whatever the halting head says
    )


class Model(nn.Module):
    Config = Config
    puzzle_format = "canvas"

    def __init__(self, config):
        super().__init__()
        check_config(config)
        names = ("n_latent", "n_recursion", "n_grad", "n_sup")
        for name in (*names, *(f"text_{name}" for name in names)):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
        for name, most in (("n_grad", "n_recursion"), ("text_n_grad", "text_n_recursion")):
            if getattr(config, name) > getattr(config, most):
                raise ValueError(
                    f"{name}={getattr(config, name)} recursions cannot have a gradient: {most}={getattr(config, most)}"
                )
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = make_blocks(config, post=True)
        self.q_head = nn.Linear(config.n_embd, 1)  # is the answer all correct?
        self.register_buffer("y_init", torch.randn(config.n_embd).clamp(-2, 2))
        self.register_buffer("z_init", torch.randn(config.n_embd).clamp(-2, 2))
        # Post-norm keeps every vector at length sqrt(n_embd), and x is scaled to match. What it does not keep is the gradient: a
        # branch as large as the stream it joins makes it grow, and it goes through n_layer * (n_latent + 1) layers and more. The last
        # matrix of each branch is therefore smaller, and smaller in a deeper core: then a pass hands on about as much as it gets.
        for name, p in self.named_parameters():
            if name.endswith("f_proj.1.weight"):
                nn.init.zeros_(p)  # as in Route A: KDA first forgets at the pace of its dt_bias alone
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(p, std=(2 / config.n_layer / p.shape[1]) ** 0.5)
            elif p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name.endswith("bias") and not name.endswith("dt_bias"):
                nn.init.zeros_(p)
        nn.init.zeros_(self.q_head.weight)

    def num_params(self):
        """All of them; the embedding is also the output head and counts once."""
        return sum(p.numel() for p in self.parameters())

    def recursion(self, mode):
        """(n, T, n_grad) in mode "text" or "puzzle"."""
        c = self.config
        if mode == "puzzle":
            return c.n_latent, c.n_recursion, c.n_grad
        return c.text_n_latent, c.text_n_recursion, c.text_n_grad

    def passes(self, mode):
        """How often one supervision step goes through the core: (all passes, those with gradient)."""
        n, T, n_grad = self.recursion(mode)
        return T * (n + 1), n_grad * (n + 1)

    def flops_per_token(self, context, mode="text", training=False):
        """
        FLOPs per token, forward, or forward and backward: of all supervision steps of text, of one of a puzzle, where the head is left
        out as in Route A. Canvases see both ways, which is twice Route A's attention.
        """
        forward, backward = self.passes(mode)
        steps, backward = (self.config.text_n_sup if mode == "text" else 1), backward if training else 0
        core = core_flops_per_token(self.config, context * (2 if mode == "puzzle" else 1)) * (
            forward + 2 * backward
        )
        head = 2 * self.config.n_embd * self.config.vocab_size if mode == "text" else 0
        return steps * core + head * (
            3 * steps if training else 1
        )  # the head is read after the last step, and learns after each

    def configure_optimizer(self, weight_decay, learning_rate, betas):
        return torch.optim.AdamW(
            split_parameters(self, weight_decay), lr=learning_rate, betas=betas, fused=True
        )

    # -------------------------------------------------------------------------
    # the recursion

    def supervision_step(self, x, y, z, mode, rope, visible=None, starts=None, lines=None, caches=None):
        """
        x, y, z (B, L, n_embd) -> y, z after T recursions, of which the last n_grad have a gradient. visible, starts and lines as in
        run_blocks; caches: an iterator over one list of block caches per pass through the core, or None.
        """
        n, T, n_grad = self.recursion(mode)

        def f(h):
            cache = None if caches is None else next(caches)
            return run_blocks(self.blocks, h, rope, cache, visible, self.config.recompute, starts, lines)

        for t in range(T):
            with torch.set_grad_enabled(torch.is_grad_enabled() and t >= T - n_grad):
                for _ in range(n):
                    z = f(x + y + z)
                y = f(y + z)
        return y, z

    def start(self, x):
        """The first y and z, for every position alike."""
        return self.y_init.to(x.dtype).expand_as(x), self.z_init.to(x.dtype).expand_as(x)

    def rope(self, positions):
        return rope_3d(positions, self.config.n_embd // self.config.n_head, self.config.rope_base)

    def forward(self, idx, targets=None, *, mode="text", carry=None):
        """
        idx (B, L) of token ids. In mode "text" a row may hold many documents; in mode "puzzle" it is one, right-padded with PAD. targets
        (B, L), IGNORE where there is no loss.
        Without targets: logits, None, None; (B, L, vocab_size) in mode "text", in mode "puzzle" (B, L, 11) over ANSWER_IDS after
        n_sup supervision steps. With targets: None, the loss, the carry. In training, mode "puzzle" takes one supervision step,
        on the rows that the carry still holds and on rows of idx in place of those that have halted. Evaluated, it takes all
        n_sup and the loss is the last one's. ValueError if the carry is of other shape than idx.
        """
        if mode == "text":
            return self.forward_text(idx, targets)
        if targets is not None and self.training:
            return self.forward_carried(idx, targets, carry)
        for _, y, _ in self.think(idx):
            pass
        if targets is None:
            return F.linear(y, self.wte.weight[ANSWER_IDS]), None, None
        return None, self.canvas_loss(y, targets, targets != IGNORE, self.puzzle_words())[0], None

    # -------------------------------------------------------------------------
    # reading text

    def read_steps(self, idx, positions=None, caches=None, visible=None, starts=None):
        """idx (B, T) of text -> y (B, T, n_embd), which the head reads, after each of text_n_sup supervision steps."""
        x = self.wte(idx) * self.config.n_embd**0.5
        rope = self.rope(arc.positions(idx) if positions is None else positions)
        y, z = self.start(x)
        each_pass = None if caches is None else iter(caches)
        for _ in range(self.config.text_n_sup):
            y, z = self.supervision_step(
                x, y.detach(), z.detach(), "text", rope, visible, starts, caches=each_pass
            )
            yield y

    def forward_text(self, idx, targets):
        starts = document_starts(idx) if self.config.separate_documents else None
        steps = self.read_steps(idx, visible=None if starts is None else same_document(starts), starts=starts)
        if targets is None:
            *_, y = steps
            return F.linear(y, self.wte.weight), None, None
        keep = targets != IGNORE
        share = torch.full((int(keep.sum()),), 1.0, device=idx.device) / keep.sum()
        if not self.training:
            *_, y = steps
            return None, linear_cross_entropy(y[keep], self.wte.weight, targets[keep], share), None
        losses = [linear_cross_entropy(y[keep], self.wte.weight, targets[keep], share) for y in steps]
        # The halting head has nothing to say about text. Times zero it still gets a gradient, which DDP waits for.
        return None, sum(losses) / len(losses) + 0.0 * sum(p.sum() for p in self.q_head.parameters()), None

    # Decoding is Route A's, word for word. Only its hidden() is another: every pass through the core has caches of its own, since what a
    # position held in pass 5 is what later positions look up in pass 5.
    read, read_padded, read_on, generate = RouteA.read, RouteA.read_padded, RouteA.read_on, RouteA.generate

    def hidden(self, idx, positions=None, caches=None, visible=None, starts=None):
        *_, y = self.read_steps(idx, positions, caches, visible, starts)
        return y

    def empty_caches(self, batch_size):
        """For each pass through the core, for each block, what it remembers before the first token."""
        passes = self.config.text_n_sup * self.passes("text")[0]
        return [[block.mixer.empty_cache(batch_size) for block in self.blocks] for _ in range(passes)]

    # -------------------------------------------------------------------------
    # learning puzzles

    def puzzle_words(self):
        """
        (number of reserved ids, n_embd): of the embedding what puzzles are written with and answered in, <|endoftext|> first. A step
        takes it once and looks everything up in it: each look-up in the embedding itself would have a gradient of 50,304 rows, as much
        work as a pass through a small core.
        """
        return self.wte.weight[tok.EOT : tok.END + 1]

    def embed_canvas(self, idx, words):
        """
        idx (B, L), puzzle_words -> x (B, L, n_embd) of about unit size per channel; the rotation of its positions, who can be seen and the
        lines of its grids, as run_blocks takes them.

        The test input's cells on the canvas also get the embedding of a blank one: they are to be answered. That they lie where their
        answer goes, and not in a grid of their own, spares half of a sudoku's or maze's row, and the core the discovery of how to look up
        one cell among all (measured in LOG.md).
        """
        positions = arc.positions(idx)
        given = arc.canvas_cells(idx, positions) & (idx != tok.BLANK)
        x = F.embedding(idx - tok.EOT, words) + given.unsqueeze(-1) * words[tok.BLANK - tok.EOT]
        # Everyone sees everyone, padding excepted. Never None, even without padding: None is causal.
        visible = (idx != tok.PAD)[:, None, None, :]
        return x * self.config.n_embd**0.5, self.rope(positions), visible, arc.grid_lines(idx, positions)

    def halt_logit(self, y):
        """y (B, L, n_embd) -> (B,): above 0, the model thinks the answer is all correct. Read at the first token."""
        return self.q_head(y[:, 0]).squeeze(-1).float()

    def canvas_loss(self, y, targets, keep, words):
        """The loss at the canvas cells keep (B, L), and for each row whether all of them are right (B,)."""
        logits = F.linear(y[keep], words[ANSWER_ROWS])
        wanted = torch.where(targets[keep] == tok.VOID, len(ANSWER_IDS) - 1, targets[keep] - tok.CELL0)
        rows = keep.nonzero()[:, 0]
        wrong = torch.bincount(rows, (logits.argmax(-1) != wanted).to(logits.dtype), minlength=len(y))
        loss = F.cross_entropy(logits.float(), wanted, reduction="none")
        return (loss * row_shares(rows, len(y))).sum(), wrong == 0

    def forward_carried(self, idx, targets, carry):
        words = self.puzzle_words()
        y, carry = self.carried_step({"idx": idx, "targets": targets}, carry, words)
        loss, correct = self.canvas_loss(y, carry["targets"], carry["targets"] != IGNORE, words)
        q = self.halt_logit(y)
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q, correct.float())
        return None, loss, {**carry, "halted": self.halts(q, carry)}

    def carried_step(self, fresh, carry, words):
        """
        One supervision step of training. fresh: tensors (B, ...) of which each row belongs to a puzzle, "idx"
        (B, L) among them; carry: the same ones as the step before left them, with y, z, steps, begun and
        halted, or None; words: puzzle_words. Rows that have halted give way to those of fresh; begun (B,)
        counts those of each place. -> y (B, L, n_embd) with gradient, the new carry but for `halted`.
        ValueError if the carry is of other shape than idx.
        """
        idx = fresh["idx"]
        if carry is None:
            carry = {**fresh, "steps": torch.zeros(len(idx), dtype=torch.long, device=idx.device)}
            carry["halted"] = carry["steps"] == 0
        if carry["idx"].shape != idx.shape:
            raise ValueError(
                f"the carry holds rows of shape {tuple(carry['idx'].shape)}, not {tuple(idx.shape)}: keep one per shape"
            )
        new = carry["halted"]
        rows = {k: torch.where(new.view(-1, *[1] * (v.ndim - 1)), v, carry[k]) for k, v in fresh.items()}
        steps = torch.where(new, 0, carry["steps"]) + 1
        begun = carry.get("begun", torch.zeros_like(steps)) + new  # carries of older checkpoints have none
        x, rope, visible, lines = self.embed_canvas(rows["idx"], words)
        y, z = self.start(x)
        if "y" in carry:
            y, z = (
                torch.where(new[:, None, None], first, carry[k].to(x.dtype))
                for first, k in ((y, "y"), (z, "z"))
            )
        y, z = self.supervision_step(x, y, z, "puzzle", rope, visible, lines=lines)
        return y, {**rows, "y": at_rest(y), "z": at_rest(z), "steps": steps, "begun": begun}

    @torch.no_grad()
    def halts(self, q, carry):
        """(B,): which rows have been thought about enough, given the halting logits q (B,) and the carry after a step."""
        stay = self.steps_to_stay(carry["idx"], carry["begun"])
        return (carry["steps"] >= self.config.n_sup) | ((q > 0) & (carry["steps"] >= stay))

    def steps_to_stay(self, idx, begun):
        """
        Exploration: (B,) the fewest steps each row must take, 1 for most, for a share of halt_exploration
        uniform in 2..n_sup. Drawn by hashing the row and begun (B,), how many rows have begun in its place,
        rather than from a random number generator: one process or two, resumed or not, draw the same, and a
        row that comes again draws anew.
        """
        weights = torch.arange(1, idx.shape[1] + 1, device=idx.device) * 2654435761 % 2147483647
        draw = ((idx * weights).sum(1) + begun * 1640531527) % 2147483647 * 48271 % 2147483647
        share = draw.double() / 2147483647
        steps = 2 + (draw * 16807 % 2147483647) % max(self.config.n_sup - 1, 1)
        return torch.where(share < self.config.halt_exploration, steps, 1)

    # -------------------------------------------------------------------------
    # answering

    def think(self, idx, n_sup=None, halt=None):
        """
        On puzzles idx (B, L), yields after each supervision step (rows, y, halting probability): rows (R,) of idx are still being
        thought about, y (R, L, n_embd) is what they say, with probability (R,) all correct. A row whose probability has passed
        `halt` leaves the batch, so it costs nothing any more; None: all rows take all n_sup steps.
        """
        x, rope, visible, lines = self.embed_canvas(idx, self.puzzle_words())
        y, z = self.start(x)
        rows = torch.arange(len(idx), device=idx.device)
        for _ in range(n_sup or self.config.n_sup):
            y, z = self.supervision_step(x, y, z, "puzzle", rope, visible, lines=lines)
            p = self.halt_logit(y).sigmoid()
            yield rows, y, p
            if halt is not None and (p > halt).any():
                on = p <= halt
                if not on.any():
                    return
                rows, x, y, z, visible = (t[on] for t in (rows, x, y, z, visible))
                rope, lines = (tuple(t[on] for t in several) for several in (rope, lines))

    def canvases(self, tasks):
        """
        The test inputs of tasks as puzzles: yields (list of (task number, test number, canvas shape, canvas start), idx (B, L)),
        short ones first, about ANSWER_TOKENS positions at a time. Those longer than block_size are left out.
        """
        puzzles = []
        for i, task in enumerate(tasks):
            for j, (test_input, _) in enumerate(task.test):
                shape = arc.canvas_shape(task.train, test_input)
                ids = arc.encode_prompt(task.kind, task.train, test_input, canvas=shape)
                if len(ids) <= self.config.block_size:
                    puzzles.append((i, j, shape, ids))
        puzzles.sort(key=lambda p: len(p[3]))
        while puzzles:
            count = 1
            while count < len(puzzles) and (count + 1) * len(puzzles[count][3]) <= ANSWER_TOKENS:
                count += 1
            part, puzzles = puzzles[:count], puzzles[count:]
            idx = torch.full((count, len(part[-1][3])), tok.PAD)
            for row, (_, _, _, ids) in zip(idx, part):
                row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
            yield (
                [(i, j, shape, len(ids) - shape[0] * (shape[1] + 1)) for i, j, shape, ids in part],
                idx.to(self.wte.weight.device),
            )

    @torch.no_grad()
    def answer(self, tasks, n_sup=None, trace=False, halt=None):
        """
        Solve tasks, whose test outputs are not read. Returns for each task, for each of its test inputs, a list of (grid, halting
        probability): the different answers of all supervision steps, surest first. None where the row does not fit into block_size.
        With trace, the list holds instead the answer after every supervision step, first to last, with None for a canvas declared all
        void, and None with probability 0 where the model's logits were not finite. Steps are n_sup (None: as
        configured), fewer for rows that pass `halt`, a probability (None: none do).
        """
        answers = [[None] * len(task.test) for task in tasks]
        for where, idx in self.canvases(tasks):
            steps = [[] for _ in where]
            for rows, y, p in self.think(idx, n_sup, halt):
                logits = F.linear(y, self.wte.weight[ANSWER_IDS])
                finite = (logits.isfinite().all(-1) & p.isfinite()[:, None]).cpu()
                choice = torch.tensor(ANSWER_IDS)[logits.argmax(-1).cpu()].numpy()
                for row, ids, known, probability in zip(rows.tolist(), choice, finite, p.tolist()):
                    _, _, shape, start = where[row]
                    canvas = slice(start, start + shape[0] * (shape[1] + 1))
                    answer = arc.read_canvas(ids[canvas], shape), probability
                    steps[row].append(answer if known[canvas].all() else (None, 0.0))
            for (i, j, _, _), thoughts in zip(where, steps):
                answers[i][j] = thoughts if trace else surest(thoughts)
        return answers

    @torch.no_grad()
    def answer_logits(self, tasks, answers):
        """
        Log-probabilities of given answers after n_sup steps. answers: for each task, for each test input, a grid or None. Returns
        the same nesting of float32 arrays (h, w), each cell's log-probability among ANSWER_IDS; None where the answer is None,
        the row longer than block_size, or the answer larger than the canvas.
        """
        out = [[None] * len(task.test) for task in tasks]
        for where, idx in self.canvases(tasks):
            for _, y, _ in self.think(idx):
                pass
            log_p = F.linear(y, self.wte.weight[ANSWER_IDS]).float().log_softmax(-1).cpu().numpy()
            for b, (i, j, (rows, columns), start) in enumerate(where):
                grid = answers[i][j]
                if grid is None or grid.shape[0] > rows or grid.shape[1] > columns:
                    continue
                canvas = log_p[b, start : start + rows * (columns + 1)].reshape(rows, columns + 1, -1)
                h, w = grid.shape
                out[i][j] = np.take_along_axis(canvas[:h, :w], grid[..., None].astype(np.int64), -1)[..., 0]
        return out


def surest(thoughts):
    """
    thoughts: (grid or None, halting probability) after each supervision step -> the different grids, each with the highest probability it
    had, surest first, of equally sure ones the latest. Not simply the last: most puzzles leave training as soon as they are believed to
    be solved, so what further steps do to a right answer is hardly trained, and some spoil it (measured in LOG.md).
    """
    best = {}
    for grid, p in reversed(thoughts):
        if grid is not None:
            key = grid.shape, grid.tobytes()
            if key not in best or p > best[key][1]:
                best[key] = grid, p
    return sorted(best.values(), key=lambda answer: -answer[1])


def at_rest(t):
    """
    y or z as the carry keeps it until the next step: detached, and where numbers are multiplied in half precision, in float16, which has
    room for them (none is beyond sqrt(n_embd) or so). A run holds a carry for every batch of a step and every length: gigabytes.
    """
    return t.detach().to(torch.float16 if torch.is_autocast_enabled(t.device.type) else t.dtype)


def describe_recursion(model, context=1024):
    """Print what n, T and n_sup make of the cost of a token, mode by mode."""
    c = model.config
    print(
        f"\n   at a context of {context:,}        passes through the core     MFLOP per token and step    MFLOP per token,"
    )
    print(
        "            n  T  n_grad  n_sup    per step, with gradient      forward, training         all steps, forward"
    )
    for mode, n_sup in (("text", c.text_n_sup), ("puzzle", c.n_sup)):
        n, T, n_grad = model.recursion(mode)
        steps_counted = c.text_n_sup if mode == "text" else 1
        forward, training = (
            model.flops_per_token(context, mode, t) / steps_counted / 1e6 for t in (False, True)
        )
        all_passes, kept = model.passes(mode)
        print(
            f"   {mode:6s} {n:4d} {T:2d} {n_grad:7d} {n_sup:6d} {all_passes:11d} {kept:14d} {forward:12,.0f} {training:9,.0f} "
            f"{forward * n_sup:27,.0f}"
        )


if __name__ == "__main__":
    configurator.help_only(__doc__)
    model = Model(Config())
    describe(model, passes=model.config.text_n_sup * model.passes("text")[0])
    describe_recursion(model)
