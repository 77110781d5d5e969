"""publish.py, and train.py --push_to: the real huggingface_hub client against a small hub on this machine (local_hub.py)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from local_hub import TOKEN, Fault, LocalHub
from test_train import SHAPE, STAGE

import prepare
from smol import checkpoint

ROOT = Path(__file__).parent.parent
STEPS = [*SHAPE, "--max_iters=6", "--eval_interval=3", "--decay_iters=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.main(["demo", f"--data_dir={folder}", *STAGE])
    return folder


@pytest.fixture
def hub(tmp_path):
    server = LocalHub()
    server.home = tmp_path / "home"
    yield server
    server.close()


def run(hub, *words, token=TOKEN):
    """-> (exit code, what it printed, what it complained about)"""
    env = {**hub.env(hub.home, token), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr.strip()


def train(hub, data, out, *settings, **more):
    return run(hub, "train.py", f"--data_dir={data}", f"--out_dir={out}", *STEPS, *settings, **more)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The out_dir of a run of six steps that was never near a hub."""
    out = tmp_path_factory.mktemp("run") / "out"
    subprocess.run(
        [sys.executable, "train.py", f"--data_dir={data}", f"--out_dir={out}", *STEPS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return out


def test_a_published_run_goes_on_elsewhere_as_if_it_had_never_stopped(hub, data, trained, tmp_path):
    here, far = tmp_path / "here", tmp_path / "far"
    code, out, err = train(
        hub,
        data,
        here,
        "--max_iters=3",
        "--push_to=ada/run",
        "--push_full=True",
        "--eval_suites=arc1",
        "--eval_limit=400",
        "--eval_minutes=0.01",
    )
    assert code == 0 and "step 3 is at ada/run, all of it" in out + err, (out, err)
    # published first, however long an evaluation takes
    assert out.index("step 3 is at ada/run") < out.index("the evaluation of step 3 was ended")
    assert hub.repos["ada/run"].private and not [f for f in os.listdir(here) if "push" in f]
    card = hub.files("ada/run")["README.md"].decode()
    assert card.startswith("---\nlicense:") and "after step\n3 of 3" in card and "| stdlib |" in card

    code, out, err = run(hub, "-m", "smol.publish", "pull", "ada/run", f"--out_dir={far}")
    assert code == 0 and "step 3 of ada/run" in out, err
    assert (far / "ckpt.pt").read_bytes() == (here / "ckpt.pt").read_bytes() and not (far / ".pull").exists()
    code, out, err = train(hub, data, far, "--init_from=resume")
    assert code == 0, err
    ours, never_stopped = (checkpoint.load(d / "ckpt.pt")["weights"] for d in (far, trained))
    assert all(torch.equal(ours[k], never_stopped[k]) for k in never_stopped)


def test_weights_alone_serve_for_everything_but_resuming(hub, data, trained, tmp_path):
    code, out, err = run(hub, "-m", "smol.publish", "push", trained, "--repo=ada/light")
    assert code == 0 and "step 6 is at ada/light, weights alone" in out, err
    assert len(hub.files("ada/light")["ckpt.pt"]) < 0.6 * (trained / "ckpt.pt").stat().st_size
    before = len(hub.log)
    code, out, err = run(hub, "-m", "smol.publish", "push", trained, "--repo=ada/light")
    assert code == 0 and "already" in out and not [x for x in hub.log[before:] if x[0] == "PUT"], (
        "something was sent again"
    )

    far = tmp_path / "far"
    assert run(hub, "-m", "smol.publish", "pull", "ada/light", f"--out_dir={far}")[0] == 0
    whole, light = checkpoint.load(trained / "ckpt.pt"), checkpoint.load(far / "ckpt.pt")
    assert (
        all(torch.equal(whole["weights"][k], light["weights"][k]) for k in whole["weights"])
        and "optimizers" not in light["train"]
    )
    model, _ = checkpoint.load_model(far / "ckpt.pt")
    assert model.num_params() == sum(w.numel() for w in whole["weights"].values())
    code, out, err = train(hub, data, far, "--init_from=resume")
    assert code == 1 and "weights alone" in err.splitlines()[-1]


def test_a_hub_that_fails_costs_one_line_and_no_step(hub, data, tmp_path):
    code, out, err = train(hub, data, tmp_path / "out", "--push_to=ada/run", token=None)
    assert (
        code == 0
        and "hf auth login" in out + err
        and checkpoint.load(tmp_path / "out/ckpt.pt")["train"]["iter"] == 6
    )
    assert "ada/run" not in hub.repos


def test_training_does_not_wait_for_a_slow_hub(hub, data, tmp_path):
    hub.lock.acquire()  # it accepts connections and says nothing
    try:
        env = {**hub.env(hub.home), "OMP_NUM_THREADS": "1"}
        words = ["train.py", f"--data_dir={data}", f"--out_dir={tmp_path}", *STEPS, "--push_to=ada/run"]
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        until = time.monotonic() + 120
        while time.monotonic() < until:
            log = tmp_path / "log.jsonl"
            if log.exists() and any(
                json.loads(line).get("iter") == 6 and "val_loss" in line
                for line in log.read_text().splitlines()
            ):
                break
            time.sleep(0.2)
        else:
            pytest.fail("the run did not get through its steps")
    finally:
        hub.lock.release()
    out = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and "step 6 is at ada/run" in out, out


def test_what_breaks_off_or_lies_is_not_taken(hub, trained, tmp_path):
    hub.faults.append(Fault("POST", "/commit/", 500, times=20))
    code, _, err = run(hub, "-m", "smol.publish", "push", trained, "--repo=ada/run")
    assert code == 1 and "run it again" in err.splitlines()[-1] and "ckpt.pt" not in hub.files("ada/run")
    hub.faults.clear()
    assert run(hub, "-m", "smol.publish", "push", trained, "--repo=ada/run")[0] == 0

    digest = hub.repos["ada/run"].commits[hub.repos["ada/run"].branches["main"]]["ckpt.pt"]
    content = hub.blobs[digest]
    hub.blobs[digest] = content[:-1] + b"x"
    code, _, err = run(hub, "-m", "smol.publish", "pull", "ada/run", f"--out_dir={tmp_path / 'far'}")
    assert code == 1 and "hash" in err.splitlines()[-1] and not (tmp_path / "far/ckpt.pt").exists()
    hub.blobs[digest] = content

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "ckpt.pt").write_bytes(b"hours of work")
    code, _, err = run(hub, "-m", "smol.publish", "pull", "ada/run", f"--out_dir={mine}")
    assert code == 1 and "--overwrite=True" in err and (mine / "ckpt.pt").read_bytes() == b"hours of work"
