"""
Units of work: a few megabytes of one source, read, judged (curate.py), tokenised; and who makes them.

A unit is a file, data/work/SOURCE/KEY/NUMBER-LANE.npz, with the arrays tokens, ends (offsets of documents),
keys (for duplicates and for the split), band0, band1, ... (of MinHash, for text) and the record: what was
read and dropped, and where to read on. It is written whole or not at all, so a kill costs one per worker; it
has checksums, so one that was damaged is made anew.

Before this: sources.py, curate.py. Read next: pipeline.py, which makes a stage of units.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np

from smol import arc, curate, puzzles, tokenizer
from smol import sources as table
from smol.snapshots import write

BYTES_PER_TOKEN = 4  # of English, about: how megabytes of a stage become tokens, for puzzles as for text
MAX_CHARS = 4_000_000  # of a document: 20 for each of the 200,000 words that the widest rule allows
EXAMPLES, EXAMPLE_CHARS = 3, 600  # dropped documents kept per rule, for a person to read


class Dropped:
    """How many documents each rule took out, and the first few of them, to look at."""

    def __init__(self, *reports):
        self.rules = {}
        for report in reports:
            for rule, found in report.items():
                self.add(rule, *found["examples"], count=found["count"])

    def add(self, rule, *examples, count=1):
        entry = self.rules.setdefault(rule, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] += examples[: EXAMPLES - len(entry["examples"])]

    def __str__(self):
        rules = sorted(self.rules.items(), key=lambda item: -item[1]["count"])
        return ", ".join(f"{rule} {found['count']:,}" for rule, found in rules) or "nothing"


def unit_path(folder, number, lane):
    return Path(folder) / f"{number:06d}-{lane}.npz"


def read_record(path):
    """-> the record of a unit, None if it is not there or damaged: reading an array checks its sum."""
    try:
        with np.load(path) as unit:
            arrays = {name: unit[name] for name in unit.files}
        return json.loads(str(arrays["record"]))
    except Exception:  # noqa: BLE001 (damage may look like anything to numpy and zipfile)
        return None


def make_units(job):
    """Make the units first to last of one lane of one source, or up to its end. -> their records."""
    before = unit_path(job["folder"], job["first"] - 1, job["lane"])
    state = read_record(before)["state"] if job["first"] else None
    rows = table.open_rows(job["source"], job["where"], job["seed"], job["lane"], state)
    iterator, records = iter(rows), []
    for number in range(job["first"], job["last"] + 1):
        records.append(make_unit(job, number, rows, iterator))
        if records[-1]["end"]:
            break
    return records


def make_unit(job, number, rows, iterator):
    """Read, judge, tokenise and write one unit. -> its record."""
    source = table.SOURCES[job["source"]]
    documents, size, read, end, dropped = [], 0, 0, True, Dropped()
    for origin, row in iterator:
        read += 1
        try:
            document = table.to_document(job["source"], row)
        except table.OddRow as e:
            dropped.add(e.rule, f"[{origin}] {e}".encode(errors="backslashreplace").decode()[:EXAMPLE_CHARS])
            size += len(repr(row)) if source.is_read else BYTES_PER_TOKEN  # of a generator, an address
        else:
            task, grids, pieces = table.instantiate(document)
            chars = sum(len(p) for p in pieces if isinstance(p, str))
            size += chars + BYTES_PER_TOKEN * sum(np.size(p) for p in pieces if not isinstance(p, str))
            if chars > MAX_CHARS:  # before it is judged, which takes about 60 bytes of memory for each
                dropped.add("too_long", f"[{origin}] {chars:,} characters")
            else:
                documents.append((origin, task, grids, pieces))
        if size >= job["unit_bytes"]:
            end = False
            break
    state = rows.state()
    puzzling = source.kind == "puzzle" or any(task for _, task, _, _ in documents)
    judge = judge_puzzles if puzzling else judge_texts
    kept, keys, bands = judge(source, documents, dropped, read_evaluations(job["evaluations"]))
    record = {"lane": job["lane"], "number": number, "end": end, "state": state, "read": read}
    record |= {"documents": len(kept), "tokens": sum(map(len, kept)), "dropped": dropped.rules}
    content = io.BytesIO()
    np.savez(
        content,
        record=json.dumps(record),
        tokens=np.concatenate([np.zeros(0, np.uint16), *kept]),
        ends=np.cumsum([0, *map(len, kept)]),
        keys=np.array(keys, np.uint64).reshape(-1, 2).T,
        **{f"band{b}": band for b, band in enumerate(bands)},
    )
    write(unit_path(job["folder"], number, job["lane"]), content.getvalue())
    return record


# ---------------------------------------------------------------------------------------------------------
# judging


@functools.lru_cache(maxsize=2)
def read_evaluations(path):
    """-> (what curate.quoted takes, {puzzle_key: name of the set it is from})"""
    with np.load(path) as arrays:
        tables = {(int(k.split(":")[0]), k.split(":")[1]): arrays[k] for k in arrays.files}
    puzzle_keys = {key: name for (n, name), keys in tables.items() if n == 0 for key in keys.tolist()}
    return {key: hashes for key, hashes in tables.items() if key[0]}, puzzle_keys


def tokenise(pieces):
    """List of str and ids -> uint16, end-of-text last. Text that spells a reserved token is text."""
    encoder = tokenizer.load()
    # without a list of Python integers on the way this is encode_ordinary, and a fifth faster
    arrays = [
        encoder.encode_to_numpy(p, disallowed_special=()) if isinstance(p, str) else np.atleast_1d(p)
        for p in pieces
    ]
    return np.concatenate([*arrays, [tokenizer.EOT]]).astype(np.uint16)


def hash64(data):
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def puzzle_key(task):
    """One key for all turned and mirrored images of a puzzle."""
    return int(arc.task_hash(task)[:16], 16)


def judge_texts(source, documents, dropped, evaluations):
    """-> of those that pass: token arrays, (key for duplicates, key for the split), bands or nothing"""
    layout = source.profile in ("code", "dialogue")
    kept, texts = [], []
    for origin, _, _, pieces in documents:
        pieces = [curate.normalise(p, layout) if isinstance(p, str) else p for p in pieces]
        if any(p is None for p in pieces):
            dropped.add("undecodable", f"[{origin}]")
        elif not any(isinstance(p, str) and p for p in pieces):
            dropped.add("empty", f"[{origin}]")
        else:
            kept.append((origin, pieces))
            texts.append("\n".join(p for p in pieces if isinstance(p, str)))
    words = curate.read_words(texts)
    verdicts = curate.judge(words, texts, source.profile)
    for i, name in curate.quoted(words, evaluations[0]).items():
        verdicts[i] = verdicts[i] or f"quotes_{name}"
    generated = source.profile == "none"  # as the suites of puzzles in words are
    tokens, keys, good = [], [], []
    for i, (origin, pieces) in enumerate(kept):
        if generated and texts[i].split("\nSolution:")[0] in curate.held_out_questions():
            verdicts[i] = verdicts[i] or "held_out"
        if verdicts[i]:
            dropped.add(verdicts[i], f"[{origin}] {texts[i][:EXAMPLE_CHARS]}")
            continue
        try:
            ids = tokenise(pieces)
        except ValueError as e:  # tiktoken gives up on a million blanks in a row
            dropped.add("not_tokenised", f"[{origin}] {e}")
            continue
        key = hash64(ids.tobytes())
        # a module and its docstrings are on the same side of the split
        keys.append((key, hash64(origin.encode()) if source.rows else key))
        tokens.append(ids)
        good.append(i)
    # what is generated from templates is alike by design
    return tokens, keys, () if generated else curate.signatures(words)[:, good]


def held_out_from(source):
    return curate.held_out(source.suite == "rearc" or source.tasks)


def judge_puzzles(source, documents, dropped, evaluations):
    """As judge_texts, for puzzles and texts about puzzles."""
    tokens, keys = [], []
    tested_on = evaluations[1]
    for origin, task, grids, pieces in documents:
        name = f"[{origin}] {task.id}"
        same = puzzle_key(task)
        if source.repo and not puzzles.answer_fits(task):
            dropped.add("wrong_answer", name)
        elif source.tasks and curate.is_evaluation_task(task):
            dropped.add("evaluation_task", name)
        elif held_out_from(source).has(task, source.augment):
            dropped.add("held_out", name)
        elif same in tested_on:
            dropped.add(f"is_in_{tested_on[same]}", name)
        elif found := curate.given_away(grids):
            dropped.add("evaluation_output", f"{name}: {found[0]}")
        else:
            ids = tokenise(pieces)
            # Images of a puzzle are the same puzzle: the loader makes them by itself. An ARC task comes back
            # turned and recoloured on purpose, and all its images are on the same side of the split.
            key = hash64(ids.tobytes()) if source.group == "arc" or source.kind == "text" else same
            keys.append((key, hash64(task.id.encode()) if source.group == "arc" else key))
            tokens.append(ids)
    return tokens, keys, ()


# ---------------------------------------------------------------------------------------------------------
# who makes them


@contextlib.contextmanager
def workers(engine, num_proc, sources):
    """-> submit(job): a Future of make_units(job), on this machine's cores or on a Ray cluster."""
    num_proc = num_proc or os.cpu_count() or 1
    if engine == "ray":
        yield from ray_workers(num_proc)
    elif num_proc == 1:

        def submit(job):
            done = concurrent.futures.Future()
            done.set_result(make_units(job))
            return done

        yield submit
    else:
        for source in sources:
            if source.kind == "puzzle":
                held_out_from(source)
        # spawned, because a forked worker would hold the lock of the data folder beyond our death
        spawn = multiprocessing.get_context("spawn")
        begin = {"initializer": begin_worker, "initargs": (curate.HELD_OUT,)}
        pool = concurrent.futures.ProcessPoolExecutor(num_proc, mp_context=spawn, **begin)
        try:
            yield lambda job: pool.submit(make_units, job)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # what they are at is made again
                process.terminate()
            raise
        pool.shutdown()


def begin_worker(held_out):
    """In a worker: take what the build has generated, and end when it was killed instead of waiting on."""
    curate.HELD_OUT.update(held_out)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def ray_workers(num_proc):
    """
    The cluster that RAY_ADDRESS names, or a local one. Every node needs this repository at the same place,
    and the data folder on a file system that they share, because units are written where they are made.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--engine=ray needs Ray: pip install ray") from None
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    options = {"runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"num_cpus": num_proc, "include_dashboard": False}
    ray.init(**options)
    try:
        remote = ray.remote(num_cpus=1)(make_units)
        yield lambda job: remote.remote(job).future()
    finally:
        ray.shutdown()
