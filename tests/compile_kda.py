"""
Compile the Triton kernels of kda.py for GPUs that are not here, and look at what comes out. One JSON object
per kernel:

    python tests/compile_kda.py --capability=86 --dot=tf32 --sizes=64,128 [--options='{"STEP": 32}']

shared and stack are bytes (a stack means that registers were spilled: Triton has no other use for it), mma is
the number of tensor core instructions, slow_dots the number of products that did not become any.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import kda  # noqa: E402

TENSOR_CORE = re.compile(r"\bmma\.sync|\bwgmma\.mma_async|\btcgen05\.mma\b")


def compile_kernel(name, capability, dot, size, back, overrides):
    kernel = getattr(kda, name)
    step, warps = kda.LAUNCH[name]
    constants = {"DOT": dot, "STEP": min(step, size), "KPAD": size, "BACK": back} | overrides
    options = {"num_warps": constants.pop("num_warps", warps), "num_stages": constants.pop("num_stages", 1)}
    constants = {arg: constants[arg] for arg in kernel.arg_names if arg in constants}
    signature = {
        arg: "*fp32" if arg.endswith("_p") else "i32" for arg in kernel.arg_names if arg not in constants
    }
    # what a launch with 64 or 128 channels finds out: pointers and sizes are multiples of 16
    aligned = [i for i, arg in enumerate(kernel.arg_names) if arg in signature and arg != "N"]
    if triton.__version__ < "3.3":
        from triton.backends.compiler import AttrsDescriptor

        properties = {"arg_properties": {"tt.divisibility": aligned}, "cls": "AttrsDescriptor"}
        source = ASTSource(kernel, signature, constants, AttrsDescriptor.from_dict(properties))
    else:
        signature |= {arg: "constexpr" for arg in constants}
        source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(code.asm["cubin"])
        f.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        usage = subprocess.run(
            [tool, "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    dots = re.findall(r"= tt\.dot .*", code.asm["ttgir"])
    return {
        "kernel": name,
        "backwards": back,
        "capability": capability,
        "dot": dot,
        "size": size,
        "shared": code.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "mma": len(TENSOR_CORE.findall(code.asm["ptx"])),
        "slow_dots": len([line for line in dots if not re.search(r"parent = #mma", line)]),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, required=True)
    parser.add_argument("--dot", default="tf32", choices=("tf32", "ieee"))
    parser.add_argument("--sizes", default="64,128")
    parser.add_argument("--kernels", default=",".join(kda.LAUNCH))
    parser.add_argument("--options", type=json.loads, default={})
    args = parser.parse_args()
    for size in args.sizes.split(","):
        for name in args.kernels.split(","):
            for back in (False, True) if name == "states_kernel" else (None,):
                found = compile_kernel(name, args.capability, args.dot, int(size), back, args.options)
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
