"""The training kernels compile for GPUs, which the untyped interpreter can't check. This needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


pytest.importorskip("triton")

PROGRAM = """
import itertools
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peft_multibatch.ops import triton_gradient_kernels, triton_training_kernels

WEIGHTS = {"fp32": tl.float32, "bf16": tl.bfloat16}
POINTERS = {"plan": "*i32", "table": "*i64", "drops": "*i64", "steps": "*i32", "offsets": "*i64"}
OF_WEIGHTS = ("out", "h", "ds", "grads", "left")

def compile(kernel, weights, **constants):
    constants |= {"WEIGHTS": WEIGHTS[weights], "ALIGNED": True, "PRECISION": "tf32x3", "R": 16, "BLOCK_T": 32}
    constants = {name: each for name, each in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in OF_WEIGHTS:
            signature[name] = f"*{weights}"
        elif name.startswith(("in", "to", "from", "dx")):
            signature[name] = "*bf16"
        else:
            signature[name] = POINTERS.get(name, "i32")
    signature |= {name: "i32" for name in ("num_inputs", "tiles") if name in signature}
    constants = {(kernel.arg_names.index(name),): each for name, each in constants.items()}
    triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))

count = 0
for weights, drops in itertools.product(WEIGHTS, (False, True)):
    shared = {"weights": weights, "DROPS": drops, "SLICES": 3, "BLOCK_C": 64, "BLOCK_R": 16, "REPEATS": drops}
    for backward in (False, True):
        compile(triton_training_kernels.shrink_kernel, IS_BACKWARD=backward, **shared)
    compile(triton_training_kernels.expand_kernel, IN_PLACE=False, **shared)
    compile(triton_gradient_kernels.grad_x_kernel, IN_PLACE=drops, **shared)
    compile(triton_gradient_kernels.grad_weight_kernel, IS_B=False, IN_PLACE=False, **shared)
    count += 5
print("compiled", count)
"""


def test_training_kernels(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "compiled 20"
