"""Cases for tests of training products: a projection group, its adapters, its batch and its output gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_close
from weight_tables import make_table, update

from peft_multibatch import Segments
from peft_multibatch.adapters.tables import LayerWeights
from peft_multibatch.ops.dropout import DropTable, dropped, table_rows
from peft_multibatch.ops.gradients import TrainedWeights, Wanted, add_with_gradients
from peft_multibatch.ops.torch_gradients import TorchProduct


triton_backend = pytest.importorskip("peft_multibatch.ops.triton_backend", reason="needs triton")
from peft_multibatch.ops import triton_gradients  # noqa: E402, F401, after triton was looked for
from peft_multibatch.ops.triton_gradients import TritonProduct  # noqa: E402


GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
kernels = pytest.mark.skipif(not GPU and not triton_backend.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")
both_backends = pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), pytest.param("triton", torch.float32, marks=kernels)]
)

MIXES = {
    "[0, 0, 1]": [[0, 0, 1]],
    "one row each": [[2, 0, 1]],
    "interleaved": [[2, 0, 1, 2, 0, 3]],
    "with base": [[-1, 1, -1, 0]],
    "uneven": [[0] * 100 + [1, 2, -1, 0] * 2],
    "all base": [[-1, -1]],
    "no adapter here": [[3, 3]],
    "mixtures": [[0, 1, 0, -1, 2], [1, -1, 2, -1, 0]],
}
WEIGHTS = {"mixtures": [[0.5, 1.0, 0.25, 1.0, -2.0], [0.125, 1.0, 3.0, 1.0, 0.5]]}
RANKS = [[3, 8, 1], [0, 4, 16], [5, 0, 12], [0, 0, 0]]  # slot 3 has no adapter here, and others lack a slice


def dropped_by(mask, rows, per_entry, columns, device="cpu"):
    """Apply one mask to an adapter's rows."""
    return dropped([(rows, [mask])], per_entry, columns, torch.device(device))[:, 0]


