"""train.py as a user runs it: real processes on a small real stage."""

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scripts
import tiny
import torch

import configurator
import prepare
from model_dense import Config, Model
from smol import checkpoint, loop, sanity

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
STAGE = [
    "--val_every=3",
    "--limit_mb=1",
    "--num_proc=1",
]
SHAPE = [
    "--n_layer=4",
    "--n_head=2",
    "--n_embd=16",
    "--n_ff=24",
    "--block_size=256",
    "--batch_size=2",
    "--gradient_accumulation_steps=2",
    "--log_interval=1",
    "--eval_batches=1",
    "--warmup_iters=2",
    "--decay_iters=4",
    "--learning_rate=3e-3",
    "--mixture={'stdlib': 1, 'sudoku4': 1, 'maze': 1}",
]
ROUTES = {
    "dense": [],
    "trm": ["--model=trm", "--n_latent=1", "--n_recursion=2", "--n_sup=3", "--carry_turns=2", "--ema=0.9"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.main(["demo", f"--data_dir={folder}", *STAGE])
    return folder


def command(data, out, *settings, processes=1, script="train.py"):
    launch = [sys.executable]
    if processes > 1:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    return [*launch, str(ROOT / script), f"--data_dir={data}", f"--out_dir={out}", *SHAPE, *settings]


def train(*args, limits=(), **kwargs):
    """Run to the end. limits: (resource, value) pairs, such as the largest file that may be written."""

    def limit():
        for what, value in limits:
            resource.setrlimit(what, (value, value))

    return subprocess.run(
        command(*args, **kwargs),
        env=ENV,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        preexec_fn=limit,
    )


# Things that go wrong in a machine, not in the program: put in from outside, before train.py runs unchanged.
FAULTS = """
import os, runpy, sys
import torch
fault, script, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
step, calls = torch.optim.AdamW.step, [0]  # once a step, with Muon as without

def faulty(optimizer, *args, **kwargs):
    calls[0] += 1
    step(optimizer, *args, **kwargs)
    if fault == "flip" and calls[0] == 3 and os.environ["RANK"] == "1":
        p = optimizer.param_groups[0]["params"][5]
        with torch.no_grad():
            p.view(-1)[7] = torch.nextafter(p.view(-1)[7], torch.tensor(9.0))  # the last bit of one weight

torch.optim.AdamW.step = faulty
unscale = torch.amp.GradScaler.unscale_
def spoiled(scaler, optimizer):
    calls[0] += 1
    if fault == "nan" and calls[0] in (3, 6) or fault == "never":
        optimizer.param_groups[0]["params"][2].grad.view(-1)[0] = float("nan")
    unscale(scaler, optimizer)
if fault in ("nan", "never"):
    torch.amp.GradScaler.unscale_ = spoiled
    torch.optim.AdamW.step = step
runpy.run_path(script, run_name="__main__")
"""


def train_with_fault(fault, folder, *args, **kwargs):
    (folder / "faults.py").write_text(FAULTS)
    words = command(*args, **kwargs)
    at = words.index(str(ROOT / "train.py"))
    return subprocess.run(
        [*words[:at], str(folder / "faults.py"), fault, *words[at:]],
        env=ENV,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


def losses(out):
    """{step: loss} and {step: validation losses} from log.jsonl."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {e["iter"]: e["loss"] for e in lines if "loss" in e}, {
        e["iter"]: e["val_losses"] for e in lines if "val_losses" in e
    }


@pytest.fixture(scope="module", params=ROUTES)
def finished(request, data, tmp_path_factory):
    """A run of 8 steps of either route: (settings, out_dir)."""
    out = tmp_path_factory.mktemp(request.param)
    settings = [*ROUTES[request.param], "--max_iters=8", "--eval_interval=4"]
    run = train(data, out, *settings)
    assert run.returncode == 0, run.stderr
    return settings, out


def test_a_run_leaves_a_log_a_config_and_a_checkpoint_that_loads(finished):
    settings, out = finished
    trained, validated = losses(out)
    assert sorted(trained) == list(range(1, 9)) and sorted(validated) == [4, 8]
    assert set(validated[8]) == {"stdlib", "sudoku4", "maze"}
    assert json.loads((out / "config.json").read_text())["max_iters"] == 8
    model, ckpt = checkpoint.load_model(out / "ckpt.pt")
    assert ckpt["train"]["iter"] == 8 and not model.training
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert list(out.glob("*.tmp")) == []


@pytest.fixture(scope="module")
def finished_by_two(finished, data, tmp_path_factory):
    settings, _ = finished
    out = tmp_path_factory.mktemp("two")
    run = train(data, out, *settings, "--sync_check_interval=3", processes=2)
    assert run.returncode == 0, run.stderr
    return [*settings, "--sync_check_interval=3"], out


def same_losses(out, other, rel=1e-4):
    for one, two in zip(losses(out), losses(other)):
        assert one.keys() == two.keys()
        for step in one:
            assert two[step] == pytest.approx(one[step], rel=rel), step


def same_weights(out, other, name="ckpt.pt"):
    ours, theirs = checkpoint.load(out / "ckpt.pt"), checkpoint.load(other / name)
    for key in theirs["weights"]:
        assert torch.equal(ours["weights"][key], theirs["weights"][key]), key


def test_two_processes_take_the_same_steps_as_one(finished, finished_by_two):
    same_losses(finished[1], finished_by_two[1])


def test_so_do_four(data, tmp_path):
    settings = ["--gradient_accumulation_steps=4", "--max_iters=3", "--eval_interval=3"]
    runs = [train(data, tmp_path / str(n), *settings, processes=n) for n in (1, 4)]
    assert [run.returncode for run in runs] == [0, 0], runs[1].stderr
    same_losses(tmp_path / "1", tmp_path / "4")
    counted = [
        [json.loads(line)["tokens"] for line in open(tmp_path / n / "log.jsonl") if "tokens" in line]
        for n in "14"
    ]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("finished", ["dense"], indirect=True)
def test_two_machines_are_two_torchruns(finished_by_two, data, tmp_path):
    settings, out = finished_by_two
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    script = command(data, tmp_path, *settings)[1:]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=localhost",
        f"--master_port={port}",
    ]
    machines = [
        subprocess.Popen(
            [*launch, f"--node_rank={n}", *script],
            env=ENV,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in (0, 1)
    ]
    said = [m.communicate(timeout=300)[0] for m in machines]
    assert [m.returncode for m in machines] == [0, 0], said
    assert losses(tmp_path) == losses(out)


def killed_after_step_4(out, words):
    """Run until the checkpoint of step 4 is there, and kill -9. On a busy machine the run can end before we see that: then once more."""
    for _ in range(5):
        process = subprocess.Popen(
            words,
            env=ENV,
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not (out / "ckpt.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        for pid in [process.pid, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if checkpoint.load(out / "ckpt.pt")["train"]["iter"] == 4:
            return
        shutil.rmtree(out)
    raise AssertionError("five runs have ended before they could be killed")


def test_two_processes_killed_and_resumed_are_the_same_run_to_the_last_bit(finished_by_two, data, tmp_path):
    settings, out = finished_by_two
    killed_after_step_4(tmp_path, command(data, tmp_path, *settings, processes=2))
    run = train(data, tmp_path, *settings, "--init_from=resume", processes=2)
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path) == losses(out)
    same_weights(tmp_path, out)


@pytest.mark.parametrize("finished", ["trm"], indirect=True)
def test_killed_at_any_moment_again_and_again(finished, data, tmp_path):
    """kill -9, saving after every step: each time there is a whole checkpoint to go on from, and the end is the same."""
    settings, out = finished
    settings = [*settings, "--eval_interval=1"]
    moments, path = random.Random(len(settings)), tmp_path / "ckpt.pt"
    kills = done = 0
    while kills < 5:
        before = path.stat().st_mtime_ns if path.exists() else None
        process = subprocess.Popen(
            command(data, tmp_path, *settings),
            env=ENV,
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns != before):
            time.sleep(0.01)
        time.sleep(
            0.3 * moments.random()
        )  # now it has saved once, and is in a step, in a validation, or saving again
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
        assert checkpoint.load(path)["train"]["iter"] > done
        done = checkpoint.load(path)["train"]["iter"]
        if done == 8:
            break
    assert kills >= 2
    run = train(data, tmp_path, *settings, "--init_from=resume")
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path)[0] == losses(out)[0]
    same_weights(tmp_path, out)
    assert list(tmp_path.glob("*.tmp")) == []


def test_the_same_command_goes_on_and_the_run_is_the_same_to_the_last_bit(finished, data, tmp_path):
    settings, out = finished
    killed_after_step_4(tmp_path, command(data, tmp_path, *settings))
    saved = checkpoint.load(tmp_path / "ckpt.pt")
    saved["train"]["usual"] = {"stdlib": [4, 5.0, 0.5]}  # earlier versions kept the mean loss of each source
    checkpoint.save(saved, tmp_path / "ckpt.pt")
    run = train(data, tmp_path, *settings)
    assert run.returncode == 0, run.stderr
    assert f"going on after step 4 of {tmp_path}/ckpt.pt, with demo:None in {data}/" in run.stdout, run.stdout
    assert losses(tmp_path) == losses(out)
    same_weights(tmp_path, out)


@pytest.mark.parametrize("finished", ["dense"], indirect=True)
def test_sigterm_saves_and_the_rest_is_the_same_run(finished, data, tmp_path):
    settings, out = finished
    process = subprocess.Popen(
        command(data, tmp_path, *settings),
        env=ENV,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "log.jsonl").exists() or len((tmp_path / "log.jsonl").read_text().splitlines()) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stdout = process.communicate()[0]
    assert process.returncode == 0 and "--init_from=resume" in stdout
    stopped = checkpoint.load(tmp_path / "ckpt.pt")["train"]["iter"]
    assert 2 <= stopped < 8
    run = train(data, tmp_path, *settings, "--init_from=resume")
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path)[0] == losses(out)[0]
    assert losses(tmp_path)[1][8] == losses(out)[1][8]
    if "--model=trm" in settings:  # puzzles of both turns wait, two batches of each
        carries = checkpoint.load(tmp_path / "ckpt.pt")["train"]["carries"]
        assert {int(key.split("/")[0]) for key in carries} == {0, 1, 2, 3}


@pytest.mark.parametrize("finished", ["trm"], indirect=True)
def test_resume_on_two_processes_goes_on_with_every_carry(finished, data, tmp_path):
    settings, out = finished
    shutil.copytree(out, tmp_path / "run")
    longer = [s for s in settings if "max_iters" not in s] + ["--max_iters=10", "--init_from=resume"]
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert train(data, tmp_path / "alone", *longer).returncode == 0
    run = train(data, tmp_path / "run", *longer, processes=2)
    assert run.returncode == 0, run.stderr
    for step in (9, 10):
        assert losses(tmp_path / "run")[0][step] == pytest.approx(
            losses(tmp_path / "alone")[0][step], rel=1e-4
        )


def test_a_folder_has_one_run_and_a_second_signal_ends_it_at_once(data, tmp_path):
    out = tmp_path / "out"  # a step of many minutes
    process = subprocess.Popen(
        command(data, out, "--gradient_accumulation_steps=20000"),
        env=ENV,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (out / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    for processes in (1, 2):  # another run in the same folder
        run = train(data, out, "--seed=2", processes=processes)
        assert run.returncode == 1 and f"error: another run is at work in {out}/" in run.stderr, run.stderr
        assert run.stderr.count("another run is at work") == 1 or processes == 2, run.stderr
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 128 + signal.SIGINT


@pytest.mark.parametrize("finished", ["dense"], indirect=True)
def test_max_hours_saves_and_the_rest_is_the_same_run(finished_by_two, data, tmp_path):
    settings, out = finished_by_two
    run = train(data, tmp_path, *settings, "--max_hours=0.00001", processes=2)
    assert run.returncode == 0 and "after step 1" in run.stdout and "--init_from=resume" in run.stdout, (
        run.stdout
    )
    run = train(data, tmp_path, *settings, "--init_from=resume", processes=2)
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path)[0] == losses(out)[0]
    same_weights(tmp_path, out)


def test_processes_that_drift_apart_are_stopped_by_name(data, tmp_path):
    run = train_with_fault(
        "flip", tmp_path, data, tmp_path / "out", "--max_iters=8", "--sync_check_interval=2", processes=2
    )
    assert run.returncode == 1
    # the bit changes after the 3rd step; the comparison after the 4th finds it
    assert "out of sync at step 4: process 1 differs in blocks." in run.stderr, run.stderr


def test_a_gradient_that_is_not_finite_costs_its_step_only(data, tmp_path):
    run = train_with_fault(
        "nan", tmp_path, data, tmp_path / "out", "--max_iters=8", "--ema=0.9", "--optimizer=adamw"
    )
    assert run.returncode == 0, run.stderr
    entries = [json.loads(line) for line in open(tmp_path / "out" / "log.jsonl")]
    assert [e["iter"] for e in entries if "loss" in e and e["loss"] is None] == [3, 6]
    assert "step 3 skipped" in run.stdout and entries[-2]["skipped"] == 2
    saved = checkpoint.load(tmp_path / "out" / "ckpt.pt")
    assert saved["train"]["skipped"] == 2 and saved["train"]["iter"] == 8
    for weights in (saved["weights"], saved["ema"]):
        assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.parametrize("finished", ["dense"], indirect=True)
def test_too_many_of_them_end_the_run_and_not_the_checkpoint(finished, data, tmp_path):
    settings, out = finished
    shutil.copytree(out, tmp_path / "run")
    files = [tmp_path / "run" / name for name in ("ckpt.pt", "ckpt_prev.pt")]
    before = [path.read_bytes() for path in files]

    def ends_as_it_began(run, *parts):
        assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
        for part in (*parts, f"{files[0]} is untouched, of step 8", str(files[1])):
            assert part in run.stderr, run.stderr
        assert [path.read_bytes() for path in files] == before

    longer = [*settings, "--max_iters=30", "--learning_rate=1e30"]
    # steps 10 and 12, which are skipped, would be saved
    run = train(data, tmp_path / "run", *longer, "--eval_interval=2", "--max_skipped=4")
    ends_as_it_began(run, "4 steps in a row", "Lower learning_rate (now 1e+30)")
    assert "changed: learning_rate" in run.stdout and "step 10: validation" not in run.stdout
    run = train(data, tmp_path / "run", *longer, "--eval_interval=1")
    ends_as_it_began(run, "step 9", "not finite")
    briefly = [*settings, "--max_iters=30", "--max_hours=0.00001"]
    run = train_with_fault("never", tmp_path, data, tmp_path / "run", *briefly)
    ends_as_it_began(run, "stopped after 1e-05 hours after step 9", "nothing was saved")


def test_float16_scales_its_loss_and_resumes_to_the_last_bit(data, tmp_path):
    """The T4's way, on the CPU's float16."""
    settings = ["--dtype=float16", "--max_iters=6", "--eval_interval=3", "--mixture={'sudoku4': 1}"]
    run = train(data, tmp_path / "whole", *settings)
    assert run.returncode == 0, run.stderr
    saved = checkpoint.load(tmp_path / "whole" / "ckpt.pt")["train"]
    assert saved["scaler"]["scale"] == 2**16 / 2 ** saved["skipped"] and saved["skipped"] < 6
    assert train(data, tmp_path / "parts", *settings, "--max_hours=0.00001").returncode == 0
    assert train(data, tmp_path / "parts", *settings, "--init_from=resume").returncode == 0
    assert losses(tmp_path / "parts")[0] == losses(tmp_path / "whole")[0]
    same_weights(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("finished", ["dense"], indirect=True)
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(finished, data, tmp_path):
    settings, out = finished
    shutil.copytree(out, tmp_path / "run")
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    limits = [(resource.RLIMIT_FSIZE, 5_000_000)]
    run = train(data, tmp_path / "run", *settings, "--max_iters=12", limits=limits)
    assert "the checkpoint of step 12 could not be saved" in run.stdout and "untouched" in run.stdout, (
        run.stdout
    )
    assert (
        run.returncode == 1
        and "all 12 steps are done, but the last checkpoint could not be saved" in run.stderr
    ), run.stderr
    assert sorted(losses(tmp_path / "run")[0]) == list(range(1, 13))
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    assert list((tmp_path / "run").glob("*.tmp")) == []
    alone = tmp_path / "run" / "ckpt_weights.pt"  # the last steps, as an evaluation needs them
    assert str(alone) in run.stderr and alone.stat().st_size < len(before) / 2
    assert checkpoint.load_model(str(alone))[1]["train"]["iter"] == 12
    still = [*settings, "--max_iters=1", "--learning_rate=0.0"]
    run = train(data, tmp_path / "next", *still, f"--init_from={alone}")
    assert run.returncode == 0 and f"from the weights of {alone}" in run.stdout, run.stderr
    same_weights(tmp_path / "next", tmp_path / "run", "ckpt_weights.pt")


def test_out_of_memory_is_one_line_with_what_takes_less(data, tmp_path):
    settings = ["--max_iters=1", "--mixture={'stdlib': 1}", "--layer_pattern=a", "--n_embd=128"]
    run = train(data, tmp_path, "--batch_size=2048", *settings, limits=[(resource.RLIMIT_AS, 3_000_000_000)])
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    for part in (
        "out of memory on CPU",
        "2048 x 256 tokens",
        "--batch_size",
        "--gradient_accumulation_steps",
        "--recompute=True",
    ):
        assert part in run.stderr, run.stderr
    assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize("finished", ["dense"], indirect=True)
def test_a_later_stage_takes_the_weights(finished, data, tmp_path):
    settings, out = finished
    still = [*settings, "--max_iters=2", "--learning_rate=0.0", f"--init_from={out / 'ckpt.pt'}"]
    for extra, steps in ([], 2), (["--init_optimizer=True"], 10):
        assert train(data, tmp_path, *still, *extra, "--overwrite=True").returncode == 0
        same_weights(tmp_path, out)
        saved = checkpoint.load(tmp_path / "ckpt.pt")["train"]
        assert saved["iter"] == 2 and {int(s["step"]) for s in saved["optimizers"][-1]["state"].values()} == {
            steps
        }
    assert saved["optimizers"][0]["param_groups"][0]["weight_decay"] == 0.1
    everything = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run = train(data, tmp_path, *still, "--seed=2")  # the path that it began with, again: it is done
    assert run.returncode == 0 and "nothing left to do: max_iters=2" in run.stdout, run.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == everything
    (tmp_path / "moved").symlink_to(data)
    longer = [*settings, "--max_iters=3", "--weight_decay=0.0", "--init_from=resume"]
    run = train(tmp_path / "moved", tmp_path, *longer)
    assert f"changed: data demo:None in {tmp_path}/moved/" in run.stdout, run.stdout
    assert f"(were demo:None in {data}/" in run.stdout, run.stdout
    assert (
        "changed: weight_decay=0.0 (was 0.1)" in run.stdout and "changed: max_iters=3 (was 2)" in run.stdout
    )
    assert (
        checkpoint.load(tmp_path / "ckpt.pt")["train"]["optimizers"][0]["param_groups"][0]["weight_decay"]
        == 0
    )  # and it has
    run = train(data, tmp_path / "muon", *still, "--init_optimizer=True", "--optimizer=adamw")
    assert (
        run.returncode == 1
        and "'adamw'" in run.stderr
        and "'muon'" in run.stderr
        and run.stderr.count("\n") == 1
    ), run.stderr


def test_adamw_and_cosine(data, tmp_path):
    settings = [
        "--optimizer=adamw",
        "--schedule=cosine",
        "--max_iters=6",
        "--eval_interval=3",
        "--learning_rate=1e-2",
        "--min_lr=1e-3",
        "--mixture={'sudoku4': 1}",
    ]
    assert train(data, tmp_path / "whole", *settings).returncode == 0
    rates = [json.loads(line)["lr"] for line in open(tmp_path / "whole" / "log.jsonl") if '"lr"' in line]
    assert rates[:3] == pytest.approx([5.5e-3, 1e-2, 1e-2]) and rates == sorted(rates[:2]) + sorted(
        rates[2:], reverse=True
    )
    assert 1e-3 < rates[-1] < 3e-3
    assert train(data, tmp_path / "parts", *settings, "--max_hours=0.00001").returncode == 0
    assert train(data, tmp_path / "parts", *settings, "--init_from=resume").returncode == 0
    same_weights(tmp_path / "parts", tmp_path / "whole")


def test_a_plateau_without_end_is_for_stages_that_are_followed(data, tmp_path):
    assert (
        train(data, tmp_path, "--decay_iters=0", "--max_iters=4", "--mixture={'sudoku4': 1}").returncode == 0
    )
    rates = [json.loads(line)["lr"] for line in open(tmp_path / "log.jsonl") if '"lr"' in line]
    assert rates == pytest.approx([1.5e-3, 3e-3, 3e-3, 3e-3])


def test_a_run_shorter_than_its_decay_says_so(data, tmp_path):
    run = train(
        data, tmp_path, "--max_iters=1", "--warmup_iters=0", "--decay_iters=10", "--mixture={'sudoku4': 1}"
    )
    assert (
        "decay_iters=10 is longer than max_iters=1" in run.stdout and "never gets above 3.0e-04" in run.stdout
    ), run.stdout
    assert '"lr": 0.0003' in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize("finished", ["dense"], indirect=True)
def test_the_log_says_how_it_goes_and_is_drawn(finished):
    _, out = finished
    entries = [json.loads(line) for line in open(out / "log.jsonl")]
    entry = [e for e in entries if "loss" in e][-1]
    assert {
        "iter",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "mfu",
        "memory_gb",
        "data_wait",
        "eta_hours",
        "skipped",
    } <= entry.keys()
    assert entry["eta_hours"] == 0 and 0 <= entry["data_wait"] < 1 and entry["memory_gb"] > 0.1
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_stage_0_ends_with_a_table(data, tmp_path):
    settings = [
        "--sanity=True",
        "--sanity_steps=40",
        "--sanity_tokens=16",
        "--sanity_run_tokens=1e6",
        "--n_embd=64",
        "--n_layer=2",
        "--max_iters=3",
        "--learning_rate=1e-2",
    ]
    run = train(data, tmp_path, *settings)
    table = run.stdout[run.stdout.index("stage 0 of") :]
    for what in (
        "data",
        "tokenizer",
        "text batch by heart",
        "puzzle batch by heart",
        "3 steps",
        "checkpoint",
        "speed",
        "0.001B tokens",
    ):
        assert what in table, (what, table)
    waits = [line for line in table.splitlines() if "waiting for data" in line]
    failed = [
        line
        for line in table.splitlines()
        if line.strip().startswith("FAIL") and "waiting" not in line and "memory" not in line
    ]
    assert len(waits) == 1 and failed == [], (
        table
    )  # how long it waits in three steps is the machine's business
    run = train(data, tmp_path, *settings[:2], "--sanity_steps=1", "--data=stage9")
    assert run.returncode == 1 and "stage9" in run.stderr and "FAIL" in run.stdout


def test_what_is_not_validated_is_told_at_the_start(data, tmp_path):
    scripts.stage_without_validation(data, tmp_path / "data", "stdlib")
    settings = ["--max_iters=2", "--eval_interval=1", "--n_layer=1", "--layer_pattern=a"]
    run = scripts.run("train.py", command(tmp_path / "data", tmp_path / "out", *settings)[2:])
    assert run.returncode == 0, run.stderr
    start, rest = run.stdout.split("step 1: ", 1)
    assert "not validated: stdlib (it has no validation shard)\n" in start and "validation maze" in rest, (
        run.stdout
    )
    run = scripts.run(
        "train.py", command(tmp_path / "data", tmp_path / "none", *settings, "--mixture={'stdlib': 1}")[2:]
    )
    assert run.returncode == 0, run.stderr
    start, _ = run.stdout.split("step 1: ", 1)
    assert "nothing can be validated" in start and ": stdlib (it has no validation shard)\n" in start
    assert "validation \n" not in run.stdout and losses(tmp_path / "none")[1] == {}
    path = tmp_path / "none" / "ckpt.pt"
    assert checkpoint.load(path)["train"]["val_loss"] is None
    entries = [json.loads(line) for line in (tmp_path / "none" / "log.jsonl").read_text().splitlines()]
    for val_losses in ({}, {"stdlib": 2.0}, {"stdlib": float("nan")}):  # stage 0 does not pass it
        checks = sanity.afterwards(
            entries,
            val_losses,
            path,
            checkpoint.load_model(path, "cpu")[0],
            scaled=False,
            world_size=1,
            card="CPU",
            run_tokens=0,
        )
        passed = {what: well for what, well, _ in checks}
        assert passed["validation"] == (val_losses == {"stdlib": 2.0}) and passed["checkpoint"]


def test_a_pinned_snapshot_is_verified(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    stage = copy / "stages" / "demo"
    frozen = stage / "v0.1"
    frozen.mkdir()
    wanted = {"stage": "demo", "tag": "v0.1", "tokenizer": checkpoint.tok.fingerprint()}
    for name in ("manifest.jsonl", "mixture.json"):
        shutil.copy(stage / name, frozen / name)
        wanted[name.split(".")[0] + "_sha256"] = hashlib.sha256((stage / name).read_bytes()).hexdigest()
    (frozen / "snapshot.json").write_text(json.dumps(wanted))
    settings = ["--data_tag=v0.1", "--max_iters=2", "--eval_interval=2"]
    run = train(copy, tmp_path / "out", *settings)
    assert run.returncode == 0, run.stderr
    pinned = checkpoint.load(tmp_path / "out" / "ckpt.pt")["train"]["data"]
    assert pinned["stage"] == "demo" and pinned["tag"] == "v0.1"
    assert pinned["snapshot"] == hashlib.sha256((frozen / "snapshot.json").read_bytes()).hexdigest()

    def refused(*parts, settings=settings, out="new"):
        run = train(copy, tmp_path / out, *settings)
        assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
        for part in parts:
            assert part in run.stderr, run.stderr

    refused("demo:None", "demo:v0.1", settings=["--init_from=resume", "--max_iters=4"], out="out")
    mixture = (frozen / "mixture.json").read_text()
    (frozen / "mixture.json").write_text(mixture.replace("0.1", "0.2", 1))
    refused("demo:v0.1", "mixture.json was changed")


@pytest.mark.parametrize("finished", ["dense"], indirect=True)
def test_an_evaluation_runs_beside_and_is_kept(finished, data, tmp_path):
    settings, out = finished
    run = train(data, tmp_path, *settings, "--eval_suites=sudoku4", "--eval_limit=2")
    assert run.returncode == 0, run.stderr
    entries = [json.loads(line) for line in open(tmp_path / "evals.jsonl")]
    assert entries[0]["iter"] == 4 and all(e["suites"]["sudoku4"]["total"] == 2 for e in entries)
    assert losses(tmp_path) == losses(out)
    assert not (tmp_path / "ckpt_eval.pt").exists()
    said = []
    evaluation = loop.Evaluation(str(tmp_path), "chess", 2, "cpu", said.append)
    evaluation.start(4)
    evaluation.process.wait()
    evaluation.collect()
    assert len(said) == 1 and said[0].startswith(
        "the evaluation of step 4 failed: error: unknown suite 'chess'"
    ), said
    run = train(data, tmp_path, *settings, "--overwrite=True", "--max_iters=4")
    assert run.returncode == 0, run.stderr
    assert len(losses(tmp_path)[0]) == 4
    assert len((tmp_path / "log.cut.jsonl").read_text().splitlines()) == 10  # of the longer run


KILLED = """
import os, signal, sys, time
from smol import loop
evaluation = loop.Evaluation(sys.argv[1], "arc1", 400, "cpu", print)
evaluation.start(1)
print(evaluation.process.pid, flush=True)
if sys.argv[2] == "killed":
    while not os.path.getsize(os.path.join(sys.argv[1], "eval_step.log")):  # at work: it shows how far it is
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
evaluation.end(float(sys.argv[2]))
"""


def test_an_evaluation_ends_with_its_training_however_that_ends(tmp_path):
    """It would take many minutes: 400 tasks."""
    tiny.save(tmp_path / "ckpt.pt", "trm", {"iter": 1}, block_size=4096)
    for how, code in (("killed", -signal.SIGKILL), ("0.001", 0)):
        run = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), how],
            env=ENV,
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=100,
        )
        assert run.returncode == code, run.stderr
        until = time.monotonic() + 20
        while time.monotonic() < until and Path(f"/proc/{run.stdout.split()[0]}/cmdline").exists():
            time.sleep(0.1)
        with pytest.raises(ProcessLookupError):
            os.kill(int(run.stdout.split()[0]), 0)
    assert "the evaluation of step 1 was ended after 0.001 minutes" in run.stdout
    assert not (tmp_path / "ckpt_eval.pt").exists()


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("min_lr", 1.0, "min_lr=1.0 must be at most learning_rate=0.0006"),
        ("mixture", {"maze": 0}, "mixture must give a share above 0"),
        ("gradient_accumulation_steps", 3, "cannot be shared evenly by 2"),
        ("push_to", "nobody", "--push_to=nobody: .*USER/NAME"),
        ("eval_suites", "sudoku4,chess", "--eval_suites=sudoku4,chess: unknown suite 'chess'"),
        ("eval_suites", ",", "--eval_suites=,: "),
        ("eval_suites", "arc1,lm_eval:", "lm_eval: needs the names"),
        ("eval_suites", "lm_eval:sciq", "pip install lm-eval"),
        ("eval_device", "tpu", "--eval_device=tpu: "),
        ("eval_device", "", "--eval_device=: "),
        ("beta2", 1.0, r"beta2 must be in \[0, 1\)"),
    ],
)
@pytest.mark.parametrize("script", ["train.py", "distill.py"])
def test_settings_are_checked_against_each_other(script, setting, value, message, monkeypatch):
    monkeypatch.setattr(loop, "world_size", 2)
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: None)
    own = configurator.defaults_of(ROOT / script)
    config = {**configurator.settings(own), "learning_rate": 6e-4}
    loop.check_settings(config, own["RANGES"])
    loop.check_settings(
        {**config, "eval_suites": "arc1,language", "push_to": "me/it", "eval_device": "cpu"}, own["RANGES"]
    )
    with pytest.raises(ValueError, match=message):
        loop.check_settings({**config, setting: value}, own["RANGES"])


def test_under_torchrun_the_line_comes_once_and_again_at_the_end(data, tmp_path):
    run = train(data, tmp_path, "--data=stage9", processes=2)
    assert run.returncode == 1
    before, after = run.stderr.split("Traceback", 1)  # torchrun's own
    assert before.count("error: there is no stage 'stage9'") == 1
    assert "error: there is no stage 'stage9'" in after.split("Root Cause")[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
def test_compiled_blocks_give_the_same_losses(data, tmp_path):
    # Widths as wide as a register of AVX-512: for narrower ones (16, two heads, n_ff=24) the C++ that PyTorch 2.13 makes
    # there writes past its memory, and the process is aborted
    settings = [
        "--layer_pattern=a",
        "--n_layer=1",
        "--n_embd=64",
        "--n_ff=64",
        "--max_iters=2",
        "--mixture={'stdlib': 1}",
    ]
    for compiled in (False, True):
        run = train(data, tmp_path / str(compiled), *settings, f"--compile={compiled}")
        assert run.returncode == 0 and (", compiled," in run.stdout) == compiled, run.stdout
    same_losses(tmp_path / "False", tmp_path / "True", rel=1e-3)


class OneBatch:
    def val_batches(self, mode, n):
        idx = torch.arange(16)[None]
        return iter([("text", 0, idx, idx.roll(-1, 1))] * (mode == "text"))


@pytest.mark.parametrize("works", (True, False))
def test_a_copy_of_a_compiled_model_runs_its_own_weights(works, monkeypatch):
    compile = torch.compile  # which calls no compiler here, or falls over its first batch

    def fail(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile(f, backend="eager") if works else fail)
    torch.manual_seed(0)
    net, said = Model(Config(n_layer=1, n_head=1, n_embd=16, n_ff=16, layer_pattern="a", block_size=16)), []
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    idx = torch.arange(16)[None] + 7
    want = net(idx)[0].detach()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert loop.compile_blocks(net, OneBatch(), contextlib.nullcontext(), scaler, "cpu", said.append) == works
    assert bool(said) != works
    assert all((block._compiled_call_impl is not None) == works for block in net.blocks)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(copied(idx)[0], want)
        with torch.no_grad():
            for p in copied.blocks.parameters():
                p.mul_(3)
        assert (copied(idx)[0] - want).abs().max() > 0.1
        torch.testing.assert_close(net(idx)[0], want)


def test_without_a_compiler_it_goes_on_without(data, tmp_path):
    env = {**ENV, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = command(
        data,
        tmp_path,
        "--layer_pattern=a",
        "--n_layer=2",
        "--max_iters=2",
        "--compile=True",
        "--mixture={'stdlib': 1}",
    )
    run = subprocess.run(words, env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "torch.compile does not work here, going on without it" in run.stdout
    assert checkpoint.load(tmp_path / "ckpt.pt")["train"]["iter"] == 2


FORKED = """
import json, os, runpy, sys
import torch
for n, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{sys.argv[2]}/{n}.err", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = arguments
        sys.path[0] = os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def forked(commands, folder):
    """
    Commands [script, argument, ...] one after the other, each a process forked from one that has PyTorch: importing it is nearly all that a
    run takes that ends at a mistake. -> for each its exit code and what it wrote to stderr.
    """
    run = subprocess.run(
        [sys.executable, "-u", "-c", FORKED, json.dumps(commands), str(folder)],
        env=ENV,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    codes = [int(line) for line in run.stdout.splitlines() if re.fullmatch(r"-?\d+", line)]
    assert len(codes) == len(commands), run.stderr
    return [(code, (folder / f"{n}.err").read_text()) for n, code in enumerate(codes)]


def test_mistakes_are_one_line_and_cost_nothing(data, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "ckpt.pt").write_text("precious")
    text = tmp_path / "notes.txt"
    text.write_text("not a checkpoint")
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    shard = next((broken / "processed" / "stdlib").glob("train*.bin"))
    with open(shard, "r+b") as f:
        f.truncate(shard.stat().st_size - 2)
    out = tmp_path / "out"
    mistakes = [
        (["--init_from=scratch", f"--out_dir={kept}"], ["ckpt.pt exists", "--init_from=resume"]),
        ([f"--out_dir={kept}"], ["ckpt.pt is not a checkpoint"]),
        (["--eval_minutes=-1"], ["eval_minutes"]),
        ([f"--init_from={text}"], ["notes.txt", "not a checkpoint"]),
        (["--init_from=resume"], ["ckpt.pt does not exist"]),
        ([f"--data_dir={broken}"], [shard.name]),
        (["--mixture={'wikipedia': 1}"], ["wikipedia", "stdlib"]),
        (["--max_itres=3"], ["max_itres", "max_iters"]),
        (["--model=transformer"], ["transformer", "dense", "trm"]),
        (["--n_head=3"], ["n_embd=16", "n_head=3"]),
        (["--dtype=int8"], ["int8", "bfloat16"]),
        (["--max_iters=0"], ["max_iters must be in [1, inf), got 0"]),
        # before the checkpoint and the data are looked for
        (
            ["--grad_clip=-1", "--init_from=gone.pt", "--data=gone"],
            ["grad_clip must be in [0, inf], got -1.0"],
        ),
        (["--seed=99999999999999999999", "--init_from=gone.pt", "--data=gone"], ["seed", "[0, 1e18)"]),
        (["--mixture={'maze': 'most'}", "--init_from=gone.pt", "--data=gone"], ["mixture", "'maze': 'most'"]),
        (["--eval_suites=sudoku4,nosuch", "--init_from=gone.pt"], ["eval_suites", "unknown suite 'nosuch'"]),
        (["--sanity=True", "--init_from=resume"], ["stage 0 is not resumed"]),
        (["--optimizer=sgd"], ["'sgd'", "'muon', 'adamw'"]),
        (["--device=cuda"] if not torch.cuda.is_available() else ["--device=tpu"], ["device"]),
    ]
    said = forked([command(data, out, *settings)[1:] for settings, _ in mistakes], tmp_path)
    for (settings, names), (code, stderr) in zip(mistakes, said):
        assert code == 1, settings
        assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
        for name in names:
            assert name in stderr, (settings, stderr)
    assert not out.exists()
    assert (kept / "ckpt.pt").read_text() == "precious"


def test_another_models_checkpoint_is_refused_by_name(finished, data, tmp_path):
    settings, out = finished
    other = ROUTES["trm"] if "--model=trm" not in settings else []
    for change, difference in (
        (other, "missing"),
        ([*settings, "--n_ff=40"], "up_proj.weight is (48, 16) there and (80, 16)"),
    ):
        run = train(data, tmp_path / "new", *change, f"--init_from={out / 'ckpt.pt'}")
        assert run.returncode == 1 and "does not fit" in run.stderr and run.stderr.count("\n") == 1, (
            run.stderr
        )
        assert difference in run.stderr, run.stderr


TRACKER = """
import json, os
def note(**what):
    with open(os.path.join(os.path.dirname(__file__), "noted"), "a") as f:
        f.write(json.dumps(what) + "\\n")
def init(project, name, config, resume):
    note(init=name, learning_rate=config["learning_rate"])
def log(figures, step):
    note(step=step, **figures)
def finish():
    note(finish=True)
"""


def test_a_tracker_gets_what_the_log_gets(data, tmp_path):
    """A stand-in with the three functions that trackio and wandb have in common; without either, a line says what to install."""
    (tmp_path / "trackio.py").write_text(TRACKER)
    words = command(data, tmp_path / "run7", "--tracker=trackio", "--max_iters=2", "--eval_interval=2")
    run = subprocess.run(
        words, env={**ENV, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert run.returncode == 0, run.stderr
    noted = [json.loads(line) for line in (tmp_path / "noted").read_text().splitlines()]
    assert noted[0] == {"init": "run7", "learning_rate": 3e-3} and noted[-1] == {"finish": True}
    logged = [json.loads(line) for line in (tmp_path / "run7" / "log.jsonl").read_text().splitlines()]
    assert [n["step"] for n in noted[1:-1]] == [1, 2, 2] == [e["iter"] for e in logged]
    assert (
        noted[1]["loss"] == logged[0]["loss"] and noted[3]["val_loss/maze"] == logged[2]["val_losses"]["maze"]
    )
    if importlib.util.find_spec("wandb") is None:
        run = train(data, tmp_path / "none", "--tracker=wandb")
        assert run.returncode == 1 and run.stderr.count("\n") == 1 and "pip install wandb" in run.stderr, (
            run.stderr
        )


def test_help_lists_every_setting_with_its_comment():
    run = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0
    assert "--learning_rate=0.0006" in run.stdout and "rows of text per batch" in run.stdout


def test_every_config_file_is_understood():
    script = configurator.defaults_of(ROOT / "train.py")
    for path in sorted((ROOT / "config").glob("route_*.py")):
        config = configurator.resolve(script, [str(path)])
        loop.check_settings(config, script["RANGES"])
        assert config["out_dir"] != script["out_dir"], path
        assert not config["overwrite"], f"{path}: the same command after a reboot would begin anew"
