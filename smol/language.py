"""
The suite `language`: how well does a model read and write text and code? Both routes, in their text mode.

    python eval_arc.py out/demo/route_a/ckpt.pt --suites=language

  bits per byte     of the validation shards of every text source: the model's surprise, -log2 of the text's probability, for each byte.
                    Unlike the loss in nats per token it does not depend on how text is cut into tokens.
  questions         132 sentences to be continued, four ends each, in language_items.py: right if the true end is likeliest. Chance is 25%.
  code              42 small functions from signature and docstring, greedily completed and run on tests in the sandbox.

Every figure has a 95% interval. Read next: language_items.py (the items), sandbox.py, eval_arc.py (which calls evaluate() here).
"""

import contextlib
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from smol import engine, language_items, loader, sandbox
from smol import tokenizer as tok
from smol.scores import interval

BATCH_TOKENS = 2048  # in one pass through the model: its logits are 50,304 numbers for each
SOURCE_TOKENS = 65536  # read of each source, in windows of block_size spread evenly over it
CODE_TOKENS = 96  # a function may have
CODE_BATCH = 14  # functions that Route A writes at a time, and that are lost when a run is killed


# -----------------------------------------------------------------------------
# figures


def ratio_interval(above, below):
    """above, below (N,) of N windows -> [low, high], the 95% interval of sum(above) / sum(below) by how windows differ; None for one."""
    if len(above) < 2:
        return None
    ratio = above.sum() / below.sum()
    error = math.sqrt(len(above) * np.var(above - ratio * below, ddof=1)) / below.sum()
    return [round(float(ratio + side * 1.959964 * error), 6) for side in (-1, 1)]


# -----------------------------------------------------------------------------
# likelihoods


def log_probabilities(model, rows, progress=lambda n: None):
    """
    rows: list of (context, continuation), lists of ids, neither empty. -> list of (log-probability of every token of the continuation, in
    nats (n,) float32, is each the likeliest (n,) bool). What does not fit into block_size loses its beginning, of the context first.
    """
    device, longest = next(model.parameters()).device, model.config.block_size
    out, order = [None] * len(rows), sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    start = 0
    while start < len(order):  # rows of similar length together, as many as BATCH_TOKENS allows
        count = 1
        while (
            start + count < len(order)
            and (count + 1) * sum(map(len, rows[order[start + count]])) <= BATCH_TOKENS
        ):
            count += 1
        part = order[start : start + count]
        given = [(list(rows[i][0]) + list(rows[i][1]))[-longest - 1 :] for i in part]
        idx = torch.full((count, max(map(len, given)) - 1), tok.PAD, device=device)
        for row, ids in zip(idx, given):
            row[: len(ids) - 1] = torch.tensor(ids[:-1], device=device)
        with torch.no_grad():
            logits = model(idx)[0]
        for i, ids, row in zip(part, given, logits):
            n = min(len(rows[i][1]), len(ids) - 1)
            row, targets = row[len(ids) - 1 - n : len(ids) - 1].float(), torch.tensor(ids[-n:], device=device)
            chosen = F.log_softmax(row, -1).gather(1, targets[:, None])[:, 0]
            out[i] = chosen.cpu().numpy(), (row.argmax(-1) == targets).cpu().numpy()
        start += count
        progress(count)
    return out


# -----------------------------------------------------------------------------
# the three parts


def held_out(data_dir, stage, tag=None):
    """-> {text source: its validation shards, as the manifest has them} of a stage. FileNotFoundError or ValueError if it is not there."""
    out = {}
    for entry in sorted(
        loader.read_stage(data_dir, stage, tag, verify=False)[0], key=lambda entry: entry["source"]
    ):
        if entry["kind"] == "text" and entry["split"] == "val":
            out.setdefault(entry["source"], []).append(entry)
    return out


