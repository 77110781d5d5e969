"""From a model to its attempts: views and their inverses, votes, programs, test-time training, and that none of it sees an answer."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import grid, make, stand_ins  # noqa: F401

import eval_arc
from smol import arc, engine, programs, puzzles, solve, suites, ttt
from smol import tokenizer as tok
from smol.solve import Settings

pytestmark = pytest.mark.usefixtures("stand_ins")


def tasks_of(*suites_and_counts):
    """So many of each suite, the smallest: an untrained model writes until there is no room left."""
    return [
        task for suite, n in suites_and_counts for task in sorted(suites.load(suite), key=eval_arc.length)[:n]
    ]


def exact(name, block_size=256):
    """
    A model in float64, for grids that must be the same however rows are batched: in float32 the recursion of a
    tiny Route B turns the last bits of one batch or another into 5e-3 of a logit; two colours may be nearer.
    """
    return make(name, block_size).double()


def plain(given):
    """What solve returned, as something that can be compared."""

    def of(g):
        return (
            None if g is None else [(np.asarray(c.grid).tolist(), c.votes, c.program) for c in g.candidates]
        )

    return [list(map(of, task)) for task in given]


# views


@pytest.mark.parametrize("suite, most", [("transforms", 40), ("sudoku4", 40), ("maze", 8)])
def test_views_are_different_and_a_longer_list_begins_with_the_shorter(suite, most):
    for task in suites.load(suite)[:5]:
        some = solve.views(task, most, seed=3)
        assert len(set(some)) == len(some) == most
        assert solve.views(task, 5, seed=3) == some[:5]
        assert some[0].symmetry == arc.IDENTITY and some[0].order == tuple(range(len(task.train)))
        assert solve.views(task, most, seed=4) != some
    assert len(solve.views(suites.load("maze")[0], 100, seed=3)) == 8  # there are no more


@pytest.mark.parametrize("suite", ["transforms", "sudoku4", "sudoku9", "maze"])
def test_a_view_is_another_task_of_the_same_kind_and_its_answer_turns_back_into_the_answer(suite):
    for task in suites.load(suite)[:4]:
        for view in solve.views(task, 8, seed=1):
            seen = solve.look(view, task)
            puzzle, answer = seen.test[0]
            assert np.array_equal(arc.invert(view.symmetry, answer), task.test[0][1])
            assert sorted(x.tobytes() for x, _ in seen.train) == sorted(
                arc.augment(view.symmetry, x).tobytes() for x, _ in task.train
            )
            if suite != "transforms":
                assert puzzles.check(seen)  # still a sudoku, still a maze, with this one solution


class Sees:
    """In place of a model: gives the answer to any view of a task whose rule is 'turn by half a turn', at most `right` times."""

    puzzle_format, config = "autoregressive", None

    def __init__(self, right):
        self.left = right

    def answer(self, tasks, samples, temperature, seed):
        out = []
        for task in tasks:
            for x, y in task.train:
                assert np.array_equal(y, np.rot90(x, 2))  # what a view shows is the same task
            self.left -= 1
            out.append(
                [[(np.rot90(x, 2) if self.left >= 0 else np.roll(x, 1, 1), -1.0)] for x, _ in task.test]
            )
        return out

    def answer_logits(self, tasks, answers):
        return [[np.full(g.shape, -1.0) for g in grids] for grids in answers]

    def cell_logits(self, documents, shapes):
        return torch.zeros(sum(h * (w + 1) + 1 for h, w in shapes), 11)


def turned(n=3):
    rng = np.random.default_rng(0)
    pairs = [(x, np.rot90(x, 2)) for x in (rng.permutation(12).reshape(3, 4) % 10 for _ in range(n + 1))]
    return arc.Task(
        "turned",
        "arc",
        *([(x.astype(np.uint8), y.astype(np.uint8)) for x, y in part] for part in (pairs[:n], pairs[n:])),
    )


def test_the_answer_of_most_views_comes_first():
    task = turned()
    for right in (16, 9):
        ((given,),) = solve.solve(Sees(right), [task], Settings(augment=16))
        assert (
            np.array_equal(given.candidates[0].grid, task.test[0][1]) and given.candidates[0].votes == right
        )
        assert sum(c.votes for c in given.candidates) == 16


def test_votes_come_before_scores_and_a_program_before_both():
    a, b, c = grid("1"), grid("22"), grid("3/3")
    ranked = solve.vote(
        [(a, 1, -0.1, None), (b, 1, -5.0, None), (b, 1, -7.0, None), (c, 1, 0.0, "solve"), (a, 0, 9.0, None)]
    )
    assert [x.grid.tolist() for x in ranked] == [c.tolist(), b.tolist(), a.tolist()]
    assert [(x.votes, x.score, x.program) for x in ranked] == [
        (1, 0.0, "solve"),
        (2, -6.0, None),
        (1, -0.1, None),
    ]


def test_one_view_is_what_the_model_answers_by_itself():
    tasks = tasks_of(("sudoku4", 2), ("transforms", 4))
    for name in ("dense", "trm"):
        model = exact(name, 400)
        for task, given, by_itself in zip(
            tasks, solve.solve(model, tasks, Settings()), model.answer(solve.without_answers(tasks))
        ):
            for found, wanted in zip(given, by_itself):
                assert (found is None) == (wanted is None), task.id
                if found:
                    assert found.candidates[0].grid.tolist() == wanted[0][0].tolist()
                    theirs = found.candidates[: len(wanted)]  # without Route A's second attempt
                    assert {c.grid.tobytes() for c in theirs} == {g.tobytes() for g, _ in wanted}


def test_two_attempts_at_an_arc_task_are_two_answers():
    """Of Route A, the second is the likeliest that differs from the first in a cell: found by trying all."""
    model, tasks = make("dense", 400), [turned(1), *tasks_of(("sudoku4", 1))]
    (given,), (puzzle,) = solve.solve(model, tasks, Settings())
    first, second = given.candidates
    assert len(puzzle.candidates) == 1  # one attempt counts there
    assert [c.votes for c in given.candidates] == [1, 0] and first.grid.shape == second.grid.shape
    ((r, c),) = np.argwhere(first.grid != second.grid)

    lost = {}
    ids = arc.encode("arc", [*tasks[0].train, (tasks[0].test[0][0], first.grid)])
    ids = torch.from_numpy(ids.astype(np.int64))
    h, w = first.grid.shape
    for (i, j), colour in np.ndenumerate(first.grid):  # by the forward pass up to each cell, of ten colours
        at = len(ids) - 1 - h * (w + 1) + i * (w + 1) + j
        logits = model(ids[None, :at], mode="puzzle")[0][0, -1, tok.CELL0 : tok.CELL0 + 10]
        log_p = logits.log_softmax(-1).tolist()
        lost.update({(i, j, other): log_p[colour] - log_p[other] for other in range(10) if other != colour})
    assert lost[r, c, second.grid[r, c]] == pytest.approx(min(lost.values()), abs=1e-4)
    assert second.score == pytest.approx(first.score - min(lost.values()) / first.grid.size, abs=1e-4)


def test_the_second_attempt_of_route_b_is_another_answer_wherever_a_step_gave_one():
    model, tasks = make("trm", 400), tasks_of(("transforms", 8))
    several = 0
    for task, (given,) in zip(tasks, solve.solve(model, tasks, Settings())):
        (record,) = eval_arc.judge(task, [given], 2)["test"]
        different = {grid.tobytes() + bytes(grid.shape) for grid, _ in given.steps if grid is not None}
        assert len(set(map(str, record["attempts"]))) == len(record["attempts"]) == min(2, len(different))
        several += len(different) > 1
    assert several


def test_route_a_that_says_nothing_at_a_place_has_no_candidate_there(monkeypatch):
    """Its way out of numbers that are not finite: None for that row, beside rows with an answer."""
    model, tasks, write = make("dense", 400), tasks_of(("transforms", 3)), engine.write_grids

    def second_row_is_none(*args, **named):
        return [None if n == 1 else answer for n, answer in enumerate(write(*args, **named))]

    monkeypatch.setattr(engine, "write_grids", second_row_is_none)
    for settings in (Settings(), Settings(samples=3), Settings(augment=3)):
        given = [found[0] for found in solve.solve(model, tasks, settings)]
        assert all(c.grid is not None and np.isfinite(c.score) for found in given for c in found.candidates)
    nothing = lambda logits, read_on, limits, *_, **__: [(None, 0.0)] * len(limits)  # noqa: E731
    monkeypatch.setattr(engine, "write_grids", nothing)
    assert [found.candidates for (found,) in solve.solve(model, tasks, Settings(samples=2))] == [[], [], []]


def test_route_b_keeps_every_step_of_the_task_as_it_is():
    model, tasks = exact("trm"), tasks_of(("sudoku4", 3))
    for given, (trace,) in zip(
        solve.solve(model, tasks, Settings(augment=4)), model.answer(tasks, trace=True)
    ):
        assert [(g.tolist(), pytest.approx(p, abs=1e-5)) for g, p in given[0].steps] == [
            (g.tolist(), p) for g, p in trace
        ]


def test_route_b_stops_where_it_is_sure_enough():
    model, tasks = make("trm"), tasks_of(("sudoku4", 3))
    for halt, n in ((0.0, 1), (1.0, model.config.n_sup)):  # any probability is above 0, and none above 1
        assert [len(given[0].steps) for given in solve.solve(model, tasks, Settings(halt=halt))] == [n] * 3


def test_a_score_of_route_a_is_the_mean_over_views_of_what_its_cells_are_likely():
    model, tasks = make("dense", 400), tasks_of(("sudoku4", 2))
    settings = Settings(augment=3, samples=2)
    for task, (given,) in zip(tasks, solve.solve(model, tasks, settings)):
        for c in given.candidates[: solve.RESCORED]:
            log_p = []
            for view in solve.views(task, 3, settings.seed):
                seen = solve.look(view, task)
                answer = arc.augment(view.symmetry, c.grid)
                log_p.append(model.answer_logits([seen], [[answer]])[0][0].mean())
            assert c.score == pytest.approx(np.mean(log_p), abs=1e-4)


# what draws depend on


def test_samples_are_drawn_from_one_reading_as_if_each_had_read_alone():
    """The same distribution in both: first cells drawn many times, against the probabilities that the model gives."""
    model, task = make("dense"), tasks_of(("sudoku4", 1))[0]
    drawn = model.answer([task], samples=600, temperature=1.0, seed=1)[0][0]
    first = np.bincount([g[0, 0] for g, _ in drawn[1:]], minlength=10) / 599
    ids = torch.from_numpy(arc.encode_prompt("sudoku", [], task.test[0][0]).astype(np.int64))
    p = model(ids[None], mode="puzzle")[0][0, -1, tok.CELL0 : tok.CELL0 + 10].softmax(-1).detach().numpy()
    assert np.abs(first - p).max() < 4 * 0.5 / 599**0.5
    grid_, log_p = drawn[7]
    tokens = torch.from_numpy(arc.encode("sudoku", [(task.test[0][0], grid_)]).astype(np.int64))
    assert grid_.shape[1] <= 4 and len(tokens) and log_p < 0
    assert [g.tolist() for g, _ in drawn] == [
        g.tolist() for g, _ in model.answer([task], samples=600, temperature=1.0, seed=1)[0][0]
    ]


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_answers_do_not_depend_on_what_else_is_asked(name):
    model, settings = exact(name, 400), Settings(augment=3, samples=2)
    tasks = tasks_of(("sudoku4", 2), ("transforms", 3))
    together = plain(solve.solve(model, tasks, settings))
    assert together == [plain(solve.solve(model, [task], settings))[0] for task in tasks]
    assert together == plain(solve.solve(model, tasks[::-1], settings))[::-1]


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_what_is_written_is_what_generate_writes_and_stays_in_its_room(name):
    model, prompts = exact(name, 64), [[tok.EOT, 5, 6], [tok.EOT, 7, 8, 9, 10]]
    written = solve.write(model, prompts, 3, [6, 4], (), Settings())
    for prompt, room, texts in zip(prompts, (6, 4), written):
        greedy = [int(ids[0]) for ids in engine.generate(model, torch.tensor([prompt]), room, 0, stop=())]
        assert texts[0] == greedy and len(texts) == 3 and all(len(ids) == room for ids in texts)
    stopped = solve.write(model, prompts[:1], 1, [6], (written[0][0][2],), Settings())
    assert stopped == [[written[0][0][: written[0][0].index(written[0][0][2])]]]
    assert solve.write(model, prompts[::-1], 3, [4, 6], (), Settings()) == written[::-1]


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_nothing_of_the_answers_reaches_the_model(name, monkeypatch):
    """With everything on: tasks with noise in place of their test outputs get identical answers."""
    monkeypatch.setattr(solve, "PROGRAM_TOKENS", 12)
    rng, model = np.random.default_rng(3), make(name, 400)
    tasks = tasks_of(("transforms", 2), ("sudoku4", 1))
    noisy = [
        arc.Task(
            t.id,
            t.kind,
            t.train,
            [(x, rng.integers(0, 10, rng.integers(1, 31, 2)).astype(np.uint8)) for x, _ in t.test],
        )
        for t in tasks
    ]
    settings = Settings(augment=2, samples=2, ttt_steps=2, programs=2)
    seen, given = [], []

    def answer(part):
        seen.extend(y for t in part for _, y in t.test)
        found = solve.solve(model, part, settings)
        given.extend(plain(found))
        return found

    for some in (tasks, noisy):
        eval_arc.evaluate(some, answer)
    half = len(given) // 2
    assert given[:half] == given[half:] and half == 3 and any(g for task in given for g in task)
    assert all(y.tolist() == [[0]] for y in seen)


def test_puzzles_in_words_are_read_up_to_the_solution_and_answered_behind_answer():
    task = suites.load("logic")[0]
    question, expected = task.test[0]
    assert "Solution" not in question and "Answer" not in question
    encoder, asked = tok.load(), []

    class Writes:
        puzzle_format, config = "autoregressive", make("dense", 1024).config
        wte = make("dense").wte
        texts = [f" Well. Leaves 1 of 2.\nAnswer: {expected} \n", " No.\nAnswer: Nobody", " It does not say."]

        def generate(self, prompts, max_new_tokens, temperature, stop, generator):
            asked.append(encoder.decode(prompts[0][1:].tolist()))
            rows = [
                encoder.encode_ordinary(t) + [tok.EOT]
                for t in (self.texts[:1] if temperature == 0 else self.texts[: len(prompts)])
            ]
            for i in range(max(map(len, rows))):
                yield torch.tensor([row[i] if i < len(row) else tok.PAD for row in rows])

    ((given,),) = solve.solve(Writes(), [task], Settings(samples=4))
    assert asked == [f"{question}\nSolution:"] * 2
    assert [(c.grid, c.votes) for c in given.candidates] == [(expected, 2), ("Nobody", 1)]
    ((nothing,),) = solve.solve(Writes(), solve.without_answers([task]), Settings(samples=1))
    assert [c.grid for c in nothing.candidates] == [expected]
    assert solve.solve(make("dense", 20), [task], Settings()) == [[None]]


def test_a_prompt_at_which_numbers_are_not_finite_costs_its_own_text_alone():
    class Breaks:
        puzzle_format, wte = "autoregressive", make("dense").wte

        def generate(self, prompts, max_new_tokens, temperature, stop, generator):
            for _ in range(max_new_tokens):
                if any(5 in p for p in prompts):
                    raise ValueError("logits that are not finite")
                yield torch.stack([p[-1] for p in prompts])

    prompts = [[tok.EOT, 6], [tok.EOT, 5], [tok.EOT, 7]]
    assert solve.write(Breaks(), prompts, 2, [2, 3, 4], (), Settings()) == [
        [[6] * 2] * 2,
        [[], []],
        [[7] * 4] * 2,
    ]


# programs


def test_only_programs_that_pass_every_demonstration_answer():
    task, steps = programs.make(np.random.default_rng(4), "turn_then_colour")
    right = programs.program_text(steps)
    texts = [
        "def solve.solve(grid):\n    grid = crop(grid)\n    return grid\n",
        "import os\n",
        "def solve.solve(grid):\n    return open('/etc/passwd')\n",
        "def solve.solve(grid):\n" + "    grid = tile(grid, ny=3, nx=3)\n" * 30 + "    return grid\n",
        right,
    ]
    encoder = tok.load()

    class Writes:
        puzzle_format, config = "canvas", make("dense", 4096).config
        wte = make("dense").wte

        def generate(self, prompts, max_new_tokens, temperature, stop, generator):
            rows = [
                encoder.encode_ordinary(t) + [tok.OUTPUT]
                for t in (["nonsense"] if temperature == 0 else texts[: len(prompts)])
            ]
            for i in range(max(map(len, rows))):
                yield torch.tensor([row[i] if i < len(row) else tok.PAD for row in rows])

    (found,) = solve.from_programs(Writes(), task, Settings(programs=6))
    assert [(g.tolist(), text) for g, _, _, text in found] == [(task.test[0][1].tolist(), right)]
    (nothing,) = solve.from_programs(Writes(), task, Settings(programs=5))  # all but the right one
    assert nothing == []


# test-time training


@pytest.mark.parametrize("name", ["dense", "trm"])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_tuned_model_has_learned_its_task_and_the_model_itself_is_untouched(name, rank):
    model, task = make(name, 512), turned()
    before = copy.deepcopy(model.state_dict())
    rows = ttt.rows(task, 8, model.puzzle_format, 512, np.random.default_rng(99))

    def loss(m):
        idx, targets = ttt.pad_rows(rows, max(len(r[0]) for r in rows))
        with torch.no_grad():
            return m(idx, targets, mode="puzzle")[1].item()

    # At twice this rate a weight's last bit decides what Route B gains; one seed of it in ten loses a little
    gained = []
    for seed in range(1, 5 if name == "trm" else 2):
        tuned = ttt.tune(model, task, Settings(ttt_steps=16, ttt_rank=rank, ttt_lr=4e-3, seed=seed))
        gained.append(loss(model) - loss(tuned))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training and not tuned.training
    assert tuned.state_dict().keys() == before.keys()  # nothing is left beside the weights
    changed = {k for k, v in tuned.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    if rank:
        assert all(k.startswith("blocks") and k.endswith("weight") and before[k].ndim == 2 for k in changed)
    assert np.mean(gained) > 0.05


def test_tuning_depends_on_the_seed_and_on_nothing_else():
    model, task, settings = make("dense", 512), turned(), Settings(ttt_steps=2, ttt_lr=1e-2)
    tuned, again, other = (
        ttt.tune(model, task, s).state_dict() for s in (settings, settings, replace(settings, seed=2))
    )
    assert all(torch.equal(v, again[k]) for k, v in tuned.items())
    assert not all(torch.equal(v, other[k]) for k, v in tuned.items())


def test_low_rank_changes_are_of_low_rank():
    model = make("dense", 512)
    tuned = ttt.tune(model, turned(), Settings(ttt_steps=5, ttt_rank=2, ttt_lr=1e-2))
    tuned, changed = tuned.state_dict(), 0
    for name, w in model.state_dict().items():
        if not torch.equal(w, tuned[name]):
            changed += 1
            assert torch.linalg.matrix_rank(tuned[name] - w, rtol=1e-3) <= 2, name
    assert changed > 5


def test_the_test_input_is_not_learned_from_and_one_demonstration_is_too_few():
    task = turned()
    other = arc.Task(
        task.id, task.kind, task.train, [(np.zeros((9, 9), np.uint8), np.zeros((1, 1), np.uint8))]
    )
    model, settings = make("dense", 512), Settings(ttt_steps=3)
    a, b = (ttt.tune(model, t, settings).state_dict() for t in (task, other))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    alone = [arc.Task("alone", "arc", task.train[:1], task.test)]
    assert plain(solve.solve(model, alone, settings)) == plain(solve.solve(model, alone, Settings()))
    assert (
        ttt.tune(make("dense", 20), task, settings).config.block_size == 20
    )  # nothing fits: the model as it is
