"""
What is asked: every suite of tasks, always the same ones in the same order, and the names by which they are called.

arc1, arc2        ARC-AGI-1's evaluation set (400 tasks), ARC-AGI-2's public evaluation set (120)
sudoku            sudoku4; sudoku9, sudoku9_medium, sudoku9_hard (30, 42 and 54 blanks); sudoku_extreme where its file is there
maze              7x7 mazes; maze_hard (30x30) where its file is there
logic             puzzles in words: who sits where, knights and knaves
transforms        grid programs of one step
language, lm_eval:NAME,NAME      are no tasks: language.py measures them

sudoku_extreme and maze_hard are the test.csv of sapientinc/sudoku-extreme and sapientinc/maze-30x30-hard-1k, looked for in
data/raw/sudoku_extreme and data/raw/maze_hard; of sudoku-extreme's 422,786 puzzles the first 1,000.

A task of a suite in words is an arc.Task with texts in place of grids: test = [("Question: ...", "the answer")].

Read next: puzzles.py, which makes most of these; eval_arc.py, which asks.
"""

import csv
import difflib
import functools
import os

import numpy as np

from smol import arc, puzzles, sources

ARC_SUITES = {"arc1": "arc1_eval", "arc2": "arc2_eval"}
HARDER = {"sudoku9_medium": 42, "sudoku9_hard": 54}  # blanks; puzzles.py's own sudoku9 has 30
FILES = {"sudoku_extreme": sources.sudoku_extreme, "maze_hard": sources.maze_hard}
OF_FILES = 1000  # tasks taken from a file, the first ones
N_GENERATED = 50  # tasks of suites that are made here
SEEDS = {
    "sudoku9_medium": 90042,
    "sudoku9_hard": 90054,
    "logic": 7117,
}  # changing one changes what was measured
GROUPS = {"sudoku": ("sudoku4", "sudoku9", *HARDER, "sudoku_extreme"), "maze": ("maze", "maze_hard")}
SUITES = (*ARC_SUITES, *puzzles.SUITES, *HARDER, *FILES, "logic")
ALL = ", ".join(dict.fromkeys((*SUITES, *GROUPS, "language", "lm_eval:NAME")))
IN_WORDS = ("logic",)
RAW = os.path.join("data", "raw")


def is_tasks(name):
    """Is the suite one of tasks, rather than one that language.py measures?"""
    return name != "language" and not name.startswith("lm_eval:")


def found(name):
    """Is the suite there? Those of FILES may not be."""
    return name not in FILES or os.path.isfile(os.path.join(RAW, name, "test.csv"))


def default():
    """The names of all suites that are there, language last: what is asked when nobody says what to ask."""
    return [
        name
        for name in ("arc1", "arc2", *GROUPS["sudoku"], *GROUPS["maze"], "transforms", "logic")
        if found(name)
    ] + ["language"]


def names(text):
    """
    'arc1,sudoku,lm_eval:sciq,arc_easy' -> suites in the order given, each once, groups as what they consist of; what follows lm_eval: up
    to the next name of a suite is its own list. ValueError naming the closest suite, or saying which file is missing.
    """
    out, known = [], {*SUITES, *GROUPS, "language"}
    for name in filter(None, text.split(",")):
        if name == "lm_eval:":
            raise ValueError("lm_eval: needs the names of its benchmarks, such as lm_eval:sciq,arc_easy")
        if name.startswith("lm_eval:"):
            out.append(name)
        elif out and out[-1].startswith("lm_eval:") and name not in known:
            out[-1] += f",{name}"
        elif name in GROUPS:
            out += [part for part in GROUPS[name] if found(part)]
        elif name not in known:
            closest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0)[0]
            raise ValueError(f"unknown suite {name!r}: did you mean {closest!r}? There are {ALL}")
        elif not found(name):
            raise ValueError(
                f"suite {name!r} needs {os.path.join(RAW, name, 'test.csv')}, which is not there (suites.py says whose it is)"
            )
        else:
            out.append(name)
    if not out:
        raise ValueError(f"--suites names no suite: there are {ALL}")
    return list(dict.fromkeys(out))


@functools.cache
def load(name):
    """-> tuple of arc.Task, always the same ones in the same order. ValueError as `names`, or saying which line of a file is wrong."""
    if names(name) != [name] or not is_tasks(name):
        raise ValueError(f"{name!r} is not one suite of tasks: there are {', '.join(SUITES)}")
    if name in ARC_SUITES:
        return tuple(arc.load(ARC_SUITES[name]))
    if name in puzzles.SUITES:
        return tuple(puzzles.heldout(name))
    if name in FILES:
        return tuple(read_csv(os.path.join(RAW, name, "test.csv"), name, FILES[name]))
    if name == "logic":
        return tuple(logic())
    rng = np.random.default_rng(SEEDS[name])
    tasks = [puzzles.sudoku(rng, 9, HARDER[name], "test") for _ in range(N_GENERATED)]
    return tuple(arc.Task(f"{name}-{i:04d}", "sudoku", [], task.test) for i, task in enumerate(tasks))


def read_csv(path, name, task_of):
    tasks = []
    with open(path, newline="", encoding="utf-8-sig") as f:
        for i, row in zip(range(OF_FILES), csv.DictReader(f)):
            try:
                tasks.append(task_of(row))
            except (ValueError, KeyError) as e:
                raise ValueError(f"{path}, row {i + 1}: no puzzle of {name} ({e})") from None
            tasks[-1].id = f"{name}-{i:04d}"
    return tasks


def logic():
    """Puzzles of puzzles.logic_puzzle. The question ends before the solution; the answer is what stands behind 'Answer:'."""
    rng, tasks = np.random.default_rng(SEEDS["logic"]), []
    for i in range(N_GENERATED):
        text, answer = puzzles.logic_puzzle(rng)
        question = text[: text.index("\nSolution:")]
        tasks.append(arc.Task(f"logic-{i:04d}", "logic", [], [(question, str(answer))]))
    return tasks
