"""Compile kernels for GPUs that aren't here, and print how much shared memory they need.

    python tests/ops/shared_memory.py --capability 89 --limit 101376 --ranks 128,256 --dtypes float32

A program of its own, because tests run kernels in Triton's interpreter, which has no such limit. Its exit status is 1
if a kernel needs more than the limit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


sys.path.insert(0, str(Path(__file__).parents[1]))
from products import Case, TritonProduct

from peft_multibatch.adapters.tables import TableRows
from peft_multibatch.ops import triton_backend, triton_gradients
from peft_multibatch.ops.launches import Limits, fits


TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}
# adapters of a batch, rows of each, slices: each way of choosing a launch; with several slices also for any plan
BATCHES = [(4, 1, 1), (64, 1, 1), (64, 1, 3), (4, 128, 2), (10, 100, 3), (3, 512, 1), (32, 512, 1), (32, 512, 3)]


class Recorded:
    """Stands in for a kernel, and keeps how it is launched."""

    def __init__(self, kernel, found):
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid):
        return lambda *args, **options: self._found.append((self._kernel, args, options))


def launches(rank, dtype, limit):
    """Return the launches of inference and training for adapters of this rank, if kernels run them."""
    found = []
    for module in (triton_backend, triton_gradients):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            setattr(module, name, Recorded(kernel._kernel if isinstance(kernel, Recorded) else kernel, found))
    rows = torch.zeros(1, 3, 4, dtype=torch.int64)
    for segments, longest, slices in BATCHES if fits(rank, dtype.itemsize, limit) else ():
        table, widths = TableRows(rows, dtype, rank, True), [4096] * slices
        x, ys = torch.empty(1, 4096, dtype=dtype), [torch.empty(1, 4096, dtype=dtype) for _ in widths]
        for loops, adds in [(False, True), (True, True), (True, False)][: None if slices > 1 else 1]:
            product = triton_backend.product(ys, x, widths, segments, longest, table, loops=loops, adds=adds)
            product(ys, x, torch.zeros(8, dtype=torch.int32), rows)
    if fits(rank, dtype.itemsize, limit, trains=True):
        case = Case([[0, 0, 1]], [[rank] * 3] * 2, 256, [256] * 3, dtype, rows=64)
        product, _ = case.product(TritonProduct)
        _, h = product.forward(case.ys, case.x)
        product.backward(case.grads, case.x, h)
    return found


def shared_memory(kernel, args, options, capability):
    """Compile a launch, and return the bytes of shared memory that a program needs."""
    signature, constants, hints = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, args)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[place,] = "constexpr", value
            continue
        signature[parameter.name] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or (not parameter.do_not_specialize and value % 16 == 0):
            hints[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    options = {name: options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=89)
    parser.add_argument("--limit", type=int, default=99 * 1024, help="bytes of shared memory per program")
    parser.add_argument("--ranks", default="128,512")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    triton_backend.INTERPRETED = True  # otherwise it asks a GPU
    triton_backend.limits_of = triton_gradients.limits_of = lambda _: Limits(132, options.limit)
    seen, is_over = {}, False
    for dtype in options.dtypes.split(","):
        for rank in map(int, options.ranks.split(",")):
            for kernel, args, extra in launches(rank, getattr(torch, dtype), options.limit):
                constants = {p.name: a for p, a in zip(kernel.params, args) if p.is_constexpr}
                named = ("R", "SPLITS", "ADDS", "LOOP", "BY_COLUMNS")
                blocks = {name: value for name, value in constants.items() if name in named or "BLOCK" in name}
                key = kernel.__module__, kernel.__name__, dtype, *blocks.items(), *extra.values()
                if key in seen:
                    continue
                seen[key] = shared_memory(kernel, args, extra, options.capability)
                is_over |= seen[key] > options.limit
                mark = "  <-- too much" if seen[key] > options.limit else ""
                name = f"{kernel.__module__[-16:]} {kernel.__name__}"
                print(f"{seen[key]:7} {name} {dtype} {blocks} {extra}{mark}", flush=True)
    sys.exit(is_over)


if __name__ == "__main__":
    main()
