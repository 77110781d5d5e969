"""
Where documents come from: one short entry per source, and how its rows are read, from the hub, from local files, or generated.

A source says in which group it belongs, under which licence it is, how a row of it becomes a document, and which rules it must pass
(curate.py). To add one, add an entry here and give it a share in STAGES. A document is one of

    str                    text
    list                   text and token ids in turn, for dialogues: [USER, "question", END, ASSISTANT, "answer", END]
    arc.Task               a puzzle
    (arc.Task, list, list) a puzzle, text and ids about it, and the grids in those that the puzzle does not have

Rows are read in LANES lanes side by side: lane n reads every eighth file (or generates every eighth document), whatever the number of
processes, so that the order of a stage's documents never depends on the machine. A lane can say where it is and be continued there.

--source_dir=DIR reads DIR/NAME/*.parquet, .jsonl, .json, .csv or .txt (also .gz, .zst) in place of the hub,
with the same columns. A .jsonl or .json file has one object a line; a .json file may also be one array of
objects, which is read into memory whole. A .txt file is one document, or several between lines that say
<|endoftext|>; one that is longer than TEXT_FILE_CHARS is cut at line ends. Hidden files and folders,
README, LICENSE and .md files are not read; a file of any other kind stops the build.

A row that is no document (a number or null where text is expected, bytes or escapes that are not Unicode, a
line that is no JSON object, a sudoku of 82 characters, a role other than system, user and assistant) is
dropped and counted by reason, with its file and row; too many of them stop the build (pipeline.py). A
column that the first row of a file lacks stops it at once.

DIR/gsm8k_test, DIR/sudoku_extreme_test and DIR/maze_hard_test hold what is evaluated on, to be kept out.

Where a dataset's columns were seen stands beside its entry. Revisions are not in the table: the first build resolves `main` to a commit,
writes it to data/metadata/revisions.json, and all later builds in that folder use that commit or stop.

Read next: curate.py, what is kept of these; pipeline.py, how it becomes shards.
"""

import ast
import contextlib
import csv
import functools
import gzip
import hashlib
import inspect
import io
import itertools
import json
import re
import reprlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smol import arc, programs, puzzles
from smol import tokenizer as tok

LANES = 8
TEXT_FILE_CHARS = 200_000  # of a document from a .txt file: at most 100,000 words, the limit of prose
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".txt")
NO_DATA = re.compile(r"(readme|licen[cs]e)(\.(txt|rst))?|.*\.md", re.I)  # comes with a dataset, holds no rows
csv.field_size_limit(1 << 28)


