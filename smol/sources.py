"""
Where documents come from: one entry per source, and how its rows are read (the hub, local files) or made.

An entry says which group a source belongs to, its licence, how a row becomes a document, and which rules
a document must pass (curate.py). To add a source, add an entry to SOURCES and its weights to WEIGHTS.
A document is one of

    str                     text
    list                    text and token ids in turn: [USER, "question", END, ASSISTANT, "answer", END]
    arc.Task                a puzzle
    (arc.Task, list, list)  a puzzle, text and ids about it, and the grids in those that the puzzle lacks

Rows are read in LANES lanes: lane n reads every eighth file (or makes every eighth document), whatever the
number of processes, so the order of documents never depends on the machine. A lane has a state to go on from.
A row that is no document is an OddRow, counted by reason; a file that cannot be read stops all.

Read next: curate.py, what is kept of these; units.py and pipeline.py, how it becomes shards.
"""

import ast
import codecs
import contextlib
import functools
import glob
import gzip
import hashlib
import json
import os
import re
import reprlib
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from smol import arc, programs, puzzles, rearc
from smol import tokenizer as tok
from smol.snapshots import first_line

LANES = 8
# of `datasets`, but for .json. Of JSON it reads lines, as text: one that is damaged costs a row and not the
# build, and where a column has texts and something else, its own reader makes JSON literals of the texts
READERS = {".parquet": "parquet", ".jsonl": "text", ".json": "json", ".csv": "csv"}
AS_LINES = {"encoding": "utf-8-sig", "encoding_errors": "backslashreplace"}


@dataclass(frozen=True)
class Source:
    group: str  # web, code, math, synth or arc
    licence: str
    document: Callable  # row -> document; of a generated source: (rng, index) -> document
    profile: str = "none"  # of rules, see curate.RULES
    repo: str = ""  # on the hub; without one, the source is generated
    config: str | None = None
    split: str = "train"
    files: str | None = None  # pattern, where only part of a dataset is wanted
    columns: tuple = ()  # of csv files: all are read as text, for 81 digits of a sudoku are not a number
    kind: str = "text"  # or "puzzle"
    augment: str = "none"  # what the loader may do to a puzzle
    suite: str | None = None  # of held-out puzzles (suites.py) that the source is validated on
    rows: Callable | None = None  # of what Python brings along: () -> list of rows, dicts with a "name"
    reasoning_gym: bool = False  # is it made with that package, which requirements.txt lacks?
    tasks: bool = False  # is it read as ARC's JSON? Without a repo, from --source_dir alone

    @property
    def is_read(self):
        """From files or the hub, rather than made or brought along by Python."""
        return bool(self.repo or self.tasks)


# -----------------------------------------------------------------------------
# rows -> documents


class OddRow(ValueError):
    """A row that is no document, and the rule under which it is counted: one of ODD_RULES if it was read."""

    def __init__(self, rule, problem):
        super().__init__(problem)
        self.rule = rule


ODD_RULES = ("not_text", "not_a_row", "no_column", "unknown_role", "few_pairs", "not_as_expected")
ROLES = {"system": tok.USER, "user": tok.USER, "assistant": tok.ASSISTANT}


def text_of(row, name):
    """
    The text in a column; bytes are decoded. KeyError, OddRow or UnicodeError for anything else: no row of
    numbers can be taken for the token ids of a dialogue.
    """
    value = row[name].decode() if isinstance(row[name], bytes) else row[name]
    if not isinstance(value, str):
        raise OddRow("not_text", f"{name} is {type(value).__name__}, not text")
    value.encode()  # fails for lone surrogates
    return value


def column(name):
    return lambda row: text_of(row, name)


def turns(*messages):
    """(role, text), ... -> a document with dialogue tokens. A system message is a turn of the user's."""
    out = []
    for role, text in messages:
        if role not in ROLES:
            raise OddRow("unknown_role", f"the role is {role!r}, not {', '.join(ROLES)}")
        out += [ROLES[role], text.strip(), tok.END]
    return out


