"""Runs on the hub (checkpoint.py, --push_to): the real huggingface_hub client against local_hub.py."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import safetensors.torch
import scripts
import tiny
import torch
from local_hub import TOKEN, Fault, LocalHub
from test_train import losses, words

from smol import checkpoint, teachers

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
    assert card.startswith("---\nlicense:") and "after step 3 of 3" in card
    assert "| stdlib | validation loss |" in card

    code, out, err = train(hub, data, far, *push, "--init_from=resume")
    assert code == 0 and "going on after step 3" in out and "step 6 is at ada/run, all of it" in out, err
    ours, never_stopped = (checkpoint.load(d / "ckpt.pt")["weights"] for d in (far, trained))
    assert all(torch.equal(ours[k], never_stopped[k]) for k in never_stopped)
    assert losses(far) == losses(trained)  # its log was there as well
    before = len(hub.log)
    code, out, err = train(hub, data, far, *push)  # the same command again sends nothing
    for part in ("going on after step 6", "its last: raise max_iters", "step 6 is at ada/run"):
        assert code == 0 and part in out, (out, err)
    assert not [x for x in hub.log[before:] if x[0] == "PUT"]

    code, out, err = train(hub, data, tmp_path / "empty", *push)  # it would take the place of the other
    assert code == 1 and "ada/run holds a run" in err and "--init_from=resume" in err, err
    assert not (tmp_path / "empty").exists()

    whole = hub.repos["ada/run"].branches["main"]  # later weights never stand beside an earlier ckpt.pt
    code, out, err = train(hub, data, far, push[0], "--max_iters=7")
    assert code == 0 and "step 7 is at ada/run, weights alone" in out, err
    assert "ckpt.pt" not in hub.files("ada/run") and "ckpt.pt" in hub.files("ada/run", whole)
    told = json.loads(hub.files("ada/run")["config.json"])
    assert told["train"]["iter"] == 7 and "batch_tokens" in told["settings"]


def test_published_weights_are_loaded_evaluated_and_trained_on_by_name(hub, data, trained, tmp_path):
    whole = checkpoint.load(trained / "ckpt.pt")
    theirs = whole["ema"] = {k: w + 0.01 for k, w in whole["weights"].items()}  # what evaluation uses
    student, teacher = tmp_path / "before.pt", os.path.relpath(trained / "ckpt.pt", scripts.ROOT)
    whole["config"] |= {"init_from": str(student), "teacher": teacher}  # as if distill.py had made it
    whole["train"]["data"]["teacher"] = teachers.load(str(trained / "ckpt.pt"), "cpu").about
    shutil.copytree(trained, tmp_path / "run")
    checkpoint.save(whole, tmp_path / "run" / "ckpt.pt")
    suites = {"sudoku4": {"solved": 2, "total": 5, "interval": [0.1, 0.8]}, "language": {"seconds": 1.0}}
    solved = {"iter": 3, "suites": suites}
    (tmp_path / "run" / "evals.jsonl").write_text(json.dumps(solved) + "\n")
    code, out, err = run(hub, "", code=PUSH.format(str(tmp_path / "run"), "ada/light", False))
    assert code == 0 and "step 6 is at ada/light, weights alone" in out, err
    files = hub.files("ada/light")
    ours = {"model.safetensors", "config.json", "README.md", "log.jsonl", "evals.jsonl", "loss.png"}
    assert set(files) == ours | {".gitattributes"}
    assert b"| sudoku4 | solved after step 3 | 2 of 5 |" in files["README.md"]
    for here in (bytes(tmp_path), bytes(trained)):
        assert not [name for name, content in files.items() if here in content]
    told = json.loads(files["config.json"], parse_constant=pytest.fail)
    assert told.items() >= whole["model_config"].items() and told["train"]["data"] == whole["train"]["data"]
    hub.repos["ada/light"].tags["v0.1"] = hub.repos["ada/light"].branches["main"]
    hub.put("ada/light", {"model.safetensors": b"of another day" * 100})

    code, out, err = run(hub, "", code=PULL.format("ada/light", str(tmp_path / "far")))
    assert code == 1 and "ada/light has no ckpt.pt on the hub: it was pushed without push_full" in err
    code, out, err = run(hub, "eval_arc.py", "ada/light", f"--out_dir={tmp_path}", "--suites=sudoku4")
    assert code == 1 and "not a checkpoint, or it is damaged" in err.splitlines()[-1]
    asked = ["--suites=sudoku4", "--limit=1", f"--out_dir={tmp_path}", "--device=cpu"]
    code, out, err = run(hub, "eval_arc.py", "ada/light@v0.1", *asked)
    assert code == 0, err
    (name, about), *_ = json.loads((tmp_path / "eval.json").read_text()).items()
    assert (name, about["iter"], about["data"]["stage"]) == ("ada/light@v0.1", 6, "demo")
    assert about["sha256"] == hashlib.sha256(files["model.safetensors"]).hexdigest()
    page = (tmp_path / "report.html").read_text()  # with the run's curves, and nothing of this machine
    assert '"losses":{"' in page and '"points":[{"iter":3,"suites":{"sudoku4"' in page
    assert str(hub.home) not in page
    code, out, err = run(hub, "sample.py", "ada/light@v0.1", "--max_new_tokens=1", "--device=cpu")
    assert code == 0, err

    still = ["--learning_rate=0.0", "--init_from=ada/light@v0.1"]
    code, out, err = train(hub, data, tmp_path / "next", *still)
    assert code == 0 and "from the weights of ada/light@v0.1" in out, err
    ours = checkpoint.load(tmp_path / "next/ckpt.pt")["weights"]
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)

    (tmp_path / "empty").mkdir()  # as a stranger does, who has a checkout and nothing else
    program = f"""
