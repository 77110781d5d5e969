"""
What a teacher said, written down once: for teachers that do not fit beside the student, or cost too much to ask twice.

    python distill.py record config/distill_route_a.py --record_prompts=10000 --out_dir=out/said
    python distill.py config/distill_route_a.py --teacher=out/said

A folder of shards of about 100 prompts and teacher.json, which names the teacher, the data, and the SHA-256 of every file. A shard is
four arrays: ids (the documents, each a prompt and the teacher's answer to it, one after the other), length (of each document), shape (rows
and columns of each frame), log_p (the frames, in float16: 11 numbers for each place). Before this: teachers.py.
"""

import contextlib
import hashlib
import io
import json
import os

import numpy as np
import torch
from tqdm import tqdm

import configurator
from smol import arc
from smol import tokenizer as tok
from smol.files import write_whole
from smol.loader import Puzzles, draw_rng, puzzle_row
from smol.teachers import OUTCOMES, document, prompt, solved, tasks_of

RECORD = "teacher.json"
SHARD = 100  # prompts
EVAL_DEMOS = "arc_eval_demos"  # the demonstrations of ARC's evaluation tasks as a source; prepare.py --eval_demos=True calls it so as well


class Recorded:
    """
    What a teacher said, read from a folder that `distill.py record` wrote, after comparing every file with its hash. It answers only
    prompts that are in it; `documents` are those, each with the teacher's answer.
    """

    def __init__(self, folder):
        try:
            with open(os.path.join(folder, RECORD), encoding="utf-8") as f:
                record = json.load(f)
            self.about, self.conditional = {**record["teacher"], "recorded": str(folder)}, record["conditional"]
            self.sources, shards = record["data"]["sources"], record["shards"]
            if record["tokenizer"] != tok.fingerprint():
                raise ValueError(f"{folder} was recorded with another tokenizer ({record['tokenizer'][:12]}...) than this one "
                                 f"({tok.fingerprint()[:12]}...): its token ids mean something else")  # fmt: skip
            self.documents, self.where, self.data = [], {}, []
            for shard in shards:
                parts = {}
                for part, digest in shard["sha256"].items():
                    path = os.path.join(folder, f"{shard['name']}.{part}.npy")
                    with open(path, "rb") as f:
                        if hashlib.sha256(f.read()).hexdigest() != digest:
                            raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {RECORD}; record again")
                    parts[part] = np.load(path, mmap_mode="r", allow_pickle=False)
                ends = np.cumsum([0, *parts["length"].tolist()])
                sizes = np.cumsum([0, *parts["shape"].astype(np.int64).prod(1).tolist()])
                for i, (rows, columns) in enumerate(parts["shape"].tolist()):
                    ids = parts["ids"][ends[i] : ends[i + 1]]
                    self.where[key_of(ids)] = len(self.documents)
                    self.documents.append(ids)
                    self.data.append((parts["log_p"], int(sizes[i]), rows, columns))
        except (KeyError, TypeError, json.JSONDecodeError) as e:
            raise ValueError(f"{os.path.join(folder, RECORD)} is not what distill.py record writes ({type(e).__name__}: {e})") from None

    def find(self, task):
        return self.where.get(key_of(arc.encode(task.kind, [*task.train, (task.test[0][0], np.zeros((1, 1), np.uint8))])))

    def frames(self, tasks, answers):
        frames = []
        for task in tasks:
            i = self.find(task)
            if i is None:
                frames.append(None)
                continue
            log_p, start, rows, columns = self.data[i]
            frames.append(torch.from_numpy(log_p[start : start + rows * columns].astype(np.float32)).view(rows, columns, OUTCOMES))
        return frames

    def write(self, tasks):
        found = [self.find(task) for task in tasks]
        return [None if i is None else arc.decode(self.documents[i])[1][-1][1] for i in found]


def key_of(ids):
    """The prompt of a document, hashed: up to the last OUTPUT."""
    ids = np.asarray(ids, dtype=np.uint16)
    return hashlib.sha256(ids[: np.flatnonzero(ids == tok.OUTPUT)[-1] + 1].tobytes()).hexdigest()