def chat(row):
    return turns(*((m["role"], text_of(m, "content")) for m in row["messages"]))


def exchange(question, answer):
    """Columns of a question and its answer -> what makes a dialogue of them."""
    return lambda row: turns(("user", text_of(row, question)), ("assistant", text_of(row, answer)))


def gsm8k(row):
    # <<48/2=24>> are notes to a calculator, not text
    answer = re.sub("<<.*?>>", "", text_of(row, "answer")).replace("#### ", "Answer: ")
    return f"Question: {text_of(row, 'question').strip()}\nSolution: {answer.strip()}"


def square_puzzle(kind, side, characters):
    """Question and answer are square grids as strings; `characters` are those of colours 0, 1, 2, ..."""

    def grid(text):
        return np.array([characters.index(c) for c in text], np.uint8).reshape(side, side)

    def document(row):
        question, answer = text_of(row, "question"), text_of(row, "answer")
        return arc.Task(kind, kind, [], [(grid(question), grid(answer))])

    return document


sudoku_extreme = square_puzzle("sudoku", 9, ".123456789")
maze_hard = square_puzzle("maze", 30, " #SGo")  # wall, start, goal; in the answer o on the way


STDLIB = Path(sysconfig.get_paths()["stdlib"])
# folders with tests, tables of characters, and a copy of the language reference
LEFT_OUT = "test tests idle_test idlelib lib2to3 site-packages dist-packages __pycache__ pydoc_data encodings"