import os, sys
os.chdir({str(tmp_path / "empty")!r})
sys.path.insert(0, {str(scripts.ROOT)!r})
import torch
from {checkpoint.MODEL_FILES[told["model"]]} import Model
model = Model.from_pretrained("ada/light", revision="v0.1")
torch.save(model.state_dict(), "weights.pt")
model.push_to_hub("ada/again")
"""
    code, out, err = run(hub, "", code=program)
    assert code == 0, err
    loaded = torch.load(tmp_path / "empty/weights.pt")
    assert loaded.keys() == theirs.keys() and all(torch.equal(loaded[k], theirs[k]) for k in theirs)
    again = safetensors.torch.load(hub.files("ada/again")["model.safetensors"])
    assert again.keys() == theirs.keys() and all(torch.equal(again[k], theirs[k]) for k in theirs)


def test_a_file_without_some_of_the_weights_is_refused_in_one_line(tmp_path):
    model = tiny.dense()
    model.save_pretrained(tmp_path)
    weights = {k: v for k, v in model.state_dict().items() if k != "norm_f.weight"}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    for load in (type(model).from_pretrained, checkpoint.load_model):
        with pytest.raises(ValueError, match=r"does not fit this model: Missing .*norm_f.weight") as e:
            load(tmp_path)
        assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    (tmp_path / "config.json").unlink()  # as where the hub has no such repository
    with pytest.raises(ValueError, match="no config.json, or there is no such repository or revision"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", tiny.BUILD)
def test_a_model_goes_into_a_folder_and_comes_back(name, tmp_path):
    """Every weight once, the tied head too; with no more than the model's own Config beside it."""
    model = tiny.BUILD[name](n_ff=40)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == vars(model.config)
    size = (tmp_path / "model.safetensors").stat().st_size
    held = sum(w.numel() for w in model.state_dict().values())
    assert 4 * held < size < 4 * held + 20_000 and model.wte.weight.numel() * 4 > 20_000
    ours, at = checkpoint.load_model(tmp_path)
    assert at["model"] == name
    for loaded in (type(model).from_pretrained(tmp_path), ours):
        assert loaded.config == model.config and not loaded.training
        for mode in ("text", "puzzle"):
            idx = tiny.text(2, 30) if mode == "text" else tiny.puzzle_batch(model.puzzle_format, [1, 2])[0]
            assert torch.equal(model(idx, mode=mode)[0], loaded(idx, mode=mode)[0])


