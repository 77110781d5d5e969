"""runtime.py: the device, the log, several processes as one, and signals (their use is in test_train.py)."""

import json
import os
from functools import lru_cache

import pytest
import scripts
import torch

from smol import runtime
from smol.muon import fast_dtype


def test_a_log_is_cut_back_to_a_step_and_cut_lines_are_dropped(tmp_path):
    path = str(tmp_path / "log.jsonl")
    for i in range(1, 6):
        runtime.append_log({"iter": i}, path)
    with open(path, "a") as f:
        f.write('{"iter": 6, "lo')  # a process was killed here
    assert [e["iter"] for e in runtime.read_log(path)] == [1, 2, 3, 4, 5]
    runtime.append_log({"iter": 7}, path)  # and is not cut off with it
    assert [e["iter"] for e in runtime.read_log(path)] == [1, 2, 3, 4, 5, 7]
    runtime.cut_log(path, 3)
    assert [json.loads(line)["iter"] for line in open(path)] == [1, 2, 3]
    for _ in range(2):  # also where there is none
        runtime.cut_log(path, 0)
        assert os.listdir(tmp_path) == []


def test_cards_are_known_by_the_names_that_drivers_report():
    cards = {"Tesla T4": 65, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA L40S": 362}
    for reported, tflops in cards.items():
        assert runtime.peak_flops(reported) == tflops * 1e12
    assert runtime.peak_flops("CPU") is runtime.peak_flops("Quadro T400") is None


@pytest.mark.parametrize(
    "amx, about, want",
    [
        (True, "GenuineIntel avx512_bf16", "bfloat16"),
        (False, "GenuineIntel avx512_bf16", "float32"),
        (False, "AuthenticAMD avx512_bf16", "bfloat16"),  # Zen 4
        (False, "AuthenticAMD avx2", "float32"),
        (False, None, "float32"),  # where there is no such file
    ],
)
def test_a_cpu_trains_in_bfloat16_where_that_is_faster(amx, about, want, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(runtime, "CPUINFO", tmp_path / "cpuinfo")
    if about:
        (tmp_path / "cpuinfo").write_text(about)
    monkeypatch.setattr(runtime, "cpu_prefers_bfloat16", lru_cache(runtime.cpu_prefers_bfloat16.__wrapped__))
    for effect in ("keep_freed_memory", "start_processes"):
        monkeypatch.setattr(runtime, effect, lambda *about: None)
    assert runtime.start("cpu", "auto") == ("cpu", want)
    assert runtime.start("cpu", "float32") == ("cpu", "float32")
    assert fast_dtype(torch.device("cpu")) == getattr(torch, want)  # of Muon
    assert runtime.pick_dtype("auto", "cpu") == "float32"  # evaluation is the same on every CPU


def test_device_and_dtype():
    assert runtime.pick_dtype("float16", "cpu") == "float16"
    with pytest.raises(ValueError, match="'tpu'"):
        runtime.pick_device("tpu")
    if not torch.cuda.is_available():
        assert runtime.pick_device("auto") == "cpu"
        with pytest.raises(ValueError, match="no GPU"):
            runtime.pick_device("cuda:0")


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert runtime.pick_device("auto") == runtime.pick_device("cuda") == "cuda:0"
    monkeypatch.setattr(runtime, "local_rank", 1)  # as with torchrun's two processes for one GPU
    with pytest.raises(ValueError, match="device='cuda:1', but PyTorch counts 1 GPUs"):
        runtime.pick_device("auto")


@pytest.mark.parametrize("factor, found", [(1.0, "mps"), (1.1, "cpu"), (None, "cpu")])
def test_an_apple_gpu_is_used_if_it_computes_what_the_cpu_does(factor, found, monkeypatch, capsys):
    """Stood in for by the CPU, right, wrong, and not there."""
    to = torch.Tensor.to
    if factor:
        monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
        as_told = lambda x, *how, **more: x * factor if how == ("mps",) else to(x, *how, **more)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "to", as_told)
    runtime.mps_works.cache_clear()
    assert runtime.pick_device("mps") == found
    runtime.mps_works.cache_clear()
    assert ("the Apple GPU cannot be used" in capsys.readouterr().out) == (found == "cpu")


def test_memory_is_counted_and_its_end_is_recognised():
    # in a process of its own: it is the peak of a whole life
    code = """
import torch
from smol import runtime
before = runtime.peak_memory("cpu")
x = torch.ones(100_000_000)
print(runtime.peak_memory("cpu") - before)
"""
    assert int(scripts.run("", before=code).stdout) > 200_000_000
    with pytest.raises(RuntimeError) as e:
        torch.empty(2**60, dtype=torch.uint8)
    assert runtime.out_of_memory(e.value)
    assert runtime.out_of_memory(MemoryError()) and not runtime.out_of_memory(RuntimeError("shape mismatch"))


DRIFT = """
import torch
from smol import runtime
runtime.start_processes("cpu")
r = runtime.rank
same = {"a": torch.arange(4.0), "b": torch.tensor([1.0], dtype=torch.float64), "n": torch.tensor(3)}
found = [runtime.difference(same)]
for odd in (0, 2):
    other = {**same, "b": same["b"] + (1e-16 * 4) * (r == odd), "n": same["n"] + (r == odd)}
    found.append(runtime.difference(other))
found += [runtime.all_agree(None), runtime.all_agree("broken" if r == 1 else None), runtime.all_agree("all")]
found += [runtime.sums([r, 0.5], "cpu"), runtime.gather(r * 10)]
print(r, repr(found), sep="|", flush=True)
with runtime.errors_agree():
    if r == 2:
        raise ValueError("no such thing")
print("not here")
"""


def test_three_processes_find_the_same_and_end_together():
    done = scripts.run("", before=DRIFT, processes=3)
    assert done.returncode == 1 and done.stderr == "error: no such thing (process 2)\n"
    found = dict(line.split("|") for line in done.stdout.splitlines())
    want = [None, *(f"process {r} differs from process 0 in b, 2 of 3 in all" for r in (1, 2))]
    want += [None, "broken (process 1)", "all", [3.0, 1.5]]
    for r, gathered in ("0", [0, 10, 20]), ("1", []), ("2", []):
        assert found[r] == repr([*want, gathered])


def test_interrupted_before_training_is_one_line():
    code = "from smol import runtime; runtime.crashed(KeyboardInterrupt, KeyboardInterrupt(), None)"
    done = scripts.run("", before=code)
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted before the first step: nothing was changed"
