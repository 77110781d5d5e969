"""
Decoding: caches, prefill, one token at a time, sampling, and the grammar that answers are written under.

These are functions of a model, and but for the canvases, which are Route B's, of either route. All they ask
of it:

    model.wte                               token embedding, which is also the output head
    model.empty_cache(B, length)            list of tuples of tensors (B, ...), one tuple per layer and pass
    model.hidden(idx, starts, ...)          idx (B, T) -> what the head reads (B, T, n_embd)
    model.answer_steps(idx, ...)            Route B's supervision steps on puzzles idx (B, T)

Prompts of different lengths are padded on the left, and the padding is one more document, which nothing
after it sees.

Before this: smol/arc.py. Read next: model_dense.py.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from smol import arc
from smol import tokenizer as tok
from smol.loader import draw_rng

BATCH_TOKENS = 2**15  # tokens per batch when answering: memory is the same for short and for long tasks
GRID_IDS = [*range(tok.CELL0, tok.CELL0 + 10), tok.ROW, tok.EOT]  # what an answer is written with
ROW, END = 10, 11  # the last two, as numbers into GRID_IDS
ANSWER_IDS = [*range(tok.CELL0, tok.CELL0 + 10), tok.VOID]  # what a cell of a canvas can become
CANVAS_TOKENS = 8192  # the same of canvases, which are read again and again
NOISE = 0.3  # on z of Route B's rollouts: with 1.0 few of them may be worse than none (LOG.md)

# -----------------------------------------------------------------------------
# caches


@dataclass
class KVCache:
    """What B rows of T tokens leave for the tokens after them."""

    layers: list  # tuples of tensors (B, ...): keys and values of full attention; tail and state of KDA
    idx: torch.Tensor  # (B, T) the tokens; shorter prompts have PAD before them
    first: torch.Tensor | None  # (B,) where each row's document begins; None if that is 0 in every row

    def repeat(self, n):
        """Every row n times, or n[b] times: a prompt is read once and continued n times."""
        layers = [tuple(t.repeat_interleave(n, 0) for t in layer) for layer in self.layers]
        first = None if self.first is None else self.first.repeat_interleave(n, 0)
        return KVCache(layers, self.idx.repeat_interleave(n, 0), first)


@torch.no_grad()
def prefill(model, prompts, room=0):
    """
    Read prompts: (B, T) long, or a list of (T_b,) long. Returns what the head reads after their last tokens
    (B, n_embd), and a KVCache with room for `room` more tokens. ValueError if a prompt is empty or there is
    none.
    """
    if not min(map(len, prompts), default=0):
        raise ValueError("a prompt is empty: begin it with <|endoftext|>, as every document does")
    device = model.wte.weight.device
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    idx = pad_documents([torch.as_tensor(prompt) for prompt in prompts], device, "left")
    T = idx.shape[1]
    t = torch.arange(T, device=device)
    starts = (t == T - lengths) | (idx == tok.EOT)
    first = torch.where(starts, t, 0).amax(1)
    one_document = not starts[:, 1:].any()
    # Activations take ten times the memory of the cache, so only so many rows are read at a time.
    parts = []
    for some, begin in zip(idx.split(max(1, BATCH_TOKENS // T)), starts.split(max(1, BATCH_TOKENS // T))):
        layers = model.empty_cache(len(some), T + room)
        x = model.hidden(some, None if one_document else begin, cache=layers)
        parts.append((x[:, -1], layers))
    x = torch.cat([last for last, _ in parts])
    layers = parts[0][1]
    if len(parts) > 1:
        layers = [tuple(map(torch.cat, zip(*layer))) for layer in zip(*(layers for _, layers in parts))]
    return x, KVCache(layers, idx, None if one_document else first)


@torch.no_grad()
def decode_step(model, token, cache):
    """
    token (B,) -> what the head reads after it (B, n_embd). The cache is brought up to date in place.
    <|endoftext|> ends a row: what comes after it there means nothing.
    """
    length = cache.idx.shape[1]
    cache.idx = torch.cat([cache.idx, token[:, None]], 1)
    attn_mask = None
    if cache.first is not None:
        attn_mask = torch.arange(length + 1, device=token.device) >= cache.first[:, None]
        attn_mask = attn_mask[:, None, None]  # (B, 1, 1, length + 1)
    position = arc.positions(cache.idx)[:, -1:]
    return model.hidden(token[:, None], None, attn_mask, position, cache.layers, length)[:, -1]


# -----------------------------------------------------------------------------
# text


class NotFinite(ValueError):
    """Logits are NaN or infinite: nothing can be drawn."""


def sample(logits, temperature, top_k=None, top_p=None, generator=None, uniform=None):
    """
    logits (B, V) -> ids (B,). Temperature 0 is greedy. top_k keeps the k likeliest ids; top_p then keeps
    the fewest likeliest whose probabilities sum to top_p. Unassigned ids are never drawn. NotFinite where
    logits are NaN or infinite. uniform (B,) on the CPU, in [0, 1): what each row draws with, instead of the
    generator.
    """
    logits = logits[:, : tok.END + 1].float()
    if not logits.amax(-1).isfinite().all():
        raise NotFinite("the model's logits are not finite: training diverged, take an earlier checkpoint")
    if temperature < 1e-30:  # in float32 it could be 0
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0: nothing overflows
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    p = logits.softmax(-1)
    if top_p is not None:
        ordered, order = p.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the likelier ones suffice without this one
        beyond[:, 0] = False  # however small top_p is
        p = p.masked_fill(beyond.scatter(1, order, beyond), 0.0)
    if uniform is not None:
        below = p.cpu().double().cumsum(-1)  # an Apple GPU has no float64
        drawn = torch.searchsorted(below, uniform.double()[:, None] * below[:, -1:], right=True)
        return drawn.squeeze(1).to(p.device)
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    stop=(tok.EOT,),
    generator=None,
    uniform=None,
    n_ids=tok.END + 1,
):
    """
    Continue prompts, as in `prefill`, with ids below n_ids: yields (B,) ids as they are drawn. A row that has
    drawn one of `stop` yields PAD from then on; the end is when all rows have. uniform (B, max_new_tokens):
    what each row draws with, instead of the generator. The rest as in `sample`.
    """
    x, cache = prefill(model, prompts, max_new_tokens)
    head = model.wte.weight[:n_ids]
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    stop = torch.tensor(tuple(stop), dtype=torch.long, device=x.device)
    for i in range(max_new_tokens):
        mine = None if uniform is None else uniform[:, i]
        drawn = sample(F.linear(x, head), temperature, top_k, top_p, generator, mine)
        drawn = drawn.masked_fill(done, tok.PAD)
        yield drawn
        done = done | torch.isin(drawn, stop)
        if done.all() or i == max_new_tokens - 1:
            return
        x = decode_step(model, drawn, cache)


@torch.no_grad()
def continue_texts(model, prompts, uniform, temperature, n_ids):
    """
    Continue prompts, a list of (T_b,) long, with ids below n_ids up to the end of a text or a turn. uniform
    (B, N) float64 in [0, 1): what each row draws with, whatever is written beside it. Returns a list of
    (n_b,) long on the CPU, n_b <= N. NotFinite where logits are.
    """
    out, n = [None] * len(prompts), uniform.shape[1]
    for part in batches_by_length(list(enumerate(prompts)), lambda row: len(row[1]) + n):
        where, some = zip(*part)
        how = {"stop": (tok.EOT, tok.END, tok.PAD), "uniform": uniform[list(where)], "n_ids": n_ids}
        drawn = torch.stack([*generate(model, some, n, temperature, **how)], 1)  # (rows, up to N)
        for b, ids in zip(where, drawn.cpu()):
            out[b] = ids[ids != tok.PAD]
    return out


# -----------------------------------------------------------------------------
# grids


def legal(row, column, width, most_rows):
    """Which of GRID_IDS can come at (row, column), bool (N, 12). Arrays (N,); width: in row 0 the most."""
    cell_fits = (column < width) & (row < most_rows)
    row_ends = (column > 0) & ((row == 0) | (column == width))  # the first row chooses the width
    grid_ends = (column == 0) & (row > 0)
    return torch.from_numpy(np.stack([cell_fits] * 10 + [row_ends, grid_ends], 1))


def legal_outcomes(shape, limit):
    """
    Bool (h * (w + 1) + 1, 11): what could have come at each token of an answer of this shape (h, w), as
    `cell_logits` has them. limit: (most rows, most columns) that it was written under.
    """
    (h, w), (most_rows, most_columns) = shape, np.maximum(shape, limit)
    row, column = np.divmod(np.arange(h * (w + 1) + 1), w + 1)
    allowed = legal(row, column, np.where(row == 0, most_columns, w), most_rows)
    return torch.cat([allowed[:, :10], allowed[:, 10:].any(1, keepdim=True)], 1)


def write_grids(logits, next_logits, limits, temperature, noise):
    """
    Write grids under their grammar: only what can follow is allowed, so every answer parses. logits (B,
    12): of GRID_IDS, after the prompts. next_logits: function of drawn (B,), numbers into GRID_IDS ->
    logits (B, 12). limits: for each row (most rows, most columns). noise: for each row an
    np.random.Generator to draw with at `temperature`, or None for the likeliest token. Returns a list of
    (grid, log-probability under the grammar), None for a row whose logits were not finite. Ends after as
    many tokens as the largest grid has, whatever the logits are.
    """
    B = len(limits)
    most_rows, most_columns = np.array(limits).reshape(B, 2).T
    row, column = np.zeros(B, int), np.zeros(B, int)
    width = most_columns.copy()  # of row 0 at most
    score, done, failed = np.zeros(B), np.zeros(B, bool), np.zeros(B, bool)
    written = []
    for _ in range(max((h * (w + 1) + 1 for h, w in limits), default=0)):
        allowed = legal(row, column, width, most_rows)
        log_p = logits.float().cpu().masked_fill(~allowed, -torch.inf).log_softmax(-1)
        # argmax of log p / temperature + Gumbel noise is a draw from softmax(log p / temperature)
        gumbel = [np.zeros(12) if rng is None else temperature * rng.gumbel(size=12) for rng in noise]
        drawn = (log_p + torch.from_numpy(np.stack(gumbel))).argmax(-1)
        failed |= ~done & log_p.isnan().any(-1).numpy()
        done |= failed
        choice = np.where(done, END, drawn.numpy())
        score += np.where(done, 0.0, log_p.gather(1, drawn[:, None]).squeeze(1).numpy())
        written.append(choice)
        width = np.where((choice == ROW) & (row == 0), column, width)
        row = row + (choice == ROW)
        column = np.where(choice == ROW, 0, column + (choice < ROW))
        done |= choice == END
        if done.all():
            break
        logits = next_logits(drawn)
    out = []
    for b in range(B):
        cells = np.array([choice[b] for choice in written if choice[b] < ROW], dtype=np.uint8)
        out.append(None if failed[b] else (cells.reshape(row[b], width[b]), float(score[b])))
    return out


@torch.no_grad()
def decode_grids(model, prompts, limits, samples, temperature, noise):
    """
    prompts: list of (T_b,) long, each read once and answered `samples` times; limits: for each (most rows,
    most columns). temperature and noise as in `write_grids`, which returns len(prompts) * samples answers.
    """
    ids = torch.tensor(GRID_IDS, device=model.wte.weight.device)
    head = model.wte.weight[ids]
    x, cache = prefill(model, prompts, max(h * (w + 1) for h, w in limits))
    if samples > 1:
        x, cache = x.repeat_interleave(samples, 0), cache.repeat(samples)

    def next_logits(drawn):
        return F.linear(decode_step(model, ids[drawn.to(ids.device)], cache), head)

    repeated = [limit for limit in limits for _ in range(samples)]
    return write_grids(F.linear(x, head), next_logits, repeated, temperature, noise)


# -----------------------------------------------------------------------------
# tasks


def batches_by_length(items, length, tokens=None):
    """Batches of items, by length(item), short ones first, of about `tokens` (BATCH_TOKENS) each."""
    items, batch = sorted(items, key=length), []
    for item in items:
        if batch and (len(batch) + 1) * length(item) > (tokens or BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@torch.no_grad()
def answer_tasks(model, tasks, samples, temperature, seed, tokens):
    """
    Solve tasks with an autoregressive model. tasks: list of arc.Task, whose test outputs are not read.
    Returns for each task, for each test input, a list of `samples` (grid, log-probability): the greedy one,
    then drawn ones, without those whose logits were not finite; None where prompt and answer do not fit
    into block_size. A draw depends on seed and prompt, not on what else is asked. tokens: of prompts and
    answers per batch.
    """
    answers = [[None] * len(task.test) for task in tasks]
    questions = []
    for i, task in enumerate(tasks):
        for j, (test_input, _) in enumerate(task.test):
            prompt = arc.encode_prompt(task.kind, task.train, test_input)
            h, w = arc.canvas_shape(task.train, test_input)
            length = len(prompt) + h * (w + 1)
            if length <= model.config.block_size:
                questions.append((i, j, torch.from_numpy(prompt.astype(np.int64)), (h, w), length))
    for part in batches_by_length(questions, lambda q: samples * q[-1], tokens):
        noise = []
        for _, _, prompt, _, _ in part:
            ids = prompt.tolist()
            noise += [None] + [draw_rng(seed, f"sample {n}", ids) for n in range(1, samples)]
        prompts, limits = [q[2] for q in part], [q[3] for q in part]
        drawn = decode_grids(model, prompts, limits, samples, temperature, noise)
        for n, (i, j, *_) in enumerate(part):
            mine = drawn[n * samples : (n + 1) * samples]
            answers[i][j] = [answer for answer in mine if answer is not None]
    return answers


@torch.no_grad()
def score_answers(model, tasks, answers):
    """
    Log-probabilities of given answers. tasks: list of arc.Task with one test input each; answers: for each a
    list of grids. Returns for each task an array (len(grids),) of float32: what `write_grids` gives with a
    grid that it writes. A prompt is read once for all of its answers.
    """
    scores, questions = [None] * len(tasks), []
    for i, (task, grids) in enumerate(zip(tasks, answers)):
        ((test_input, _),) = task.test
        prompt = arc.encode_prompt(task.kind, task.train, test_input)
        written = [torch.from_numpy(arc.encode_grid(grid).astype(np.int64)) for grid in grids]
        longest = len(prompt) + max(map(len, written))
        questions.append((i, torch.from_numpy(prompt.astype(np.int64)), written, longest))
    # by length, for prompts are padded; as if each had as many answers as the one with most
    most = max(map(len, answers), default=0)
    for part in batches_by_length(questions, lambda q: most * q[-1]):
        numbers, prompts, written, _ = zip(*part)
        x = hidden_of_answers(model, prompts, written)
        shapes = [grid.shape for i in numbers for grid in answers[i]]
        limits = [arc.canvas_shape(tasks[i].train, tasks[i].test[0][0]) for i in numbers for _ in answers[i]]
        legal = torch.cat([legal_outcomes(shape, limit) for shape, limit in zip(shapes, limits)])
        log_p = outcome_logits(model, x, shapes).cpu().masked_fill(~legal, -torch.inf).log_softmax(-1)
        # what came: the colours, the end of each row, the end of the grid
        came = torch.cat([F.pad(ids - tok.CELL0, (0, 1), value=10) for some in written for ids in some])
        log_p = log_p.gather(1, came[:, None]).squeeze(1)
        of_grids = iter(log_p.split([h * (w + 1) + 1 for h, w in shapes]))
        for i in numbers:
            scores[i] = np.array([next(of_grids).sum() for _ in answers[i]], np.float32)
    return scores


def hidden_of_answers(model, prompts, written):
    """
    prompts: list of (T_b,) long; written: for each prompt a list of (n_a,) long, its answers. Returns what
    the head reads (N, n_embd) at the n_a + 1 tokens from the prompt's last on, one answer after the other.
    """
    device = model.wte.weight.device
    answers = [ids for some in written for ids in some]
    idx = pad_documents(answers, device)  # (R, T)
    x, cache = prefill(model, prompts, idx.shape[1])
    counts = torch.tensor([len(some) for some in written], device=device)
    x, cache = x.repeat_interleave(counts, 0), cache.repeat(counts)
    length = cache.idx.shape[1]
    t = torch.arange(length + idx.shape[1], device=device)
    attn_mask = (t <= t[length:, None]).expand(len(idx), 1, -1, -1)
    if cache.first is not None:
        attn_mask = attn_mask & (t >= cache.first[:, None, None, None])
    positions = arc.positions(torch.cat([cache.idx, idx], 1))[:, length:]
    more = model.hidden(idx, None, attn_mask, positions, cache.layers, length)
    return torch.cat([row[: len(ids) + 1] for row, ids in zip(torch.cat([x[:, None], more], 1), answers)])


def pad_documents(documents, device, side="right"):
    """documents: list of (T_b,) long -> (B, T) long, padded on one side."""
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(documents, batch_first=True, padding_value=tok.PAD, padding_side=side).to(device)


def cell_logits(model, documents, shapes):
    """
    What an autoregressive model makes of given answers, with gradient where gradients are on. documents:
    list of (T_b,) long, as arc.encode makes them; shapes: the (h, w) of their answers. Returns (N, 11) for
    one document after the other, as `outcome_logits` does.
    """
    x = model.hidden(pad_documents([ids[:-1] for ids in documents], model.wte.weight.device))
    counts = [h * (w + 1) + 1 for h, w in shapes]
    x = torch.cat([row[len(ids) - 1 - n : len(ids) - 1] for row, ids, n in zip(x, documents, counts)])
    return outcome_logits(model, x, shapes)


def outcome_logits(model, x, shapes):
    """
    x (N, n_embd): what the head reads at each of the h * (w + 1) + 1 tokens before those of an answer and its
    <|endoftext|>, for one shape (h, w) after the other. Returns (N, 11) float32: the logits of the ten
    colours and of "it ends here", which is that of ROW, and of <|endoftext|> in the first column.
    """
    logits = F.linear(x, model.wte.weight[torch.tensor(GRID_IDS, device=x.device)]).float()
    first_column = torch.cat([torch.arange(h * (w + 1) + 1) % (w + 1) == 0 for h, w in shapes])
    ends = torch.where(first_column.to(x.device), logits[:, END], logits[:, ROW])
    return torch.cat([logits[:, :10], ends[:, None]], 1)


# -----------------------------------------------------------------------------
# canvases


def canvases(model, tasks, n_rollouts=1):
    """
    The test inputs of tasks as puzzles, about CANVAS_TOKENS positions at a time with all rollouts, short ones
    first. Yields (list of (task number, test number, canvas shape, canvas start), idx (B, T)). Those longer
    than block_size are left out.
    """
    puzzles = []
    for i, task in enumerate(tasks):
        for j, (test_input, _) in enumerate(task.test):
            shape = arc.canvas_shape(task.train, test_input)
            ids = arc.encode_prompt(task.kind, task.train, test_input, canvas=shape)
            start = len(ids) - shape[0] * (shape[1] + 1)
            if len(ids) <= model.config.block_size:
                puzzles.append(((i, j, shape, start), torch.from_numpy(ids.astype(np.int64))))
    for part in batches_by_length(puzzles, lambda p: len(p[1]) * n_rollouts, CANVAS_TOKENS):
        where, documents = zip(*part)
        yield where, pad_documents(documents, model.wte.weight.device)


@torch.no_grad()
def answer_canvases(model, tasks, trace, n_rollouts, **how):
    """
    Solve tasks, whose test outputs are not read. Returns for each task, for each of its test inputs, a list
    of (grid, halting probability) as `ranked` orders them; None where the row does not fit into block_size.
    With trace, a list of the answers after every supervision step, of one rollout after the other: the grid
    is None for an empty canvas, and where logits were not finite, with probability 0. how: the rest of what
    model.answer_steps takes.
    """
    answers = [[None] * len(task.test) for task in tasks]
    for where, idx in canvases(model, tasks, n_rollouts):
        steps = [[[] for _ in range(n_rollouts)] for _ in where]
        for rows, y, p in model.answer_steps(idx, n_rollouts=n_rollouts, **how):
            logits = F.linear(y, model.wte.weight[ANSWER_IDS])
            finite = (logits.isfinite().all(-1) & p.isfinite()[:, None]).cpu()  # (R, T)
            ids = torch.tensor(ANSWER_IDS)[logits.argmax(-1).cpu()].numpy()
            for n, (row, probability) in enumerate(zip(rows.tolist(), p.tolist())):
                _, _, shape, start = where[row]
                canvas = slice(start, start + shape[0] * (shape[1] + 1))
                step = arc.read_canvas(ids[n, canvas], shape), probability
                steps[row][n % n_rollouts].append(step if finite[n, canvas].all() else (None, 0.0))
        for (i, j, _, _), rollouts in zip(where, steps):
            given = [step for steps in rollouts for step in steps]
            answers[i][j] = given if trace else [(g, p) for g, p, _ in ranked(given, n_rollouts)]
    return answers


def rollout_rngs(idx, n_rollouts, seed):
    """For each rollout of each row of idx (B, T): a generator, None for the first, and the row's length."""
    rngs = []
    for ids in idx.tolist():
        row = [i for i in ids if i != tok.PAD]
        rngs += [(draw_rng(seed, f"rollout {k}", row) if k else None, len(row)) for k in range(n_rollouts)]
    return rngs