def test_a_hub_that_fails_costs_one_line_and_no_step(hub, data, tmp_path):
    code, out, err = train(hub, data, tmp_path / "out", "--push_to=ada/run", "--max_iters=1", token="")
    assert code == 0 and "not published: cannot push to ada/run" in out and "hf auth login" in out, (out, err)
    assert checkpoint.load(tmp_path / "out/ckpt.pt")["train"]["iter"] == 1 and "ada/run" not in hub.repos


def test_the_last_push_is_tried_once_more(monkeypatch, capsys):
    answers = [ValueError("no network"), "step 9 is there"]
    monkeypatch.setattr(checkpoint, "create", lambda repo: None)
    monkeypatch.setattr(checkpoint, "push", Mock(side_effect=answers))
    publication = checkpoint.Publication({"push_to": "ada/run", "out_dir": "out", "push_full": False})
    publication.collect(60)
    publication.start(9)
    publication.end(9)
    assert capsys.readouterr().out == "not published: no network\nstep 9 is there\n"


def test_neither_training_nor_a_signal_waits_for_a_slow_hub(hub, data, tmp_path):
    """In a Python of its own: a fork of scripts.py ends without waiting for threads."""
    more = ["--max_iters=100000", "--push_to=ada/run", "--init_from=scratch"]
    settings = words(data, tmp_path, *STEPS, *more)
    how = {"cwd": scripts.ROOT, "env": {**hub.env(hub.home), "OMP_NUM_THREADS": "1"}}
    with hub.lock:  # it accepts connections and says nothing
        at_work = subprocess.Popen([sys.executable, "train.py", *settings], stdout=subprocess.DEVNULL, **how)
        try:
            while not (tmp_path / "ckpt.pt").exists():
                assert at_work.poll() is None
                time.sleep(0.1)
            at_work.terminate()
            assert at_work.wait(60) == 0
        finally:
            at_work.kill()


def test_what_breaks_off_or_lies_is_not_taken(hub, trained, tmp_path):
    hub.faults.append(Fault("POST", "/commit/", 500, times=20))
    code, _, err = run(hub, "", code=PUSH.format(str(trained), "ada/run", True))
    assert code == 1 and "run it again" in err.splitlines()[-1] and "ckpt.pt" not in hub.files("ada/run")
    hub.faults.clear()
    assert run(hub, "", code=PUSH.format(str(trained), "ada/run", True))[0] == 0

    commit = hub.repos["ada/run"].commits[hub.repos["ada/run"].branches["main"]]
    before = dict(hub.blobs)
    for file, get in (
        ("ckpt.pt", f"checkpoint.pull('ada/run', {str(tmp_path / 'far')!r})"),
        ("model.safetensors", "checkpoint.load('ada/run')"),
    ):
        content = before[commit[file]]
        middle = len(content) // 2  # one byte in the middle of a tensor
        hub.blobs[commit[file]] = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        code, _, err = run(hub, "", code=f"from smol import checkpoint; {get}")
        assert code == 1 and f"{file} of ada/run is not what its hash says" in err.splitlines()[-1]
        assert not (tmp_path / "far").exists() or file != "ckpt.pt"
        hub.blobs[commit[file]] = content
        assert run(hub, "", code=f"from smol import checkpoint; {get}")[0] == 0
    assert (tmp_path / "far" / "ckpt.pt").read_bytes() == (trained / "ckpt.pt").read_bytes()
