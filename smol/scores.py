"""
What counts as right, and how sure one can be: everything between an answer and a figure.

A *record* is what is kept of one task that a model was asked: a dict, a line of answers.jsonl (eval_arc.py's docstring has its fields).
Figures are computed from records alone, so it makes no difference to them which process answered, or whether it was killed in between.

Read next: solve.py (how a model comes to its attempts), eval_arc.py (the command).
"""

import math

import numpy as np

SIZES = (25, 100, 225, 400, 900)  # cells: borders between the bins of accuracy by size
KEPT = 2  # attempts of a test input that are kept, at least


# -----------------------------------------------------------------------------
# one answer


def rows_of(grid):
    """np.uint8 (h, w), or None -> list of strings, a row each, a digit each cell: how a grid is written down. Text stays text."""
    return (
        grid if grid is None or isinstance(grid, str) else ["".join(map(str, row)) for row in grid.tolist()]
    )


def grid_of(rows):
    """The inverse of rows_of."""
    return (
        rows
        if rows is None or isinstance(rows, str)
        else np.array([[int(c) for c in row] for row in rows], np.uint8)
    )


def same(a, b):
    """Are two answers (grids, texts, or None) the same?"""
    return (
        a is not None
        and b is not None
        and (a == b if isinstance(a, str) or isinstance(b, str) else np.array_equal(a, b))
    )


# -----------------------------------------------------------------------------
# one task


def judge(task, given, attempts):
    """
    -> a record, without model, suite, key and seconds. given: for each test input a solve.Given, or None where the task is too
    long. A task whose test outputs are not all known is judged by none: its `solved` is None.
    """
    tests = []
    for (puzzle, expected), found in zip(task.test, given):
        ranked = found.candidates if found else []
        kept = ranked[: max(KEPT, attempts)]
        right = [same(c.grid, expected) for c in ranked]
        tests.append(
            {
                "input": rows_of(puzzle),
                "expected": rows_of(expected),
                "attempts": [rows_of(c.grid) for c in kept],
                "right": right[: len(kept)] if expected is not None else [],
                "solved": any(right[:attempts]),
                "oracle": any(right),
                "votes": [c.votes for c in kept],
                "scores": [round(float(c.score), 6) if math.isfinite(c.score) else None for c in kept],
                "candidates": len(ranked),
                "programs": [c.program for c in kept],
                **(
                    {"steps": [[rows_of(grid), round(p, 6)] for grid, p in found.steps]}
                    if found and found.steps
                    else {}
                ),
            }
        )
    known = all(t["expected"] is not None for t in tests)
    return {
        "id": task.id,
        "kind": task.kind,
        "solved": all(t["solved"] for t in tests) if known else None,
        "too_long": any(found is None for found in given),
        "demonstrations": [[rows_of(x), rows_of(y)] for x, y in task.train],
        "test": tests,
    }


# -----------------------------------------------------------------------------
# a suite


def interval(k, n):
    """95% of k out of n, by Wilson's score: [low, high], inside [0, 1] and never of width 0. [0, 1] for n = 0."""
    if n == 0:
        return [0.0, 1.0]
    z, p = 1.959964, k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [
        round(max(0.0, (middle - half) / (1 + z * z / n)), 6),
        round(min(1.0, (middle + half) / (1 + z * z / n)), 6),
    ]


def mcnemar(only_one, only_other):
    """Exact McNemar test, two-sided: how likely is a split of the tasks that only one of the two solves as uneven as this, by chance?"""
    n, k = only_one + only_other, min(only_one, only_other)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def share_right(rows, expected):
    """The share of cells of an answer that are right; 0 when there is none or its size is wrong."""
    if rows is None or len(rows) != len(expected) or len(rows[0]) != len(expected[0]):
        return 0.0
    return float(np.mean([a == b for row, wanted in zip(rows, expected) for a, b in zip(row, wanted)]))


def figures(records, attempts):
    """What eval.json says of a suite (eval_arc.py's docstring), from the records of its tasks."""
    judged = [r for r in records if r["solved"] is not None]
    tests = [(r, t) for r in judged for t in r["test"]]
    solved, outputs = sum(r["solved"] for r in judged), sum(t["solved"] for _, t in tests)

    def passed(n):
        return sum(all(any(t["right"][:n]) for t in r["test"]) for r in judged)

    by_size, start = {}, 1
    for stop in SIZES:
        part = [
            t["solved"]
            for _, t in tests
            if not isinstance(t["expected"], str) and start <= cells(t["expected"]) <= stop
        ]
        by_size[f"{start}-{stop}"] = [sum(part), len(part)]
        start = stop + 1
    shares = [
        (
            share_right(t["attempts"][0] if t["attempts"] else None, t["expected"]),
            share_right(t["input"], t["expected"]),
        )
        for r, t in tests
        if not isinstance(t["expected"], str) and not (r["too_long"] and not t["attempts"])
    ]
    right, copied = np.mean(shares, axis=0).round(6).tolist() if shares else (None, None)
    return {
        "total": len(judged),
        "solved": solved,
        "interval": interval(solved, len(judged)),
        "score": round(
            sum(np.mean([t["solved"] for t in r["test"]]) for r in judged) / max(1, len(judged)), 6
        ),
        "outputs_total": len(tests),
        "outputs_solved": outputs,
        "outputs_interval": interval(outputs, len(tests)),
        "attempts": attempts,
        "pass_1": passed(1),
        "pass_2": passed(2),
        "oracle": sum(all(t["oracle"] for t in r["test"]) for r in judged),
        "candidates": round(float(np.mean([t["candidates"] for r in records for t in r["test"]])), 3)
        if records
        else None,
        "unknown": len(records) - len(judged),
        "too_long": sum(r["too_long"] for r in records),
        "too_long_ids": [r["id"] for r in records if r["too_long"]],
        "by_size": {k: v for k, v in by_size.items() if v[1]},
        "cells_right": right,
        "cells_right_by_copying": copied,
        "seconds": round(sum(r.get("seconds", 0.0) for r in records), 3),
    }


def cells(rows):
    return len(rows) * len(rows[0])


def against(records, others):
    """-> {only_this, only_other, p} of two models' records on the tasks that both were asked."""
    others = {r["id"]: r["solved"] for r in others}
    pairs = [(r["solved"], others[r["id"]]) for r in records if r["solved"] is not None and r["id"] in others]
    this, other = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return {"only_this": this, "only_other": other, "p": float(f"{mcnemar(this, other):.3g}")}


# -----------------------------------------------------------------------------
# for others to score


def submission(records):
    """
    {task id: [{"attempt_1": grid, "attempt_2": grid} for each test input]}, grids as lists of lists: the format of the ARC Prize. Where
    there is no second attempt, the first is given again; where there is none at all, a single black cell.
    """

    def attempt(rows):
        return [[int(c) for c in row] for row in rows]

    return {
        r["id"]: [
            {
                "attempt_1": attempt(t["attempts"][0]) if t["attempts"] else [[0]],
                "attempt_2": attempt(t["attempts"][min(1, len(t["attempts"]) - 1)])
                if t["attempts"]
                else [[0]],
            }
            for t in r["test"]
        ]
        for r in records
    }
