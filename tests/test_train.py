"""train.py as a user runs it: real processes on a small real stage."""

import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import scripts
import torch

import configurator
import distill
import prepare
import train
from smol import checkpoint, loader, loop
from smol import tokenizer as tok

ROOT = Path(__file__).parent.parent
SHAPE = """--n_layer=2 --layer_pattern=ka --n_head=2 --n_embd=16 --n_ff=24 --block_size=128 --batch_size=2
    --gradient_accumulation_steps=2 --log_interval=1 --eval_batches=1 --eval_interval=3 --max_iters=9
    --warmup_iters=2 --decay_iters=4 --learning_rate=3e-3 --mixture={'stdlib':1,'sudoku4':1,'maze':1}
    --dtype=float32"""
ROUTES = {
    "dense": [],
    "trm": ["--model=trm", "--n_latent=1", "--n_recursion=2", "--n_sup=3", "--carry_turns=2", "--ema=0.9"],
}


def words(data, out, *settings):
    return [f"--data_dir={data}", f"--out_dir={out}", *SHAPE.split(), *settings]


def run(data, out, *settings, **more):
    return scripts.run("train.py", words(data, out, *settings), **more)


def succeed(*args, **more):
    done = run(*args, **more)
    assert done.returncode == 0, done.stderr
    return done


def fail(*args, **more):
    """-> the one line of a run that ends with exit code 1."""
    done = run(*args, **more)
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    return done.stderr


def entries(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out):
    return {e["iter"]: e["loss"] for e in entries(out) if "loss" in e}


def validated(out):
    return {e["iter"]: e["val_losses"] for e in entries(out) if "val_losses" in e}


def same_losses(out, other):
    """Bit for bit, those of validation too, where both have validated."""
    assert losses(out) == losses(other)
    ours, theirs = (validated(o) for o in (out, other))
    assert all(ours[step] == theirs[step] for step in ours.keys() & theirs.keys())


def same_weights(out, other):
    ours, theirs = (checkpoint.load(o / "ckpt.pt") for o in (out, other))
    for part in ("weights", "ema"):
        for key in theirs[part] or {}:
            assert torch.equal(ours[part][key], theirs[part][key]), key


EVALUATED = {"eval_suites": "sudoku4", "eval_limit": 1, "eval_device": "cpu"}
# wandb, with the functions that trackio has as well
TRACKER = """
import json, os, sys, types
def note(**what):
    print("noted", json.dumps(what))
tracker = types.ModuleType("wandb", "")
tracker.__spec__ = types.SimpleNamespace()
def init(project, name, config, resume, **more):
    note(init=name, rate=config["learning_rate"], **more)
tracker.init = init
tracker.log = lambda figures, step: note(step=step, **figures)
tracker.Image = lambda path: os.path.getsize(path)
tracker.finish = lambda: note(finish=True)
sys.modules["wandb"] = tracker
"""


@pytest.fixture(scope="module", params=ROUTES)
def route(request):
    return request.param


@pytest.fixture(scope="module")
def finished(route, data, tmp_path_factory):
    """The out_dir of 9 steps of either route in one process; Route A's is evaluated on the way."""
    out = tmp_path_factory.mktemp(route)
    if route == "trm":
        succeed(data, out, *ROUTES[route])
        return out
    more = ["--eval_suites=sudoku4", "--eval_limit=1", "--tracker=wandb", "--keep_every=6"]
    done = succeed(data, out, *more, before=TRACKER)
    (out / "stdout").write_text(done.stdout)
    return out


dense = pytest.mark.parametrize("route", ["dense"], indirect=True)
trm = pytest.mark.parametrize("route", ["trm"], indirect=True)


