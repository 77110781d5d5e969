"""
What is asked: every suite of tasks, always the same ones in the same order, and their names.

arc1, arc2         ARC-AGI-1's evaluation set (400 tasks), ARC-AGI-2's public evaluation set (120)
arc1_train         ARC-AGI-1's training set (400): for models that were not trained on it; known() says so
sudoku             sudoku4; sudoku9, sudoku9_medium, sudoku9_hard (30, 42 and 54 blanks); sudoku_extreme
maze               5x5 mazes; maze_hard (30x30)
turn               3x3 grids as they are or after a quarter turn: two demonstrations tell which
transforms         grid programs of one step
rearc              RE-ARC: pairs that are not trained on, one task for each family that fits 1,024 tokens
logic              puzzles in words: who sits where, knights and knaves
language           short questions, small functions, bits per byte, which language.py measures
lm_eval:NAME,NAME  lm-eval's benchmarks

sudoku_extreme and maze_hard are the first 1,000 puzzles of test.csv of sapientinc/sudoku-extreme and
sapientinc/maze-30x30-hard-1k, where that file is in data/raw/sudoku_extreme or data/raw/maze_hard.

A task in words is an arc.Task with texts in place of grids: test = [("Question: ...", "the answer")].
language.jsonl, written for this repository, has the items of `language`, small and easy. A question's four
choices are natural ends of one sentence, about equally long. A function is given by signature and docstring;
its tests are calls with their values; `solution` passes them and `mistake`, a plausible body, does not.
The generated tasks are kept out of training: curate.held_out().

Read next: puzzles.py, which makes most of these; eval_arc.py, which asks.
"""

import ast
import csv
import functools
import itertools
import json
import math
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np

import configurator
from smol import arc, programs, puzzles, rearc, sources

ARC_SUITES = {"arc1": "arc1_eval", "arc2": "arc2_eval", "arc1_train": "arc1_train"}
FILES = ("sudoku_extreme", "maze_hard")
FROM_FILE = 1000  # tasks taken from a file, the first ones
IN_WORDS = ("logic",)
RAW = Path("data/raw")


def logic(rng):
    """The question ends before the solution; the answer is what stands behind 'Answer:'."""
    question, solution = puzzles.logic_puzzle(rng).split("\nSolution: ")
    return arc.Task("", "logic", [], [(question, solution.split("\nAnswer: ")[1])])


# suite: (seed, number of tasks, function of a random generator). Changing one changes what was measured.
GENERATED = {
    "sudoku4": (4004, 100, lambda rng: puzzles.sudoku(rng, 4, 6, "test")),
    "sudoku9": (9009, 50, lambda rng: puzzles.sudoku(rng, 9, 30, "test")),
    "sudoku9_medium": (90042, 50, lambda rng: puzzles.sudoku(rng, 9, 42, "test")),
    "sudoku9_hard": (90054, 50, lambda rng: puzzles.sudoku(rng, 9, 54, "test")),
    "maze": (7007, 50, lambda rng: puzzles.maze(rng, 5, 5)),
    "turn": (6116, 50, lambda rng: puzzles.turned(rng, 2)),
    "transforms": (1234, 50, programs.transform),
    "logic": (7117, 50, logic),
}
ON_GRIDS = tuple(name for name in GENERATED if name not in IN_WORDS)
GROUPS = {
    "sudoku": ("sudoku4", "sudoku9", "sudoku9_medium", "sudoku9_hard", "sudoku_extreme"),
    "maze": ("maze", "maze_hard"),
}
SUITES = (*ARC_SUITES, "rearc", *GROUPS["sudoku"], *GROUPS["maze"], "turn", "transforms", "logic")
ALL = (*SUITES, "sudoku", "language", "lm_eval:NAME")


def is_tasks(name):
    """Is the suite one of tasks, rather than one that language.py measures?"""
    return name != "language" and not name.startswith("lm_eval:")


def lacking(name):
    """What a suite needs and is not there, or ""."""
    if name == "rearc" and not rearc.installed():
        return f"RE-ARC's generators: {rearc.INSTALL}"
    path = RAW / name / "test.csv"
    return f"{path}, which is not there" if name in FILES and not path.is_file() else ""


def default():
    """All suites that are there but arc1_train: what is asked unless somebody says what to ask."""
    return [name for name in (*SUITES, "language") if not lacking(name) and name != "arc1_train"]


