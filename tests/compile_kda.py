"""
Compile the Triton kernels for GPUs that are not here, and look at what comes out. One JSON object per kernel:

    python tests/compile_kda.py --capability=86 --dtypes=bf16 --sizes=64,128 [--kernels=pairs,dinputs]

shared and stack are bytes (a stack means that registers were spilled: Triton has no other use for it), mma is the number of tensor core
instructions, dots the number of products in the intermediate code, slow_dots those of them that did not become tensor core instructions.
Works with every Triton that is first on PYTHONPATH: `make check-t4` runs it with the last one that knows Turing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from smol import kda_triton as kt  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FLOAT32 = "g beta decay initial final dfinal dinitial units dg dbeta state".split()
AS_INPUTS = "q k v o dq dk dv".split()  # the rest is what kt.low_dtype says
TENSOR_CORE = re.compile(r"\bmma\.sync|\bwgmma\.mma_async|\btcgen05\.mma\b")


def compile_kernel(name, capability, dtype, size, **overrides):
    kernel = getattr(kt, name)
    cc = (capability // 10, capability % 10)
    constants = kt.launch_constants(cc, DTYPES[dtype], 8, size, size)
    constants, options = kt.launch_parameters(kernel.fn, cc, DTYPES[dtype], constants)
    for key, value in overrides.items():
        (options if key in options else constants)[key] = value
    signature, aligned = {}, {}
    for i, arg in enumerate(kernel.arg_names):
        stem = arg.removesuffix("_ptr")
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg == "tokens":
            signature[arg] = "i32"
        elif arg == "scale":
            signature[arg] = "fp32"
        else:
            signature[arg] = "*i32" if stem in ("start", "end", "first") else "*fp32" if stem in FLOAT32 else "*" + dtype
            if dtype == "bf16" and stem not in FLOAT32 + AS_INPUTS and signature[arg] == "*bf16":
                signature[arg] = "*fp16"
            aligned[i,] = [["tt.divisibility", 16]]
    began = time.time()
    if triton.__version__ < "3.3":
        from triton.backends.compiler import AttrsDescriptor

        attrs = AttrsDescriptor.from_dict({"arg_properties": {"tt.divisibility": [i for (i,) in aligned]}, "cls": "AttrsDescriptor"})
        signature = {k: v for k, v in signature.items() if v != "constexpr"}
        source = ASTSource(kernel, signature, dict(constants), attrs)
    else:
        source = ASTSource(kernel, signature, constants, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    seconds = time.time() - began
    ptx, ir = code.asm["ptx"], code.asm["ttgir"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as f:
            f.write(code.asm["cubin"])
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    dots = [line for line in ir.splitlines() if re.search(r"= (tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ", line)]
    plain = [line for line in dots if "tt.dot " in line and not re.search(r"parent = #mma", line)]
    return {
        "kernel": name, "capability": capability, "dtype": dtype, "size": size, "options": options, "step": constants["STEP"],
        "shared": code.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "mma": len(TENSOR_CORE.findall(ptx)), "dots": len(dots), "slow_dots": len(plain), "fma": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, required=True)
    parser.add_argument("--dtypes", default="fp16,bf16")
    parser.add_argument("--sizes", default="64,128")
    parser.add_argument("--kernels", default=",".join((*kt.KERNELS, "one_step")))
    parser.add_argument("--options", type=json.loads, default={}, help='instead of the table: {"STEP": 32, "num_warps": 8}')
    args = parser.parse_args()
    for size in args.sizes.split(","):
        for dtype in args.dtypes.split(","):
            for name in args.kernels.split(","):
                print(json.dumps(compile_kernel(name, args.capability, dtype, int(size), **args.options)), flush=True)


if __name__ == "__main__":
    main()
