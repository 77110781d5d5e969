"""
From sources to what training reads: clean documents, token shards, a stage, frozen and published.

    python prepare.py demo                       a small offline stage, in about a minute
    python prepare.py stage1                     of the curriculum, streamed from the hub; killed, it goes on
        --source_dir=DIR                         from local DIR/SOURCE/*.parquet, .jsonl, .json, .csv instead
        --sources=a,b --limit_mb=200             some of the sources, a smaller stage
        --dry_run=True                           print what would be built
    python prepare.py stage2|stage3              the other stages of the curriculum
    python prepare.py sudoku_extreme             a thousand hard sudokus
    python prepare.py arc                        RE-ARC, BARC and programs, for config/arc_speedrun.py
    python prepare.py arc_cpu                    RE-ARC alone, for hours on a CPU, in some minutes
    python prepare.py status                     what is there, and what was dropped by which rule
    python prepare.py show programs              the first documents of a source
    python prepare.py freeze stage1 --tag=v0.1   an immutable copy; training pins it with --data_tag=v0.1
    python prepare.py verify stage1:v0.1         check every byte that it lists
    python prepare.py clean                      delete the shards that no stage lists any more
    python prepare.py push stage1:v0.1 --repo=USER/NAME    upload it as a dataset under that tag
    python prepare.py pull USER/NAME:v0.1        download it, check every hash, put it in place

A build that was killed leaves the stage as it was or not there; run again, it goes on. Nothing in a shard
depends on the clock, on chance or on how many processes there are. data/README.md has the layout, and what is
kept out.

Read next: smol/sources.py (what there is, the shares of each stage), smol/curate.py (what is kept),
smol/pipeline.py (how it becomes a stage), smol/snapshots.py (the files).
"""

import concurrent.futures.process
import contextlib
import itertools
import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import configurator
from smol import arc, pipeline, snapshots, tokenizer, units
from smol import sources as table
from smol.files import lock

# ---- where and how
data_dir = "data"
seed = 1  # of everything that is generated
force = False  # build the stage although it is there
num_proc = 0  # worker processes; 0: one for each core
engine = "local"  # "ray": on the Ray cluster that RAY_ADDRESS names, or else a local one
dry_run = False  # print what would be built or deleted, and stop
# ---- which documents
sources = ""  # names, with commas between: only these sources of the stage
source_dir = ""  # read DIR/SOURCE/* in place of the hub
limit_mb: float | None = None  # megabytes of text that a stage should have; None: as smol/sources.py has it
val_every: int | None = None  # for validation one document in so many; None: 400, demo 50, sudoku_extreme 4
eval_demos = False  # also the demonstrations of ARC's evaluation tasks, never their tests (transductive)
# ---- freeze, push
tag = ""  # of the frozen stage
repo = ""  # USER/NAME on the hub; private, if it is new

RANGES = {
    "[0, inf)": "seed num_proc",
    "(0, inf)": "limit_mb",
    "[2, 1e9]": "val_every",
    ("local", "ray"): "engine",
}


# ---------------------------------------------------------------------------------------------------------
# building