def windows(n_tokens, size, source_tokens):
    """The numbers of the windows of `size` tokens that are read of a source of n_tokens: evenly spread, source_tokens of them together."""
    there = max((n_tokens - 1) // size, 1)
    return np.linspace(0, there - 1, min(there, max(source_tokens // size, 1))).astype(int)


def bits_per_byte(model, data_dir, entries, source_tokens=SOURCE_TOKENS, progress=lambda n: None):
    """
    -> {bits_per_byte, interval, bytes, tokens} of the shards `entries` of one source, None where they have no
    text, or the model no probability for it that is finite. Ends of documents and reserved ids are read but not
    counted: they are no text.
    """
    bytes_of = np.array(
        [len(tok.load().decode_single_token_bytes(i)) if i < tok.EOT else 0 for i in range(tok.VOCAB_SIZE)]
    )
    shards, size = loader.Shards(data_dir, entries), model.config.block_size
    picks = windows(shards.n_tokens, size, source_tokens)
    ids = [shards.slice(i * size, min((i + 1) * size + 1, shards.n_tokens)) for i in picks]
    surprise, counted = [], []
    for (nats, _), window in zip(log_probabilities(model, [(w[:1], w[1:]) for w in ids], progress), ids):
        n_bytes = bytes_of[window[1:]]
        surprise.append(-float(nats[n_bytes > 0].sum(dtype=np.float64)) / math.log(2))
        counted.append(int(n_bytes.sum()))
    above, below = np.array(surprise), np.array(counted)
    if not below.sum() or not np.isfinite(above).all():
        return None
    return {
        "bits_per_byte": round(float(above.sum() / below.sum()), 6),
        "interval": ratio_interval(above, below),
        "bytes": int(below.sum()),
        "tokens": sum(len(w) - 1 for w in ids),
    }


def answer_questions(model, limit=None, progress=lambda n: None):
    """
    -> {total, right, accuracy, interval, chance, accuracy_per_byte, interval_per_byte, by_category: {category: [right, total]}, answers}.
    The model picks the end of the highest log-probability; per_byte is the same with log-probabilities divided by the length of the end.
    Where several ends are equally likely, each counts for its share. answers: [{category, question, choices, right, picked,
    log_probabilities}, ...].
    """
    items, encode = spread(language_items.questions(), limit), tok.load().encode_ordinary
    rows = [
        ([tok.EOT, *encode(beginning)], encode(" " + choice))
        for _, beginning, choices, _ in items
        for choice in choices
    ]
    scores = iter([float(nats.sum(dtype=np.float64)) for nats, _ in log_probabilities(model, rows, progress)])
    points, per_byte, categories, answers = [], [], {}, []
    for category, beginning, choices, right in items:
        given = np.array([next(scores) for _ in choices])
        scaled = given / [len(choice.encode()) + 1 for choice in choices]
        points.append(best_is(given, right))
        per_byte.append(best_is(scaled, right))
        counted = categories.setdefault(category, [0, 0])
        counted[0], counted[1] = counted[0] + points[-1], counted[1] + 1
        answers.append(
            {
                "category": category,
                "question": beginning,
                "choices": list(choices),
                "right": right,
                "picked": int(given.argmax()),
                "log_probabilities": given.round(4).tolist(),
            }
        )
    n = len(items)
    return {
        "total": n,
        "right": sum(points),
        "accuracy": round(sum(points) / n, 6),
        "interval": interval(sum(points), n),
        "chance": 0.25,
        "accuracy_per_byte": round(sum(per_byte) / n, 6),
        "interval_per_byte": interval(sum(per_byte), n),
        "by_category": categories,
        "answers": answers,
    }


def spread(items, limit):
    """At most `limit` of the items, evenly spread, in order."""
    return [
        items[i] for i in np.linspace(0, len(items) - 1, min(limit or len(items), len(items))).astype(int)
    ]


def best_is(scores, right):
    """1 if the score at `right` is the highest, 1/n if n are equally high and it is one of them, else 0."""
    best = np.flatnonzero(scores >= scores.max() - 1e-9)
    return 1 / len(best) if right in best else 0


def write_code(model, items, progress=lambda n: None):
    """
    items of language_items.functions() -> [{name, stub, written, solved, reason}, ...]: one greedy attempt at each, run on its tests.
    There is no chance level: a function that returns nothing passes no test.
    """
    answers = []
    together = (
        CODE_BATCH if model.puzzle_format == "autoregressive" else 1
    )  # Route B's generate() ends when its first row does
    for start in range(0, len(items), together):
        part = items[start : start + together]
        for (name, stub, tests, _, _), written in zip(part, complete(model, [stub for _, stub, *_ in part])):
            result = sandbox.run_tests(stub + written, tests)
            answers.append(
                {"name": name, "stub": stub, "written": written, "solved": result.ok, "reason": result.reason}
            )
        progress(len(part))
    return answers


def complete(model, stubs, max_new_tokens=CODE_TOKENS):
    """stubs: beginnings of functions -> list of what the model writes after each, up to the first line that is no longer indented."""
    device, encode = next(model.parameters()).device, tok.load().encode_ordinary
    prompts = [torch.tensor([tok.EOT, *encode(stub)], device=device) for stub in stubs]
    written = [[] for _ in stubs]
    with contextlib.suppress(ValueError):  # logits that are not finite: nothing more is written
        together = torch.stack(prompts) if len(prompts) == 1 else prompts
        for drawn in engine.generate(model, together, max_new_tokens, temperature=0):
            for ids, token in zip(written, drawn.tolist()):
                ids.append(token)
            if all(body(ids)[1] for ids in written):
                break
    return [body(ids)[0] for ids in written]


def body(ids):
    """ids: what was written after a docstring -> (the text of its indented lines, has it come to an end?)."""
    end = next((n for n, i in enumerate(ids) if i >= tok.EOT), len(ids))
    text = tok.load().decode(ids[:end])
    lines = text.splitlines(keepends=True)
    for n, line in enumerate(lines):
        if line.strip() and not line[0].isspace():
            return "".join(lines[:n]), True
    return text, end < len(ids)


def evaluate(
    model,
    data_dir="data",
    stage=None,
    tag=None,
    limit=None,
    desc="language",
    before=None,
    keep=lambda part, found: None,
):
    """
    -> {bits_per_byte: {source: figures}, questions, code: {total, solved, accuracy, interval, answers}, seconds}: as the functions above
    give them; bits_per_byte is {} where no stage is named. limit: only so many questions and functions, and a share of the text to match.
    desc: what the progress bar is called. keep(name of a part, what was found) is called after each part, and parts that are in `before`,
    {name: what keep was given}, are not measured again.
    """
    before, seconds = before or {}, 0.0

    def measured(part, measure, rows):
        nonlocal seconds
        found = before.get(part)
        if found is None:
            started = time.perf_counter()
            with tqdm(total=rows, desc=f"{desc}, {part}", unit="row", dynamic_ncols=True, leave=False) as bar:
                found = {"figures": measure(bar.update), "seconds": round(time.perf_counter() - started, 3)}
            keep(part, found)
        seconds += found["seconds"]
        return found["figures"]

    share = 1 if limit is None else min(limit / len(language_items.QUESTIONS), 1)
    bits, source_tokens = {}, int(SOURCE_TOKENS * share)
    for source, entries in (held_out(data_dir, stage, tag) if stage else {}).items():
        rows = len(windows(sum(entry["tokens"] for entry in entries), model.config.block_size, source_tokens))
        bits[source] = measured(
            f"bits per byte of {source}",
            lambda progress, e=entries: bits_per_byte(model, data_dir, e, source_tokens, progress),
            rows,
        )
    rows = sum(len(choices) for _, _, choices, _ in spread(language_items.questions(), limit))
    questions = measured("questions", lambda progress: answer_questions(model, limit, progress), rows)
    functions, answers = spread(language_items.functions(), limit), []
    for start in range(0, len(functions), CODE_BATCH):
        part = functions[start : start + CODE_BATCH]
        answers += measured(
            f"code from {part[0][0]} on",
            lambda progress, part=part: write_code(model, part, progress),
            len(part),
        )
    solved, n = sum(a["solved"] for a in answers), len(answers)
    return {
        "bits_per_byte": {source: figures for source, figures in bits.items() if figures},
        "questions": questions,
        "code": {
            "total": n,
            "solved": solved,
            "accuracy": round(solved / n, 6),
            "interval": interval(solved, n),
            "answers": answers,
        },
        "seconds": round(seconds, 3),
    }


# -----------------------------------------------------------------------------
# for people


def table(figures):
    """The figures as lines of text."""

    def row(name, value, interval, more):
        shown = "" if interval is None else "{:.3f} to {:.3f}".format(*interval)
        return f"{name:32}{value:8.3f}   {shown:16}   {more}"

    lines = [f"{'':32}{'':8}   {'95%':16}"]
    lines += [
        row(f"bits per byte, {source}", f["bits_per_byte"], f["interval"], f"{f['bytes']:,} bytes")
        for source, f in figures["bits_per_byte"].items()
    ]
    q, c = figures["questions"], figures["code"]
    lines.append(
        row(
            "questions", q["accuracy"], q["interval"], f"{q['right']:g} of {q['total']}; chance {q['chance']}"
        )
    )
    lines.append(row("questions, per byte", q["accuracy_per_byte"], q["interval_per_byte"], ""))
    lines += [
        f"  {name:30}{right / total:8.3f}   {'':16}   {right:g} of {total}"
        for name, (right, total) in q["by_category"].items()
    ]
    lines.append(row("code", c["accuracy"], c["interval"], f"{c['solved']} of {c['total']}"))
    return "\n".join(lines)
