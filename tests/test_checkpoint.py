"""
checkpoint.py: what was saved comes back, a crash never costs the last good file, nothing in a file can run.
"""

import contextlib
import math
import os
import pickle
import re
import shutil

import pytest
import tiny
import torch

from smol import checkpoint as ckpt
from smol.loop import make_optimizers

SMALL = {"n_layer": 4, "n_head": 2, "n_embd": 12, "n_ff": 8}


def make(model="dense", **changes):
    torch.manual_seed(0)
    net = ckpt.make_model(model, SMALL)
    (optimizer,) = make_optimizers(net, "adamw", 0.1, 1e-3, (0.9, 0.95))
    net(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[1].backward()
    optimizer.step()
    train = {
        "iter": 7,
        "optimizer_name": "adamw",
        "optimizers": [optimizer.state_dict()],
        "loader": {"step": 3, "sources": {"a": {"drawn": 5}}},
        "carries": {"0/a/96": {"y": torch.ones(2, 3), "halted": torch.tensor([True, False])}},
        "loss": float("nan"),
    }
    shape = {**SMALL, "layer_pattern": None}
    return tiny.content(model, net, **{"model_config": shape, "train": train, **changes})


def equal(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and (a == b or a != a)


def refused(path, *parts, call=ckpt.load):
    """Refused with one line, of FileNotFoundError or ValueError, that names the file."""
    with pytest.raises((FileNotFoundError, ValueError)) as e:
        call(path)
    line = str(e.value)
    assert "\n" not in line and str(path) in line, line
    for part in parts:
        assert re.search(part, line), line


# ---- round trip


@pytest.mark.parametrize("model", ("dense", "trm"))
def test_what_was_saved_comes_back(tmp_path, model):
    path = tmp_path / "new" / "folder" / "ckpt.pt"
    saved = make(model)
    ckpt.save(saved, str(path))
    assert os.listdir(path.parent) == ["ckpt.pt"]
    assert equal(ckpt.load(str(path)), saved)
    assert equal(torch.load(path, weights_only=True), saved)  # nothing in it needs trust
    net, checkpoint = ckpt.load_model(str(path))
    assert not net.training and checkpoint["train"]["iter"] == 7
    assert equal(dict(net.state_dict()), dict(saved["weights"]))
    assert net.config.n_embd == 12 and net.config.layer_pattern == "kkka"  # None is the default
    saved["ema"] = {k: v + 1 for k, v in saved["weights"].items()}  # what a reader gets, where it is there
    ckpt.save(saved, str(path))
    assert equal(dict(ckpt.load_model(str(path))[0].state_dict()), saved["ema"])


def test_the_state_of_another_optimizer_is_refused():
    with pytest.raises(ValueError, match="is of optimizer 'adamw', not 'muon'"):
        ckpt.load_optimizers([], "muon", make()["train"])
    with pytest.raises(ValueError, match="--init_optimizer=False"):  # as published weights are
        ckpt.load_optimizers([], "muon", {})


def test_stage_0_replaces_only_a_checkpoint_of_its_own(tmp_path):
    path = tmp_path / "ckpt.pt"

    def check(path):
        ckpt.check_is_stage_0({"out_dir": str(path.parent)})

    check(path)  # there is none
    ckpt.save(make(config={"sanity": True}), str(path))
    check(path)
    ckpt.save(make(config={"sanity": False}), str(path))
    refused(path, "another --out_dir", call=check)


# ---- crashes


@pytest.mark.parametrize(
    "moment, there",
    [
        ("torch.save", (1, 0)),  # half written
        ("os.fsync", (1, 0)),
        ("os.link", (1, 0)),  # of the second name
        ("os.replace", (1, 1)),
        (None, (2, 1)),
    ],
)
def test_a_killed_save_leaves_a_whole_checkpoint(moment, there, tmp_path, monkeypatch):
    """A save that fails, on a full disk for one, is in test_train.py."""
    path, replace = str(tmp_path / "ckpt.pt"), os.replace

    def die(*args):
        if moment == "torch.save":
            args[1].write(b"half of it")
        if moment == "os.replace" and args[1] != path:  # that of the second name
            return replace(*args)
        raise KeyboardInterrupt

    ckpt.save(make(train={"iter": 1}), path)
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "remove", lambda path: None)  # who is killed does not clean up
        if moment:
            patch.setattr(moment, die)
        ckpt.save(make(train={"iter": 2}), path, ckpt.previous(path))
    found = [ckpt.load(p)["train"]["iter"] if os.path.exists(p) else 0 for p in (path, ckpt.previous(path))]
    assert tuple(found) == there
    ckpt.save(make(), path)
    assert not list(tmp_path.glob("*.tmp"))  # what was half written is gone


def test_what_is_not_finite_is_not_read_and_the_one_before_is_named(tmp_path):
    path, older = tmp_path / "ckpt.pt", tmp_path / "ckpt_prev.pt"
    good, bad = make(), make()
    bad["weights"]["norm_f.weight"][3] = math.inf
    for broken in (bad, {**good, "ema": bad["weights"]}):
        ckpt.save(broken, path)
        refused(path, r"not finite \(norm_f.weight\)$")
    ckpt.save(good, older)
    refused(path, "not finite.*from the one before it: mv .*ckpt_prev.pt .*ckpt.pt")
    path.write_text("half of it")
    refused(path, "damaged.*from the one before it: mv .*ckpt_prev.pt .*ckpt.pt")
    assert ckpt.load(older)["train"]["iter"] == 7


def test_a_second_name_outlives_the_first(tmp_path, monkeypatch):
    path, other = tmp_path / "ckpt.pt", tmp_path / "other.pt"
    for links in (True, False):  # some file systems, such as exFAT, have none
        if not links:
            monkeypatch.delattr(os, "link")
            monkeypatch.setattr(os, "link", lambda a, b: os.open("/nowhere/at/all", 0), raising=False)
        ckpt.save(make(train={"iter": 1}), path)
        ckpt.second_name(path, other)
        ckpt.save(make(train={"iter": 2}), path)
        assert ckpt.load(other)["train"]["iter"] == 1 and ckpt.load(path)["train"]["iter"] == 2
        ckpt.second_name(path, path)  # two names of one file
        assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "other.pt"]
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: os.open("/nowhere/at/all", 0))
    with pytest.raises(OSError):
        ckpt.second_name(path, other)
    assert ckpt.load(other)["train"]["iter"] == 1  # a full disk costs nothing that was there