class Case:
    """A projection group, its batch and the gradients of its outputs.

    `mix` has a row per component, `ranks` one per slot, and `masks` the dropout of each slot and slice.
    """

    def __init__(self, mix, ranks, inputs, widths, dtype, weights=None, rows=2, scales=None, frozen=(), masks=None):
        scales = scales or [None] * len(mix)
        self.components = [Segments.from_ids(slots, weights=scale) for slots, scale in zip(mix, scales)]
        self.dtype, self.weights_dtype = dtype, weights or dtype
        entries = len(mix[0])
        self.x = torch.randn(entries, rows, inputs).to(DEVICE, dtype).requires_grad_("x" not in frozen)
        self.ys = [torch.randn(entries, rows, width).to(DEVICE, dtype).requires_grad_() for width in widths]
        self.grads = [torch.randn_like(y) for y in self.ys]
        used = sorted({slot for slots in mix for slot in slots} - {-1})
        self.parts = {slot: self._parts(ranks[slot], slot, inputs, widths, frozen) for slot in used}
        self.slots = len(ranks) + 2
        self.masks = masks or {}

    def _parts(self, ranks, slot, inputs, widths, frozen):
        found = []
        for i, (rank, width) in enumerate(zip(ranks, widths)):
            if not rank:
                found.append(None)
                continue
            a = (torch.randn(rank, inputs) / inputs**0.5).to(DEVICE, self.weights_dtype)
            b = torch.randn(width, rank).to(DEVICE, self.weights_dtype)
            a.requires_grad_((slot, "a") not in frozen)
            b.requires_grad_((slot, "b") not in frozen)
            found.append(LayerWeights(a.data, b.data, [2.0, -0.5, 0.25, 1.0][(slot + i) % 4], (a, b)))
        return found

    def trained(self):
        adapters = {slot: SimpleNamespace(parts=lambda _, row=row: row) for slot, row in self.parts.items()}
        return TrainedWeights(adapters, [None] * len(self.ys), self.slots)

    def product(self, kind):
        trained = self.trained()
        wanted = Wanted(self.x.requires_grad, tuple(each.requires_grad for each in trained.parameters))
        if kind is TorchProduct:
            return TorchProduct(self.components, trained, wanted, self.masks), trained
        table = make_table(self.weights_dtype, self.slots, len(self.ys), DEVICE)
        update(table, self.parts)
        drops = self.drops() if self.masks else None
        return TritonProduct(self.components, [table.describe(self.parts)], trained, wanted, drops), trained

    def drops(self):
        steps = [
            next((mask.step for (own, _), mask in self.masks.items() if own == slot), 0) for slot in range(self.slots)
        ]
        rows = table_rows(self.masks, self.slots, len(self.ys), torch.device(DEVICE))
        return DropTable(rows, torch.tensor(steps, dtype=torch.int32, device=DEVICE))

    def without_dropout(self):
        other = Case.__new__(Case)
        other.__dict__ |= {**self.__dict__, "masks": {}}
        return other

    def run(self, kind):
        product, trained = self.product(kind)
        return add_with_gradients(product, trained, self.ys, self.x), trained

    def tensors(self, trained):
        return [each for each in (self.x, *self.ys, *trained.parameters) if each.requires_grad]

    def gradients(self, kind, grads=None):
        outputs, trained = self.run(kind)
        found = torch.autograd.grad(outputs, self.tensors(trained), grads or self.grads)
        return outputs, list(found)

    def exact(self):
        """The same in float64; inputs are first rounded to the weights' dtype, as in PEFT."""
        other = Case.__new__(Case)
        other.__dict__ |= self.__dict__
        other.dtype = other.weights_dtype = torch.float64
        other.x = self.x.detach().to(self.weights_dtype).double().requires_grad_(self.x.requires_grad)
        other.ys = [y.detach().double().requires_grad_() for y in self.ys]
        other.grads = [grad.to(self.weights_dtype).double() for grad in self.grads]
        other.parts = {}
        for slot, row in self.parts.items():
            other.parts[slot] = []
            for part in row:
                pair = part and tuple(p.detach().double().requires_grad_(p.requires_grad) for p in part.parameters)
                other.parts[slot].append(part and LayerWeights(pair[0].data, pair[1].data, part.scaling, pair))
        return other

    def by_autograd(self):
        """Compute outputs and gradients with autograd, one sample and adapter at a time."""
        outputs = []
        per_entry, inputs = self.x.shape[1:]
        for i, y in enumerate(self.ys):
            rows = list(y)
            for component in self.components:
                found = component.rows(len(rows), torch.device("cpu"))
                for (slot, entries), weight in zip(found, component.scales):
                    part = self.parts[slot][i] if slot >= 0 else None
                    for sample, entry in enumerate(torch.arange(len(rows))[entries].tolist() if part else ()):
                        (a, b), x, mask = part.parameters, self.x[entry], self.masks.get((slot, i))
                        if mask is not None:  # the number of samples may have changed
                            dropped = dropped_by(mask, (sample + 1) * per_entry, per_entry, inputs, x.device)
                            x = x.masked_fill(dropped[-per_entry:], 0) * mask.scale
                        rows[entry] = rows[entry] + (x @ a.t() @ b.t()) * (part.scaling * weight)
            outputs.append(torch.stack(rows))
        tensors = self.tensors(self.trained())
        return outputs, list(torch.autograd.grad(outputs, tensors, self.grads, materialize_grads=True))


def make(mix, slices=3, **options):
    widths = options.pop("widths", [40, 24, 33])[:slices]
    inputs = options.pop("inputs", 72)
    ranks = [row[:slices] for row in options.pop("ranks", RANKS)]
    return Case(MIXES[mix], ranks, inputs, widths, options.pop("dtype"), scales=WEIGHTS.get(mix), **options)


def check(case):
    """Compare the kernels with float64, twice: the same input gives the same bits."""
    outputs, gradients = case.gradients(TritonProduct)
    again, gradients_again = case.gradients(TritonProduct)
    wanted, expected = case.exact().gradients(TorchProduct)
    coarsest = max(case.dtype, case.weights_dtype, key=lambda each: torch.finfo(each).eps)
    for actual, twice, exact in zip([*outputs, *gradients], [*again, *gradients_again], [*wanted, *expected]):
        assert_close(actual, exact, coarsest)
        assert torch.equal(actual, twice)
    for actual, tensor in zip(gradients, case.tensors(case.trained())):
        assert (actual.dtype, actual.shape) == (tensor.dtype, tensor.shape)


class Counted:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


GPU_DTYPES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")]