def build(c, stage):
    data = Path(c.data_dir)
    parts, notes = pipeline.plan(c, data, stage)
    if c.dry_run:
        show_plan(c, stage, parts, notes)
        return
    evaluations = pipeline.gather_evaluations(c, data, parts, notes)
    pipeline.set_jobs(c, data, parts, evaluations)
    for note in notes:
        print(f"note: {note}")
    inputs = {
        "settings": {name: getattr(c, name) for name in ("seed", "sources", "limit_mb", "val_every")},
        "units": {part.name: part.folder.name for part in parts},
        # a list: of two documents that are alike, the one of the source that stands first is kept
        "targets": [[part.name, part.source.group, part.target] for part in parts],
    }
    with contextlib.suppress(FileNotFoundError, ValueError):  # of a stage that is not there, or damaged
        snapshots.read_manifest(data, stage, verify=False)
        made_of = snapshots.read_json(data / "metadata" / stage / "provenance.json").get("inputs")
        if made_of == inputs and not c.force:
            print(f"stage {stage!r} is already there in {data} (--force=True builds it anew)")
            return
    print(f"building stage {stage!r} in {data}")
    for folder in ("processed", "work", "metadata", "stages", "arc"):  # what a killed build has left
        for left in (data / folder).rglob("*.tmp"):
            left.unlink(missing_ok=True)  # a worker of the killed build may have renamed it
    if "arc" in inputs["units"]:
        for name in arc.SETS:  # as they are published; the `_eval` sets are for evaluation alone
            snapshots.write(data / "arc" / f"{name}.json", json.dumps(arc.tasks_in(name)) + "\n")
    pipeline.build_stage(c, data, stage, parts, {"inputs": inputs, "notes": notes})
    show_stage(data, stage)


def show_plan(c, stage, parts, notes):
    print(f"stage {stage!r}, into {c.data_dir}/\n{'source':18}{'group':7}{'share':>7}{'tokens':>15}   from")
    for part in parts:
        source = f"{part.name:18}{part.source.group:7}{part.share:7.1%}{part.target:>15,.0f}"
        print(f"{source}   {snapshots.origin(part.about)}")
    for note in notes:
        print(f"note: {note}")


# ---------------------------------------------------------------------------------------------------------
# looking


def status(c):
    """Print every stage that is there, and every frozen one."""
    data = Path(c.data_dir)
    stages = sorted(path.parent.name for path in data.glob("stages/*/manifest.jsonl"))
    tags = sorted(path.parent for path in data.glob("stages/*/*/snapshot.json"))
    frozen = [f"{folder.parent.name}:{folder.name}" for folder in tags]
    if not stages and not frozen:
        print(f"no stage is prepared in {data}/; run: python prepare.py demo")
    for name in [*stages, *frozen]:
        try:
            if name in frozen:
                print(f"\nfrozen {summary(data, name, verify=False)}")
            else:
                show_stage(data, name)
        except (ValueError, FileNotFoundError) as e:
            print(f"\n{name} is damaged: {e}")


def summary(data, name, verify):
    entries, _ = snapshots.read_manifest(data, *snapshots.split_name(name), verify)
    return f"{name}: {len(entries)} shards, {sum(e['tokens'] for e in entries):,} tokens"


def show_stage(data, stage):
    """Print a table of a stage's sources, its mixture, and what was dropped by which rule."""
    entries, mixture = snapshots.read_manifest(data, stage, verify=False)
    print(f"\nstage {stage}, seed {mixture['seed']}")
    print(f"{'source':18}{'group':7}{'split':7}{'share':>7}{'documents':>11}{'tokens':>15}{'bytes':>16}")
    columns = {}
    for e in entries:  # a large source has many shards
        sums = columns.setdefault((e["source"], e["group"], e["split"]), [0, 0, 0])
        for i, key in enumerate(("documents", "tokens", "bytes")):
            sums[i] += e[key]
    for (source, group, split), (documents, tokens, size) in columns.items():
        share = f"{mixture['weights'].get(source, 0):.1%}" if split == "train" else ""
        print(f"{source:18}{group:7}{split:7}{share:>7}{documents:>11,}{tokens:>15,}{size:>16,}")
    documents, tokens, size = map(sum, zip(*columns.values()))
    print(f"{'total':39}{documents:>11,}{tokens:>15,}{size:>16,}")
    for group, share in mixture["groups"].items():
        print(f"{group:7}{share:6.1%} {'#' * round(60 * share)}")
    folder = data / "metadata" / stage
    print(f"dropped, by rule (examples: {folder / 'filters.json'})")
    for source, report in snapshots.read_json(folder / "filters.json").items():
        text = f"  {source:16}{units.Dropped(report['dropped'])}"
        print(textwrap.fill(text, 100, subsequent_indent=" " * 18))