def stdlib():
    """The modules of the standard library by name, in an order that is always the same."""
    names = []
    for folder, folders, files in os.walk(STDLIB):
        folders[:] = [f for f in folders if f not in LEFT_OUT.split() and not f.startswith("config-")]
        paths = [Path(folder, f) for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")]
        names += [path.relative_to(STDLIB).as_posix() for path in paths]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return [{"name": name} for name in names]


def module(row):
    return (STDLIB / row["name"]).read_text(encoding="utf-8")


def docstrings(row):
    """A module's docstring, then those of its classes and functions, each under its first line of code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have odd escapes
        try:
            tree = ast.parse(module(row))
        except SyntaxError:
            return ""
    parts = [ast.get_docstring(tree)]
    for node in ast.walk(tree):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if text := ast.get_docstring(node):
            of_class = isinstance(node, ast.ClassDef)
            inside = ", ".join(map(ast.unparse, node.bases)) if of_class else ast.unparse(node.args)
            parts += [f"{node.name}({inside})", text]
    return "\n\n".join([f"# {row['name']}", *filter(None, parts)]) if any(parts) else ""


def language_reference():
    from pydoc_data import topics  # half a megabyte that nothing else needs

    return [{"name": name, "text": text} for name, text in sorted(topics.topics.items())]


def sudoku(size, fewest, most):
    """Sudokus with so many blanks."""
    return lambda rng, _: puzzles.sudoku(rng, size, int(rng.integers(fewest, most + 1)), "train")


@functools.cache
def arc_tasks():
    """The training tasks of both ARCs that neither evaluates on, one per test pair."""
    tasks = {task.id: task for name in ("arc1_train", "arc2_train") for task in arc.load(name)}
    tasks = [tasks[i] for i in sorted(tasks.keys() - {task.id for task in arc.evaluation_tasks()})]
    return [arc.Task(task.id, "arc", task.train, [pair]) for task in tasks for pair in task.test]


@functools.cache
def arc_eval_demos():
    """The evaluation tasks of both ARCs without their tests: the last demonstration is the question."""
    tasks = {task.id: task for task in arc.evaluation_tasks() if len(task.train) > 1}
    return [arc.Task(i, "arc", tasks[i].train[:-1], tasks[i].train[-1:]) for i in sorted(tasks)]


def augmented(tasks_of):
    """All tasks as they are; then again, each turned, recoloured, its pairs in another order; and so on."""

    def document(rng, index):
        tasks = tasks_of()
        task = tasks[index % len(tasks)]
        if index < len(tasks):
            return task
        symmetry = arc.random_augment(rng, "arc")
        pairs = task.train + task.test
        pairs = [pairs[i] for i in rng.permutation(len(pairs))]
        pairs = [(arc.augment(symmetry, x), arc.augment(symmetry, y)) for x, y in pairs]
        return arc.Task(task.id, "arc", pairs[:-1], pairs[-1:])

    return document


MOST_PAIRS = 6  # of a task from elsewhere: some have hundreds


def arc_json(row):
    """
    A task in ARC's JSON: {train, test}, lists of {input, output}, or {examples}, which may be a list of
    [input, output] too; `outputs` are those of the tests where they come apart. A pair without is left out.
    """
    raw = row
    if "examples" in row:
        pairs = [p if isinstance(p, dict) else dict(zip(("input", "output"), p)) for p in row["examples"]]
        raw = {"train": pairs[:-1], "test": pairs[-1:]}
    task = arc.to_task("", raw, row.get("outputs"))
    pairs = [(x, y) for x, y in task.train + task.test if y is not None][:MOST_PAIRS]
    if len(pairs) < 2:
        raise OddRow("few_pairs", "a task has two pairs at the least")
    task.train, task.test = pairs[:-1], pairs[-1:]
    task.id = str(row.get("id") or row.get("task_id") or arc.task_hash(task)[:8])
    task.id.encode()  # fails for half of a surrogate pair
    return task


def json_tasks(path):
    """The rows of a .json file, as arc_json takes them. A list of pairs is cut into tasks of a few."""
    name = arc.name_of(path)
    if name.endswith(arc.NO_TASKS):
        return
    content = arc.read_json(path)
    if isinstance(content, list):
        n = -(-len(content) // MOST_PAIRS) or 1  # of about the same length: no pair is left alone
        for i in range(n):
            yield {"id": name, "examples": content[i * len(content) // n : (i + 1) * len(content) // n]}
    elif "examples" in content:
        yield {"id": name, **content}
    else:
        for task_id, (raw, outputs) in arc.tasks_of_file(path).items():
            yield {"id": task_id, **raw, "outputs": outputs} if isinstance(raw, dict) else raw


def new_pairs(difficulty, tokens):
    """RE-ARC's tasks of three to five pairs and at most so many tokens."""

    def document(rng, index):
        family = str(rng.choice(list(rearc.families())))
        task = rearc.task(rng, family, int(rng.integers(3, 6)), difficulty, tokens)
        if task is None:
            raise OddRow("few_pairs_that_fit", f"{family}: no three pairs within {tokens:,} tokens")
        return task

    return document


def in_one_row(rng, index):
    """A task of three to five pairs of one row each. Its kinds are few: the split is not by them."""
    task = rearc.task_in_one_row(rng, int(rng.integers(3, 6)))
    return replace(task, id=f"{task.id}-{index}")


# -----------------------------------------------------------------------------
# the table. Columns, splits and licences are those of the datasets' cards on the hub, as far as a copy of the
# card could be read; elsewhere the entry says what was seen instead.

OURS, TEXT = "generated here", column("text")
MAZE = {"kind": "puzzle", "augment": "dihedral", "suite": "maze"}
PROGRAM = {"kind": "puzzle", "augment": "arc", "suite": "transforms"}
REARC = {"kind": "puzzle", "augment": "arc", "suite": "rearc", "reasoning_gym": True}
TASKS = {"kind": "puzzle", "augment": "arc", "tasks": True}
OPENMATH, SC2 = exchange("problem", "generated_solution"), "bigcode/self-oss-instruct-sc2-exec-filter-50k"
BARC = "barc0/200k_HEAVY_gpt4o-description-gpt4omini-code_generated_problems"
REARC_LICENCE = "MIT (RE-ARC), Apache-2.0 (reasoning-gym)"
HRM = {"files": "train.csv", "columns": ("source", "question", "answer", "rating"), "kind": "puzzle"}

SOURCES = {
    # messages = [{role, content}]
    "smol_smoltalk": Source("web", "Apache-2.0", chat, "dialogue", "HuggingFaceTB/smol-smoltalk"),
    "fineweb_edu": Source("web", "ODC-By-1.0", TEXT, "prose", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
    # licence of its card; columns not on it: public training scripts read `text`
    "openwebtext2": Source("web", "Apache-2.0", TEXT, "prose", "Geralt-Targaryen/openwebtext2"),
    "wikipedia": Source("web", "CC-BY-SA-3.0, GFDL", TEXT, "prose", "wikimedia/wikipedia", "20231101.en"),
    # columns as public training code reads them. Python only, checked by execution
    "oss_instruct": Source("code", "ODC-By-1.0", exchange("instruction", "response"), "dialogue", SC2),
    # columns of the cards of its halves, codeparrot-clean-train and -valid
    "codeparrot": Source("code", "each file's own", column("content"), "code", "codeparrot/codeparrot-clean"),
    "gsm8k": Source("math", "MIT", gsm8k, "dialogue", "openai/gsm8k", "main"),
    "arithmetic": Source("math", OURS, lambda rng, _: puzzles.arithmetic(rng)),
    # files of the split train_1M seen; columns as public training code reads them
    "openmath_instruct": Source(
        "math", "CC-BY-4.0", OPENMATH, "dialogue", "nvidia/OpenMathInstruct-2", split="train_1M"
    ),
    "open_web_math": Source("math", "ODC-By-1.0", TEXT, "math", "open-web-math/open-web-math"),
    "programs": Source("synth", OURS, lambda rng, _: programs.make(rng)[0], **PROGRAM),
    "traces": Source("synth", OURS, lambda rng, _: programs.trace(rng)),
    # strings of cells, as HRM's build_sudoku_dataset.py and build_maze_dataset.py read them
    "sudoku_extreme": Source(
        "synth", "none given", sudoku_extreme, repo="sapientinc/sudoku-extreme", augment="sudoku", **HRM
    ),
    "sudoku9": Source("synth", OURS, sudoku(9, 20, 54), kind="puzzle", suite="sudoku9"),
    "sudoku4": Source("synth", OURS, sudoku(4, 4, 8), kind="puzzle", suite="sudoku4"),
    # of a maze's many shortest ways the answer is one
    "maze_hard": Source(
        "synth", "none given", maze_hard, repo="sapientinc/maze-30x30-hard-1k", augment="dihedral", **HRM
    ),
    "mazes": Source(
        "synth", OURS, lambda rng, _: puzzles.maze(rng, *rng.integers(5, 16, 2).tolist()), **MAZE
    ),
    "maze": Source("synth", OURS, lambda rng, _: puzzles.maze(rng, 5, 5), **MAZE),  # as the suite asks
    "turned": Source("synth", OURS, lambda rng, _: puzzles.turned(rng, 2), kind="puzzle", suite="turn"),
    "transforms": Source("synth", OURS, lambda rng, _: programs.transform(rng), **PROGRAM),  # of one function
    "graphs": Source("synth", OURS, lambda rng, _: puzzles.shortest_path(rng)),
    "logic": Source("synth", OURS, lambda rng, _: puzzles.logic_puzzle(rng)),
    # comes with Python
    "stdlib": Source("code", "PSF-2.0", module, "code", rows=stdlib),
    "langref": Source("web", "PSF-2.0", TEXT, "dialogue", rows=language_reference),
    "docstrings": Source("web", "PSF-2.0", docstrings, "dialogue", rows=stdlib),
    "arc": Source("arc", "Apache-2.0", augmented(arc_tasks), kind="puzzle", augment="arc"),
    # difficulty and length grow with the stages: what fits block_size there
    "rearc": Source("arc", REARC_LICENCE, new_pairs((0, 0.3), 1024), **REARC),
    "rearc_medium": Source("arc", REARC_LICENCE, new_pairs((0, 0.6), 2048), **REARC),
    "rearc_hard": Source("arc", REARC_LICENCE, new_pairs((0, 1), 4096), **REARC),
    "arc_1d": Source("arc", "Apache-2.0", in_one_row, kind="puzzle", augment="arc", reasoning_gym=True),
    # examples = [[input, output], ...], numbers as floats, as public training code reads data_100k.jsonl
    "barc_heavy": Source("arc", "MIT", arc_json, repo=BARC, **TASKS),
    # each from --source_dir: ID.json of ARC-GEN-100K (Kaggle, arcgen100k/the-arc-gen-100k-dataset), a list of
    # pairs; corpus/ of github.com/victorvikram/ConceptARC; data/MiniARC/ of github.com/KSB21ST/MINI-ARC
    "arc_gen": Source("arc", "Apache-2.0", arc_json, **TASKS),
    "concept_arc": Source("arc", "MIT", arc_json, **TASKS),
    "mini_arc": Source("arc", "Apache-2.0", arc_json, **TASKS),
    "arc_json": Source("arc", "that of its files", arc_json, **TASKS),
    # demonstrations of evaluation tasks, never their tests: only with --eval_demos=True
    "arc_eval_demos": Source("arc", "Apache-2.0", augmented(arc_eval_demos), kind="puzzle", augment="arc"),
}

# What models are tested on and must not be trained on: texts, looked for in all other texts, and puzzles.
EVALUATIONS = {
    "gsm8k_test": replace(SOURCES["gsm8k"], split="test"),
    "sudoku_extreme_test": replace(SOURCES["sudoku_extreme"], files="test.csv"),
    "maze_hard_test": replace(SOURCES["maze_hard"], files="test.csv"),
}

# source: how the sources of a group divide its share in stages 1, 2 and 3. Of two documents that are alike,
# the one whose source stands first here is kept.
WEIGHTS = {
    "smol_smoltalk": (0, 3, 5),
    "fineweb_edu": (6, 4, 3),
    "openwebtext2": (2, 1, 0),
    "wikipedia": (2, 1, 1),
    "oss_instruct": (0, 2, 3),
    "codeparrot": (1, 4, 3),
    "gsm8k": (0.2, 0.5, 0.5),
    "arithmetic": (0.2, 0.2, 0.2),
    "openmath_instruct": (0, 4, 6),
    "open_web_math": (9, 5, 3),
    "programs": (5, 5, 5),
    "traces": (3, 3, 3),
    "sudoku_extreme": (2, 2, 2),
    "sudoku9": (1, 1, 1),
    "sudoku4": (0.5, 0.5, 0.5),
    "maze_hard": (0.5, 0.5, 0.5),
    "mazes": (1, 1, 1),
    "graphs": (1, 1, 1),
    "logic": (1, 1, 1),
    "arc": (1, 1, 1),
    "rearc": (2, 0, 0),
    "rearc_medium": (0, 2, 0),
    "rearc_hard": (0, 0, 2),
    "arc_1d": (0.5, 0.2, 0.2),
    "barc_heavy": (1, 1, 1),
    "arc_gen": (0.5, 0.5, 0.5),
    "concept_arc": (0.1, 0.1, 0.1),
    "mini_arc": (0.1, 0.1, 0.1),
    "arc_json": (0.5, 0.5, 0.5),
}


def _stage(number, megabytes, **groups):
    return megabytes, groups, {name: w[number - 1] for name, w in WEIGHTS.items() if w[number - 1]}


# stage: (megabytes of text in all, {group: share}, {source: weight within its group})
STAGES = {
    "stage1": _stage(1, 30_000, web=0.5, code=0.2, math=0.1, synth=0.1, arc=0.1),
    "stage2": _stage(2, 10_000, web=0.4, code=0.2, math=0.1, synth=0.15, arc=0.15),
    "stage3": _stage(3, 5_000, web=0.3, code=0.2, math=0.1, synth=0.2, arc=0.2),
    # needs no network; more of what can be learned within minutes on a CPU
    "demo": (
        16,
        dict(web=0.15, code=0.15, math=0.1, synth=0.45, arc=0.15),
        dict(stdlib=1, langref=1, docstrings=2, arithmetic=1)
        | dict(sudoku4=5, maze=3, turned=3, transforms=1, arc=1, rearc=3),
    ),
    # for hours on a CPU: none of the pairs that ARC itself has, neither for training nor for validation
    "arc_cpu": (40, {"arc": 1.0}, {"rearc": 1}),
    # for a GPU; config/arc_speedrun.py goes through it about twice
    "arc": (
        1200,
        {"arc": 0.9, "synth": 0.1},
        dict(rearc=1, rearc_medium=2, rearc_hard=3, barc_heavy=3, arc=0.5, programs=1),
    ),
    # the first thousand puzzles of the file, each seen through a new symmetry at every draw
    "sudoku_extreme": (0.74, {"synth": 1.0}, {"sudoku_extreme": 1}),
}


def find(name):
    """-> the entry of a source or an evaluation."""
    return SOURCES.get(name) or EVALUATIONS[name]


def to_document(name, row):
    """A row of a source or an evaluation -> document. OddRow if the row is no document."""
    source = find(name)
    if not source.is_read and not source.rows:
        return source.document(*row)
    if not isinstance(row, dict):
        raise OddRow("not_a_row", f"a line of {name!r} is no JSON object: {reprlib.repr(row)}")
    try:
        return source.document(row)
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        rule = "no_column" if isinstance(e, KeyError) else getattr(e, "rule", "not_as_expected")
        raise OddRow(rule, f"a row of {name!r} is no document: {e}: {reprlib.repr(row)}") from None


def instantiate(document):
    """document -> (arc.Task or None, list of its grids, parts). A part is a str, an id or an array of ids."""
    if isinstance(document, str):
        return None, [], [document]
    if isinstance(document, list):
        return None, [], document
    if isinstance(document, arc.Task):
        document = document, [arc.encode(document.kind, document.train + document.test)[:-1]], []
    task, parts, more = document
    return task, [grid for pair in task.train + task.test for grid in pair] + more, parts


# -----------------------------------------------------------------------------
# reading


def local_files(source_dir, name):
    """
    -> (the files of a source under source_dir, in order; those left out, but README and LICENSE). ([], [])
    without a folder, ValueError if it has none. A copy of a whole repository has files for training and for
    evaluation: words in the names of files and folders tell which, and those of the other kind are left out.
    """
    folder, source = Path(source_dir) / name, find(name)
    entries = [e for e in (*SOURCES.values(), *EVALUATIONS.values()) if source.repo and e.repo == source.repo]
    words = {Path(e.files or e.split).stem for e in entries}  # such as train and test
    words -= {Path(source.files or source.split).stem}
    paths, left_out = [], []
    for found in sorted(map(Path, glob.glob("**", root_dir=folder, recursive=True))):  # follows links
        if (folder / found).is_file() and found.stem not in ("README", "LICENSE"):
            ours = reader_of(found) and not words & {*re.findall("[a-z]+", found.as_posix().lower())}
            (paths if ours else left_out).append(folder / found)
    if folder.is_dir() and not paths:
        raise ValueError(f"{folder} has no file of {', '.join(READERS)} (or such a .gz): put some there")
    return paths, left_out


def reader_of(path):
    """'text' of a.jsonl.gz; None of a file that is not data."""
    return READERS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def is_array(path):
    """Of a .json file: is it one array? Or else there is a row in each line."""
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as f:
        return f.read(1000).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


class Rows:
    """
    (origin, row) of datasets that are read one after the other. parts: list of (name, function that opens an
    iterable dataset or a list). Lines of JSON are parsed here; one that is no JSON stays a str.
    state: what state() gave, to go on from there; None for the beginning.
    """

    def __init__(self, parts, state):
        self.parts, self.data = parts, None
        self.part, self.row, self.inside = state or (0, 0, None)

    def __iter__(self):
        while self.part < len(self.parts):
            name, open_part = self.parts[self.part]
            try:
                self.data = open_part()
                of_lines = not isinstance(self.data, list) and self.data.info.builder_name == "text"
                if self.inside:
                    self.data.load_state_dict(self.inside)
                for row in self.data[self.row :] if isinstance(self.data, list) else self.data:
                    self.row += 1
                    if of_lines:
                        row = row["text"]
                        if not row.strip():
                            continue
                        with contextlib.suppress(ValueError, RecursionError):
                            row = json.loads(row)
                    yield f"{name}:{self.row}", row
            except Exception as e:  # noqa: BLE001 (client, file system and readers raise their own)
                problem = f"cannot read {name} after row {self.row:,}: {first_line(e)}"
                raise ValueError(f"{problem}; mend it, or run the same command again to go on") from None
            self.part, self.row, self.data, self.inside = self.part + 1, 0, None, None

    def state(self):
        inside = self.data.state_dict() if hasattr(self.data, "state_dict") else self.inside
        return self.part, self.row, inside


class LocalRows:
    """Every LANES-th of a source's own rows, or of an endless sequence of (random generator, index) pairs."""

    def __init__(self, name, seed, lane, state):
        self.rows = SOURCES[name].rows and SOURCES[name].rows()
        self.key = [seed, int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)]
        self.index = lane if state is None else state

    def __iter__(self):
        while self.rows is None or self.index < len(self.rows):
            index = self.index
            self.index += LANES
            if self.rows is None:
                yield str(index), (np.random.default_rng([*self.key, index]), index)
            else:
                yield self.rows[index]["name"], self.rows[index]

    def state(self):
        return self.index


def open_rows(name, where, seed, lane, state, lanes=LANES):
    """
    An iterable of (origin, row) of a lane with state(), which open_rows takes to go on from there. name: of a
    source or an evaluation. where: {"files": [path, ...]}, {"revision": commit}, or {} if it is generated.
    """
    source = find(name)
    if not source.is_read:
        return LocalRows(name, seed, lane, state)
    import datasets  # half a second that generated sources do without

    how = {}
    if source.columns:
        how["features"] = datasets.Features({c: datasets.Value("string") for c in source.columns})

    def stream(*names, **how):
        data = datasets.load_dataset_builder(*names, **how)
        if data.name == "json":
            data = datasets.load_dataset_builder("text", data_files=data.config.data_files, **AS_LINES)
        return data.as_streaming_dataset(source.split)

    def open_hub():
        files = {"data_files": {source.split: source.files}} if source.files else {}
        data = stream(source.repo, source.config, revision=where["revision"], **files, **how)
        n = min(lanes, data.num_shards)
        return data.shard(num_shards=n, index=lane, contiguous=False) if lane < n else []

    def open_file(path):
        reader = reader_of(path)
        if reader == "json" and source.tasks:
            return list(json_tasks(str(path)))
        if reader == "json" and is_array(path):
            return arc.read_json(path)
        files = {source.split: glob.escape(str(path))}  # a name with brackets is no pattern
        return stream(reader, data_files=files, **(AS_LINES if reader == "text" else how))

    if "files" in where:
        paths = [Path(p) for p in where["files"][lane::lanes]]
        return Rows([(path.name, functools.partial(open_file, path)) for path in paths], state)
    return Rows([(source.repo, open_hub)], state)
