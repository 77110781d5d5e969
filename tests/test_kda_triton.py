"""
The Triton kernels without a GPU: right in Triton's interpreter (tests/kda_interpreted.py), and compiled for GPUs (tests/compile_kda.py).
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")
from smol import kda_triton as kt  # noqa: E402

TESTS = os.path.dirname(os.path.abspath(__file__))
SHARED = {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block can have


def python(*args, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1", **environment}
    done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def check(capability, dtypes, sizes, kernels=None, spills=0, **environment):
    """Compile, and complain about anything that would make a kernel slow on this hardware, or impossible to launch."""
    args = [f"--capability={capability}", f"--dtypes={dtypes}", f"--sizes={sizes}"] + ([f"--kernels={kernels}"] if kernels else [])
    results = [json.loads(line) for line in python(os.path.join(TESTS, "compile_kda.py"), *args, **environment).splitlines()]
    assert len(results) == len(dtypes.split(",")) * len(sizes.split(",")) * len(kernels.split(",") if kernels else [*kt.KERNELS, "step"])
    for r in results:
        assert r["shared"] <= SHARED[capability], r
        assert r["stack"] <= spills, r
        assert r["slow_dots"] == 0, r
        assert (r["mma"] > 0) == (r["kernel"] != "one_step"), r
    return results


def test_in_the_interpreter():
    python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", os.path.join(TESTS, "kda_interpreted.py"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability, dtype", [(80, "bf16"), (86, "fp16"), (90, "bf16"), (100, "bf16")])
def test_compiles(capability, dtype):
    if capability == 100 and kt.triton.__version__.startswith("3.2"):
        pytest.skip("Triton 3.2 does not know this capability")
    check(capability, dtype, "64")


def test_compiles_for_turing_if_only_to_multiply_adds():
    out = python(os.path.join(TESTS, "compile_kda.py"), "--capability=75", "--dtypes=fp16", "--sizes=64")
    results = [json.loads(line) for line in out.splitlines()]
    assert {r["kernel"] for r in results} == {*kt.KERNELS, "one_step"}
    for r in results:
        assert r["shared"] <= SHARED[75]
        assert (r["mma"] > 0) == (kt.tensor_cores_on_turing() and r["kernel"] != "one_step")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_everything_compiles(capability):
    check(capability, "fp16,bf16", "64,128")
    check(capability, "fp32", "64,128", spills=0 if capability == 100 else 512)  # float32 inputs are for tests, not for speed


@pytest.mark.slow
def test_t4_with_the_last_triton_that_knows_it(tmp_path):
    install = ["uv", "pip", "install"] if shutil.which("uv") else [sys.executable, "-m", "pip", "install"]
    subprocess.run([*install, "--quiet", "--target", str(tmp_path), "triton==3.2.0", "setuptools"], check=True)
    results = check(75, "fp16", "64,128", PYTHONPATH=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert len(results) == 2 * (len(kt.KERNELS) + 1)
    assert python("-c", "import kda_triton; print(kda_triton.tensor_cores_on_turing())", PYTHONPATH=f"{tmp_path}:{TESTS}/..") == "True\n"
