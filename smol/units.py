"""
Units of work: a few megabytes of one source, read, normalised, judged (curate.py), tokenised, and written with what it takes to find
duplicates.

They lie in data/work/SOURCE/KEY/ as NUMBER-LANE.tokens, .ends (offsets of documents), .keys (for duplicates
and for the split), .bands (of MinHash, where near-duplicates are looked for), and last .json, the record:
what was read and dropped, where to read on, and the SHA-256 of the files and of itself. A unit without a
record is not there, so a kill costs a unit per worker; one whose files or record have changed is made
again.

Read next: workers.py, who makes them; pipeline.py, what is done with them.
"""

import functools
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from smol import arc, curate, puzzles, tokenizer
from smol import sources as table
from smol.snapshots import sha256, sha256_file, write

BYTES_PER_TOKEN = 4  # of English, about: how megabytes of a stage become tokens, for puzzles as for text
EXAMPLES, EXAMPLE_CHARS = 3, 600  # dropped documents kept per rule, for a person to read
MAX_CHARS = 4_000_000  # of a document: 20 for each of the 200,000 words that the widest rule allows


class Dropped:
    """How many documents each rule took out, and the first few of them, to look at."""

    def __init__(self):
        self.rules = {}

    def add(self, rule, example, count=1):
        entry = self.rules.setdefault(rule, {"count": 0, "examples": []})
        entry["count"] += count
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(example)

    def merge(self, rules):
        for rule, found in rules.items():
            entry = self.rules.setdefault(rule, {"count": 0, "examples": []})
            entry["count"] += found["count"]
            entry["examples"] += found["examples"][: EXAMPLES - len(entry["examples"])]


def unit_path(folder, lane, number, suffix):
    return Path(folder) / f"{number:06d}-{lane}.{suffix}"


