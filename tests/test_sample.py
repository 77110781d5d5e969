"""sample.py: text arrives whole and as it is drawn, tasks are found, shown, and honestly judged."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import sample
from smol import arc, checkpoint, puzzles, thinking
from smol import tokenizer as tok

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{'dense', 'trm'}: paths of tiny models with large random weights."""
    paths = {}
    for name in ("dense", "trm"):
        torch.manual_seed(1)
        model = checkpoint.make_model(
            name,
            {
                "n_layer": 2,
                "layer_pattern": "ka",
                "n_head": 2,
                "n_embd": 16,
                "n_ff": 24,
                "block_size": 300,
                "n_latent": 1,
                "n_recursion": 1,
                "n_sup": 3,
            },
        )
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * torch.randn_like(p)
        paths[name] = str(tmp_path_factory.mktemp(name) / "ckpt.pt")
        checkpoint.save(
            {
                "format": checkpoint.CHECKPOINT_FORMAT,
                "model": name,
                "model_config": dict(vars(model.config)),
                "weights": model.state_dict(),
                "ema": None,
                "tokenizer": tok.fingerprint(),
                "train": {"iter": 1},
            },
            paths[name],
        )
    return paths


def call(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["sample.py", *args])
    sample.main()
    return capsys.readouterr().out


# text