# ---- where a run begins


def test_the_same_command_begins_goes_on_and_never_replaces_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, other = "run/ckpt.pt", "other.pt"
    ckpt.save(make(), other)

    def run(began_with):
        return make(train={"iter": 9, "began_with": began_with, "optimizers": [], "data": {}})

    def begin(init_from, overwrite=False):
        found, where, resumed = ckpt.starting_point(init_from, path, overwrite)
        return found and found["train"]["iter"], where, resumed

    for init_from in ("auto", "scratch"):
        assert begin(init_from) == (None, None, False)
    assert begin(other) == (7, other, False)
    refused(path, "does not exist", call=lambda _: begin("resume"))
    ckpt.save(run(other), path)
    assert begin("auto") == begin("resume") == begin(other) == (9, path, True)
    refused(path, "exists", "--init_from=resume", "--overwrite=True", call=lambda _: begin("scratch"))
    assert begin("scratch", True) == begin("auto", True) == (None, None, False)
    assert begin(other, True) == (7, other, False)
    for began_with in (None, "elsewhere.pt"):
        ckpt.save(run(began_with), path)
        refused(path, "exists", "--init_from=resume", call=lambda _: begin(other))


def test_other_data_are_refused():
    data = {"stage": "demo", "tag": None, "snapshot": None, "shards": "a" * 64, "sources": ["x"]}
    ckpt.check_same_data(data, {**data, "stage": "renamed", "sources": ["x", "y"]})
    for change, part in (
        ({"shards": "d" * 64}, "demo:.*demo:.*name the same data"),
        ({"tag": "v1", "snapshot": "e" * 64}, "demo:.*demo:.*name the same data"),
        ({"snapshot": "f" * 64}, "demo:.*demo:.*name the same data"),
        ({"teacher": {"sha256": "b" * 64}}, "teacher .*another --out_dir"),
    ):
        for one, two in ((data, {**data, **change}), ({**data, **change}, data)):
            with pytest.raises(ValueError, match=part):
                ckpt.check_same_data(one, two)


# ---- files that are no checkpoint


class Evil:
    """A pickle that would create a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_code_in_a_file_does_not_run(tmp_path):
    path, trace = tmp_path / "ckpt.pt", tmp_path / "ran"
    Evil(trace).__reduce__()[0](trace, "w").close()  # it would work
    assert trace.exists()
    trace.unlink()
    path.write_bytes(pickle.dumps({**make(), "train": Evil(trace)}, protocol=2))
    refused(path, "not a checkpoint")
    torch.save({**make(), "train": Evil(trace)}, path)
    refused(path, "not a checkpoint, or it is damaged")
    refused(path, call=ckpt.load_model)
    torch.save({**make(), "train": Evil(trace)}, path, _use_new_zipfile_serialization=False)
    refused(path)
    assert not trace.exists()


def test_what_is_not_a_checkpoint_or_damaged_is_refused(tmp_path):
    """Also one flipped bit inside a tensor, of which PyTorch itself tells nothing."""
    path = tmp_path / "ckpt.pt"
    refused(path, "does not exist")
    ckpt.save(make(), path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (b"", b"some text\n" * 50, whole[:100], whole[:middle], whole[:-1], flipped):
        path.write_bytes(content)
        refused(path, "not a checkpoint, or it is damaged")
    for value in ([1, 2], torch.ones(3), {"model": {}, "model_args": {}}):
        torch.save(value, path)
        refused(path, "not a checkpoint that train.py wrote")
    for changes, part in (({"format": 0}, "format 0"), ({"tokenizer": "0" * 64}, "another tokenizer")):
        torch.save(make(**changes), path)
        refused(path, part)


def test_models_that_do_not_exist():
    with pytest.raises(ValueError, match="'dense', 'trm'"):
        ckpt.make_model("gpt", {})
    settings = {**SMALL, "n_sup": 5, "learning_rate": 1}  # settings of others are not the model's
    assert ckpt.make_model("trm", settings).config.n_sup == 5
