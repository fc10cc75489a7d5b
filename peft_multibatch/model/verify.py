"""Verifies a model's mixed batches: compares a batch with PEFT, and runs it with samples replaced.

Names and shapes can't prove that a layer's rows are in the order of the samples. Two experiments can. First, the batch
runs once mixed, and once through PEFT for each of its adapters: each sample's part of every output must equal that of
its own adapter. Second, the base model runs once per sample with that sample replaced by another one: in no layer may
rows of other samples change. The second experiment also finds which part of an output belongs to which sample, so
outputs may have the samples in any dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from peft_multibatch.compat import AuxiliaryTrainingWrapper, BaseTunerLayer, LoraLayer, PeftModel, set_adapter
from peft_multibatch.errors import AdapterIdsLengthError, MultibatchError
from peft_multibatch.plan.ids import Entry
from peft_multibatch.plan.segments import BASE
from peft_multibatch.report import LayerCheck, OutputCheck, Verification


# The largest error of an output, relative to its largest value, that rounding can explain.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


class Verifier:
    """Compares one mixed batch with PEFT.

    Args:
        model: the model to call.
        inner: the model that contains the layers.
        layers: the patched layers and their names.
        in_order: the names of layers whose rows should be in the order of the samples.
        entries: the entry of each sample.
        names: the names of the adapters in the entries, by id.
        inputs: the keyword arguments of the call.
        tolerance: as in ``Multibatch.verify``.

    Raises:
        AdapterIdsLengthError: there are fewer than two samples.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: nn.Module,
        layers: Mapping[nn.Module, str],
        in_order: Collection[str],
        entries: Sequence[Entry],
        names: Mapping[int, str | None],
        inputs: dict[str, Any],
        tolerance: float | None,
    ) -> None:
        if len(entries) < 2:
            raise AdapterIdsLengthError(
                f"verify was called with {len(entries)} adapter ids: expected at least two samples, because it "
                "replaces samples by each other. Pass a batch of three or four different samples."
            )
        self._model, self._inner, self._layers, self._in_order = model, inner, layers, in_order
        self._entries, self._names, self._inputs = entries, names, inputs
        dtypes = [each.dtype for each in inner.parameters() if each.dtype in TOLERANCES]
        self._unexchanged: list[int] = []
        self._tolerance = tolerance or max((TOLERANCES[dtype] for dtype in set(dtypes)), default=1e-4)

    def run(self, adapter_ids: Any) -> Verification:
        """Run both experiments, and compare the outputs.

        Raises:
            MultibatchError: the mixed batch can't run.
        """
        mixed, inside = self._call({**self._inputs, "adapter_ids": adapter_ids}, keeps_inputs=False)
        references, errors = {}, [0.0] * len(inside)
        for entry in dict.fromkeys(self._entries):
            samples = [index for index, each in enumerate(self._entries) if each == entry]
            with self._under(entry):
                references[entry], found = self._call(self._inputs, keeps_inputs=False)
            if len(found) == len(inside):  # not if whether a layer runs depends on the adapters
                for index, ((_, actual), (_, expected)) in enumerate(zip(inside, found)):
                    errors[index] = max(errors[index], self._row_error(actual, expected, samples))
        with self._under(BASE):
            base, rows = self._call(self._inputs, keeps_inputs=True)
            exchanged = [self._exchange(sample) for sample in range(len(self._entries))]
        outputs = tuple(
            self._check_output(name, value, base, [each[0] for each in exchanged], references)
            for name, value in mixed.items()
        )
        strangers = [self._strangers(index, rows, [each[1] for each in exchanged]) for index in range(len(rows))]
        layers = tuple(
            LayerCheck(layer, errors[index], strangers[index] if len(rows) == len(inside) else "")
            for index, (layer, _) in enumerate(inside)
        )
        return Verification(outputs, layers, self._tolerance)

    def _exchange(self, sample: int) -> tuple[dict[str, Tensor], list[tuple[str, Tensor]]]:
        """Run the base model with one sample replaced; returns nothing if the model can't run these inputs."""
        try:
            return self._call(_exchanged(self._inputs, sample, len(self._entries)), keeps_inputs=True)
        except MultibatchError:
            raise
        except Exception:  # for example, if the replaced sample has a different number of images
            self._unexchanged.append(sample)
            return {}, []

    def _call(self, inputs: dict[str, Any], keeps_inputs: bool) -> tuple[dict[str, Tensor], list[tuple[str, Tensor]]]:
        """The model's outputs, and the inputs or outputs of its layers, in the order in which they ran."""
        inside: list[tuple[str, Tensor]] = []

        def keep(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            value = (*args, *kwargs.values()) if keeps_inputs else output
            found = next((each for each in _flat(value, "").values()), None)
            if found is not None:
                inside.append((self._layers[layer], found))

        hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in self._layers]
        devices = [*range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                torch.manual_seed(0)
                return _flat(self._model(**inputs), ""), inside
        finally:
            for hook in hooks:
                hook.remove()

    def _under(self, entry: Entry) -> AbstractContextManager[None]:
        if entry == BASE:
            return _alone(self._model, self._inner, {})
        pairs = entry if isinstance(entry, tuple) else ((entry, 1.0),)
        return _alone(self._model, self._inner, {str(self._names[number]): weight for number, weight in pairs})

    def _row_error(self, actual: Tensor, expected: Tensor, samples: Sequence[int]) -> float:
        """The largest error in the rows of some samples, relative to the largest value."""
        count = len(self._entries)
        if actual.shape != expected.shape or not actual.numel() or not actual.dim() or len(actual) % count:
            return 0.0  # rows can't be mapped by their number; the comparison of outputs covers these layers
        if not _is_whole(self._inputs, count) and len(actual) != count:
            return 0.0  # rows of images
        rows = [each.unflatten(0, (count, -1))[list(samples)] for each in (actual, expected)]
        return (
            float((rows[0] - rows[1]).abs().max() / expected.abs().max().clamp_min(TINY)) if rows[0].numel() else 0.0
        )

    def _strangers(self, index: int, base: list, exchanged: list[list]) -> str:
        """Why the rows of a layer's input can't be in the order of the samples; the empty string if they can."""
        count, (name, rows) = len(self._entries), base[index]
        if name not in self._in_order or not rows.numel() or not rows.dim() or len(rows) % count:
            return ""  # a mixed batch refuses these
        scale = rows.abs().max().clamp_min(TINY)
        parts = rows.unflatten(0, (count, -1))
        has_changed = False
        for sample, each in enumerate(exchanged):
            if len(each) != len(base) or each[index][1].shape != rows.shape:
                return ""
            change = (each[index][1].unflatten(0, (count, -1)) - parts).abs().flatten(1)
            largest = change.max(1).values / scale
            others = [other for other in range(count) if other != sample and largest[other] > self._tolerance]
            if others and not _is_whole(self._inputs, count):
                return ""  # images of other samples may have moved
            if others:
                return f"rows of sample {others[0]} change with sample {sample}"
            has_changed = has_changed or bool(largest[sample] > self._tolerance)
        if not (has_changed or self._model.training) and (parts - parts[:1]).abs().max() > self._tolerance * scale:
            return "rows differ between samples, but don't change with any of them"
        return ""

    def _check_output(
        self,
        name: str,
        actual: Tensor,
        base: dict[str, Tensor],
        exchanged: list[dict[str, Tensor]],
        references: dict[Entry, dict[str, Tensor]],
    ) -> OutputCheck:
        shape, known = tuple(actual.shape), [*references.values(), base, *exchanged]
        if any(each and (name not in each or each[name].shape != actual.shape) for each in known):
            return OutputCheck(name, shape, 0.0, (), "its shape depends on the samples or the adapters: not compared")
        owners = _owners(base[name], [each.get(name, base[name]) for each in exchanged], self._tolerance)
        is_seen = owners is not None and len(self._unexchanged) < len(exchanged)
        is_apart = is_seen or _is_whole(self._inputs, len(exchanged))
        if not is_apart or len(self._unexchanged) == len(exchanged):  # assume the samples in dimension 0
            has_samples = actual.dim() and (is_apart or len(actual) == len(exchanged))  # and not rows of images
            owners = _parts(actual.shape, 0, len(exchanged)) if has_samples else None
        if owners is None:
            return OutputCheck(name, shape, 0.0, (), "parts of it depend on several samples: not compared")
        scale = max(float(each[name].abs().max()) if actual.numel() else 0.0 for each in references.values())
        wrong, largest, spread = [], 0.0, 0.0
        for sample, (entry, own) in enumerate(zip(self._entries, owners)):
            expected = references[entry][name][own]
            difference = (actual[own] - expected).abs()
            difference[actual[own] == expected] = 0.0  # infinities from masks
            error = float(difference.nan_to_num(float("inf")).max()) / max(scale, TINY) if own.any() else 0.0
            spreads = [(each[name][own] - expected).abs().nan_to_num(0.0, 0.0) for each in references.values()]
            spread = max(spread, *(float(each.max()) if each.numel() else 0.0 for each in spreads))
            largest = max(largest, error)
            if error > self._tolerance:
                wrong.append(sample)
        note = ""
        if not any(own.any() for own in owners):
            note = "no part of it depends on any sample: not compared"
        elif spread <= self._tolerance * scale:
            note = "it is the same for all of these adapters: nothing to compare"
        elif sum(int(own.sum()) for own in owners) < actual.numel():
            note = "a part of it depends on no sample: the rest was compared"
        elif not is_apart:
            note = "inputs have rows that aren't samples: compared in the order of the samples"
        elif self._unexchanged:
            note = f"samples {', '.join(map(str, self._unexchanged))} can't be replaced: compared in their order"
        is_tested = any(own.any() for own in owners) and spread > self._tolerance * scale
        return OutputCheck(name, shape, largest, tuple(wrong), note, is_tested)


TINY = 1e-30


@contextlib.contextmanager
def _alone(model: nn.Module, inner: nn.Module, weights: dict[str, float]) -> Iterator[None]:
    """Run the model through plain PEFT with some adapters active, or none, and restore its state afterwards."""
    layers = [each for each in inner.modules() if isinstance(each, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    states = [{key: each.__dict__.get(key) for key in ("_active_adapter", "_disable_adapters")} for each in layers]
    trained = [(each, each.requires_grad) for each in inner.parameters()]
    outer = model if isinstance(model, PeftModel) and weights else None
    before = outer.active_adapter if outer is not None else None
    scaled: list[tuple[Any, str, Any]] = []
    try:
        for layer in layers:
            layer.enable_adapters(bool(weights))
        if weights:
            active: Any = [*weights] if len(weights) > 1 else next(iter(weights))
            if outer is not None and isinstance(active, str):
                outer.set_adapter(active)
            else:
                set_adapter(inner, active, inference_mode=True)
            for layer in layers:
                for name, weight in weights.items() if isinstance(layer, LoraLayer) else ():
                    if weight != 1.0 and name in layer.scaling:
                        scaled.append((layer, name, layer.scaling[name]))
                        layer.scaling[name] = layer.scaling[name] * weight
        yield
    finally:
        for layer, name, scaling in scaled:
            layer.scaling[name] = scaling
        if outer is not None:
            outer.set_adapter(before)
        for layer, state in zip(layers, states):
            layer.enable_adapters(not state["_disable_adapters"])
            layer.__dict__.update({key: value for key, value in state.items() if value is not None})
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _exchanged(value: Any, sample: int, count: int) -> Any:
    """Inputs with one sample replaced by another, in all tensors that have as many rows as there are samples."""
    other = (sample + 1) % count
    if isinstance(value, Tensor) and value.dim() and len(value) == count:
        order = torch.arange(count, dtype=torch.int64, device=value.device)
        order[sample] = other
        return value[order]
    if isinstance(value, Mapping):
        return {key: _exchanged(each, sample, count) for key, each in value.items()}
    if isinstance(value, (list, tuple)) and len(value) == count and all(isinstance(each, Tensor) for each in value):
        return type(value)([*value[:sample], value[other], *value[sample + 1 :]])
    return value


def _is_whole(value: Any, count: int) -> bool:
    """Whether all tensors of the inputs have as many rows as there are samples, so that a sample can be replaced."""
    if isinstance(value, Mapping):
        return all(_is_whole(each, count) for each in value.values())
    if isinstance(value, (list, tuple)):
        return len(value) == count or all(_is_whole(each, count) for each in value)
    return not isinstance(value, Tensor) or not value.dim() or len(value) == count


def _owners(base: Tensor, exchanged: list[Tensor], tolerance: float) -> list[Tensor] | None:
    """One mask per sample of the elements that belong to it; None if some elements change with several samples.

    If a model mixes samples, its outputs can't be compared at all, not even those elements that didn't change.
    """
    scale = (
        base.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(TINY)
        if base.numel()
        else torch.ones((), dtype=base.dtype, device=base.device)
    )
    changes = [(each - base).abs().nan_to_num(0.0) > tolerance * scale for each in exchanged]
    for dim in range(base.dim()):
        masks = _parts(base.shape, dim, len(changes))
        if masks is None or not any(change.any() for change in changes):
            continue
        if not any((change & ~mask).any() for change, mask in zip(changes, masks)):
            return masks
    times = torch.stack(changes).sum(0)
    return None if (times > 1).any() else changes


def _parts(shape: Sequence[int], dim: int, count: int) -> list[Tensor] | None:
    """One mask per sample, if the rows in a dimension are in the order of the samples; None if it can't have them."""
    size = shape[dim] // count
    if shape[dim] % count:
        return None
    masks = [torch.zeros(shape, dtype=torch.bool, device="cpu") for _ in range(count)]
    for sample, mask in enumerate(masks):
        mask.narrow(dim, sample * size, size).fill_(True)
    return masks


def _flat(value: Any, name: str) -> dict[str, Tensor]:
    """All tensors of an output by name, on the CPU, and in at least float32."""
    if isinstance(value, Tensor):
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return {name or "output": value.detach().to("cpu", torch.promote_types(value.dtype, torch.float32), copy=True)}
    items: Any = ()
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}" if name else str(key), each) for key, each in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{name}[{index}]", each) for index, each in enumerate(value)]
    return {key: tensor for inner, each in items for key, tensor in _flat(each, inner).items()}
