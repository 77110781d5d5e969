"""
Real benchmarks: our models behind the interface of EleutherAI's lm-eval, which has hundreds of them.

    pip install lm-eval
    python eval_arc.py CKPT --suites=lm_eval:sciq,arc_easy      one after the other, with 95% intervals

lm-eval asks three things of a model: how likely is this continuation, how likely is this text, what comes next until one of these words.
Each text begins with <|endoftext|>, as every document does in training. Greedy, one attempt, no fine-tuning.

lm-eval fetches the benchmarks from the Hugging Face hub when they are first used. Read next: language.py, which needs no network.
"""

import difflib
import functools
import math
import time

import torch
from tqdm import tqdm

from smol import engine, language
from smol import tokenizer as tok

try:
    import lm_eval
    import lm_eval.utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError:
    raise ValueError("suites called lm_eval:... need EleutherAI's lm-eval: pip install lm-eval") from None

MAX_TOKENS = 256  # written at most where a task does not say
SHARES = ("acc", "exact_match", "f1")  # metrics between 0 and 1
BATCH = 16  # texts that Route A continues at a time


class Wrapped(TemplateLM):
    """A model of ours as lm-eval wants it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.told = model, False

    @property
    def eot_token_id(self):
        return tok.EOT

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return tok.load().encode_ordinary(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """requests: list of (texts, context ids, continuation ids) -> list of (log-probability, is it what greedy decoding gives)."""
        rows = [
            (context if context[:1] == [tok.EOT] else [tok.EOT, *context], continuation)
            for _, context, continuation in requests
        ]
        with tqdm(
            total=len(rows),
            desc="likelihoods",
            unit="text",
            dynamic_ncols=True,
            leave=False,
            disable=disable_tqdm,
        ) as bar:
            scores = language.log_probabilities(self.model, rows, bar.update)
        return [(float(nats.sum(dtype="float64")), bool(greedy.all())) for nats, greedy in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """-> the log-probability of each text, every token predicted once, from what came before it in its window of block_size."""
        rows, owners = [], []
        for n, request in enumerate(requests):
            windows = lm_eval.utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), tok.EOT, self.model.config.block_size, 1
            )
            for context, continuation in map(lm_eval.utils.make_disjoint_window, windows):
                rows.append((context, continuation))
                owners.append(n)
        totals = [0.0] * len(requests)
        for n, (nats, _) in zip(owners, language.log_probabilities(self.model, rows)):
            totals[n] += float(nats.sum(dtype="float64"))
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """-> what the model writes after each text, greedily, up to the first of the words in `until`."""
        out, together = (
            [],
            BATCH if self.model.puzzle_format == "autoregressive" else 1,
        )  # Route B's generate() ends with its first row
        with tqdm(
            total=len(requests),
            desc="writing",
            unit="text",
            dynamic_ncols=True,
            leave=False,
            disable=disable_tqdm,
        ) as bar:
            for start in range(0, len(requests), together):
                part = [request.args for request in requests[start : start + together]]
                out += self.write([context for context, _ in part], [settings for _, settings in part])
                bar.update(len(part))
        return out

    def write(self, contexts, settings):
        device = next(self.model.parameters()).device
        untils = [
            [s["until"]] if isinstance(s.get("until"), str) else list(s.get("until") or []) for s in settings
        ]
        asked = [s.get("max_gen_toks", MAX_TOKENS) for s in settings]
        fit = [self.fit([tok.EOT, *self.tok_encode(context)], n) for context, n in zip(contexts, asked)]
        prompts, most = [torch.tensor(ids, device=device) for ids, _ in fit], [n for _, n in fit]
        written = [[] for _ in contexts]
        for drawn in engine.generate(
            self.model, torch.stack(prompts) if len(prompts) == 1 else prompts, max(most), temperature=0
        ):
            for ids, token in zip(written, drawn.tolist()):
                ids.append(token)
            if all(len(ids) >= n or cut(ids, words)[1] for ids, n, words in zip(written, most, untils)):
                break
        return [cut(ids[:n], words)[0] for ids, n, words in zip(written, most, untils)]

    def fit(self, ids, asked):
        """
        -> (the end of a prompt, how many tokens are written after it), together at most block_size. The
        prompt comes first: what is asked for beyond half of block_size is written only as far as the prompt
        leaves room. Whatever is left out is said, once.
        """
        block = self.model.config.block_size
        n = min(asked, max(block - len(ids), block // 2))
        if (n < asked or len(ids) > block - n) and not self.told:
            self.told = True
            print(
                f"block_size {block} has no room for a prompt of {len(ids)} tokens and {asked} after it: "
                f"the prompt's last {min(len(ids), block - n)} are read and at most {n} written "
                "(of others this is not said)"
            )
        return ids[-(block - n) :], n


def cut(ids, words):
    """-> (the text of ids up to the first of the words, or to a token that is no text; has it come to that end?)."""
    end = next((n for n, i in enumerate(ids) if i >= tok.EOT), len(ids))
    text = tok.load().decode(ids[:end])
    found = [text.index(word) for word in words if word in text]
    return text[: min(found, default=len(text))], bool(found) or end < len(ids)


@functools.cache
def manager(include_path=None, include_defaults=True):
    """lm-eval's list of the tasks that there are. With all of lm-eval's own it takes ten seconds to make, so it is made once."""
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def check(tasks, include_path=None):
    """-> the TaskManager that knows all of these tasks by name. ValueError, with the closest names, for one that there is not."""
    if include_path and set(tasks) <= set(manager(include_path, include_defaults=False).all_tasks):
        return manager(include_path, include_defaults=False)
    known = manager(include_path)
    for task in tasks:
        if task not in known.all_tasks:
            closest = difflib.get_close_matches(task, known.all_tasks, 3, 0)
            raise ValueError(f"lm-eval has no task {task!r}: the closest are {', '.join(closest)}")
    return known


def evaluate(model, tasks, limit=None, include_path=None):
    """
    tasks: list of names that lm-eval knows, or that YAML files in the folder include_path define. limit: only so many items of each.
    -> {results: {task: {metric: {value, interval}}}, items: {task: how many}, seconds}; interval: 95%, from lm-eval's standard error, None
    where it has none. ValueError for an unknown task, OSError where a benchmark cannot be fetched.
    """
    started, known = time.perf_counter(), check(tasks, include_path)
    try:
        found = lm_eval.simple_evaluate(
            Wrapped(model),
            tasks=list(tasks),
            limit=limit,
            task_manager=known,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except (ConnectionError, OSError) as e:
        raise OSError(f"lm-eval cannot get {', '.join(tasks)}: {str(e).splitlines()[0]}") from None
    results = {}
    for task, figures in found["results"].items():
        for name, value in figures.items():
            metric, _, how = name.partition(
                ","
            )  # "acc,none": the filter that answers went through comes after the comma
            if isinstance(value, (int, float)) and how and not metric.endswith("_stderr"):
                error = figures.get(f"{metric}_stderr,{how}")
                interval = None
                if isinstance(error, float) and math.isfinite(value + error):
                    interval = [value - 1.959964 * error, value + 1.959964 * error]
                if interval and metric.startswith(SHARES):
                    interval = [max(interval[0], 0.0), min(interval[1], 1.0)]
                shown = metric if how == "none" else f"{metric}, {how}"
                interval = interval and [round(end, 6) for end in interval]
                results.setdefault(task, {})[shown] = {"value": round(float(value), 6), "interval": interval}
    items = {task: counts["effective"] for task, counts in found["n-samples"].items()}
    return {"results": results, "items": items, "seconds": round(time.perf_counter() - started, 3)}