TEXTS = [
    "plain text, as usual\n",
    "naïve café",
    "日本語のテキスト",
    "🤖🦜 and a 👩‍👩‍👧 family",
    "\u0000\ufeff \u2028",
]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_several_tokens_come_out_whole(text):
    pieces = list(sample.text_of(tok.load().encode_ordinary(text)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece or piece == "" for piece in pieces)


def test_text_is_there_as_soon_as_it_can_be():
    enc, taken = tok.load(), []
    robot = enc.encode_ordinary("🤖")
    assert len(robot) > 1

    def ids():
        for token in [*robot, *enc.encode_ordinary(" hello"), *robot[:-1]]:
            taken.append(token)
            yield token

    pieces = sample.text_of(ids())
    assert next(pieces) == "🤖" and taken == robot
    assert next(pieces) == " hello" and len(taken) == len(robot) + 1
    assert list(pieces) == []  # half a robot is none


def test_bytes_that_are_no_character_are_left_out():
    enc = tok.load()
    robot = enc.encode_ordinary("🤖")
    ids = [
        *enc.encode_ordinary("a"),
        *robot[:-1],
        *enc.encode_ordinary("b"),
        robot[-1],
        *enc.encode_ordinary("c"),
    ]
    assert "".join(sample.text_of(ids)) == "abc"


def test_text_ends_at_the_end_of_text_and_names_reserved_ids():
    assert "".join(sample.text_of([tok.CELL0 + 3, tok.ROW, tok.EOT, tok.ROW])) == "<|3|><|row|>"


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_text_is_what_the_model_draws(name, checkpoints, monkeypatch, capsys):
    """Against the same ids decoded at once, bytes first."""
    args = (
        checkpoints[name],
        "--prompt=Once upon",
        "--max_new_tokens=30",
        "--seed=5",
        "--top_k=50",
        "--device=cpu",
    )
    out = call(monkeypatch, capsys, *args)
    model, _ = checkpoint.load_model(checkpoints[name])
    idx = torch.tensor([[tok.EOT, *tok.load().encode_ordinary("Once upon")]])
    ids = [i.item() for i in model.generate(idx, 30, 0.8, 50, generator=torch.Generator().manual_seed(5))]
    ids = ids[: ids.index(tok.EOT)] if tok.EOT in ids else ids
    expected = b"".join(map(tok.load().decode_single_token_bytes, ids)).decode("utf-8", "ignore")
    assert out == "Once upon" + expected + "\n" and len(expected) > 10
    assert call(monkeypatch, capsys, *args) == out
    assert call(monkeypatch, capsys, *args[:3], "--seed=6") != out


def test_temperature_0_does_not_depend_on_the_seed(checkpoints, monkeypatch, capsys):
    outs = {
        call(
            monkeypatch, capsys, checkpoints["dense"], "--temperature=0", "--max_new_tokens=8", f"--seed={s}"
        )
        for s in (1, 2)
    }
    assert len(outs) == 1


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_a_top_p_of_next_to_nothing_is_greedy(name, checkpoints, monkeypatch, capsys):
    outs = {
        call(monkeypatch, capsys, checkpoints[name], how, "--max_new_tokens=8")
        for how in ("--temperature=0", "--top_p=0.0001")
    }
    assert len(outs) == 1


def test_several_samples_differ(checkpoints, monkeypatch, capsys):
    out = call(monkeypatch, capsys, checkpoints["trm"], "--num_samples=3", "--max_new_tokens=12")
    parts = out.split("-" * 20 + "\n")
    assert len(parts) == 3 == len(set(parts))


# tasks


def same(a, b):
    return [[g.tolist() for g in pair] for pair in a.train + a.test] == [
        [g.tolist() for g in pair] for pair in b.train + b.test
    ]


def test_tasks_are_found_by_id():
    assert same(sample.find_task("00576224"), arc.find("00576224"))
    for suite in puzzles.SUITES:
        tasks = puzzles.heldout(suite, 8)
        for i in (0, 7):
            assert same(sample.find_task(f"{suite}-{i:04d}"), tasks[i]) and same(
                sample.find_task(tasks[i].id), tasks[i]
            )
    assert sample.find_task("sudoku4-0099").id == "sudoku4-0099"


@pytest.mark.parametrize(
    "task_id, words",
    [
        ("0057622", "00576224"),
        ("sudoku4-0100", "sudoku4-0000 to sudoku4-0099"),
        ("maze-x", "maze-0000 to maze-0049"),
        ("sudku4-0001", "did you mean 'sudoku4'"),
        ("transforms-0003:no:such=1", "number 3 of transforms is transforms-0003:"),
        ("", "no ARC task"),
    ],
)
def test_unknown_ids_name_what_comes_close(task_id, words):
    with pytest.raises(ValueError) as e:
        sample.find_task(task_id)
    assert words in str(e.value) and "\n" not in str(e.value)


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("name, n_sup", [("dense", None), ("trm", None), ("trm", 5)])
def test_a_puzzle_is_shown_and_judged(name, n_sup, checkpoints, monkeypatch, capsys):
    options = [f"--n_sup={n_sup}"] if n_sup else []
    out = plain(call(monkeypatch, capsys, checkpoints[name], "--task=sudoku4-0007", "--device=cpu", *options))
    task = puzzles.heldout("sudoku4", 8)[7]
    model, _ = checkpoint.load_model(checkpoints[name])
    grid = model.answer([task], **({"n_sup": n_sup} if n_sup else {}))[0][0][0][0]
    assert "puzzle" in out and "expected" in out
    if grid.shape == (4, 4):
        assert f"wrong in {(grid != task.test[0][1]).sum()} of 16 cells" in out
    else:
        assert "wrong: {}x{}, where 4x4 is expected".format(*grid.shape) in out
    if name == "trm":
        steps = re.findall(r"step (\d+), halt (\d\.\d\d)", out)
        assert [int(i) for i, _ in steps] == list(range(1, (n_sup or 3) + 1))
        assert f"the surest answer of {n_sup or 3} supervision steps" in out
    else:
        assert re.search(r"answer, p [\d.e-]+", out)


def test_a_task_with_demonstrations_and_two_test_inputs(checkpoints, monkeypatch, capsys):
    fits = [
        t
        for t in arc.load("arc1_train")
        if len(t.test) == 2
        and max(len(arc.encode_prompt("arc", t.train, x, arc.canvas_shape(t.train, x))) for x, _ in t.test)
        <= 300
    ]
    out = plain(call(monkeypatch, capsys, checkpoints["trm"], f"--task={fits[0].id}"))
    assert all(f"demo {i} " in out for i in range(1, len(fits[0].train) + 1))
    assert "test 1 of 2, the surest" in out and "test 2 of 2, the surest" in out


def test_verdicts():
    a = np.array([[1, 2], [3, 4]], np.uint8)
    assert sample.verdict(a, a.copy()) == "correct"
    assert sample.verdict(a, a.T) == "wrong in 2 of 4 cells"
    assert sample.verdict(a[:1], a) == "wrong: 1x2, where 2x2 is expected"
    assert sample.verdict(None, a) == "no answer"


# mistakes


@pytest.mark.parametrize(
    "args, words",
    [
        (["{dense}", "--task=00000000"], "no ARC task has the id"),
        (["{dense}", "--task=sudoku4-9999"], "sudoku4-0099"),
        (["{dense}", "--task=00576224", "--prompt=both"], "not allowed with"),
        (["{dense}", "--task=sudoku4-0001", "--n_sup=3"], "Route B"),
        (["{trm}", "--n_sup=3"], "--task"),
        (["{dense}", "--temperature=-1"], "--temperature"),
        (["{dense}", "--temperature=nan"], "--temperature"),
        (["{dense}", "--top_k=0"], "1 or more"),
        (["{dense}", "--top_p=0"], "--top_p"),
        (["{trm}", "--top_p=1.5"], "--top_p"),
        (["{text}"], "not a checkpoint"),
        (["missing.pt"], "does not exist"),
        ([], "CKPT"),
    ],
)
def test_mistakes_are_one_line(args, words, checkpoints, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("text\n" * 9)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, capsys, *[a.format(**checkpoints, text=tmp_path / "notes.txt") for a in args])
    assert (
        stopped.value.code.startswith("error: ")
        and words in stopped.value.code
        and "\n" not in stopped.value.code
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_too_long_says_both_numbers(name, checkpoints, monkeypatch, capsys):
    task = next(t for t in arc.load("arc1_eval") if len(arc.encode("arc", t.train)) > 1000)
    shapes = [(x, *arc.canvas_shape(task.train, x)) for x, _ in task.test]
    longest = max(
        len(arc.encode_prompt("arc", task.train, x, (h, w)))
        if name == "trm"
        else len(arc.encode_prompt("arc", task.train, x)) + h * (w + 1)
        for x, h, w in shapes
    )
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, capsys, checkpoints[name], f"--task={task.id}")
    assert f"{longest:,} tokens" in stopped.value.code and "at most 300" in stopped.value.code
    assert capsys.readouterr().out == ""


def test_the_command_exits_with_1_and_survives_a_reader_that_leaves(checkpoints):
    run = [sys.executable, "sample.py", checkpoints["dense"]]
    done = subprocess.run([*run, "--task=nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: no ARC task")
        and done.stderr.count("\n") == 1
        and done.stdout == ""
    )
    process = subprocess.Popen(
        [*run, "--max_new_tokens=2000", "--num_samples=50", "--device=cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(10)  # there is text long before it is done
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=20) == 0


def test_a_moving_picture_of_the_answer(checkpoints, tmp_path, monkeypatch, capsys):
    """It plays, ends as `answer` ends, is written whole or not at all, and needs Route B and a task."""
    from PIL import Image

    for task_id, frames in (("sudoku4-0003", 7), ("maze-0001", 12)):
        path = str(tmp_path / "new" / f"{task_id}.gif")
        said = call(
            monkeypatch,
            capsys,
            checkpoints["trm"],
            f"--task={task_id}",
            f"--gif={path}",
            f"--n_sup={frames // 5}",
            "--device=cpu",
        )
        film = Image.open(path)
        assert path in said and film.n_frames == frames and film.info["loop"] == 0
    assert sorted(os.listdir(tmp_path / "new")) == ["maze-0001.gif", "sudoku4-0003.gif"]
    for args in ((checkpoints["dense"], "--task=maze-0001"), (checkpoints["trm"], "--prompt=a")):
        with pytest.raises(SystemExit, match="Route B"):
            call(monkeypatch, capsys, *args, f"--gif={tmp_path / 'no.gif'}", "--device=cpu")
    with pytest.raises(SystemExit, match="folder"):
        call(monkeypatch, capsys, checkpoints["trm"], "--task=maze-0001", f"--gif={tmp_path}", "--device=cpu")
    assert not (tmp_path / "no.gif").exists()


def test_what_is_filmed_is_what_is_answered(checkpoints):
    model, _ = checkpoint.load_model(checkpoints["trm"])
    task = arc.Task("t", "arc", puzzles.heldout("maze", 2)[0].test, puzzles.heldout("maze", 2)[1].test)
    steps = thinking.thoughts(model, task)
    trace = model.answer([task], trace=True)[0][0]
    assert len(steps) == len(trace) == 3
    for (p, halt), (grid, probability) in zip(steps, trace):
        assert np.allclose(p.sum(-1), 1, atol=1e-5) and abs(halt - probability) < 1e-5
        H, W = p.shape[:2]
        ids = np.full((H, W + 1), tok.VOID)
        ids[:, :W] = np.array(thinking.ANSWER_IDS)[p.argmax(-1)]
        filmed = arc.read_canvas(ids.reshape(-1), (H, W))
        assert (filmed is None) == (grid is None) and (grid is None or np.array_equal(filmed, grid))


@pytest.mark.parametrize("name", ("dense", "trm"))
def test_a_diverged_checkpoint_is_said_to_be_one(name, checkpoints, tmp_path, monkeypatch, capsys):
    path, ckpt = str(tmp_path / "ckpt.pt"), checkpoint.load(checkpoints[name])
    checkpoint.save({**ckpt, "weights": {k: v * np.nan for k, v in ckpt["weights"].items()}}, path)
    assert "no answer" in call(monkeypatch, capsys, path, "--task=sudoku4-0003", "--device=cpu")
    films = [["--task=sudoku4-0003", f"--gif={tmp_path / 'no.gif'}"]] if name == "trm" else []
    for args in (["--prompt=a"], ["--prompt=", "--temperature=0"], *films):
        with pytest.raises(SystemExit, match="not finite") as e:
            call(monkeypatch, capsys, path, *args, "--device=cpu")
        assert str(e.value).startswith("error: ") and "\n" not in str(e.value)
    assert not (tmp_path / "no.gif").exists()