@pytest.fixture(scope="module")
def finished_by_two(route, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    succeed(data, out, *ROUTES[route], "--sync_check_interval=3", processes=2)
    return out


def test_a_run_leaves_a_log_a_picture_a_config_and_a_checkpoint(finished):
    assert sorted(losses(finished)) == list(range(1, 10))
    val_losses = validated(finished)
    assert sorted(val_losses) == [3, 6, 9] and set(val_losses[9]) == {"stdlib", "sudoku4", "maze"}
    entry = [e for e in entries(finished) if "loss" in e][-1]
    assert {"lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "memory_gb", "skipped"} <= entry.keys()
    assert entry["eta_hours"] == 0 and 0 <= entry["data_wait"] < 1
    by_source = [(e["loss"], e["losses"]) for e in entries(finished) if "loss" in e]
    assert all(loss == pytest.approx(sum(x.values()) / 2) for loss, x in by_source if len(x) == 2)
    assert set().union(*(x for _, x in by_source)) == {"stdlib", "sudoku4", "maze"}
    assert json.loads((finished / "config.json").read_text())["max_iters"] == 9
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    net, saved = checkpoint.load_model(finished / "ckpt.pt")
    assert saved["train"]["iter"] == 9 and all(torch.isfinite(p).all() for p in net.parameters())
    assert checkpoint.load(finished / "ckpt_prev.pt")["train"]["iter"] == 6


def test_two_processes_take_the_same_steps_as_one(finished, finished_by_two):
    for one, two in zip(entries(finished), entries(finished_by_two), strict=True):
        assert one.keys() == two.keys() and two.get("tokens") == one.get("tokens")
        for key in one.keys() & {"loss", "losses", "grad_norm", "val_losses", "val_bpb"}:
            assert two[key] == pytest.approx(one[key], rel=1e-3), (one["iter"], key)


def test_bits_per_byte_are_of_the_bytes_that_the_targets_stand_for(finished, data):
    entry = [e for e in entries(finished) if "val_bpb" in e][-1]
    shape = {"batch_size": 2, "block_size": 128, "batches_per_step": 1, "puzzle_format": "autoregressive"}
    held_out = loader.Loader(data, "demo", weights={"stdlib": 1}, seed=0, **shape).val_batches("text", 1)
    ((_, _, _, targets),) = held_out
    text = tok.load().decode_bytes([i for i in targets.flatten().tolist() if i != tok.EOT])
    nats = entry["val_losses"]["stdlib"] * targets.numel()
    assert entry["val_bpb"] == pytest.approx({"stdlib": nats / math.log(2) / len(text)})


@dense
def test_the_checkpoints_of_some_steps_are_kept(finished):
    assert [path.name for path in finished.glob("ckpt_[0-9]*.pt")] == ["ckpt_6.pt"]
    assert checkpoint.load(finished / "ckpt_6.pt")["train"]["iter"] == 6


@dense
def test_a_step_can_be_given_in_tokens(finished, data, tmp_path):
    """The same steps as of so many batches, however the batches are cut; the settings stay what they were."""
    asked = ["--batch_tokens=512", "--gradient_accumulation_steps=7", "--max_iters=3", "--decay_iters=0"]
    done = succeed(data, tmp_path, *asked, processes=2)
    assert "512 tokens per step" in done.stdout
    for step in (1, 2, 3):
        assert losses(tmp_path)[step] == pytest.approx(losses(finished)[step], rel=1e-3)
    saved = checkpoint.load(tmp_path / "ckpt.pt")["config"]
    assert (saved["batch_tokens"], saved["gradient_accumulation_steps"]) == (512, 7)


@dense
def test_eval_only_validates_and_changes_nothing(finished, data):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    done = succeed(data, finished, "--eval_only=True")
    assert done.stdout.splitlines()[-1] in (finished / "stdout").read_text()
    assert f"validating {finished / 'ckpt.pt'}\nstep 9: validation" in done.stdout
    assert "bits a byte" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@dense
def test_the_average_is_what_is_validated(finished, data, tmp_path):
    saved = checkpoint.load(finished / "ckpt.pt")
    saved["ema"] = {name: torch.zeros_like(weight) for name, weight in saved["weights"].items()}
    checkpoint.save(saved, str(tmp_path / "zeros.pt"))
    named = f"--init_from={tmp_path / 'zeros.pt'}"
    done = succeed(data, tmp_path / "out", named, "--eval_only=True")
    assert f"stdlib {math.log(tok.VOCAB_SIZE):.3f}" in done.stdout
    assert f"maze {math.log(12):.3f}" in done.stdout


def test_a_run_whose_last_step_is_out_of_time_ends_as_any_other(data, tmp_path):
    assert "needs a checkpoint" in fail(data, tmp_path, "--eval_only=True")
    done = succeed(data, tmp_path, "--max_iters=1", "--decay_iters=0", "--max_hours=1e-5")
    assert "step 1: validation" in done.stdout and "stopped" not in done.stdout
    assert checkpoint.load(tmp_path / "ckpt.pt")["train"]["val_losses"]


def test_killed_terminated_and_out_of_time_it_goes_on_to_the_last_bit(route, finished_by_two, data, tmp_path):
    """
    kill -9, SIGTERM of one process, max_hours, and each time the same command again; with samples, which the
    other run goes without.
    """
    settings = [*ROUTES[route], "--sync_check_interval=3", "--sample_interval=1"]
    first = scripts.Run("train.py", words(data, tmp_path, *settings), processes=2)
    first.wait_until((tmp_path / "ckpt.pt").exists)
    first.kill()
    for name in ("ckpt_3.pt.tmp", "loss.png.12.tmp"):  # as if it had been in the middle of it
        (tmp_path / name).touch()
    saved = checkpoint.load(tmp_path / "ckpt.pt")["train"]
    killed_at = saved["iter"]
    assert killed_at in (3, 6) and saved["id"]

    second = scripts.Run("train.py", words(data, tmp_path, *settings), processes=2)
    second.wait_until(lambda: max(losses(tmp_path), default=0) > killed_at)
    second.signal(signal.SIGTERM, rank=1)
    done = second.wait()
    assert done.returncode == 0 and f"going on after step {killed_at} of" in done.stdout, done.stderr
    terminated_at = checkpoint.load(tmp_path / "ckpt.pt")["train"]["iter"]
    assert killed_at < terminated_at < 9 and f"stopped after step {terminated_at}, saved to" in done.stdout

    done = succeed(data, tmp_path, *settings, "--max_hours=1e-5", processes=2)
    assert f"stopped after step {terminated_at + 1}, saved to" in done.stdout
    done = succeed(data, tmp_path, *settings, "--init_from=resume", processes=2)
    assert all(part in done.stdout for part in ("stdlib: ", "expected", "answer")), done.stdout
    assert checkpoint.load(tmp_path / "ckpt.pt")["train"]["id"] == saved["id"]  # for a tracker, one run
    same_losses(tmp_path, finished_by_two)
    same_weights(tmp_path, finished_by_two)
    assert len(entries(tmp_path)) <= 9 + 3  # no step is logged twice
    assert not [*tmp_path.glob("*.tmp")]


@trm
def test_on_another_number_of_processes_it_goes_on_with_every_carry(finished, data, tmp_path):
    carries = checkpoint.load(finished / "ckpt.pt")["train"]["carries"]
    assert {int(key.split("/")[0]) for key in carries} == {0, 1, 2, 3}  # two batches, two turns
    for n in (1, 2):
        shutil.copytree(finished, tmp_path / str(n))
        succeed(data, tmp_path / str(n), *ROUTES["trm"], "--max_iters=11", processes=n)
    for step in (10, 11):
        assert losses(tmp_path / "2")[step] == pytest.approx(losses(tmp_path / "1")[step], rel=1e-4)


def test_a_folder_has_one_run_and_a_second_signal_ends_it_at_once(data, tmp_path):
    # a step of many minutes
    first = scripts.Run("train.py", words(data, tmp_path, "--gradient_accumulation_steps=5000"))
    first.wait_until(lambda: "from scratch" in first.text(".out"))
    assert f"another run is at work in {tmp_path}/" in fail(data, tmp_path, "--seed=2", processes=2)
    first.signal(signal.SIGINT)
    time.sleep(0.5)
    assert first.alive()
    while first.alive():  # a busy machine may take two as one
        first.signal(signal.SIGINT)
        time.sleep(0.2)
    assert first.wait(20).returncode == 128 + signal.SIGINT


# Things that go wrong in a machine, not in the program: put in before train.py runs unchanged.
FLIP = """
import os, torch
step, calls = torch.optim.AdamW.step, [0]
def flipped(optimizer, *args, **kwargs):
    step(optimizer, *args, **kwargs)
    calls[0] += 1
    if calls[0] == 3 and os.environ["RANK"] == "1":
        p = optimizer.param_groups[0]["params"][5]
        with torch.no_grad():
            p.view(-1)[7] = torch.nextafter(p.view(-1)[7], torch.tensor(9.0))  # the last bit of one weight
torch.optim.AdamW.step = flipped
"""
INF = """
import torch
step = torch.optim.AdamW.step
def too_far(optimizer, *args, **kwargs):
    step(optimizer, *args, **kwargs)
    optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))
torch.optim.AdamW.step = too_far
"""
NAN = """
import torch
unscale, calls = torch.amp.GradScaler.unscale_, [0]
def spoiled(scaler, optimizer):
    calls[0] += 1
    if calls[0] in STEPS:
        optimizer.param_groups[0]["params"][2].grad.view(-1)[0] = float("nan")
    unscale(scaler, optimizer)
torch.amp.GradScaler.unscale_ = spoiled
"""
FLIP_AVERAGE = """
import os, smol.loop
update = smol.loop.update_average
def flipped(average, net, ema, iteration):
    update(average, net, ema, iteration)
    if iteration == 2 and os.environ["RANK"] == "1":
        average["blocks.0.norm_1.weight"][0] += 1e-6
smol.loop.update_average = flipped
"""


@pytest.mark.parametrize("what", ["blocks.", "the average of blocks."])
def test_processes_that_drift_apart_are_stopped_by_name(what, data, tmp_path):
    before = FLIP if what == "blocks." else FLIP_AVERAGE
    line = fail(data, tmp_path, "--sync_check_interval=2", "--ema=0.9", processes=2, before=before)
    # the bit changes after the 3rd step; the comparison after the 4th finds it
    assert f"out of sync at step 4: process 1 differs from process 0 in {what}" in line


def test_a_gradient_that_is_not_finite_costs_its_step(data, tmp_path):
    settings = ["--max_iters=5", "--ema=0.9", "--optimizer=adamw", "--dtype=bfloat16"]
    done = succeed(data, tmp_path, *settings, before=NAN.replace("STEPS", "(3,)"))
    assert [step for step, loss in losses(tmp_path).items() if loss is None] == [3]
    assert "step 3 skipped" in done.stdout
    saved = checkpoint.load(tmp_path / "ckpt.pt")
    assert saved["train"]["skipped"] == 1 and saved["train"]["iter"] == 5
    assert checkpoint.not_finite(saved["weights"]) is checkpoint.not_finite(saved["ema"]) is None
    # out of time in a step that was skipped: the next one ends the run, and is saved
    late = [*settings, "--max_hours=1e-9", f"--out_dir={tmp_path / 'late'}"]
    done = succeed(data, tmp_path, *late, before=NAN.replace("STEPS", "(1,)"))
    assert "stopped after step 2, saved to" in done.stdout
    # in its last step: what it has learned is saved
    last = [*settings, f"--out_dir={tmp_path / 'last'}"]
    succeed(data, tmp_path, *last, before=NAN.replace("STEPS", "(5,)"))
    assert checkpoint.load(tmp_path / "last/ckpt.pt")["train"]["skipped_in_a_row"] == 1


@dense
def test_a_run_that_diverges_ends_and_leaves_the_checkpoints(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    files = [tmp_path / "run" / name for name in ("ckpt.pt", "ckpt_prev.pt")]
    before = [path.read_bytes() for path in files]
    longer, always = ["--max_iters=40"], NAN.replace("STEPS", "range(99)")
    always += "import smol.loop; smol.loop.MAX_SKIPPED = 4"
    for settings, fault, part in (
        # step 10, which is skipped, would be saved
        (["--eval_interval=2"], always, "4 steps in a row"),
        (["--eval_interval=1"], INF, "after step 10 there are weights that are not finite (wte.weight)"),
    ):
        line = fail(data, tmp_path / "run", *longer, *settings, before=fault)
        assert part in line and f"{files[0]} is untouched" in line
        assert [path.read_bytes() for path in files] == before


def test_float16_scales_its_loss_and_resumes_to_the_last_bit(data, tmp_path):
    """The T4's way, on the CPU's float16."""
    settings = ["--dtype=float16", "--max_iters=4", "--block_size=64", "--batch_size=1"]
    settings += ["--mixture={'sudoku4': 1}"]
    overflow = NAN.replace("STEPS", "(1,)")
    done = succeed(data, tmp_path / "whole", *settings, before=overflow)
    assert "step 1 skipped" in done.stdout
    succeed(data, tmp_path / "parts", *settings, "--max_hours=1e-5", before=overflow)
    succeed(data, tmp_path / "parts", *settings)
    same_losses(tmp_path / "parts", tmp_path / "whole")
    same_weights(tmp_path / "parts", tmp_path / "whole")
    scalers = [checkpoint.load(tmp_path / name / "ckpt.pt")["train"]["scaler"] for name in ("whole", "parts")]
    assert scalers[0] == scalers[1] and scalers[0]["scale"] == 2**15


@dense
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    limits = [(resource.RLIMIT_FSIZE, 5_000_000)]
    done = run(data, tmp_path / "run", "--max_iters=11", "--eval_interval=5", limits=limits)
    assert done.returncode == 1 and "up to 11, were not saved" in done.stderr, done.stderr
    assert "the checkpoint of step 10 could not be saved (File too large)" in done.stdout
    assert max(losses(tmp_path / "run")) == 11
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


OUT_OF_MEMORY = """
import model_dense, torch
def forward(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")
model_dense.Model.forward = forward
"""


def test_out_of_memory_is_one_line_with_what_takes_less(data, tmp_path):
    line = fail(data, tmp_path, before=OUT_OF_MEMORY)
    for part in ("out of memory", "batch_size", "gradient_accumulation_steps", "recompute=True"):
        assert part in line, line


@dense
def test_a_later_stage_takes_the_weights(finished, data, tmp_path):
    still = ["--max_iters=2", "--learning_rate=0.0", f"--init_from={finished / 'ckpt.pt'}"]
    for extra, steps in (["--init_optimizer=True"], 11), (["--overwrite=True"], 2):
        succeed(data, tmp_path, *still, *extra)
        same_weights(tmp_path, finished)
        saved = checkpoint.load(tmp_path / "ckpt.pt")["train"]
        counts = {int(s["step"]) for s in saved["optimizers"][-1]["state"].values()}
        assert saved["iter"] == 2 and counts == {steps}
    # the path again: it goes on
    done = succeed(data, tmp_path, *still, "--max_iters=3", "--weight_decay=0.0")
    assert "going on after step 2" in done.stdout and "changed: max_iters=3 (was 2)" in done.stdout
    saved = checkpoint.load(tmp_path / "ckpt.pt")["train"]
    assert saved["optimizers"][0]["param_groups"][0]["weight_decay"] == 0  # as the config has it now
    assert saved["began_with"] == str(finished / "ckpt.pt")  # so the same command goes on once more
    # what is named is validated, and not what has been made of it
    done = succeed(data, tmp_path, *still, "--eval_only=True")
    assert f"validating {finished / 'ckpt.pt'}\nstep 9: validation" in done.stdout
    (tmp_path / "ckpt_1000.pt").touch()
    log = entries(tmp_path)
    line = fail(data, tmp_path, "--overwrite=True", "--mixture={'sudoku4': 1}", "--block_size=16")
    assert "exceed block_size=16" in line and entries(tmp_path) == log  # a mistake takes nothing away
    succeed(data, tmp_path, *still, "--overwrite=True")
    assert not (tmp_path / "ckpt_1000.pt").exists()  # it was of the run before


def test_schedules():
    base = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 2, "decay_iters": 4, "max_iters": 10}

    def rates(**changes):
        return [loop.learning_rate_at(i, {**base, **changes}) for i in range(10)]

    assert rates(schedule="wsd") == pytest.approx([0.55, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325])
    assert rates(schedule="wsd", decay_iters=0) == pytest.approx([0.55] + 9 * [1])
    assert rates(schedule="wsd", decay_iters=99) == pytest.approx(
        [0.55, 1] + [1 - 0.9 * i / 8 for i in range(8)]
    )
    cosine = [0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates(schedule="cosine") == pytest.approx([0.55, 1, *cosine])


@pytest.mark.parametrize("grad_clip, left", [(1.0, 1.0), (9.0, 5.0), (0.0, 5.0)])
def test_gradients_are_clipped_to_a_norm(grad_clip, left):
    net = torch.nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    assert loop.clip_gradients(net, [], torch.amp.GradScaler(enabled=False), grad_clip) == pytest.approx(5)
    assert net.weight.grad.norm().item() == pytest.approx(left)


def test_an_evaluation_or_a_tracker_that_fails_costs_the_run_a_line(tmp_path, monkeypatch, capsys):
    no_memory = Mock(side_effect=OSError(12, "Cannot allocate memory"))
    (tmp_path / "ckpt.pt").touch()
    monkeypatch.setattr(loop.subprocess, "Popen", no_memory)
    tracker = types.SimpleNamespace(log=no_memory)
    loop.Log.track(types.SimpleNamespace(step=3, tracker=tracker), {"loss": 1.0})
    evaluation = loop.Evaluation({**EVALUATED, "out_dir": str(tmp_path)}, None)
    evaluation.start(3)
    evaluation.process = types.SimpleNamespace(poll=lambda: 0, returncode=0)  # it has ended, and left nothing
    evaluation.collect()
    tracked, started, ended = capsys.readouterr().out.splitlines()
    assert "Cannot allocate memory" in tracked and "Cannot allocate memory" in started
    assert "the evaluation of step 3 is lost" in ended


def test_the_average_follows_and_is_taken_out_again():
    net = torch.nn.Linear(1, 1, bias=False)
    average = {"weight": torch.zeros(1, 1)}
    torch.nn.init.ones_(net.weight)
    loop.update_average(average, net, 0.9, 0)
    assert average["weight"].item() == pytest.approx(0.9)  # early on it follows closely
    loop.update_average(average, net, 0.9, 1000)
    assert average["weight"].item() == pytest.approx(0.91)
    with pytest.raises(KeyboardInterrupt), loop.averaged_weights(net, average):
        assert net.weight.item() == pytest.approx(0.91)
        raise KeyboardInterrupt
    assert net.weight.item() == 1


def test_stage_0_ends_with_a_table(data, tmp_path):
    settings = ["--sanity=True", "--sanity_steps=40", "--sanity_tokens=16", "--sanity_run_tokens=1e6"]
    settings += ["--n_embd=64", "--n_layer=2", "--max_iters=3", "--learning_rate=1e-2"]
    done = run(data, tmp_path, *settings)
    table = done.stdout[done.stdout.index("stage 0 of") :]
    failed = [line for line in table.splitlines() if line.startswith("  FAIL") and "waiting" not in line]
    assert not failed, table  # how long it waits in three steps is the machine's business
    for what in ("tokenizer", "one text batch", "one puzzle batch", "3 steps", "0.001B tokens"):
        assert what in table, (what, table)
    done = run(data, tmp_path, *settings, "--sanity_steps=1", "--max_iters=1")
    assert done.returncode == 1 and "FAIL   overfit one text batch" in done.stdout


@dense
def test_what_stage_0_does_not_pass(finished, monkeypatch):
    net, _ = checkpoint.load_model(finished / "ckpt.pt")
    logged = [e for e in entries(finished) if "loss" in e]

    def passed(logged=logged, val_losses=types.MappingProxyType({"stdlib": 2.0}), scaled=False):
        path = finished / "ckpt.pt"
        checks = train.check_run(logged, val_losses, path, net, scaled, "CPU", per_step=512)
        return {what.removeprefix("9 "): well and how for what, well, how in checks}

    # of 1,000 steps, whose rows are half padding; one takes a second
    monkeypatch.setattr(train, "sanity_run_tokens", 512 * 1000.0)
    fine = passed([{**e, "tokens": 256 * e["iter"], "tokens_per_second": 256} for e in logged])
    assert fine["steps"] and fine["validation"] and fine["checkpoint"]
    assert fine["the run it prepares"] == "0.000512B tokens: 0.3 h here"
    assert not passed(val_losses={})["validation"] and not passed(val_losses={"a": math.nan})["validation"]
    skipped = [*logged[:-1], {**logged[-1], "skipped": 4}]
    assert not passed(skipped)["steps"] and passed(skipped, scaled=True)["steps"]
    assert not passed([{**e, "data_wait": 0.5} for e in logged])["waiting for data"]
    with torch.no_grad():
        next(net.parameters()).add_(1)
    assert not passed()["checkpoint"]
    assert passed([]) == {"steps": False}


ONE_WITHOUT = "from smol.loader import Loader; Loader.not_validated = lambda *about: ['stdlib']"


def test_a_pinned_snapshot_is_verified_and_what_is_not_validated_is_told(data, tmp_path):
    copy, out, of_puzzles = tmp_path / "data", tmp_path / "out", "--mixture={'sudoku4': 1, 'maze': 1}"
    shutil.copytree(data, copy)
    prepare.main(["freeze", "demo", "--tag=v0.1", f"--data_dir={copy}"])
    snapshot = (copy / "stages/demo/v0.1/snapshot.json").read_bytes()
    done = succeed(copy, out, "--data_tag=v0.1", "--max_iters=1", of_puzzles, before=ONE_WITHOUT)
    assert "not validated: stdlib has no held-out rows" in done.stdout
    saved = checkpoint.load(out / "ckpt.pt")["train"]
    assert saved["val_loss"] is None and saved["val_losses"].keys() == {"maze", "sudoku4"}
    assert saved["data"]["stage"] == "demo" and saved["data"]["tag"] == "v0.1"
    assert saved["data"]["snapshot"] == hashlib.sha256(snapshot).hexdigest()
    line = fail(copy, out, "--max_iters=4", of_puzzles)
    assert "demo:None" in line and "demo:v0.1" in line


@dense
def test_an_evaluation_runs_beside_and_is_kept_and_a_tracker_gets_what_the_log_gets(
    finished, tmp_path, monkeypatch, capfd
):
    found = [json.loads(line) for line in (finished / "evals.jsonl").read_text().splitlines()]
    assert found[0]["iter"] == 3 and found[0]["suites"]["sudoku4"]["total"] == 1
    lines = (finished / "stdout").read_text().splitlines()
    first, *noted, last = [json.loads(line[6:]) for line in lines if line.startswith("noted ")]
    run_id = checkpoint.load(finished / "ckpt.pt")["train"]["id"]
    assert first == {"init": f"{finished.name}-{run_id}", "rate": 3e-3, "id": run_id}
    assert last == {"finish": True} and noted[0]["loss"] == losses(finished)[1]
    tracked = [n for n in noted if "solved/sudoku4" in n]
    logged = [n for n in noted if n not in tracked]
    assert [n["step"] for n in logged] == [e["iter"] for e in entries(finished)]
    assert logged[-1]["val_losses/maze"] == entries(finished)[-1]["val_losses"]["maze"]
    assert [n["solved_iter"] for n in tracked] == [e["iter"] for e in found]
    assert all(n["step"] >= n["solved_iter"] and n["answers"] > 1000 for n in tracked)
    assert [n["step"] for n in noted] == sorted(n["step"] for n in noted)  # wandb drops what goes back
    assert not (finished / "ckpt_eval.pt").exists()
    (tmp_path / "ckpt.pt").touch()
    (tmp_path / "eval_arc.py").write_text("raise SystemExit('error: it is broken')")
    monkeypatch.setattr(loop, "ROOT", str(tmp_path))
    evaluation = loop.Evaluation({**EVALUATED, "out_dir": str(tmp_path)}, None)
    evaluation.start(4)
    evaluation.end(60)
    assert "the evaluation of step 4 failed: error: it is broken" in capfd.readouterr().out


KILLED = f"""
import os, signal, time
from smol import loop
loop.ROOT = FOLDER
evaluation = loop.Evaluation({EVALUATED} | {{"out_dir": FOLDER}}, None)
evaluation.start(1)
print(evaluation.process.pid, flush=True)
while not os.path.getsize(os.path.join(FOLDER, "eval_step.log")):  # at work
    time.sleep(0.1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_an_evaluation_ends_with_its_training_however_that_ends(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    (tmp_path / "eval_arc.py").write_text("import time; print('at work', flush=True); time.sleep(300)")
    done = scripts.run("", before=KILLED.replace("FOLDER", repr(str(tmp_path))))
    assert done.returncode == signal.SIGKILL, done.stderr
    until = time.monotonic() + 20
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    while stat.exists() and stat.read_text().split(") ")[1][0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_settings_are_checked_against_each_other(monkeypatch):
    monkeypatch.setattr(loop.runtime, "world_size", 2)
    config = configurator.settings(vars(train))
    loop.check_settings({**config, "eval_suites": "arc1,language", "push_to": "me/it"})
    for setting, value, message in (
        ("min_lr", 1.0, "min_lr=1.0 must be at most learning_rate=0.0006"),
        ("gradient_accumulation_steps", 3, "cannot be shared evenly by 2"),
        ("batch_tokens", 8192, "is not a multiple of batch_size .* block_size .* processes = 16384"),
        ("keep_every", 700, "keep_every=700 must be a multiple of eval_interval=500"),
        ("push_to", "nobody", "USER/NAME"),
        ("mixture", {"stdlib": 0}, "share above 0"),
        ("eval_suites", "arc3", "the closest is 'arc2'"),
        ("eval_device", "tpu", "'tpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.check_settings({**config, setting: value})
    with pytest.raises(ValueError, match="give one of them"):
        loop.check_settings({**config, "overwrite": True, "init_from": "resume"})


def test_torchrun_ends_with_the_error_too(data, tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py".split()
    command = [sys.executable, *torchrun, *words(data, tmp_path / "out", "--data=stage9")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 1
    before, after = done.stderr.split("Traceback", 1)  # torchrun's own
    assert before.count("'stage9'") == 1 and "stage9" in after.split("Root Cause")[1]


COMPILED = """
import torch
compile = torch.compile
torch.compile = lambda f, **kwargs: print("compiled") or compile(f, backend="eager")
"""


def test_compile_compiles_the_blocks_for_all_shapes(data, tmp_path):
    settings = ["--layer_pattern=a", "--n_layer=1", "--max_iters=1", "--mixture={'stdlib': 1}"]
    of_many_shapes = [*ROUTES["trm"], "--max_iters=1", "--gradient_accumulation_steps=6"]
    for compiled, how in ((False, settings), (True, of_many_shapes)):
        done = succeed(data, tmp_path / str(compiled), *how, f"--compile={compiled}", before=COMPILED)
        assert ("compiled\n" in done.stdout) == compiled
        assert "_limit" not in done.stderr


def test_mistakes_are_one_line_and_cost_nothing(data, tmp_path):
    kept, out = tmp_path / "kept", tmp_path / "out"
    kept.mkdir()
    (kept / "ckpt.pt").write_text("precious")
    gone = ["--init_from=gone.pt", "--data=gone"]  # settings are checked before these are looked for
    for settings, parts in (
        (["--init_from=scratch", f"--out_dir={kept}"], ["ckpt.pt exists", "--overwrite=True"]),
        (["--mixture={'wikipedia': 1}"], ["wikipedia", "stdlib"]),
        ([f"--learning_rate=1{'0' * 400}", *gone], ["learning_rate", "inf"]),
    ):
        line = fail(data, out, *settings)
        assert all(part in line for part in parts), line
    assert not out.exists() and (kept / "ckpt.pt").read_text() == "precious"


def test_every_config_file_is_understood():
    for path in sorted((ROOT / "config").glob("*.py")):
        script = distill if path.stem.startswith("distill_") else train
        config, _ = configurator.read(vars(script), [str(path)])
        loop.check_settings(config)
        assert config["out_dir"] != script.out_dir, path
        assert script is train or (config["init_from"] and config["teacher"]), path
        if path.stem == "arc_speedrun":
            assert loop.batches_per_step(config) == 16
        assert not config["overwrite"], f"{path}: the same command after a reboot would begin anew"