def show(c, name):
    """Print the first documents of a source, to be judged by a person."""
    if name not in table.SOURCES:
        raise ValueError(configurator.unknown("source", name, table.SOURCES))
    where, about = pipeline.find_rows(c, Path(c.data_dir), name, keep=False)
    if where is None:
        raise ValueError(f"{name}: {about}")
    for origin, row in itertools.islice(table.open_rows(name, where, c.seed, 0, None), 8):
        try:
            task, _, pieces = table.instantiate(table.to_document(name, row))
        except table.OddRow as e:
            print(f"\n[{origin}] left out: {e}")
            continue
        print(f"\n[{origin}]", task.id if task else "")
        if table.SOURCES[name].kind == "puzzle":
            for x, y in task.train + task.test:
                print(arc.ansi_row([("input", x, None), ("output", y, None)]))
        else:
            text = tokenizer.load().decode(units.tokenise(pieces)[:-1].tolist())
            print(text.replace("<|row|>", "<|row|>\n"))


# ---------------------------------------------------------------------------------------------------------
# freezing, checking, cleaning


def freeze(c, stage):
    if not c.tag:
        raise ValueError(f"name a tag: python prepare.py freeze {stage} --tag=v0.1")
    folder = snapshots.freeze(Path(c.data_dir), stage, c.tag)
    print(f"stage {stage!r} is frozen as {stage}:{c.tag} in {folder}")


def verify(c, name):
    print(f"{summary(c.data_dir, name, verify=True)}, all intact")


def clean(c):
    """Delete the shards that no manifest lists."""
    total = 0
    for path in snapshots.unlisted_files(Path(c.data_dir)):
        total += path.stat().st_size
        print(f"{path}: {path.stat().st_size:,} bytes")
        if not c.dry_run:
            path.unlink()
    print(f"{total:,} bytes that no stage lists {'would be' if c.dry_run else 'were'} deleted")


COMMANDS = {
    "status": status,
    "clean": clean,
    "show": show,
    "freeze": freeze,
    "verify": verify,
    "push": lambda c, name: snapshots.push(Path(c.data_dir), name, c.repo),
    "pull": lambda c, name: snapshots.pull(Path(c.data_dir), name),
}
READ_ONLY = ("status", "show", "verify", "push")
FROM_FILES = {s for s, (*_, names) in table.STAGES.items() if any(table.SOURCES[n].is_read for n in names)}
OPTIONS = {  # that others would ignore
    "dry_run": (*table.STAGES, "clean"),
    "source_dir": (*FROM_FILES, "show"),
    "tag": ("freeze",),
    "repo": ("push",),
}


def main(argv):
    config, words = configurator.read(globals(), argv, "COMMAND [STAGE[:TAG] | SOURCE | USER/NAME:TAG]")
    c = SimpleNamespace(**config)
    command, *arguments = words or ["status"]
    try:
        if command not in (known := (*table.STAGES, *COMMANDS)):
            raise ValueError(configurator.unknown("command", command, known) + " (--help)")
        needed = int(command not in (*table.STAGES, "status", "clean"))
        if len(arguments) != needed:
            raise ValueError(f"{command} needs {'one argument' if needed else 'no argument'} (--help)")
        for option, of in OPTIONS.items():
            if getattr(c, option) and command not in of:
                raise ValueError(f"{command} has no --{option}")
        alone = command in READ_ONLY or c.dry_run
        with contextlib.nullcontext() if alone else lock(c.data_dir, "prepare.py"):
            if command in table.STAGES:
                build(c, command)
            else:
                COMMANDS[command](c, *arguments)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {getattr(e, 'cause', e)}")  # Ray's errors are the worker's whole traceback
    except concurrent.futures.process.BrokenProcessPool:
        sys.exit("error: a worker was killed (out of memory?); go on with a smaller --num_proc")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing half-written is listed anywhere, run it again to complete it")


if __name__ == "__main__":
    main(sys.argv[1:])