@dataclass(frozen=True)
class Source:
    group: str  # web, code, math, synth or arc
    licence: str
    document: Callable  # row -> document; of a generated source: (rng, index) -> document
    profile: str = "none"  # of rules, see curate.RULES
    kind: str = "text"  # or "puzzle"
    augment: str = "none"  # what the loader may do to a puzzle
    repo: str = ""  # on the hub; without one, the source is generated
    config: str | None = None
    split: str = "train"
    files: str | None = None  # pattern, where only part of a split is wanted
    columns: tuple = ()  # of a csv file: all read as text (81 digits of a sudoku are not a number)
    suite: str | None = (
        None  # of held-out puzzles (puzzles.py) that it is validated on; those of all suites stay out of training
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# rows -> documents


class OddRow(ValueError):
    """A row that is no document, and the rule under which it is counted."""

    def __init__(self, rule, problem):
        super().__init__(problem)
        self.rule = rule


def text_of(row, name):
    """
    The text in a column; binary that is UTF-8 is decoded. KeyError if there is no such column, OddRow if it
    holds anything else: only the functions below make token ids, so that no row of numbers can be taken for
    a dialogue.
    """
    value = row[name]
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()  # fails for lone surrogates, also those that open_text makes of what is not UTF-8
            return value
    except UnicodeError as e:
        raise OddRow("not_text", f"{name} is not Unicode: {e.reason}") from None
    raise OddRow("not_text", f"{name} is {type(value).__name__}, not text")


def column(name):
    return lambda row: text_of(row, name)


def turns(*messages):
    """
    (role, text), ... -> a document with dialogue tokens. What a system message says stands at the head of
    the user's next turn, in the middle of a dialogue too; where an answer or the end follows, it is a turn
    of the user's. OddRow for any other role.
    """
    out, said = [], ""
    for role, text in messages:
        if role == "system":
            said = (said + text.strip() + "\n\n").lstrip()
        elif role == "user":
            out += [tok.USER, said + text.strip(), tok.END]
            said = ""
        elif role == "assistant":
            out += [tok.USER, said.strip(), tok.END] if said else []
            out += [tok.ASSISTANT, text.strip(), tok.END]
            said = ""
        else:
            raise OddRow("unknown_role", f"the role is {role!r}, not system, user or assistant")
    return [*out, tok.USER, said.strip(), tok.END] if said else out


def chat(row):
    return turns(*((m["role"], text_of(m, "content")) for m in row["messages"]))


def question_and_answer(question, answer):
    return lambda row: turns(("user", text_of(row, question)), ("assistant", text_of(row, answer)))


def gsm8k(row):
    # <<48/2=24>> are notes to a calculator, not text
    answer = re.sub("<<.*?>>", "", text_of(row, "answer")).replace("#### ", "Answer: ")
    return f"Question: {text_of(row, 'question').strip()}\nSolution: {answer.strip()}"


def sudoku_extreme(row):
    """81 characters each, a dot for a blank."""

    def grid(text):
        return np.array([0 if c == "." else int(c) for c in text], np.uint8).reshape(9, 9)

    pair = grid(text_of(row, "question")), grid(text_of(row, "answer"))
    return arc.Task("sudoku_extreme", "sudoku", [], [pair])


def maze_hard(row):
    """30 x 30 characters: # wall, space free, S start, G goal; in the answer o on the way."""

    def grid(text):
        side = max(int(len(text) ** 0.5), 1)
        return np.array([" #SGo".index(c) for c in text], np.uint8).reshape(side, side)

    pair = grid(text_of(row, "question")), grid(text_of(row, "answer"))
    return arc.Task("maze_hard", "maze", [], [pair])


@functools.cache
def _arc_tasks():
    """
    Training tasks of both ARCs, one per test pair, without those that are evaluation tasks of either. Where the two share a task, ARC-2's
    version is taken: it is the later one.
    """
    evaluation = {task.id for name in ("arc1_eval", "arc2_eval") for task in arc.load(name)}
    tasks = {
        task.id: task
        for name in ("arc1_train", "arc2_train")
        for task in arc.load(name)
        if task.id not in evaluation
    }
    return [arc.Task(i, "arc", tasks[i].train, [pair]) for i in sorted(tasks) for pair in tasks[i].test]


@functools.cache
def arc_eval_demos():
    """The evaluation tasks of both ARCs without their tests: the last demonstration is the question."""
    tasks = {
        task.id: task for name in ("arc1_eval", "arc2_eval") for task in arc.load(name) if len(task.train) > 1
    }
    return [arc.Task(i, "arc", tasks[i].train[:-1], tasks[i].train[-1:]) for i in sorted(tasks)]


def arc_task(rng, index, tasks_of=_arc_tasks):
    """All tasks as they are; then all of them again, each turned, recoloured and with its pairs in another order; and so on."""
    tasks = tasks_of()
    task = tasks[index % len(tasks)]
    if index < len(tasks):
        return task
    symmetry = arc.random_augment(rng, "arc")
    pairs = task.train + task.test
    pairs = [tuple(arc.augment(symmetry, grid) for grid in pairs[i]) for i in rng.permutation(len(pairs))]
    return arc.Task(task.id, "arc", pairs[:-1], pairs[-1:])


def arc_eval_demo(rng, index):
    """The same from the demonstrations of evaluation tasks."""
    return arc_task(rng, index, arc_eval_demos)


# ---------------------------------------------------------------------------------------------------------------------------------
# the table. Columns, splits and licences are those of the datasets' cards on the hub, as far as a copy of the card could be read; where it
# could not, the entry says what was seen instead. Nothing was downloaded to check. A wrong column stops the build at the first row,
# naming the columns that there are.

SOURCES = {
    "fineweb_edu": Source(
        "web", "ODC-By-1.0", column("text"), "prose", repo="HuggingFaceFW/fineweb-edu", config="sample-10BT"
    ),
    # 27 parquet files; licence of its card; columns not on it: public training scripts read `text`
    "openwebtext2": Source(
        "web", "Apache-2.0", column("text"), "prose", repo="Geralt-Targaryen/openwebtext2"
    ),
    "wikipedia": Source(
        "web", "CC-BY-SA-3.0, GFDL", column("text"), "prose", repo="wikimedia/wikipedia", config="20231101.en"
    ),
    # columns of the cards of its halves, codeparrot-clean-train and -valid
    "codeparrot": Source(
        "code",
        "that of each file: column license",
        column("content"),
        "code",
        repo="codeparrot/codeparrot-clean",
    ),
    "open_web_math": Source("math", "ODC-By-1.0", column("text"), "math", repo="open-web-math/open-web-math"),
    "gsm8k": Source("math", "MIT", gsm8k, "dialogue", repo="openai/gsm8k", config="main"),
    # Strings of cells: as HRM's build_sudoku_dataset.py and build_maze_dataset.py read them, and several others' code. No licence is given.
    # A maze of maze_hard has many shortest ways, of which the answer is one: answers are checked to be ways, not to be the only one.
    "sudoku_extreme": Source(
        "synth",
        "none given",
        sudoku_extreme,
        kind="puzzle",
        repo="sapientinc/sudoku-extreme",
        files="train.csv",
        columns=("source", "question", "answer", "rating"),
    ),
    "maze_hard": Source(
        "synth",
        "none given",
        maze_hard,
        kind="puzzle",
        augment="dihedral",
        repo="sapientinc/maze-30x30-hard-1k",
        files="train.csv",
        columns=("source", "question", "answer", "rating"),
    ),
    # from stage 2 on. messages = [{role, content}]
    "smol_smoltalk": Source("web", "Apache-2.0", chat, "dialogue", repo="HuggingFaceTB/smol-smoltalk"),
    # licence of its card, files of the split train_1M seen; columns as public training code reads them
    "openmath_instruct": Source(
        "math",
        "CC-BY-4.0",
        question_and_answer("problem", "generated_solution"),
        "dialogue",
        repo="nvidia/OpenMathInstruct-2",
        split="train_1M",
    ),
    # licence of its card; instruction, response: as public training code reads them. Python only, checked by execution
    "oss_instruct": Source(
        "code",
        "ODC-By-1.0",
        question_and_answer("instruction", "response"),
        "dialogue",
        repo="bigcode/self-oss-instruct-sc2-exec-filter-50k",
    ),
    # generated here
    "programs": Source(
        "synth",
        "generated here",
        lambda rng, i: programs.task(rng),
        kind="puzzle",
        augment="arc",
        suite="transforms",
    ),
    "traces": Source("synth", "generated here", lambda rng, i: programs.trace(rng)),
    "sudoku4": Source(
        "synth",
        "generated here",
        lambda rng, i: puzzles.sudoku(rng, 4, int(rng.integers(4, 9)), "train"),
        kind="puzzle",
        suite="sudoku4",
    ),
    "sudoku9": Source(
        "synth",
        "generated here",
        lambda rng, i: puzzles.sudoku(rng, 9, int(rng.integers(20, 55)), "train"),
        kind="puzzle",
        suite="sudoku9",
    ),
    "maze": Source(
        "synth",
        "generated here",
        lambda rng, i: puzzles.maze(rng, *rng.integers(5, 16, size=2).tolist()),
        kind="puzzle",
        augment="dihedral",
        suite="maze",
    ),
    "graphs": Source("synth", "generated here", lambda rng, i: puzzles.shortest_path(rng)[0]),
    "logic": Source("synth", "generated here", lambda rng, i: puzzles.logic_puzzle(rng)[0]),
    "arithmetic": Source("math", "generated here", lambda rng, i: puzzles.arithmetic(rng)[0]),
    "arc": Source("arc", "Apache-2.0", arc_task, kind="puzzle", augment="arc"),
    # demonstrations of evaluation tasks, never their tests: only with --eval_demos=True, and every report of eval_arc.py then says so
    "arc_eval_demos": Source("arc", "Apache-2.0", arc_eval_demo, kind="puzzle", augment="arc"),
}

# Texts that models are tested on and that must not be quoted in training: {name: (repo, config, split, columns)}.
EVALUATION_TEXTS = {"gsm8k_test": ("openai/gsm8k", "main", "test", ("question", "answer"))}
# Puzzles that models are tested on: {name: (the source whose dataset has them, file)}; looked at when that source is in the stage.
EVALUATION_PUZZLES = {
    "sudoku_extreme_test": ("sudoku_extreme", "test.csv"),
    "maze_hard_test": ("maze_hard", "test.csv"),
}

# A stage: megabytes in all, the share of each group, and how the sources of a group divide its share. Sources that cannot fill theirs
# (GSM8K is small) give what they have, and the others of the group give the rest.
SYNTH = {
    "programs": 5,
    "traces": 3,
    "sudoku_extreme": 2,
    "sudoku9": 1,
    "sudoku4": 0.5,
    "maze_hard": 0.5,
    "maze": 1,
    "graphs": 1,
    "logic": 1,
}
STAGES = {
    "stage1": (
        30_000,
        {"web": 0.5, "code": 0.2, "math": 0.1, "synth": 0.1, "arc": 0.1},
        {
            "fineweb_edu": 6,
            "openwebtext2": 2,
            "wikipedia": 2,
            "codeparrot": 1,
            "gsm8k": 0.2,
            "arithmetic": 0.2,
            "open_web_math": 9,
            **SYNTH,
            "arc": 1,
        },
    ),
    "stage2": (
        10_000,
        {"web": 0.4, "code": 0.2, "math": 0.1, "synth": 0.15, "arc": 0.15},
        {
            "smol_smoltalk": 3,
            "fineweb_edu": 4,
            "openwebtext2": 1,
            "wikipedia": 1,
            "oss_instruct": 2,
            "codeparrot": 4,
            "gsm8k": 0.5,
            "arithmetic": 0.2,
            "openmath_instruct": 4,
            "open_web_math": 5,
            **SYNTH,
            "arc": 1,
        },
    ),
    "stage3": (
        5_000,
        {"web": 0.3, "code": 0.2, "math": 0.1, "synth": 0.2, "arc": 0.2},
        {
            "smol_smoltalk": 5,
            "fineweb_edu": 3,
            "wikipedia": 1,
            "oss_instruct": 3,
            "codeparrot": 3,
            "gsm8k": 0.5,
            "arithmetic": 0.2,
            "openmath_instruct": 6,
            "open_web_math": 3,
            **SYNTH,
            "arc": 1,
        },
    ),
}


def instantiate(document):
    """document -> (arc.Task or None, list of its grids, parts: list of str and ids). Parts that are not str are ids or arrays of them."""
    if isinstance(document, str):
        return None, [], [document]
    if isinstance(document, list):
        return None, [], document
    if isinstance(document, arc.Task):
        pairs = document.train + document.test
        return document, [grid for pair in pairs for grid in pair], [arc.encode(document.kind, pairs)[:-1]]
    task, parts, more = document
    return task, [grid for pair in task.train + task.test for grid in pair] + more, parts


def code_hash(*modules, without=()):
    """Of what the modules do: their comments do not count, nor the tables of these names."""

    def counts(node):
        named = {ast.unparse(target) for target in node.targets} if isinstance(node, ast.Assign) else set()
        return not named & set(without)

    trees = [filter(counts, ast.parse(inspect.getsource(m)).body) for m in modules]
    return hashlib.sha256("".join(ast.dump(node) for tree in trees for node in tree).encode()).hexdigest()


def described(thing, seen=None):
    """
    What a key says of a value, in lists and strings. Of a function: its code, its defaults, the values that
    it closes over, and what it uses of its own module, all the way down. So column("text") differs from
    column("content"), and what calls an edited function from what it was. Comments do not count; the
    version of Python does, which compiles to other code.
    """
    seen = set() if seen is None else seen
    thing = getattr(thing, "__func__", None) or getattr(thing, "fget", None) or thing  # a method, a property
    thing = inspect.unwrap(thing) if callable(thing) else thing  # of functools.cache and the like
    if isinstance(thing, (list, tuple)):
        return [described(value, seen) for value in thing]
    if isinstance(thing, dict):
        return [[described(key, seen), described(value, seen)] for key, value in thing.items()]
    if isinstance(thing, (set, frozenset)):
        return sorted(map(repr, thing))
    if isinstance(thing, re.Pattern):
        return [thing.pattern, thing.flags]
    if isinstance(thing, functools.partial):
        return described([thing.func, thing.args, thing.keywords], seen)
    if isinstance(thing, types.CodeType):
        return [thing.co_code.hex(), *described([thing.co_names, thing.co_consts], seen)]
    if not callable(thing):
        return re.sub(" at 0x[0-9a-f]+", "", repr(thing))
    name = f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if id(thing) in seen:
        return name
    seen.add(id(thing))
    if isinstance(thing, types.FunctionType):
        closed = [cell.cell_contents for cell in thing.__closure__ or ()]
        parts = [thing.__code__, thing.__defaults__, thing.__kwdefaults__, closed, used_by(thing)]
    elif isinstance(thing, type) and thing.__module__ != "builtins":
        parts = {k: v for k, v in vars(thing).items() if not k.startswith("__") or callable(v)}
    elif "__call__" in vars(type(thing)) and hasattr(thing, "__dict__"):
        parts = [type(thing), vars(thing)]
    else:
        return name  # what another language wrote
    return [name, described(parts, seen)]


def used_by(function):
    """{name: value} of what a function uses of its module: functions, classes, plain values; not SOURCES."""
    names, codes = set(), [function.__code__]
    for code in codes:  # it grows: functions inside of functions
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    found = {name: function.__globals__[name] for name in sorted(names & set(function.__globals__))}
    plain = (str, bytes, int, float, list, tuple, set, frozenset, dict, re.Pattern)

    def counts(value):
        return isinstance(value, plain) or getattr(value, "__module__", None) == function.__module__

    return {name: value for name, value in found.items() if counts(value) and value is not SOURCES}


def source_key(name, where):
    """
    All that decides what documents a source gives, as values, but for the rows themselves: its entry in the
    table, and the code that reads its rows and makes documents of them. The licence decides nothing.
    """
    entry = {field: value for field, value in vars(SOURCES[name]).items() if field != "licence"}
    return described([entry, reader_of(name, where), to_document, instantiate])


@functools.cache
def generators_hash():
    """Of all that decides what is generated, and which puzzles are held out."""
    return code_hash(arc, programs, puzzles)


# ---------------------------------------------------------------------------------------------------------------------------------
# reading


def local_files(source_dir, name):
    """The files of a source under source_dir, in order; [] if it has no folder there. ValueError for an empty folder or a strange file."""
    folder = Path(source_dir) / name
    if not folder.is_dir():
        return []
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file()
        and not NO_DATA.fullmatch(p.name)
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    for path in files:
        if not path.name.removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES):
            raise ValueError(
                f"{path} is of no kind that can be read: {', '.join(SUFFIXES)}, all but parquet also as .gz or .zst"
            )
    if not files:
        raise ValueError(f"{folder} is empty: put files of {name!r} there, or remove the folder")
    return files