def normal_like(z, rngs):
    """z (R, T, n_embd), rngs as rollout_rngs made them -> standard normal numbers, zero in padding."""
    noise = np.zeros(z.shape, np.float32)
    for part, (rng, length) in zip(noise, rngs):
        if rng is not None:
            rng.standard_normal(out=part[:length], dtype=np.float32)
    return torch.from_numpy(noise).to(z)


def rollouts_of(steps, n_rollouts):
    """The steps of a trace by rollout."""
    n = len(steps) // n_rollouts
    return [steps[i : i + n] for i in range(0, len(steps), n)]


def confident(steps):
    """
    The (grid, halting probability) with the highest probability, and the latest of equal ones. Not simply the
    last: puzzles leave training when they are solved, so further steps are hardly trained, and some spoil
    answers.
    """
    return max((s for s in reversed(steps) if s[0] is not None), key=lambda s: s[1], default=(None, 0.0))


def same_grid(grid):
    """A key that equal grids have in common; None and texts are their own."""
    return (grid.shape, grid.tobytes()) if isinstance(grid, np.ndarray) else grid


def ranked(steps, n_rollouts=1):
    """
    steps: (grid or None, halting probability) after each supervision step, of one rollout after the other ->
    list of (grid, the highest probability that it had, votes), all grids different, best first. Each rollout
    has a vote, for its most confident answer; of equal votes the higher probability counts.
    """
    votes = Counter(same_grid(confident(some)[0]) for some in rollouts_of(steps, n_rollouts))
    best = {}
    for grid, p, *_ in reversed(steps):
        if grid is not None and p > best.get(same_grid(grid), (None, -np.inf))[1]:
            best[same_grid(grid)] = grid, p, votes[same_grid(grid)]
    return sorted(best.values(), key=lambda answer: (-answer[2], -answer[1]))


def chosen_rollout(steps, n_rollouts):
    """Of a trace, the steps of the most confident of the rollouts that voted for the answer that is taken."""
    rollouts, answers = rollouts_of(steps, n_rollouts), ranked(steps, n_rollouts)
    taken = same_grid(answers[0][0]) if answers else None
    voted = [some for some in rollouts if same_grid(confident(some)[0]) == taken]
    return max(reversed(voted), key=lambda some: confident(some)[1])
