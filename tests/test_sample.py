"""sample.py: text arrives whole, tasks are found, shown and judged, a film ends as the answer does."""

import re

import numpy as np
import pytest
import tiny
import torch

import sample
from smol import arc, checkpoint, engine, suites
from smol import tokenizer as tok
from smol.engine import chosen_rollout


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny.save(folder / f"{name}.pt", name, {"iter": 1}, 300) for name in ("dense", "trm")}


def test_text_arrives_in_whole_characters_as_soon_as_it_can():
    encoding, taken = tok.load(), []
    robot = encoding.encode_ordinary("🤖")
    assert len(robot) > 1

    def ids():
        for token in [*robot, *encoding.encode_ordinary(" hello"), *robot[:-1]]:
            taken.append(token)
            yield token

    pieces = sample.text_of(ids())
    assert next(pieces) == "🤖" and taken == robot
    assert next(pieces) == " hello" and list(pieces) == []  # half a robot is none
    broken = [*robot[:-1], *encoding.encode_ordinary("b"), robot[-1], tok.ROW, tok.EOT, tok.ROW]
    assert "".join(sample.text_of(broken)) == "b<|row|>"


@pytest.mark.parametrize("name", ["dense", "trm"])
def test_text_is_what_the_model_draws(name, checkpoints, capsys):
    options = ["--prompt=Once upon", "--max_new_tokens=30", "--top_k=50", "--device=cpu"]
    sample.main([checkpoints[name], *options, "--seed=5"])
    out = capsys.readouterr().out
    model, _ = checkpoint.load_model(checkpoints[name])
    idx = torch.tensor([[tok.EOT, *tok.load().encode_ordinary("Once upon")]])
    drawn = engine.generate(model, idx, 30, 0.8, 50, generator=torch.Generator().manual_seed(5))
    assert out == "Once upon" + "".join(sample.text_of(i.item() for i in drawn)) + "\n" and len(out) > 20


def test_tasks_are_found_by_id():
    assert sample.find_task("00576224").id == "00576224"
    for suite in suites.ON_GRIDS:
        task = suites.load(suite)[7]
        for name in (f"{suite}-0007", task.id):
            assert np.array_equal(sample.find_task(name).test[0][0], task.test[0][0])


@pytest.mark.parametrize("name, n_sup", [("dense", None), ("trm", 5)])
def test_a_puzzle_is_shown_and_judged(name, n_sup, checkpoints, capsys):
    options = [f"--n_sup={n_sup}"] if n_sup else []
    sample.main([checkpoints[name], "--task=sudoku4-0007", "--device=cpu", *options])
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    task = suites.load("sudoku4")[7]
    model, _ = checkpoint.load_model(checkpoints[name])
    grid = model.answer([task], **({"n_sup": n_sup} if n_sup else {}))[0][0][0][0]
    assert "puzzle" in out and "expected" in out and arc.verdict(grid, task.test[0][1]) in out
    assert re.findall(r"step (\d+), halt \d\.\d\d", out) == [str(n + 1) for n in range(n_sup or 0)]


@pytest.mark.parametrize(
    "args, words",
    [
        (["{dense}", "--task=0057622"], "00576224"),
        (["{dense}", "--task=sudoku4-9999"], "sudoku4-0099"),
        (["{dense}", "--task=sudoku4-0001", "--halt=0"], "Route B"),
        (["{trm}", "--task=0934a4d8"], "at most 300"),
    ],
)
def test_mistakes_are_one_line(args, words, checkpoints, capsys):
    with pytest.raises(ValueError) as e:
        sample.main([a.format(**checkpoints) for a in args])
    assert words in str(e.value) and "\n" not in str(e.value) and capsys.readouterr().out == ""


def test_a_film_of_the_answer(checkpoints, tmp_path):
    from PIL import Image

    path = tmp_path / "new" / "film.gif"
    options = ["--task=sudoku4-0003", f"--gif={path}", "--n_sup=4", "--device=cpu"]
    sample.main([checkpoints["trm"], *options])
    film = Image.open(path)
    assert film.n_frames == 2 + sample.GLIDE * 4 and film.info["loop"] == 0
    # wrong cells are framed at the end, and the palette of all frames has that colour
    film.seek(film.n_frames - 1)
    colours = {colour for _, colour in film.convert("RGB").getcolors(10_000)}
    assert min(max(abs(a - b) for a, b in zip(colour, sample.BAD)) for colour in colours) < 8


def test_a_film_ends_with_the_answer_and_not_with_the_last_step(tmp_path, monkeypatch):
    task, words = suites.load("sudoku4")[0], []
    right = np.eye(11)[task.test[0][1]]
    wrong = np.roll(right, 1, axis=-1)
    draw = sample.draw
    monkeypatch.setattr(sample, "draw", lambda *args: words.append(args[2]) or draw(*args))
    sample.save_gif(task, [(right, 0.9), (wrong, 0.2)], tmp_path / "a.gif")
    sample.save_gif(task, [(right, 0.2), (wrong, 0.9)], tmp_path / "b.gif")
    assert [w for w in words if "surest" in w] == [
        "step 1, the surest: solved",
        "step 2, the surest: 16 of 16 cells wrong",
    ]


def test_what_is_filmed_is_what_is_answered(checkpoints):
    model, _ = checkpoint.load_model(checkpoints["trm"])
    task = arc.Task("t", "arc", suites.load("maze")[0].test, suites.load("maze")[1].test)
    steps = sample.canvas_steps(model, task, n_rollouts=3)
    trace = chosen_rollout(model.answer([task], trace=True, n_rollouts=3)[0][0], 3)
    assert len(steps) == len(trace) == 3
    for (cells, halt), (grid, probability) in zip(steps, trace):
        assert np.allclose(cells.sum(-1), 1, atol=1e-5) and abs(halt - probability) < 1e-5
        H, W = cells.shape[:2]
        ids = np.full((H, W + 1), tok.VOID)
        ids[:, :W] = np.array(sample.ANSWER_IDS)[cells.argmax(-1)]
        filmed = arc.read_canvas(ids.reshape(-1), (H, W))
        assert (filmed is None) == (grid is None) and (grid is None or np.array_equal(filmed, grid))
