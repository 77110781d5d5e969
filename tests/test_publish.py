"""Runs on the hub (checkpoint.py, --push_to): the real huggingface_hub client against local_hub.py."""

import os

import pytest
import scripts
import torch
from local_hub import TOKEN, Fault, LocalHub
from test_train import losses, words

from smol import checkpoint

STEPS = ["--max_iters=6", "--eval_interval=3", "--decay_iters=0"]
PULL = "from smol import checkpoint; checkpoint.pull({!r}, {!r})"
PUSH = "from smol import checkpoint; print(checkpoint.push({!r}, {!r}, {}))"


@pytest.fixture
def hub(tmp_path):
    server = LocalHub()
    server.home = tmp_path / "home"
    yield server
    server.close()


def run(hub, script, *arguments, code="", token=TOKEN):
    """-> (exit code, what it printed, what it complained about)"""
    env = {k: v for k, v in hub.env(hub.home, token).items() if k not in os.environ or k.startswith("HF")}
    env.setdefault("HF_TOKEN", "")
    done = scripts.run(script, arguments, before=code, env=env)
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr.strip()


def train(hub, data, out, *settings, **more):
    return run(hub, "train.py", *words(data, out, *STEPS, *settings), **more)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The out_dir of a run of six steps that was never near a hub."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert scripts.run("train.py", words(data, out, *STEPS)).returncode == 0
    return out


def test_a_published_run_goes_on_elsewhere_as_if_it_had_never_stopped(hub, data, trained, tmp_path):
    here, far, push = tmp_path / "here", tmp_path / "far", ["--push_to=ada/run", "--push_full=True"]
    code, out, err = train(hub, data, here, "--max_iters=3", *push)
    assert code == 0 and "step 3 is at ada/run, all of it" in out, (out, err)
    assert hub.repos["ada/run"].private and not [f for f in os.listdir(here) if "push" in f]
    card = hub.files("ada/run")["README.md"].decode()
    assert card.startswith("---\nlicense:") and "after step 3 of 3" in card and "| stdlib |" in card

    code, out, err = train(hub, data, far, *push, "--init_from=resume")
    assert code == 0 and "going on after step 3" in out and "step 6 is at ada/run, all of it" in out, err
    assert not (far / ".pull").exists()
    ours, never_stopped = (checkpoint.load(d / "ckpt.pt")["weights"] for d in (far, trained))
    assert all(torch.equal(ours[k], never_stopped[k]) for k in never_stopped)
    assert losses(far) == losses(trained)  # its log was there as well
    before = len(hub.log)
    code, out, err = train(hub, data, far, *push)  # the same command again sends nothing
    assert code == 0 and "nothing left to do" in out and "step 6 is at ada/run" in out, err
    assert not [x for x in hub.log[before:] if x[0] == "PUT"]


def test_weights_alone_serve_for_everything_but_resuming(hub, data, trained, tmp_path):
    code, out, err = run(hub, "", code=PUSH.format(str(trained), "ada/light", False))
    assert code == 0 and "step 6 is at ada/light, weights alone" in out, err
    assert len(hub.files("ada/light")["ckpt.pt"]) < 0.6 * (trained / "ckpt.pt").stat().st_size
    far = tmp_path / "far"
    assert run(hub, "", code=PULL.format("ada/light", str(far)))[0] == 0
    whole, (net, light) = checkpoint.load(trained / "ckpt.pt"), checkpoint.load_model(far / "ckpt.pt")
    assert all(torch.equal(w, net.state_dict()[k]) for k, w in whole["weights"].items())
    assert "optimizers" not in light["train"] and light["train"]["data"] == whole["train"]["data"]
    code, out, err = train(hub, data, far, "--init_from=resume")
    assert code == 1 and "weights alone" in err.splitlines()[-1]


def test_published_weights_are_what_a_run_begins_with(hub, data, trained, tmp_path):
    run(hub, "", code=PUSH.format(str(trained), "ada/light", False))
    code = f"import os; os.chdir({str(tmp_path)!r})"  # where out/hub/ is made
    still = ["--learning_rate=0.0", "--init_from=hub:ada/light"]
    code, out, err = train(hub, data, tmp_path / "next", *still, code=code)
    assert code == 0 and "from the weights of out/hub/ada/light/ckpt.pt" in out, err
    ours, theirs = (checkpoint.load(d / "ckpt.pt")["weights"] for d in (tmp_path / "next", trained))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_hub_that_fails_costs_one_line_and_no_step(hub, data, tmp_path):
    code, out, err = train(hub, data, tmp_path / "out", "--push_to=ada/run", "--max_iters=1", token="")
    assert code == 0 and "not published: cannot push to ada/run" in out and "hf auth login" in out, (out, err)
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["train"]["iter"] == 1 and "ada/run" not in hub.repos


def test_training_does_not_wait_for_a_slow_hub(hub, data, tmp_path):
    env = {k: v for k, v in hub.env(hub.home).items() if k.startswith("HF")}
    with hub.lock:  # it accepts connections and says nothing
        at_work = scripts.Run("train.py", words(data, tmp_path, *STEPS, "--push_to=ada/run"), env=env)
        log = tmp_path / "log.jsonl"
        at_work.wait_until(lambda: log.exists() and '{"iter": 6, "val_loss"' in log.read_text())
    done = at_work.wait(100)
    assert done.returncode == 0 and "step 6 is at ada/run" in done.stdout, done.stdout


def test_what_breaks_off_or_lies_is_not_taken(hub, trained, tmp_path):
    hub.faults.append(Fault("POST", "/commit/", 500, times=20))
    code, _, err = run(hub, "", code=PUSH.format(str(trained), "ada/run", True))
    assert code == 1 and "run it again" in err.splitlines()[-1] and "ckpt.pt" not in hub.files("ada/run")
    hub.faults.clear()
    assert run(hub, "", code=PUSH.format(str(trained), "ada/run", True))[0] == 0

    digest = hub.repos["ada/run"].commits[hub.repos["ada/run"].branches["main"]]["ckpt.pt"]
    content = hub.blobs[digest]
    middle = len(content) // 2  # one byte in the middle of a tensor
    hub.blobs[digest] = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    far = tmp_path / "far"
    code, _, err = run(hub, "", code=PULL.format("ada/run", str(far)))
    assert code == 1 and "no whole checkpoint" in err.splitlines()[-1] and not (far / "ckpt.pt").exists()
    hub.blobs[digest] = content
    assert run(hub, "", code=PULL.format("ada/run", str(far)))[0] == 0 and (far / "ckpt.pt").exists()
