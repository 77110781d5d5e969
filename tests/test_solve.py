"""From a model to its attempts: views and their inverses, votes, programs, test-time training."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import TASKS, grid, make, stand_ins  # noqa: F401

import eval_arc
from smol import arc, engine, loader, programs, puzzles, solve, suites
from smol import tokenizer as tok
from smol.solve import Candidate, Settings


def smallest(suite, n):
    """An untrained model writes until there is no room left, so the smallest tasks."""
    return sorted(suites.load(suite), key=eval_arc.length)[:n]


def exact(name, block_size=256):
    """In float64 the answers are the same however rows are batched."""
    return make(name, block_size).double()


def plain(found):
    """What solve returned, as something that can be compared."""

    def of(given):
        return given and [(np.asarray(c.grid).tolist(), c.votes, c.program) for c in given.candidates]

    return [list(map(of, task)) for task in found]


def turned(n=3):
    """A task whose rule is half a turn."""
    rng = np.random.default_rng(0)
    inputs = [(rng.permutation(12).reshape(3, 4) % 10).astype(np.uint8) for _ in range(n + 1)]
    pairs = [(x, np.rot90(x, 2)) for x in inputs]
    return arc.Task("turned", "arc", pairs[:n], pairs[n:])


# views


@pytest.mark.parametrize("suite, most", [("transforms", 20), ("sudoku4", 20), ("sudoku9", 4), ("maze", 8)])
def test_a_view_is_another_task_of_its_kind_whose_answer_turns_back(suite, most):
    for task in suites.load(suite)[:3]:
        some = solve.views(task, most, seed=3)
        assert len(set(some)) == len(some) == most
        assert solve.views(task, 3, seed=3) == some[:3]
        assert solve.views(task, most, seed=4) != some
        assert solve.apply_view(some[0], task).test[0][0].tolist() == task.test[0][0].tolist()
        for view in some[:8]:
            seen = solve.apply_view(view, task)
            assert np.array_equal(arc.invert(view.symmetry, seen.test[0][1]), task.test[0][1])
            assert len(seen.train) == len(task.train)
            if suite != "transforms":
                right = puzzles.check_maze if suite == "maze" else puzzles.check_sudoku
                assert right(*seen.test[0])  # still a puzzle with this solution


class RightInSomeViews:
    """In place of a model: answers `turned` in any view, rightly the first few times."""

    puzzle_format = "autoregressive"

    def __init__(self, right):
        self.left = right

    def answer(self, tasks, samples, temperature, seed):
        out = []
        for task in tasks:
            assert all(np.array_equal(y, np.rot90(x, 2)) for x, y in task.train)
            ((x, _),) = task.test
            self.left -= 1
            out.append([[(np.rot90(x, 2) if self.left >= 0 else np.roll(x, 1, 1), -1.0)]])
        return out

    def score_answers(self, tasks, answers):
        return [np.full(len(grids), -1.0) for grids in answers]


def test_the_answer_of_most_views_comes_first():
    task = turned()
    ((given,),) = solve.solve(RightInSomeViews(9), [task], Settings(augment=16))
    assert np.array_equal(given.candidates[0].grid, task.test[0][1])
    assert [c.votes for c in given.candidates][0] == 9 and sum(c.votes for c in given.candidates) == 16


def test_programs_come_before_votes_and_votes_before_scores():
    a, b, c = grid("1"), grid("22"), grid("3/3")
    answers = [Candidate(a, 1, -0.1), Candidate(b, 1, -5.0), Candidate(b, 1, -7.0), Candidate(c, program="x")]
    ranked = solve.vote([*answers, Candidate(a, 0, 9.0)])
    assert [x.grid.tolist() for x in ranked] == [c.tolist(), b.tolist(), a.tolist()]
    assert [(x.votes, x.score) for x in ranked] == [(1, 0.0), (2, -6.0), (1, -0.1)]


# answers


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_answers_are_the_models_own_and_do_not_depend_on_what_else_is_asked(name):
    model, tasks = exact(name, 400), [*smallest("sudoku4", 2), *smallest("transforms", 2)]
    for given, own in zip(solve.solve(model, tasks, Settings()), model.answer(tasks)):
        assert given[0].candidates[0].grid.tolist() == own[0][0][0].tolist()
        assert {c.grid.tobytes() for c in given[0].candidates} == {g.tobytes() for g, _ in own[0]}
    settings = Settings(augment=2, samples=2)
    together = plain(solve.solve(model, tasks, settings))
    assert together == [plain(solve.solve(model, [task], settings))[0] for task in tasks]


def test_the_first_attempt_has_the_best_score_and_the_second_the_most_votes_of_the_others():
    class Model(RightInSomeViews):
        """Answers to six views: one has three votes, one two, and one, which scores best, a single one."""

        def answer(self, tasks, samples, temperature, seed):
            return [[[(tasks[0].test[0][0][:rows], -1.0)]] for rows in (3, 3, 3, 2, 2, 1)]

        def score_answers(self, tasks, answers):
            of_rows = {3: -80.0, 2: -50.0, 1: -2.0}
            scores = [np.array([of_rows[len(grid)] for grid in grids]) for grids in answers]
            return [scores[0] * np.nan, *scores[1:]]  # a view whose logits overflowed does not count

    task = replace(turned(), kind="sudoku")
    seen = [solve.View(arc.IDENTITY, (0, 1, 2))] * 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve, "views", lambda *_: seen)
        ((given,),) = solve.solve(Model(0), [task], Settings(augment=6))
    assert [(len(c.grid), c.votes) for c in given.candidates] == [(1, 1), (3, 3), (2, 2)]
    assert [c.score for c in given.candidates] == pytest.approx([-2 / 6, -80 / 16, -50 / 11])


def test_the_score_of_route_a_is_the_mean_log_probability_of_a_token_over_the_views_that_fit():
    """A 2 x 9 grid has 20 tokens, 9 x 2 has 27."""
    x = np.arange(18, dtype=np.uint8).reshape(2, 9) % 10
    model, task = make("dense", 50), arc.Task("wide", "arc", [], [(x, x)])
    settings = Settings(augment=6, samples=2)
    ((given,),) = solve.solve(model, [task], settings)
    every = [(view, solve.apply_view(view, task)) for view in solve.views(task, 6, settings.seed)]
    fit = [(view, seen) for view, seen in every if seen.test[0][0].shape == (2, 9)]
    assert 0 < len(fit) < 6 and len(given.candidates) > 1
    for c in given.candidates:
        scores = [model.score_answers([seen], [[arc.augment(view.symmetry, c.grid)]]) for view, seen in fit]
        h, w = c.grid.shape
        assert c.score == pytest.approx(np.mean(scores) / (h * (w + 1) + 1), abs=1e-3)


def test_route_b_keeps_its_steps():
    model, tasks = exact("trm"), smallest("sudoku4", 2)
    found, traces = solve.solve(model, tasks, Settings(augment=2)), model.answer(tasks, trace=True)
    for (given,), (trace,) in zip(found, traces):
        assert [g.tolist() for g, _ in given.steps] == [g.tolist() for g, _ in trace]
    assert len(solve.solve(model, tasks, Settings(halt=0.0))[0][0].steps) == 1


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_no_test_output_reaches_the_model(name, monkeypatch):
    """With everything on: tasks with noise in place of their test outputs get identical answers."""
    monkeypatch.setattr(solve, "PROGRAM_TOKENS", 12)
    rng, model = np.random.default_rng(3), make(name, 400)
    tasks = [*smallest("transforms", 1), *smallest("sudoku4", 1)]
    noise = rng.integers(0, 10, (5, 7)).astype(np.uint8)
    noisy = [replace(t, test=[(x, noise) for x, _ in t.test]) for t in tasks]
    settings = Settings(augment=2, samples=2, ttt_steps=1, programs=2)
    found = [plain(solve.solve(model, some, settings)) for some in (tasks, noisy)]
    assert found[0] == found[1] and all(found[0])


# text


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_texts_are_greedy_first_then_drawn_and_do_not_depend_on_what_else_is_written(name):
    model, prompts = exact(name, 64), [[tok.EOT, 5, 6], [tok.EOT, 7, 8, 9, 10]]
    texts = solve.write(model, prompts, 3, 6)
    for prompt, (first, *others) in zip(prompts, texts):
        assert first == [int(ids[0]) for ids in engine.generate(model, torch.tensor([prompt]), 6, 0, stop=())]
        assert [len(ids) for ids in others] == [6, 6] and others[0] != others[1] != first
    assert solve.write(model, prompts[:1], 3, 6) == texts[:1]
    assert solve.write(model, prompts, 3, 6, seed=1)[0][1:] != texts[0][1:]


class Writes:
    """In place of a model: one text where it is greedy, others where it draws."""

    puzzle_format = "autoregressive"
    config = make("dense", 4096).config

    def __init__(self, greedy, drawn, end=tok.EOT):
        self.greedy, self.drawn, self.end, self.prompts = greedy, drawn, end, []

    def continue_texts(self, prompts, uniform, temperature, n_ids):
        self.prompts += [tok.load().decode(p.tolist()[1:]) for p in prompts if max(p[1:]) < tok.EOT]
        texts = [self.greedy] * len(prompts) if temperature == 0 else self.drawn
        return [torch.tensor(tok.load().encode_ordinary(text) + [self.end]) for text in texts]


@pytest.mark.usefixtures("stand_ins")
def test_a_puzzle_in_words_is_answered_behind_answer():
    task = suites.load("logic")[0]
    question, expected = task.test[0]
    right = f" Well. Leaves 1 of 2.\nAnswer: {expected} \n"
    model = Writes(right, [right, " No.\nAnswer: Nobody", " It does not say."])
    ((given,),) = solve.solve(model, [task], Settings(samples=4))
    assert set(model.prompts) == {f"{question}\nSolution:"}
    assert [(c.grid, c.votes) for c in given.candidates] == [(expected, 2), ("Nobody", 1)]
    assert solve.solve(make("dense", 20), [task], Settings()) == [[None]]  # too long


@pytest.mark.usefixtures("stand_ins")
def test_only_programs_that_pass_every_demonstration_answer(monkeypatch):
    task, steps = programs.make(np.random.default_rng(4), ["rotate", "swap"])
    right = programs.program_text(steps)
    wrong = [
        "",
        "def solve(grid):\n    return grid\n",
        "def solve(grid):\n    grid = crop(grid)\n    return grid\n",
        "def solve(grid):\n    return open('/etc/passwd')\n",
    ]
    model = Writes("nonsense", [*wrong, right], tok.OUTPUT)
    (found,) = solve.solve_by_programs(model, task, Settings(programs=6))
    assert [(c.grid.tolist(), c.program) for c in found] == [(task.test[0][1].tolist(), right)]
    alone = arc.Task("", "arc", [], task.test)  # no demonstration to pass
    assert solve.solve_by_programs(model, alone, Settings(programs=6)) == [[]]
    monkeypatch.setitem(programs.LANGUAGE, "crop", (({},), lambda grid: grid[99], ()))
    with pytest.raises(IndexError):  # the language's own mistake is no program's
        solve.solve_by_programs(model, task, Settings(programs=6))


# test-time training


@pytest.mark.parametrize("name", ["trm", "dense"])
def test_a_tuned_copy_has_learned_the_task_and_the_model_is_untouched(name):
    model, task = make(name, 512), turned()
    before = copy.deepcopy(model.state_dict())
    rng, document = np.random.default_rng(99), arc.encode("arc", task.train)
    rows = [loader.puzzle_row(document, model.puzzle_format, "arc", rng) for _ in range(8)]
    idx, targets = loader.pad_rows(rows, max(len(r[0]) for r in rows))

    def loss(m):
        with torch.no_grad():
            return m(idx, targets, mode="puzzle")[1].item()

    settings = Settings(ttt_steps=16, ttt_lr=4e-3)
    tuned = solve.tune(model, task, settings)
    assert loss(model) - loss(tuned) > 0.05 and not tuned.training
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as an evaluation in bfloat16
        half = solve.tune(model, task, settings)
    assert torch.equal(tuned.wte.weight, model.wte.weight)
    assert loss(half) == pytest.approx(loss(tuned), abs=0.02)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    other = arc.Task(task.id, task.kind, task.train, [(np.zeros((9, 9), np.uint8),) * 2])
    again = solve.tune(model, other, settings).state_dict()  # the question is not learned
    assert all(torch.equal(v, again[k]) for k, v in tuned.state_dict().items())
    assert solve.tune(model, replace(task, train=task.train[:1]), settings) is model
    large = replace(task, test=[(np.zeros((30, 30), np.uint8),) * 2])
    assert solve.tune(model, large, settings) is model  # the question does not fit
    assert solve.tune(model, replace(large, test=large.test + task.test), settings) is not model  # one does
    small = make(name, 8)
    assert solve.tune(small, task, settings) is small  # nothing fits


def test_scores_are_per_token_in_every_view():
    """A row of nine cells has eleven tokens, and turned, as a column, nineteen."""
    row, column = np.zeros((1, 9), np.uint8), np.zeros((9, 1), np.uint8)
    candidates, views = [Candidate(row), Candidate(column)], solve.views(TASKS[0], 8, 0)
    assert len({view.symmetry.dihedral for view in views}) == 3  # one of them turned

    def even(tasks, answers):
        return [np.array([-0.1 * solve.tokens_of(g) for g in some]) for some in answers]

    solve.rescore(SimpleNamespace(score_answers=even), [(TASKS[0], views, 0, candidates)])
    assert [c.score for c in candidates] == pytest.approx([-0.1, -0.1])
    ((given,),) = solve.solve(RightInSomeViews(1), [turned()], Settings())  # 3 x 4 cells
    assert [(c.votes, c.score) for c in given.candidates] == [(1, -1 / 16)]