def read_unit(folder, lane, number):
    """-> the record of a unit; None if it is not there, is damaged, or the files have other sizes."""
    try:
        record = json.loads(unit_path(folder, lane, number, "json").read_bytes())
        digest = record.pop("sha256")
        sizes = [unit_path(folder, lane, number, suffix).stat().st_size for suffix in record["files"]]
        whole = sizes == [size for size, _ in record["files"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole and digest == sha256(json.dumps(record).encode()) else None


def intact(folder, record):
    """Do the files of a unit have the bytes that were written? Reads them all."""
    for suffix, (_, digest) in record["files"].items():
        path = unit_path(folder, record["lane"], record["number"], suffix)
        if not path.is_file() or sha256_file(path) != digest:
            return False
    return True


@functools.cache
def _evaluations(path):
    """-> (curate.TextEvaluations, {puzzle_key: name of the set it is from})"""
    with np.load(path) as arrays:
        tables = {(int(k.split(":")[0]), k.split(":")[1]): arrays[k] for k in arrays.files}
    puzzle_keys = {key: name for (n, name), keys in tables.items() if n == 0 for key in keys.tolist()}
    return curate.TextEvaluations({key: hashes for key, hashes in tables.items() if key[0]}), puzzle_keys


@functools.cache
def _judging_code():
    return table.code_hash(curate, sys.modules[__name__]) + curate.held_out().digest


def judging_key(profile):
    """
    All that decides which documents of a profile are kept, and how: its rules and the code; of suites.py,
    what is asked is what counts.
    """
    rules = [(rule, what, limits[profile]) for rule, what, limits in curate.RULES if profile in limits]
    return [rules, _judging_code()]


def make_units(job, report):
    """
    Make the units `first` to `last` of one lane of one source, as far as they are not there; report(record) after each.
    Ends early where the source does. ValueError or OSError for what the user can do something about.
    """
    rows, state = None, None
    if job["first"]:
        state = read_unit(job["folder"], job["lane"], job["first"] - 1)["state"]
    for number in range(job["first"], job["last"] + 1):
        record = read_unit(job["folder"], job["lane"], number)
        if record is None:
            if rows is None:
                rows = table.open_rows(job["source"], job["where"], job["seed"], job["lane"], state)
                iterator = iter(rows)
            record = make_unit(job, number, rows, iterator)
        else:
            rows, state = None, record["state"]
        report(record)
        if record["end"]:
            return


def make_unit(job, number, rows, iterator):
    """Read, judge, tokenise and write one unit. -> its record."""
    name = job["source"]
    source = table.SOURCES[name]
    documents, size, read, end = [], 0, 0, True
    dropped, odd = Dropped(), Dropped()
    for origin, row in iterator:
        read += 1
        try:
            document = table.to_document(name, row)
        except table.OddRow as e:
            odd.add(e.rule, f"[{origin}] {e}".encode(errors="backslashreplace").decode()[:EXAMPLE_CHARS])
            size += len(repr(row))
        else:
            task, grids, parts = table.instantiate(document)
            chars = sum(len(p) for p in parts if isinstance(p, str))
            size += chars + BYTES_PER_TOKEN * sum(np.size(p) for p in parts if not isinstance(p, str))
            if chars > MAX_CHARS:  # before it is judged, which takes about 60 bytes of memory for each
                dropped.add("too_long", f"[{origin}] {chars:,} characters")
            else:
                documents.append((origin, task, grids, parts))
        if size >= job["unit_bytes"]:
            end = False
            break
    state = rows.state()
    dropped.merge(odd.rules)
    judged = (
        judge_puzzles if source.kind == "puzzle" or any(task for _, task, _, _ in documents) else judge_texts
    )
    kept, keys, bands = judged(source, documents, dropped, job)
    tokens = np.concatenate(kept) if kept else np.zeros(0, np.uint16)
    ends = np.concatenate([[0], np.cumsum([len(t) for t in kept])]).astype("<i8")
    files = {
        "tokens": tokens.astype("<u2").tobytes(),
        "ends": ends.tobytes(),
        "keys": np.array(keys, "<u8").reshape(-1, 2).T.tobytes(),
    }
    if bands is not None:
        files["bands"] = bands.astype("<u8").tobytes()
    for suffix, content in files.items():
        write(unit_path(job["folder"], job["lane"], number, suffix), content)
    record = {
        "source": name,
        "lane": job["lane"],
        "number": number,
        "read": read,
        "documents": len(kept),
        "tokens": len(tokens),
        "bytes": size,
        "end": end,
        "state": state,
        "dropped": dropped.rules,
        "odd": odd.rules,
        "files": {suffix: (len(content), sha256(content)) for suffix, content in files.items()},
    }
    sealed = {**record, "sha256": sha256(json.dumps(record).encode())}
    # last: now the unit is there
    write(unit_path(job["folder"], job["lane"], number, "json"), json.dumps(sealed))
    return record


def tokenise(parts):
    """
    list of str and ids -> np.uint16, an end-of-text at the end. Text that spells a reserved token stays text.
    ValueError for an id that the tokenizer does not have, which 16 bits could turn into another.
    """
    encoder = tokenizer.load()
    # without a list of Python integers on the way this is encode_ordinary, and a fifth faster
    arrays = [
        encoder.encode_to_numpy(p, disallowed_special=()) if isinstance(p, str) else np.atleast_1d(p)
        for p in parts
    ]
    ids = np.concatenate([*arrays, [tokenizer.EOT]])
    if not 0 <= ids.min() <= ids.max() <= tokenizer.END:
        raise ValueError(f"token ids from {ids.min()} to {ids.max()}: the tokenizer has 0 to {tokenizer.END}")
    return ids.astype(np.uint16)


def key_of(data):
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def puzzle_key(task):
    """One key for all turned and mirrored images of a puzzle."""
    return int(puzzles.task_hash(task)[:16], 16)


def judge_texts(source, documents, dropped, job):
    """-> (token arrays, (key for duplicates, key for the split) of each, band keys or None) of the documents that pass."""
    layout = source.profile in ("code", "dialogue")
    kept, texts = [], []
    for origin, _, _, parts in documents:
        parts = [curate.normalise(p, layout) if isinstance(p, str) else p for p in parts]
        if any(p is None for p in parts):
            dropped.add("not_text", f"[{origin}]")
        elif not any(isinstance(p, str) and p for p in parts):
            dropped.add("empty", f"[{origin}]")
        else:
            kept.append((origin, parts))
            texts.append("\n".join(p for p in parts if isinstance(p, str)))
    words = curate.read_words(texts)
    verdicts = curate.judge(words, texts, source.profile)
    for i, name in _evaluations(job["evaluations"])[0].quoted(words).items():
        verdicts[i] = verdicts[i] or f"quotes_{name}"
    if source.profile == "none":  # generated, as the suites of puzzles in words are
        verdicts = [
            rule or ("held_out" if curate.held_out().asks(text) else None)
            for rule, text in zip(verdicts, texts)
        ]
    good = [i for i, rule in enumerate(verdicts) if rule is None]
    for i, rule in enumerate(verdicts):
        if rule is not None:
            dropped.add(rule, f"[{kept[i][0]}] {texts[i][:EXAMPLE_CHARS]}")
    tokens = [tokenise(kept[i][1]) for i in good]
    keys = [key_of(t.tobytes()) for t in tokens]
    # what is generated from templates is alike by design
    bands = None if source.profile == "none" else curate.signatures(words)[:, good]
    return tokens, [(k, k) for k in keys], bands


def answer_fits(task):
    """Is the answer right? For puzzles from elsewhere; ours were checked when they were made. A maze may have other ways as short."""
    if task.kind == "sudoku":
        return puzzles.check_sudoku(*task.test[0])
    return puzzles.check_maze(*task.test[0], only=False)


def judge_puzzles(source, documents, dropped, job):
    """As judge_texts, for puzzles and texts about puzzles."""
    tokens, keys = [], []
    outputs, tested_on = curate.evaluation_outputs(), _evaluations(job["evaluations"])[1]
    for origin, task, grids, parts in documents:
        name = f"[{origin}] {task.id}"
        if any(max(grid.shape) > arc.MAX_SIDE for grid in grids):
            dropped.add("larger_than_30", name)
        elif source.repo and not answer_fits(task):
            dropped.add("wrong_answer", name)
        elif curate.held_out().has(task, source.augment):
            dropped.add("held_out", name)
        elif tested_on and (name_of := tested_on.get(puzzle_key(task))):
            dropped.add(f"is_in_{name_of}", name)
        elif found := outputs.matches(grids):
            dropped.add("evaluation_output", f"{name}: {found[0]}")
        else:
            ids = tokenise(parts)
            # An ARC task comes back turned and recoloured, on purpose, and all its images are on the same side of the split. Of other
            # puzzles the images are the same puzzle, because the loader makes them by itself.
            same = (
                key_of(ids.tobytes()) if source.group == "arc" or source.kind == "text" else puzzle_key(task)
            )
            tokens.append(ids)
            keys.append((same, key_of(task.id.encode()) if source.group == "arc" else same))
    return tokens, keys, None