def known(suite, trained_on):
    """
    What a model knows of the tasks of a suite by the sources it was trained on, or "": "transductive" (the
    demonstrations of evaluation tasks), "trained on" (the very pairs), "same rules" (other pairs of a task).
    """
    if "arc_eval_demos" in trained_on and suite in ("arc1", "arc2", "tasks"):
        return "transductive"
    if suite == "arc1_train" and "arc" in trained_on:
        return "trained on"
    # arc_json may be anything
    made_after_it = {"arc", "arc_gen", "arc_json", "rearc", "rearc_medium", "rearc_hard"}
    return "same rules" if suite in ("arc1_train", "rearc") and made_after_it & {*trained_on} else ""


def names(text):
    """
    'arc1,sudoku,lm_eval:sciq,arc_easy' -> list of suites, each once, groups as what they consist of. What
    follows lm_eval: up to the next suite is one name. ValueError naming the closest, or a missing file.
    """
    out, known = [], {*SUITES, *GROUPS, "language"}
    for name in filter(None, text.split(",")):
        if name.startswith("lm_eval:") and name != "lm_eval:":
            out.append(name)
        elif out and out[-1].startswith("lm_eval:") and name not in known:
            out[-1] += f",{name}"
        elif name not in known:
            raise ValueError(configurator.unknown("suite", name, ALL))
        elif name in GROUPS:
            out += [member for member in GROUPS[name] if not lacking(member)]
        elif needs := lacking(name):
            raise ValueError(f"suite {name!r} needs {needs}")
        else:
            out.append(name)
    if not out:
        raise ValueError(f"--suites names no suite: there are {', '.join(ALL)}")
    return list(dict.fromkeys(out))


@functools.cache
def load(name):
    """-> tuple of arc.Task, always the same in the same order. ValueError for a row that is no puzzle."""
    if name in ARC_SUITES:
        return tuple(arc.load(ARC_SUITES[name]))
    if name in FILES:
        with open(RAW / name / "test.csv", newline="", encoding="utf-8-sig") as f:
            rows = list(itertools.islice(csv.DictReader(f), FROM_FILE))
        tasks = [sources.to_document(name, row) for row in rows]
        for i, task in enumerate(tasks):
            if not puzzles.answer_fits(task):
                raise ValueError(f"{f.name}: the answer of row {i + 1} does not fit its question")
        return tuple(replace(task, id=f"{name}-{i:04d}") for i, task in enumerate(tasks))
    if name == "rearc":
        drawn = ((np.random.default_rng([4040, i]), family) for i, family in enumerate(rearc.families()))
        return tuple(filter(None, (rearc.task(rng, family, 4, (0, 0.3), 1024) for rng, family in drawn)))
    seed, n, make = GENERATED[name]
    rng, tasks, seen = np.random.default_rng(seed), [], set()
    while len(tasks) < n:
        task = make(rng)
        content = repr(task.test) if name in IN_WORDS else arc.task_hash(task)
        if content not in seen:
            seen.add(content)
            number = f"{name}-{len(tasks):04d}"
            task.id = f"{number}:{task.id}" if name == "transforms" else number
            tasks.append(task)
    return tuple(tasks)


@functools.cache
def language_items():
    text = Path(__file__).with_name("language.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def questions():
    """List of (category, question, four choices, index of the right one, which goes round)."""
    out = []
    for i, item in enumerate(item for item in language_items() if "question" in item):
        choices = list(item["wrong"])
        choices.insert(i % 4, item["right"])
        out.append((item["category"], item["question"], tuple(choices), i % 4))
    return out


def functions():
    """List of (name, stub, tests, solution, mistake): the stub ends with its docstring, then come bodies."""
    out = []
    for item in language_items():
        if "function" in item:
            stub = f'def {item["function"]}:\n    """{item["docstring"]}"""\n'
            tests = [(call, ast.literal_eval(value)) for call, value in item["tests"]]
            bodies = (textwrap.indent(item[key], "    ") + "\n" for key in ("solution", "mistake"))
            out.append((item["function"].split("(")[0], stub, tests, *bodies))
    return out


def language_texts():
    """
    {name: [text, ...]}: what a document must not quote, each with its right answer. Of fewer than 13 words
    nothing is found: 77 of the 132 questions.
    """
    return {
        "language_questions": [f"{question} {choices[right]}" for _, question, choices, right in questions()],
        "language_functions": [stub + solution for _, stub, _, solution, _ in functions()],
    }


def interval(k, n):
    """-> [low, high], 95% for k out of n by Wilson's score: inside [0, 1], never of width 0."""
    if n == 0:
        return [0.0, 1.0]
    z, p = 1.959964, k / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return [round(max(0.0, low), 6), round(min(1.0, high), 6)]
