"""
The suites that are no tasks: how well does a model read and write text and code? Both routes, in text mode.

    python eval_arc.py CKPT --suites=language
    python eval_arc.py CKPT --suites=lm_eval:sciq,arc_easy          needs: pip install lm-eval

  bits_per_byte   of held-out text of every source: -log2 of its probability for each byte. Unlike the loss in
                  nats per token it does not depend on how text is cut into tokens
  questions       132 sentences to be continued, four ends each: right if the true end is likeliest
  code            42 small functions from signature and docstring, written greedily and run on tests
  lm_eval:NAMES   benchmarks of EleutherAI's lm-eval, our models behind its interface

Every figure has a 95% interval, as [low, high]. The items are in suites.py. Read next: sandbox.py.
"""

import difflib
import functools
import math
import re
import time

import numpy as np
import torch
from tqdm import tqdm

from smol import engine, loader, sandbox, snapshots, solve, suites
from smol import tokenizer as tok

BATCH_TOKENS = 2048  # in one pass through the model: its logits are 50,304 numbers for each
SOURCE_TOKENS = 65536  # read of each source, in windows of block_size spread evenly over it
CODE_TOKENS = 96  # that a function may have
OUTSIDE_FUNCTION = re.compile(r"^\S", re.MULTILINE)  # the first line that is not indented


def ratio_interval(above, below):
    """above, below (N,) of N windows: the 95% interval of sum(above) / sum(below); None for one window."""
    if len(above) < 2:
        return None
    ratio = above.sum() / below.sum()
    error = 1.959964 * math.sqrt(len(above) * np.var(above - ratio * below, ddof=1)) / below.sum()
    return [round(float(ratio - error), 6), round(float(ratio + error), 6)]


# -----------------------------------------------------------------------------
# reading


def log_probs(model, rows, desc="reading"):
    """
    rows: list of (context, continuation), lists of ids, neither empty. Returns for each the log-probability
    of every token of the continuation, (n,) float32 in nats, and whether it is the likeliest, (n,) bool.
    What does not fit into block_size loses its beginning, of the context first.
    """
    device, block_size = next(model.parameters()).device, model.config.block_size
    documents = [torch.tensor([*context, *continuation][-block_size - 1 :]) for context, continuation in rows]
    out = [None] * len(rows)
    batches = list(engine.batches_by_length(range(len(rows)), lambda i: len(documents[i]), BATCH_TOKENS))
    for part in tqdm(batches, desc, dynamic_ncols=True, leave=False):
        with torch.no_grad():
            logits = model(engine.pad_documents([documents[i][:-1] for i in part], device))[0]  # (B, T, V)
        for row, i in zip(logits, part):
            end = len(documents[i]) - 1
            n = min(len(rows[i][1]), end)
            row, targets = row[end - n : end].float(), documents[i][-n:].to(device)  # (n, V), (n,)
            chosen = row.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            out[i] = chosen.cpu().numpy(), (row.argmax(-1) == targets).cpu().numpy()
    return out


# -----------------------------------------------------------------------------
# the suite `language`


def held_out(data_dir, stage, tag=None):
    """{text source: its validation shards} of a stage. FileNotFoundError or ValueError if it is not there."""
    entries, out = snapshots.read_manifest(data_dir, stage, tag=tag, verify=False)[0], {}
    for entry in sorted(entries, key=lambda entry: entry["source"]):
        if entry["kind"] == "text" and entry["split"] == "val":
            out.setdefault(entry["source"], []).append(entry)
    return out


