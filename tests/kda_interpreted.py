"""
The kernels of kda.py in Triton's interpreter, on a CPU. test_kda_triton.py runs this file in a process of its
own: Triton looks for TRITON_INTERPRET when it is imported, and other tests need it without.

    TRITON_INTERPRET=1 python -m pytest tests/kda_interpreted.py
"""

import pytest
import torch
from test_kda import GATES, by_kda, check, make, make_layer, run

import kda

# pairs that are not taken may overflow
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in matmul")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def compare_kernels(what, inputs, dtype=torch.float32, final=True):
    tolerance = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 1e-2)
    inputs = [t.to(dtype).double() if i < 3 else t for i, t in enumerate(inputs)]

    def by_triton(q, k, v, *rest):
        return by_kda(*(t.to(dtype) for t in (q, k, v)), *rest, final=final, backend="triton")

    exact = run(lambda *i: by_kda(*i, final=final), inputs, torch.float64, final)
    for got, want, allowed in zip(run(by_triton, inputs, final=final), exact, tolerance):
        check(got, want, allowed, what)


@pytest.mark.parametrize("gate", GATES)
def test_any_gate(gate):
    row = 3 if gate in ("none", "resets") else 0  # beta 2, or random
    inputs = [t[row : row + 1] for t in make(gate, 70, H=1, K=16, V=16)]
    inputs[3] = inputs[3].clamp(min=-16)  # float64 clamps later
    compare_kernels(gate, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_and_no_states(dtype):
    for gate in ("mild", "strong"):
        inputs = [t.clamp(min=-16) for t in make(gate, 70, H=1, K=16, V=16)]
        compare_kernels(gate, [t[:1, :40] for t in inputs[:5]], dtype, final=False)
        compare_kernels(gate, [t[3:] for t in inputs], dtype)


@pytest.mark.parametrize("K, V", ((32, 16), (24, 40), (128, 64)))
def test_sizes(K, V):
    compare_kernels(f"K={K}, V={V}", [t[:1].clamp(min=-16) for t in make("uneven", 30, H=2, K=K, V=V)])


def test_a_layer(monkeypatch):
    layer, x, results = make_layer(), torch.randn(1, 40, 12), []
    for backend in ("triton", "chunk"):
        monkeypatch.setattr(kda, "BACKEND", backend)
        y, _ = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), layer.parameters())])
    for got, want in zip(*results):
        check({"layer": got}, {"layer": want}, 1e-4, "through the layer")
