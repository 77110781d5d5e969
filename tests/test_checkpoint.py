"""checkpoint.py: what was saved comes back, a crash never costs the last good file, and nothing in a file can run."""

import argparse
import errno
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from smol import checkpoint as ckpt
from smol import loop
from smol import tokenizer as tok

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
SMALL = {"n_layer": 4, "n_head": 2, "n_embd": 12, "n_ff": 8}


def make(model="dense", **changes):
    torch.manual_seed(0)
    net = ckpt.make_model(model, SMALL)
    optimizer = net.configure_optimizer(0.1, 1e-3, (0.9, 0.95))
    net(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[1].backward()
    optimizer.step()
    train = {
        "iter": 7,
        "optimizer": optimizer.state_dict(),
        "loader": {"step": 3, "sources": {"a": {"drawn": 5}}},
        "carries": {"0/96": {"y": torch.ones(2, 3), "halted": torch.tensor([True, False])}},
        "loss": float("nan"),
    }
    return {
        "format": ckpt.CHECKPOINT_FORMAT,
        "model": model,
        "model_config": {**SMALL, "layer_pattern": None},
        "weights": net.state_dict(),
        "ema": None,
        "tokenizer": tok.fingerprint(),
        "train": train,
        **changes,
    }


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
    assert equal(dict(ckpt.load(str(path))), saved)
    assert equal(torch.load(path, weights_only=True), saved)  # nothing in it needs trust
    net, checkpoint = ckpt.load_model(str(path))
    assert not net.training and checkpoint["train"]["iter"] == 7
    assert equal(dict(net.state_dict()), dict(saved["weights"]))
    assert net.config.n_embd == 12 and net.config.layer_pattern == "kkka"  # None is the default


def test_a_name_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt.save(make(), "ckpt.pt")
    assert ckpt.load("ckpt.pt")["train"]["iter"] == 7


def test_averaged_weights_are_what_a_reader_gets(tmp_path):
    saved = make("trm")
    saved["ema"] = {k: v + 1 for k, v in saved["weights"].items()}
    ckpt.save(saved, tmp_path / "ckpt.pt")
    net, _ = ckpt.load_model(str(tmp_path / "ckpt.pt"))
    assert equal(dict(net.state_dict()), saved["ema"])


def test_a_second_save_replaces_the_first(tmp_path):
    path = tmp_path / "ckpt.pt"
    for n in (1, 2):
        ckpt.save(make(train={"iter": n}), path)
        assert ckpt.load(path)["train"]["iter"] == n


# ---- crashes


SAVER = """
import os, signal, sys, time
import torch
from smol import checkpoint as ckpt

path, moment = sys.argv[1:]
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
save, fsync, replace, renames = torch.save, os.fsync, os.replace, [0]


def no_links(a, b):
    raise PermissionError(1, "Operation not permitted")


def half(checkpoint, f):
    import io
    whole = io.BytesIO()
    save(checkpoint, whole)
    f.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    f.flush()
    die()


def make(n):
    return {"format": ckpt.CHECKPOINT_FORMAT, "model": "dense", "model_config": {}, "ema": None, "train": {},
            "weights": {"w": torch.full((1000, 1000), float(n))}, "tokenizer": ckpt.tok.fingerprint(), "n": n}


def rename(a, b):
    renames[0] += 1
    if wanted == f"before rename {renames[0]}":
        die()
    replace(a, b)
    if wanted == f"after rename {renames[0]}":
        die()


def attempt(at):
    global wanted
    wanted, os.replace = at.removesuffix(" without links"), rename
    if wanted != at:
        os.link = no_links
    if at == "half written":
        torch.save = half
    elif at == "before flush":
        os.fsync = die
    elif at == "before link":
        os.link = die
    n = ckpt.load(ckpt.newest(path))["n"] + 1
    while True:  # at a number of milliseconds, whatever it is doing then
        ckpt.save(make(n), path, ckpt.previous(path))
        n += 1


ckpt.save(make(1), path)
for at in moment.split(","):
    pid = os.fork()
    if pid == 0:
        attempt(at)
    if at.isdigit():
        time.sleep(int(at) / 1000)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    found = ckpt.load(ckpt.newest(path))
    whole = bool((found["weights"]["w"] == found["n"]).all())
    older = ckpt.load(ckpt.previous(path))["n"] if os.path.exists(ckpt.previous(path)) else None
    print(at, os.WTERMSIG(status), found["n"], whole, older, sep="|")
"""


def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path):
    """
    kill -9 half way through writing, before and after each later step, and at ten arbitrary moments of saving
    again and again; where files can have two names and where they cannot. The one before is kept.
    """
    path = tmp_path / "ckpt.pt"
    exact = [
        "half written",
        "before flush",
        "before link",
        "before rename 1",
        "after rename 1",
        "before rename 2",
        "after rename 2",
        "before rename 1 without links",
        "after rename 1 without links",
        "before rename 1 without links",
        "after rename 1 without links",
        "after rename 2 without links",
    ]
    arbitrary = [str(n) for n in (1, 3, 7, 12, 19, 26, 34, 45, 61, 83)]
    done = subprocess.run(
        [sys.executable, "-c", SAVER, str(path), ",".join(exact + arbitrary)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == exact + arbitrary
    assert all(int(signum) == signal.SIGKILL and whole == "True" for _, signum, _, whole, _ in lines)
    found = [(int(n), older) for _, _, n, _, older in lines[: len(exact)]]
    assert found[:7] == [(1, "None")] * 4 + [(1, "1")] * 2 + [(2, "1")]
    assert found[7:9] == [(2, "1"), (2, "2")]  # the second has its older name alone
    assert found[9:] == [(2, "2"), (3, "2"), (4, "3")]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path):
    path = tmp_path / "ckpt.pt"
    ckpt.save(make(), path)
    before = path.read_bytes()
    with pytest.raises(Exception):  # noqa: B017  whatever it is: a function that has no name cannot be pickled
        ckpt.save(make(train={"iter": lambda: 1}), path)
    assert os.listdir(tmp_path) == ["ckpt.pt"] and path.read_bytes() == before


FULL = """
import resource, sys
import torch
from smol import checkpoint as ckpt

path, *limits = sys.argv[1:]
make = lambda n: {"format": ckpt.CHECKPOINT_FORMAT, "model": "dense", "model_config": {}, "ema": None, "train": {}, "n": n,
                  "weights": {str(i): torch.full((100, 100), float(n)) for i in range(10)}, "tokenizer": ckpt.tok.fingerprint()}
ckpt.save(make(1), path)
for limit in map(int, limits):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        ckpt.save(make(2), path)
        print("saved")
    except OSError as e:
        print(e.strerror, ckpt.load(path)["n"], sep="|")
"""


def test_a_disk_that_is_full_is_said_and_keeps_what_was_there(tmp_path):
    """A write that fails at the first byte, between and inside tensors, and near the end: always an OSError, always the old file."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "ckpt.pt"), "0", "1", "50000", "200001", "400000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["File too large|1"] * 5
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_what_is_not_finite_is_not_gone_on_from_and_the_one_before_is_named(tmp_path):
    path, older = tmp_path / "ckpt.pt", tmp_path / "ckpt_prev.pt"
    good, bad = make(), make()
    bad["weights"]["norm_f.weight"][3] = math.inf
    assert ckpt.not_finite(good["weights"]) is None and ckpt.not_finite(bad["weights"]) == "norm_f.weight"
    for broken in (bad, {**good, "ema": bad["weights"]}):
        ckpt.save(broken, path)
        ckpt.save(good, older)
        refused(path, "not finite.*norm_f.weight.*ckpt_prev.pt, of step 7, is sound", call=ckpt.load_finite)
        ckpt.save(broken, older)  # of no use either, and not named
        refused(path, r"not finite.*: no run can go on from it$", call=ckpt.load_finite)
        older.unlink()
        refused(path, "no run can go on from it$", call=ckpt.load_finite)
    path.write_text("half of it")
    ckpt.save(good, older)
    refused(path, "damaged", "ckpt_prev.pt, of step 7, is sound", call=ckpt.load_finite)
    assert ckpt.load_finite(older)["train"]["iter"] == 7


# ---- where a run begins, and what it saves


def test_the_same_command_begins_goes_on_and_never_replaces_another_run(tmp_path):
    out, path, other = str(tmp_path), str(tmp_path / "ckpt.pt"), str(tmp_path / "other.pt")
    ckpt.save(make(), other)

    def begin(init_from, anew=False):
        found, where, resumed = loop.starting_point(init_from, out, anew)
        return found and found["train"]["iter"], where, resumed

    for init_from in ("auto", "scratch"):
        assert begin(init_from) == (None, None, False)
    assert begin(other) == (7, other, False)
    refused(path, "does not exist", call=lambda _: begin("resume"))
    ckpt.save(make(train={"iter": 9, "began_with": other}), path)
    assert begin("auto") == begin("resume") == begin(other) == (9, path, True)
    refused(path, "exists", "--init_from=resume", "--overwrite=True", call=lambda _: begin("scratch"))
    assert begin("scratch", True) == begin("auto", True) == (None, None, False)
    assert begin(other, True) == (7, other, False)
    os.rename(path, tmp_path / "ckpt_prev.pt")  # a save was killed where files have one name
    assert begin("auto") == (9, str(tmp_path / "ckpt_prev.pt"), True)
    for began_with in ({"began_with": None}, {"began_with": "elsewhere.pt"}, {}):
        ckpt.save(make(train={"iter": 9, **began_with}), path)
        refused(path, "exists", "--init_from=resume", call=lambda _: begin(other))
    ckpt.save(make(train={"iter": 9, "student": other}), path)  # as distill.py says it
    assert begin(other) == (9, path, True)


def test_machines_that_do_not_hold_the_same_checkpoint_do_not_begin(monkeypatch):
    monkeypatch.setattr(loop, "world_size", 2)
    for others, mine, same in (
        (9, 9, True),
        (-1, None, True),
        (9, None, False),
        (9, 7, False),
        (-1, 9, False),
    ):
        monkeypatch.setattr(loop.runtime, "sums", lambda values, device, others=others: [values[0] + others])
        assert (loop.same_start(mine, "cpu") is None) == same, (others, mine)


def test_one_folder_has_one_run(tmp_path):
    held = loop.lock(str(tmp_path))
    with pytest.raises(ValueError, match=re.escape(f"another run is at work in {tmp_path}/")):
        loop.lock(str(tmp_path))
    held.close()
    loop.lock(str(tmp_path)).close()


def test_other_data_are_named_or_refused():
    data = {
        "stage": "demo",
        "tag": None,
        "snapshot": None,
        "shards": "a" * 64,
        "manifest": "b" * 64,
        "data_dir": "data",
        "shares": {"x": 1.0},
        "sources": ["x"],
    }
    assert loop.other_data(data, {**data, "sources": ["x", "y"]}) is None
    older = {k: data[k] for k in ("stage", "tag", "snapshot", "shards")}
    assert loop.other_data(older, data) is None  # what an older checkpoint does not say cannot differ
    changes = [
        ("data_dir", "/moved", ("/moved/", "data/")),
        ("manifest", "c" * 64, ("c" * 12, "b" * 12)),
        ("shares", {"x": 0.5, "y": 0.5}, ("0.5", "1.0")),
        ("stage", "mine", ("mine", "demo")),
    ]
    for what, value, named in changes:
        line = loop.other_data(data, {**data, what: value})
        assert "\n" not in line and all(name in line for name in named), line
    for change in ({"shards": "d" * 64}, {"tag": "v1", "snapshot": "e" * 64}):
        for one, two in ((data, {**data, **change}), ({**data, **change}, data)):
            with pytest.raises(ValueError, match="name the same data"):
                loop.other_data(one, two)
    frozen = {**data, "tag": "v1", "snapshot": "e" * 64}
    with pytest.raises(ValueError, match="demo:v1"):
        loop.other_data(frozen, {**frozen, "snapshot": "f" * 64})
    assert "/moved/" in loop.other_data(frozen, {**frozen, "data_dir": "/moved"})


def test_the_average_is_taken_out_again_whatever_happens_inside():
    net = ckpt.make_model("dense", SMALL)
    own = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), loop.averaged_weights(net, {k: v + 1 for k, v in own.items()}):
        assert torch.equal(net.norm_f.weight, own["norm_f.weight"] + 1)
        raise KeyboardInterrupt
    assert equal(dict(net.state_dict()), own)


def test_a_disk_with_room_for_two_checkpoints_keeps_saving(tmp_path, monkeypatch):
    """A third would not fit: the one before the last gives way. Where it is no question of room, it stays."""
    net, path, said, room = ckpt.make_model("dense", SMALL), str(tmp_path / "ckpt.pt"), [], [2, errno.ENOSPC]
    save = torch.save

    def full(value, f):
        if len(list(tmp_path.glob("*.pt"))) >= room[0]:
            raise OSError(room[1], os.strerror(room[1]))
        save(value, f)

    monkeypatch.setattr(torch, "save", full)

    def again(step):
        train, keep = {"iter": step}, step > 1
        saved = loop.save_checkpoint(path, net, "dense", {}, None, train, "cpu", said.append, keep)
        return saved, {p.name: ckpt.load(p)["train"]["iter"] for p in tmp_path.glob("*.pt")}

    assert again(1) == (True, {"ckpt.pt": 1})
    for step in (2, 3, 4):
        assert again(step) == (True, {"ckpt.pt": step, "ckpt_prev.pt": step - 1})
    assert not said
    room[1] = errno.EFBIG
    assert again(5) == (False, {"ckpt.pt": 4, "ckpt_prev.pt": 3}) and "step 5 could not be saved" in said[0]
    average = {k: v + 1 for k, v in net.state_dict().items()}
    train = {"iter": 6, "carries": {}}
    ending = loop.save_weights_alone(path, net, "dense", {}, average, train)
    assert "neither could its weights alone" in ending
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_prev.pt"]
    room[0] = 9
    assert "ckpt_weights.pt" in loop.save_weights_alone(path, net, "dense", {}, average, train)
    alone, saved = ckpt.load_model(str(tmp_path / "ckpt_weights.pt"))
    assert equal(dict(alone.state_dict()), average) and saved["train"] == {"iter": 6}


def test_a_second_name_outlives_the_first(tmp_path, monkeypatch):
    path, other = tmp_path / "ckpt.pt", tmp_path / "other.pt"
    for links in (True, False):  # some file systems, such as exFAT, have none
        if not links:
            monkeypatch.setattr(
                os, "link", lambda a, b: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted"))
            )
        ckpt.save(make(train={"iter": 1}), path)
        ckpt.second_name(path, other)
        ckpt.save(make(train={"iter": 2}), path)
        assert ckpt.load(other)["train"]["iter"] == 1 and ckpt.load(path)["train"]["iter"] == 2


def test_an_optimizer_comes_back_without_its_settings():
    saved = make()["train"]["optimizer"]
    net = ckpt.make_model("dense", SMALL)
    optimizer = net.configure_optimizer(0.5, 2e-3, (0.8, 0.9))
    ckpt.load_optimizer(optimizer, saved)
    assert equal(optimizer.state_dict()["state"], saved["state"])
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["lr"], group["betas"]) == (0.5, 2e-3, (0.8, 0.9))
    assert saved["param_groups"][0]["weight_decay"] == 0.1


# ---- files that are no checkpoint


def test_missing_and_folder(tmp_path):
    refused(tmp_path / "nothing.pt", "does not exist", "ckpt.pt")
    refused(tmp_path, "is a folder")


def test_not_a_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    for content in (
        b"",
        b"hello, I am a text file\n" * 50,
        b"PK\x03\x04" + bytes(100),
        os.urandom(2000),
        b"\x80\x02",
        bytes(10000),
    ):
        path.write_bytes(content)
        refused(path, "not a checkpoint|damaged")
    for value in ([1, 2], {"a": 1}, torch.ones(3), "text", {"format": 1}, {"weights": {}}):
        torch.save(value, path)
        refused(path, "not a checkpoint")


def test_what_people_have_at_hand_is_named(tmp_path):
    path, weights = (
        tmp_path / "ckpt.pt",
        {"transformer.wte.weight": torch.zeros(3, 2), "lm_head.weight": torch.zeros(3, 2)},
    )
    nano = {"model": weights, "optimizer": {}, "model_args": {"n_layer": 2}, "iter_num": 5, "config": {}}
    for value, words in (
        (nano, "nanoGPT"),
        (weights, "bare state dict"),
        (OrderedDict(weights), "bare state dict"),
        ({**nano, "config": argparse.Namespace(n_layer=2)}, "Python objects"),
        (torch.nn.Linear(2, 2), "Python objects"),
    ):
        torch.save(value, path)
        refused(path, words, "not a checkpoint that train.py wrote")


def test_truncated_or_damaged(tmp_path):
    path = tmp_path / "ckpt.pt"
    ckpt.save(make(), path)
    whole = path.read_bytes()
    for n in (1, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:n])
        refused(path, "damaged")
    path.write_bytes(whole[: len(whole) // 2] + whole[len(whole) // 2 + 1 :])
    refused(path, "damaged")


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
    refused(path, "not a checkpoint")
    refused(path, "not a checkpoint", call=ckpt.load_model)
    torch.save({**make(), "train": Evil(trace)}, path, _use_new_zipfile_serialization=False)
    refused(path, "not a checkpoint")
    assert not trace.exists()


def test_another_format_or_tokenizer(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(make(format=ckpt.CHECKPOINT_FORMAT + 1), path)
    refused(path, f"format {ckpt.CHECKPOINT_FORMAT + 1}", "update smol-llm")
    for old in (0, "0.9", None, [1]):
        torch.save(make(format=old), path)
        refused(path, re.escape(f"format {old!r}"), "reads 5: that is not a checkpoint")
    for old in (1, 2, 3, 4):  # other ways to read a puzzle: nothing has changed for Route A
        torch.save(make(format=old), path)
        assert ckpt.load(path)["model"] == "dense"
        torch.save(make(format=old, model="trm"), path)
        refused(path, f"format {old}", "train it again")
    torch.save(make(tokenizer="0" * 64), path)
    refused(path, "tokenizer", "000000000000")
    torch.save(make(tokenizer=None), path)
    refused(path, "tokenizer")


@pytest.mark.parametrize("key", ("tokenizer", "model", "model_config", "ema", "weights", "format"))
def test_a_checkpoint_with_something_missing(tmp_path, key):
    path = tmp_path / "ckpt.pt"
    broken = make()
    del broken[key]
    torch.save(broken, path)
    refused(path, call=ckpt.load_model)


def test_weights_of_another_model(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(make(model_config={**SMALL, "n_ff": 16}), path)
    refused(path, "does not fit", "blocks.0.mlp", call=ckpt.load_model)
    torch.save(make(model="trm"), path)
    net = ckpt.make_model("dense", SMALL)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    refused(
        path,
        "does not fit",
        "q_head|y_init",
        call=lambda p: ckpt.load_weights(net, ckpt.load(p)["weights"], p),
    )
    assert equal(dict(net.state_dict()), before)


@pytest.mark.parametrize(
    "wrap, prefix",
    [
        (torch.nn.parallel.DataParallel, "module."),
        (lambda net: torch.compile(net, backend="eager"), "_orig_mod."),
    ],
)
def test_weights_of_a_wrapped_model_are_named_as_such(tmp_path, wrap, prefix):
    path, net = tmp_path / "ckpt.pt", ckpt.make_model("dense", SMALL)
    torch.save(make(weights=dict(wrap(net).state_dict())), path)
    refused(path, f"begin with '{prefix}'", f"model.{prefix[:-1]}", call=ckpt.load_model)


def test_models_that_do_not_exist():
    with pytest.raises(ValueError, match="'dense', 'trm'") as e:
        ckpt.make_model("gpt", {})
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="n_head"):
        ckpt.make_model("dense", {**SMALL, "n_embd": 13})
    net = ckpt.make_model(
        "trm", {**SMALL, "n_sup": 5, "learning_rate": 1}
    )  # settings of others are not the model's
    assert net.config.n_sup == 5


def test_one_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "ckpt.pt"
    ckpt.save(make(), path)
    whole = bytearray(path.read_bytes())
    for at in (len(whole) // 3, len(whole) // 2):  # far inside the embedding, the largest tensor by far
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        refused(path, "damaged")


def test_what_a_killed_save_left_is_cleaned_up_by_the_next(tmp_path):
    left = tmp_path / "ckpt.pt.123.tmp"
    left.write_bytes(b"half")
    ckpt.save(make(), tmp_path / "ckpt.pt")
    assert not left.exists()
