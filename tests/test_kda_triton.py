"""
The Triton kernels without a GPU: right in Triton's interpreter (kda_interpreted.py), and compiled
(compile_kda.py).
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
TESTS = os.path.dirname(os.path.abspath(__file__))
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program can have


def python(*args, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1", **environment}
    done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def check(capability, sizes):
    """
    Compile, and complain about anything that would make a kernel slow on this hardware, or impossible to
    launch.
    """
    args = f"--capability={capability}", f"--sizes={sizes}"
    results = [json.loads(line) for line in python(os.path.join(TESTS, "compile_kda.py"), *args).splitlines()]
    assert len(results) == 4 * len(sizes.split(","))  # states_kernel in both directions
    for r in results:
        assert r["shared"] <= SHARED[capability] and r["stack"] <= 8, r  # two registers
        assert r["slow_dots"] == 0 and r["mma"] > 0, r


def test_in_the_interpreter():
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    python("-m", "pytest", *options, f"{TESTS}/kda_interpreted.py", TRITON_INTERPRET="1")


def test_compiles():
    check(86, "64")


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_compiles_for_others(capability):
    check(capability, "64,128")