def record_shard(folder, name, tasks, teacher):
    """Have a teacher answer tasks and write what it says beside its hashes. -> the shard's entry for RECORD; None if no task fits."""
    grids = teacher.write(tasks)
    rows = [(document(task, grid), frame) for task, grid, frame in zip(tasks, grids, teacher.frames(tasks, grids))
            if grid is not None and frame is not None]  # fmt: skip
    if not rows:
        return None
    parts = {
        "ids": np.concatenate([ids.numpy() for ids, _ in rows]).astype("<u2"),
        "length": np.array([len(ids) for ids, _ in rows], "<i4"),
        "shape": np.array([frame.shape[:2] for _, frame in rows], "<i2"),
        "log_p": torch.cat([frame.reshape(-1, OUTCOMES) for _, frame in rows]).clamp(min=-60).numpy().astype("<f2"),
    }
    digests = {}
    for part, array in parts.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        digests[part] = hashlib.sha256(buffer.getbuffer()).hexdigest()
        write_whole(buffer.getbuffer(), os.path.join(folder, f"{name}.{part}.npy"))
    return {"name": name, "documents": len(rows), "tokens": int(parts["length"].sum()), "sha256": digests}


def record(folder, loader, teacher, n, data, held_out):
    """
    Have a teacher answer the first n different prompts of a loader; data: what the prompts are from, held_out: tasks whose solved share is
    noted. -> how many it could answer. The old record is gone as soon as this begins, the new one is there when it is whole.
    """
    os.makedirs(folder, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, RECORD))
    shards, seen, waiting, barren = [], set(), [], 0
    with tqdm(total=n, unit="prompt", dynamic_ncols=True) as bar:
        while bar.n < n:
            before = len(seen)
            for batch in loader.next_step():
                for task in tasks_of(batch.idx, batch.targets, loader.puzzle_format) if batch.mode == "puzzle" else ():
                    key = prompt(task).numpy().tobytes()
                    if key not in seen:
                        seen.add(key)
                        waiting.append(task)
            barren = 0 if len(seen) > before else barren + 1
            if barren == 1000:
                raise ValueError(f"the stage has only {len(seen)} different prompts: ask for --record_prompts={len(seen)}")
            while bar.n < n and len(waiting) >= min(SHARD, n - bar.n):
                part, waiting = waiting[: min(SHARD, n - bar.n)], waiting[min(SHARD, n - bar.n) :]
                entry = record_shard(folder, f"{len(shards):05d}", part, teacher)
                shards += [entry] if entry else []
                bar.update(len(part))
    found = sum(s["documents"] for s in shards)
    if not found:
        raise ValueError("every prompt is too long for the teacher: there is nothing to record")
    whole = {"teacher": teacher.about, "conditional": teacher.conditional, "tokenizer": tok.fingerprint(), "data": data, "documents": found,
             "held_out_solved": solved(teacher, held_out) if held_out else None, "shards": shards}  # fmt: skip
    configurator.save(whole, os.path.join(folder, RECORD))
    return found


class Prompts(Puzzles):
    """
    Documents that are in no stage as a source of the loader's: a record's as they were (augment "none"), since what was said holds for no
    other view of them, or the demonstrations of ARC's evaluation tasks.
    """

    def __init__(self, name, documents, seed, batch_tokens, block_size, puzzle_format, augment="none"):
        self.name, self.documents, self.seed, self.augment = name, documents, seed, augment
        self.batch_tokens, self.block_size, self.puzzle_format = batch_tokens, block_size, puzzle_format
        self.drawn, self.waiting, self.rows = 0, {}, {}

    def row(self, n):
        epoch, i = divmod(n, len(self.documents))
        i = draw_rng(self.seed, self.name, epoch).permutation(len(self.documents))[i]
        rng = draw_rng(self.seed, self.name, f"view {n}") if self.augment != "none" else None
        return puzzle_row(self.documents[i], self.puzzle_format, self.augment, rng)