def bits_per_byte(model, data_dir, shards, source_tokens=SOURCE_TOKENS):
    """
    {bits_per_byte, interval, bytes} of the shards of one source; None where they have no text or the model
    gives no finite probability. Ends of documents and reserved ids are read but not counted as text.
    """
    text, size = loader.Shards(data_dir, shards), model.config.block_size
    there = max((text.n_tokens - 1) // size, 1)
    starts = size * np.linspace(0, there - 1, min(there, max(source_tokens // size, 1))).astype(int)
    windows = [text.slice(start, min(start + size + 1, text.n_tokens)) for start in starts]
    bits, counted = np.zeros(len(windows)), np.zeros(len(windows), int)
    for i, (nats, _) in enumerate(log_probs(model, [(w[:1], w[1:]) for w in windows])):
        n_bytes = tok.byte_lengths()[windows[i][1:]]
        bits[i] = -nats[n_bytes > 0].sum(dtype=np.float64) / math.log(2)
        counted[i] = n_bytes.sum()
    if not counted.sum() or not np.isfinite(bits).all():
        return None
    return {
        "bits_per_byte": round(float(bits.sum() / counted.sum()), 6),
        "interval": ratio_interval(bits, counted),
        "bytes": int(counted.sum()),
    }


def answer_questions(model, items):
    """
    items of suites.questions(). Returns {total, right, accuracy, interval, chance, answers}. Of ends
    that are equally likely each counts for its share.
    """
    encode = tok.load().encode_ordinary
    rows = []
    for _, question, choices, _ in items:
        rows += [([tok.EOT, *encode(question)], encode(" " + choice)) for choice in choices]
    scores = np.array([nats.sum(dtype=np.float64) for nats, _ in log_probs(model, rows, "questions")])
    points, answers = 0.0, []
    for (category, question, choices, right), given in zip(items, scores.reshape(len(items), -1)):
        best = np.flatnonzero(given >= given.max() - 1e-9)
        points += (right in best) / max(1, len(best))
        answer = {"category": category, "question": question, "choices": list(choices), "right": right}
        answer.update(picked=int(given.argmax()), log_probabilities=given.round(4).tolist())
        answers.append(answer)
    share = {"accuracy": round(points / len(items), 6), "interval": suites.interval(points, len(items))}
    return {"total": len(items), "right": points, **share, "chance": 0.25, "answers": answers}


def write_code(model, items):
    """
    items of suites.functions(), one greedy attempt at each. Returns {total, solved, accuracy,
    interval, answers}.
    """
    prompts = [[tok.EOT, *tok.load().encode_ordinary(stub)] for _, stub, *_ in items]
    n, answers = len(items), []
    for (name, stub, tests, *_), (ids,) in zip(items, solve.write(model, prompts, 1, CODE_TOKENS)):
        text = OUTSIDE_FUNCTION.split(tok.load().decode(ids))[0]
        result = sandbox.run_tests(stub + text, tests)
        about = {"name": name, "stub": stub, "written": text}
        answers.append({**about, "solved": result.ok, "reason": result.reason})
    solved = sum(answer["solved"] for answer in answers)
    share = {"accuracy": round(solved / n, 6), "interval": suites.interval(solved, n)}
    return {"total": n, "solved": solved, **share, "answers": answers}


def evaluate(model, data_dir="data", texts=None, limit=None):
    """
    {bits_per_byte: {source: figures}, questions, code, seconds}. texts: as held_out() gives them. limit: only
    so many questions and functions, evenly spread, and a share of the text to match.
    """

    def spread(items):
        n = min(limit or len(items), len(items))
        return [items[i] for i in np.linspace(0, len(items) - 1, n).astype(int)]

    started = time.perf_counter()
    questions = suites.questions()
    source_tokens = SOURCE_TOKENS * len(spread(questions)) // len(questions)
    bits = {s: bits_per_byte(model, data_dir, shards, source_tokens) for s, shards in (texts or {}).items()}
    return {
        "bits_per_byte": {source: figures for source, figures in bits.items() if figures},
        "questions": answer_questions(model, spread(questions)),
        "code": write_code(model, spread(suites.functions())),
        "seconds": round(time.perf_counter() - started, 3),
    }


# -----------------------------------------------------------------------------
# lm-eval


@functools.cache
def benchmarks():
    """lm-eval's table of its tasks, which takes ten seconds to make. ValueError where it is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("suites called lm_eval:... need EleutherAI's lm-eval: pip install lm-eval") from None
    return TaskManager()


def check_benchmarks(suite):
    """'lm_eval:sciq,arc_easy' -> ['sciq', 'arc_easy']. ValueError for one that lm-eval does not have."""
    names, known = suite.removeprefix("lm_eval:").split(","), benchmarks().all_tasks
    for name in names:
        if name not in known:
            closest = ", ".join(difflib.get_close_matches(name, known, 3, 0))
            raise ValueError(f"lm-eval has no task {name!r}: the closest are {closest}")
    return names


def behind_lm_eval(model):
    """The model as lm-eval wants it. Each text begins with <|endoftext|>, as documents do in training."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Wrapped(TemplateLM):
        eot_token_id = tok.EOT

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tok.load().encode_ordinary(string)

        def _loglikelihood_tokens(self, requests, **kwargs):
            rows = []
            for _, context, continuation in requests:
                rows.append((context if context[:1] == [tok.EOT] else [tok.EOT, *context], continuation))
            return [(float(nats.sum(dtype="f8")), bool(top.all())) for nats, top in log_probs(model, rows)]

        def loglikelihood_rolling(self, requests, **kwargs):
            """Every token is predicted once, from what came before it in its window of block_size."""
            totals = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), tok.EOT, model.config.block_size, 1
                )
                rows = [utils.make_disjoint_window(window) for window in windows]
                totals.append(sum(float(nats.sum(dtype="f8")) for nats, _ in log_probs(model, rows)))
            return totals

        def generate_until(self, requests, **kwargs):
            """At most half of block_size is written; a prompt too long for the rest loses its beginning."""
            size, prompts, lengths, out = model.config.block_size, [], [], []
            for context, settings in (request.args for request in requests):
                lengths.append(min(settings.get("max_gen_toks", 256), size // 2))
                prompts.append([tok.EOT, *self.tok_encode(context)][lengths[-1] - size :])
            written = solve.write(model, prompts, 1, max(lengths))
            for request, length, (ids,) in zip(requests, lengths, written):
                text, until = tok.load().decode(ids[:length]), request.args[1].get("until") or []
                for word in [until] if isinstance(until, str) else until:
                    text = text.partition(word)[0]
                out.append(text)
            return out

    return Wrapped()


def evaluate_benchmarks(model, suite, limit=None):
    """
    {results: {task: {metric: {value, interval}}}, seconds}. limit: only so many items of each. The interval
    is lm-eval's standard error times 1.96, None where it has none. OSError where a benchmark cannot be
    fetched.
    """
    import lm_eval

    names, started, results = check_benchmarks(suite), time.perf_counter(), {}
    try:
        how = {"task_manager": benchmarks(), "bootstrap_iters": 1000, "log_samples": False}
        found = lm_eval.simple_evaluate(behind_lm_eval(model), tasks=names, limit=limit, **how)
    except OSError as e:
        raise OSError(f"lm-eval cannot get {suite}: {snapshots.first_line(e)}") from None
    for task, figures in found["results"].items():
        for name, value in figures.items():
            metric, _, how = name.partition(",")  # "acc,none": behind the comma, how answers were filtered
            if not how or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}_stderr,{how}")
            known = isinstance(error, float) and math.isfinite(value + error)
            ends = [round(value + side * 1.959964 * error, 6) for side in (-1, 1)] if known else None
            shown = metric if how == "none" else f"{metric}, {how}"
            results.setdefault(task, {})[shown] = {"value": round(float(value), 6), "interval": ends}
    return {"results": results, "seconds": round(time.perf_counter() - started, 3)}


# -----------------------------------------------------------------------------
# for people


def rows(figures):
    """The figures of one of these suites: [(what, value or None, interval or None, a remark)]."""
    if "error" in figures:
        return [("not measured", None, None, figures["error"])]
    out = []
    for source, f in figures.get("bits_per_byte", {}).items():
        out.append((f"bits per byte, {source}", f["bits_per_byte"], f["interval"], f"{f['bytes']:,} bytes"))
    if "questions" in figures:
        q, c = figures["questions"], figures["code"]
        remark = f"{q['right']:g} of {q['total']}; chance {q['chance']}"
        out.append(("questions", q["accuracy"], q["interval"], remark))
        out.append(("code", c["accuracy"], c["interval"], f"{c['solved']} of {c['total']}"))
    for task, metrics in figures.get("results", {}).items():
        out += [(f"{task}, {metric}", f["value"], f["interval"], "") for metric, f in metrics.items()]
    return out
