"""train.py as a user runs it: real processes on a small real stage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import prepare

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
STAGE = ["--val_every=3", "--limit_mb=0.2", "--n_arithmetic=100", "--n_sudoku4=300", "--n_sudoku9=4", "--n_maze=60", "--n_transforms=30"]
SHAPE = ["--n_layer=4", "--n_head=2", "--n_embd=16", "--n_ff=24", "--block_size=256", "--batch_size=2", "--gradient_accumulation_steps=2",
         "--log_interval=1", "--eval_batches=1", "--warmup_iters=2", "--decay_iters=4", "--learning_rate=3e-3",
         "--mixture={'stdlib': 1, 'sudoku4': 1, 'maze': 1}"]  # fmt: skip
ROUTES = {
    "dense": [],
    "trm": ["--model=trm", "--n_latent=1", "--n_recursion=2", "--n_sup=3", "--ema=0.9"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.main(["demo", f"--data_dir={folder}", *STAGE])
    return folder


def command(data, out, *settings, processes=1):
    launch = [sys.executable]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launch, str(ROOT / "train.py"), f"--data_dir={data}", f"--out_dir={out}", *SHAPE, *settings]


def train(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), env=ENV, capture_output=True, text=True, cwd=ROOT, timeout=300)


def losses(out):
    """{step: loss} and {step: validation losses} from log.jsonl."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {e["iter"]: e["loss"] for e in lines if "loss" in e}, {e["iter"]: e["val_losses"] for e in lines if "val_losses" in e}


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


def test_two_processes_take_the_same_steps_as_one(finished, data, tmp_path):
    settings, out = finished
    run = train(data, tmp_path, *settings, processes=2)
    assert run.returncode == 0, run.stderr
    for one, two in zip(losses(out), losses(tmp_path)):
        assert one.keys() == two.keys()
        for step in one:
            assert two[step] == pytest.approx(one[step], rel=1e-4)


def test_resumed_from_a_checkpoint_the_run_is_the_same_to_the_last_bit(finished, data, tmp_path):
    settings, out = finished
    process = subprocess.Popen(command(data, tmp_path, *settings), env=ENV, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "ckpt.pt").exists():  # saved after step 4; killed somewhere later
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.load(tmp_path / "ckpt.pt")["train"]["iter"] == 4
    run = train(data, tmp_path, *settings, "--init_from=resume")
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path) == losses(out)
    ours, theirs = checkpoint.load(tmp_path / "ckpt.pt"), checkpoint.load(out / "ckpt.pt")
    for key in theirs["weights"]:
        assert torch.equal(ours["weights"][key], theirs["weights"][key])


def test_sigterm_saves_and_the_rest_is_the_same_run(finished, data, tmp_path):
    settings, out = finished
    process = subprocess.Popen(command(data, tmp_path, *settings), env=ENV, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
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


def test_resume_on_two_processes_goes_on_with_every_carry(finished, data, tmp_path):
    settings, out = finished
    shutil.copytree(out, tmp_path / "run")
    longer = [s for s in settings if "max_iters" not in s] + ["--max_iters=10", "--init_from=resume"]
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert train(data, tmp_path / "alone", *longer).returncode == 0
    run = train(data, tmp_path / "run", *longer, processes=2)
    assert run.returncode == 0, run.stderr
    for step in (9, 10):
        assert losses(tmp_path / "run")[0][step] == pytest.approx(losses(tmp_path / "alone")[0][step], rel=1e-4)


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
    for settings, names in [
        (["--overwrite=False", f"--out_dir={kept}"], ["ckpt.pt exists", "--init_from=resume"]),
        ([f"--init_from={text}"], ["notes.txt", "not a checkpoint"]),
        (["--init_from=resume"], ["ckpt.pt does not exist"]),
        (["--data=stage9"], ["stage9", "demo"]),
        ([f"--data_dir={broken}"], [shard.name]),
        (["--mixture={'wikipedia': 1}"], ["wikipedia", "stdlib"]),
        (["--max_itres=3"], ["max_itres", "max_iters"]),
        (["--max_iters=soon"], ["max_iters", "int", "str"]),
        (["config/route_c_demo.py"], ["config/route_c_demo.py", "route_"]),
        (["--model=transformer"], ["transformer", "dense", "trm"]),
        (["--n_head=3"], ["n_embd=16", "n_head=3"]),
        (["--dtype=int8"], ["int8", "bfloat16"]),
        (["--device=cuda"] if not torch.cuda.is_available() else ["--device=tpu"], ["device"]),
    ]:
        run = train(data, out, *settings)
        assert run.returncode == 1, settings
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
        for name in names:
            assert name in run.stderr, (settings, run.stderr)
        assert not out.exists()
    assert (kept / "ckpt.pt").read_text() == "precious"


def test_another_models_checkpoint_is_refused_by_name(finished, data, tmp_path):
    settings, out = finished
    other = ROUTES["trm"] if "--model=trm" not in settings else []
    for change in (other, [*settings, "--n_ff=40"]):
        run = train(data, tmp_path / "new", *change, f"--init_from={out / 'ckpt.pt'}")
        assert run.returncode == 1 and "does not fit" in run.stderr and run.stderr.count("\n") == 1, run.stderr


def test_help_lists_every_setting_with_its_comment():
    run = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0
    assert "--learning_rate=0.0006" in run.stdout and "rows of text per batch" in run.stdout


def test_every_config_file_is_understood():
    import configurator

    script = {"__file__": str(ROOT / "train.py")}
    source = (ROOT / "train.py").read_text().split("defaults = configurator")[0]
    exec(compile(source, "train.py", "exec"), script)
    for path in sorted((ROOT / "config").glob("*.py")):
        config = configurator.resolve(script, [str(path)])
        assert config["out_dir"] != script["out_dir"], path