def open_text(path):
    """A text file without its byte order mark. What is not UTF-8 becomes lone surrogates: see text_of."""
    how = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", **how)
    if path.name.endswith(".zst"):
        import pyarrow  # here, because few files need it

        return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), **how)
    return open(path, **how)


def json_row(line):
    """The value that a line spells, or the line itself: from_row says that it is no row."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def read_file(path, skip=0):
    """
    Rows of a local file from row number `skip` on: dicts, but for lines of JSON that are something else.
    Empty lines are no rows. ValueError naming the file, and the row, if it cannot be read.
    """
    base, row = path.name.removesuffix(".gz").removesuffix(".zst"), skip
    try:
        if base.endswith(".parquet"):
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    if skip >= size:  # without reading it
                        skip -= size
                        continue
                    for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                        for record in parquet_rows(batch)[skip:]:
                            yield record
                            row += 1
                        skip = max(skip - batch.num_rows, 0)
            return
        with open_text(path) as f:
            if base.endswith(".csv"):
                records = csv.DictReader(f, strict=True)
            elif base.endswith(".txt"):
                records = ({"text": text, "content": text} for text in text_documents(f))
            else:
                lines = (line for line in f if not line.isspace())
                first = list(itertools.islice(lines, 1))
                lines = itertools.chain(first, lines)
                if base.endswith(".json") and first and first[0].lstrip().startswith("["):
                    records = json.loads("".join(lines))
                else:
                    records = map(json_row, itertools.islice(lines, skip, None))
                    skip = 0
            for record in itertools.islice(records, skip, None):
                yield record
                row += 1
    except (ValueError, OSError, EOFError, csv.Error, ImportError) as e:
        raise ValueError(f"cannot read {path} at row {row + 1}: {str(e) or type(e).__name__}") from None
    except Exception as e:
        if type(e).__module__.split(".")[0] in ("zlib", "pyarrow"):  # their own errors are plain Exceptions
            raise ValueError(f"cannot read {path} at row {row + 1}: {e}") from None
        raise


def parquet_rows(batch):
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # not all writers check what they call text: text_of looks at it row by row
        columns = [c.cast("binary") if str(c.type) == "string" else c for c in batch.columns]
        return type(batch).from_arrays(columns, names=batch.schema.names).to_pylist()


def text_documents(f):
    """The documents of a .txt file, none longer than TEXT_FILE_CHARS."""
    lines, size = [], 0
    while line := f.readline(TEXT_FILE_CHARS):  # of a longer line, that much at a time
        end = line.strip() == "<|endoftext|>"
        if size and (end or size + len(line) > TEXT_FILE_CHARS):
            yield "".join(lines)
            lines, size = [], 0
        if not end:
            lines.append(line)
            size += len(line)
    if size:
        yield "".join(lines)


class LocalRows:
    """Rows of every LANES-th file."""

    def __init__(self, files, lane, state):
        self.files = files[lane::LANES]
        self.file, self.row = (state["file"], state["row"]) if state else (0, 0)

    def __iter__(self):
        while self.file < len(self.files):
            path = self.files[self.file]
            for record in read_file(path, self.row):
                self.row += 1
                yield f"{path.name}:{self.row}", record
            self.file, self.row = self.file + 1, 0

    def state(self):
        return {"file": self.file, "row": self.row}


class GeneratedRows:
    """Every LANES-th document of an endless sequence in which each has its own random numbers."""

    def __init__(self, name, seed, lane, state):
        self.key = [seed, int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)]
        self.index = state["row"] if state else lane

    def __iter__(self):
        while True:
            index = self.index
            self.index += LANES
            yield str(index), (np.random.default_rng([*self.key, index]), index)

    def state(self):
        return {"row": self.index}


class HubRows:
    """
    Rows of every LANES-th file of a dataset on the hub, streamed. Nothing of the repository is executed, only its data files are read.
    Whatever goes wrong on the way is a ValueError in one line.
    """

    def __init__(self, repo, config, split, files, columns, revision, lane, state):
        import datasets

        self.repo, self.row = repo, state["row"] if state else 0
        where = {"name": config}
        if files:
            where = {"data_files": {split: files}}
        if columns:
            where["features"] = datasets.Features({c: datasets.Value("string") for c in columns})
        with self.plainly():
            self.data = datasets.load_dataset(repo, **where, split=split, streaming=True, revision=revision)
            shards = self.data.num_shards
            self.empty = lane >= shards
            if not self.empty:
                self.data = self.data.shard(num_shards=min(LANES, shards), index=lane)
                if state:
                    self.data.load_state_dict(state["data"])

    @contextlib.contextmanager
    def plainly(self):
        try:
            yield
        except Exception as e:  # noqa: BLE001 (the client, its file system, its readers: all raise their own)
            reason = str(e).strip().split("\n")[0][:300] or type(e).__name__
            problem = f"cannot read {self.repo} from the hub, after row {self.row:,}: {reason}"
            raise ValueError(f"{problem}; run the same command again to go on") from None

    def __iter__(self):
        records = iter(() if self.empty else self.data)
        while True:
            with self.plainly():
                record = next(records, None)
            if record is None:
                return
            self.row += 1
            yield f"{self.row}", record

    def state(self):
        return {"row": self.row, "data": None if self.empty else self.data.state_dict()}


def reader_of(name, where):
    return LocalRows if "files" in where else HubRows if SOURCES[name].repo else GeneratedRows


def open_rows(name, where, seed, lane, state):
    """
    An iterable of (origin, row) with state(), which open_rows takes again to go on from there. where: dict with "files" (list of paths),
    or "revision", or neither for a generated source.
    """
    source = SOURCES[name]
    if "files" in where:
        return LocalRows([Path(p) for p in where["files"]], lane, state)
    if source.repo:
        return HubRows(
            source.repo,
            source.config,
            source.split,
            source.files,
            source.columns,
            where["revision"],
            lane,
            state,
        )
    return GeneratedRows(name, seed, lane, state)


def is_first(origin):
    """Is it the first row of a file (on the hub: of a lane)? That one says which columns there are."""
    return origin.rpartition(":")[2] == "1"


def from_row(name, document, row, first=True):
    """document(row), for a row of a source or an evaluation of that name. Raises as to_document."""
    try:
        if not isinstance(row, dict):
            raise OddRow("not_a_row", "it is not an object with columns, one a line")
        return document(row)
    except KeyError as e:
        problem = f"a row of {name!r} has no column {e}: it has {', '.join(map(str, row))}"
        if first:
            raise ValueError(problem) from None
        raise OddRow("no_column", problem) from None
    except (TypeError, AttributeError, IndexError, ValueError) as e:
        rule = getattr(e, "rule", "not_as_expected")
        raise OddRow(rule, f"a row of {name!r} is not as expected: {e}: {reprlib.repr(row)}") from None


def to_document(name, where, row, first=True):
    """
    row -> document. OddRow for a row that is none. A column that is not there is a ValueError, which names
    those that are, in the first row of a file; in a later one it is the row that is odd.
    """
    source = SOURCES[name]
    if not source.repo and "files" not in where:
        return source.document(*row)
    document = from_row(name, source.document, row, first)
    return "" if document is None else document
