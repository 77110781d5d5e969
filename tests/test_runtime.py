"""runtime.py, runtime.py and runtime.py: the small things train.py leans on (two processes are tested in test_train.py)."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smol import runtime

ROOT = Path(__file__).parent.parent


def test_a_log_is_cut_back_to_a_step_and_cut_lines_are_dropped(tmp_path):
    path = str(tmp_path / "log.jsonl")
    for i in range(1, 6):
        assert runtime.append_log({"iter": i, "loss": 1.0 / i}, path) is None
    with open(path, "a") as f:
        f.write('{"iter": 6, "lo')  # a process was killed here
    assert [e["iter"] for e in runtime.read_log(path)] == [1, 2, 3, 4, 5]
    runtime.append_log({"iter": 7}, path)  # and is not cut off with it
    assert [e["iter"] for e in runtime.read_log(path)] == [1, 2, 3, 4, 5, 7]
    runtime.cut_log(path, 3)
    assert [json.loads(line) for line in open(path)] == [{"iter": i, "loss": 1.0 / i} for i in (1, 2, 3)]
    cut = str(tmp_path / "log.cut.jsonl")  # they may be of a run that was longer: nothing is lost
    assert [e["iter"] for e in runtime.read_log(cut)] == [4, 5, 7]
    runtime.append_log({"iter": 4}, path)
    assert [e["iter"] for e in runtime.read_log(path)] == [1, 2, 3, 4]
    runtime.cut_log(path, 0)
    assert os.listdir(tmp_path) == ["log.cut.jsonl"]
    assert [e["iter"] for e in runtime.read_log(cut)] == [4, 5, 7, 1, 2, 3, 4]
    runtime.cut_log(path, 0)  # also where there never was one


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_line_that_cannot_be_written_is_told_and_no_exception():
    assert (
        runtime.append_log({"iter": 1}, "/dev/full")
        == "could not write to /dev/full: No space left on device"
    )


def test_the_picture_is_drawn_from_any_log(tmp_path):
    for entries in (
        [],
        [
            {"iter": 1, "loss": None},
            {"iter": 2, "loss": 3.0},
            {"iter": 2, "val_losses": {"a": 2.0}},
            {"iter": 4, "val_losses": {"b": 1.0, "a": 1.0}},
        ],
    ):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
        runtime.draw_losses(str(tmp_path))
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("reported", "tflops"),
    [
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 3060", 25.5),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 25.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("CPU", None),
        ("Quadro T400", None),
        ("NVIDIA A10", 125),
        ("NVIDIA GB10", None),
    ],
)
def test_cards_are_known_by_the_names_that_drivers_report(reported, tflops):
    assert runtime.peak_flops(reported) == (tflops and tflops * 1e12)


def test_device_and_dtype():
    assert runtime.pick_dtype("auto", "cpu") == "float32"
    assert runtime.pick_dtype("float16", "cpu") == "float16"
    with pytest.raises(ValueError, match="'int8'"):
        runtime.pick_dtype("int8", "cpu")
    with pytest.raises(ValueError, match="'tpu'"):
        runtime.pick_device("tpu")
    assert runtime.pick_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        assert runtime.pick_device("auto") == "cpu"
        with pytest.raises(ValueError, match="no GPU"):
            runtime.pick_device("cuda:0")


def test_memory_is_counted_and_its_end_is_recognised():
    # in a process of its own: it is the peak of a whole life, and this one's may have been higher before
    code = (
        'import torch; from smol import runtime; a = runtime.peak_memory("cpu"); '
        'x = torch.ones(100_000_000); print(runtime.peak_memory("cpu") - a)'
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert int(run.stdout) > 200_000_000, run.stderr
    with pytest.raises(RuntimeError) as e:
        torch.empty(2**60, dtype=torch.uint8)
    assert runtime.out_of_memory(e.value)
    assert not runtime.out_of_memory(RuntimeError("shape mismatch"))


DRIFT = """
import torch
from smol import runtime
runtime.start_processes("cpu")
r = runtime.rank
same = {"a": torch.arange(4.0), "b": torch.tensor([1.0], dtype=torch.float64), "n": torch.tensor(3)}
said = [runtime.difference(same)]
for odd in (0, 2):
    other = {**same, "b": same["b"] + (1e-16 * 4) * (r == odd), "n": same["n"] + (r == odd)}
    said.append(runtime.difference(other))
said += [runtime.all_agree(None), runtime.all_agree("broken" if r == 1 else None), runtime.all_agree("all")]
said += [runtime.sums([r, 0.5], "cpu"), runtime.gather(r * 10)]
open(f"said{r}", "w").write(repr(said))
runtime.end_processes()
"""


def test_three_processes_know_which_one_is_different(tmp_path):
    (tmp_path / "drift.py").write_text(DRIFT)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "drift.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    said = [eval((tmp_path / f"said{r}").read_text()) for r in range(3)]
    want = [
        None,
        "process 0 differs in b and 1 more",
        "process 2 differs in b and 1 more",
        None,
        "broken (process 1)",
        "all",
        [3.0, 1.5],
    ]
    assert [s[:-1] for s in said] == [want] * 3
    assert [s[-1] for s in said] == [[0, 10, 20], [], []]


def test_interrupted_before_training_is_one_line():
    # a shell that starts the tests in the background has them, and what they start, ignore SIGINT
    code = (
        "import os, signal; from smol import runtime; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); runtime.start_processes('cpu'); "
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (
        run.returncode == 130
        and run.stderr.strip() == "interrupted before the first step: nothing was changed"
    )


def test_alone_there_is_nobody_to_differ_from():
    assert (
        runtime.difference({"a": torch.ones(2)}) is None
        and runtime.all_agree("x") == "x"
        and runtime.sums([1, 2], "cpu") == [1, 2]
    )
    assert runtime.gather(5) == [5]


FAULTS = """
import resource, torch
from smol import runtime
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
runtime.keep_freed_memory()
for _ in range(4):  # until tensors have found their places on the heap
    faults()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_tensor():
    env = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }  # what the C library starts from; it may raise it by itself later
    run = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, cwd=ROOT)
    given_back, kept = map(int, run.stdout.split())
    assert given_back > 5000 and kept < 500, run.stdout  # 8 MB are 2,000 pages
