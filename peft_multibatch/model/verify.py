"""Asking whether a model's mixed batches are right: the same batch under PEFT, and with its samples exchanged.

Whether the rows of a layer are those of the samples, in their order, is something that no name and no shape can tell
for certain. Two experiments can. The batch runs once mixed, and once under every one of its adapters as PEFT alone
runs it: each sample's part of each output has to be what it is under the sample's own adapter. And the base model runs
once more for every sample with that sample exchanged for another: at no layer may a row change that counts as another
sample's. Which part of an output is which sample's follows from the second experiment as well, so that outputs may
have the samples in any dimension.
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


# Error of an output, as a part of its largest value, that rounding may account for.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


class Verifier:
    """Compares one mixed batch with PEFT.

    Args:
        model: what is called.
        inner: the model that holds the layers.
        layers: the patched layers and their names.
        in_order: names of those whose rows count as the samples' in order.
        entries: what each sample runs under.
        names: names of the adapters that entries mention.
        inputs: keyword arguments of the call.
        tolerance: as in ``Multibatch.verify``.
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
                f"verify was called with {len(entries)} adapter ids: expected at least two samples, because what "
                "belongs to which is found by exchanging them. Pass a batch of three or four different samples."
            )
        self._model, self._inner, self._layers, self._in_order = model, inner, layers, in_order
        self._entries, self._names, self._inputs = entries, names, inputs
        dtypes = [each.dtype for each in inner.parameters() if each.dtype in TOLERANCES]
        self._unexchanged: list[int] = []
        self._tolerance = tolerance or max((TOLERANCES[dtype] for dtype in set(dtypes)), default=1e-4)

    def run(self, adapter_ids: Any) -> Verification:
        """Run the batch in all ways, and compare.

        Raises:
            MultibatchError: the mixed batch can't run; whatever it raises.
        """
        mixed, inside = self._call({**self._inputs, "adapter_ids": adapter_ids}, keeps_inputs=False)
        references, errors = {}, [0.0] * len(inside)
        for entry in dict.fromkeys(self._entries):
            samples = [index for index, each in enumerate(self._entries) if each == entry]
            with self._under(entry):
                references[entry], found = self._call(self._inputs, keeps_inputs=False)
            if len(found) == len(inside):  # else a layer runs or doesn't depending on the adapters
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
        """The base model with one sample exchanged; nothing where the model can't take another one in its place."""
        try:
            return self._call(_exchanged(self._inputs, sample, len(self._entries)), keeps_inputs=True)
        except MultibatchError:
            raise
        except (
            Exception
        ):  # such as other numbers of images, which belong to inputs of which nobody knows whose they are
            self._unexchanged.append(sample)
            return {}, []

    def _call(self, inputs: dict[str, Any], keeps_inputs: bool) -> tuple[dict[str, Tensor], list[tuple[str, Tensor]]]:
        """What the model returns, and what went into or came out of its layers, in the order in which they ran."""
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
        """The largest error in the rows that count as some samples', as a part of the largest value."""
        count = len(self._entries)
        if actual.shape != expected.shape or not actual.numel() or not actual.dim() or len(actual) % count:
            return 0.0  # whose rows they are is told by the outputs
        rows = [each.unflatten(0, (count, -1))[list(samples)] for each in (actual, expected)]
        return (
            float((rows[0] - rows[1]).abs().max() / expected.abs().max().clamp_min(TINY)) if rows[0].numel() else 0.0
        )

    def _strangers(self, index: int, base: list, exchanged: list[list]) -> str:
        """Why the rows of a layer's input can't be the samples' in their order; the empty string if they can."""
        count, (name, rows) = len(self._entries), base[index]
        if name not in self._in_order or not rows.numel() or not rows.dim() or len(rows) % count:
            return ""  # which the call refuses
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
                return ""  # another sample's images may have moved
            if others:
                return f"rows that count as sample {others[0]}'s change with sample {sample}"
            has_changed = has_changed or bool(largest[sample] > self._tolerance)
        if not (has_changed or self._model.training) and (parts - parts[:1]).abs().max() > self._tolerance * scale:
            return "rows that count as samples' change with none of them, and differ"
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
        is_apart = owners is not None or _is_whole(self._inputs, len(exchanged))
        if not is_apart or len(self._unexchanged) == len(exchanged):  # then nothing tells but what users expect
            owners = _parts(actual.shape, 0, len(exchanged)) if actual.dim() else None
        if owners is None:
            return OutputCheck(name, shape, 0.0, (), "parts of it depend on several samples: not compared")
        scale = max(float(each[name].abs().max()) if actual.numel() else 0.0 for each in references.values())
        wrong, largest, spread = [], 0.0, 0.0
        for sample, (entry, own) in enumerate(zip(self._entries, owners)):
            expected = references[entry][name][own]
            difference = (actual[own] - expected).abs()
            difference[actual[own] == expected] = 0.0  # infinities of masks
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
            note = "it is the same under all of these adapters: nothing could be seen"
        elif sum(int(own.sum()) for own in owners) < actual.numel():
            note = "a part of it depends on no sample: the rest was compared"
        elif not is_apart:
            note = "inputs have rows that are no samples: compared by the order of the samples"
        elif self._unexchanged:
            note = f"samples {', '.join(map(str, self._unexchanged))} can't be exchanged: compared by their order"
        is_seen = any(own.any() for own in owners) and spread > self._tolerance * scale
        return OutputCheck(name, shape, largest, tuple(wrong), note, is_seen)


TINY = 1e-30


@contextlib.contextmanager
def _alone(model: nn.Module, inner: nn.Module, weights: dict[str, float]) -> Iterator[None]:
    """A model as PEFT's users have it: some adapters active, or none; afterwards as it was."""
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
    """Inputs in which one sample is another one, wherever dimension 0 has as many rows as there are samples."""
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
    """Whether all tensors of the inputs have as many rows as there are samples, so that a sample can be exchanged."""
    if isinstance(value, Mapping):
        return all(_is_whole(each, count) for each in value.values())
    if isinstance(value, (list, tuple)):
        return len(value) == count or all(_is_whole(each, count) for each in value)
    return not isinstance(value, Tensor) or not value.dim() or len(value) == count


def _owners(base: Tensor, exchanged: list[Tensor], tolerance: float) -> list[Tensor] | None:
    """Which elements are which sample's, a mask for each; None where some change with several samples.

    In a model that mixes samples nothing has a reference, whatever it is that happened to change.
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
    """The elements of each sample where a dimension has their rows in order; None where it can't have them."""
    size = shape[dim] // count
    if shape[dim] % count:
        return None
    masks = [torch.zeros(shape, dtype=torch.bool, device="cpu") for _ in range(count)]
    for sample, mask in enumerate(masks):
        mask.narrow(dim, sample * size, size).fill_(True)
    return masks


def _flat(value: Any, name: str) -> dict[str, Tensor]:
    """All tensors of an output by their names, on the CPU and in a precision that doesn't round them."""
    if isinstance(value, Tensor):
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return {name or "output": value.detach().to("cpu", torch.promote_types(value.dtype, torch.float32), copy=True)}
    items: Any = ()
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}" if name else str(key), each) for key, each in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{name}[{index}]", each) for index, each in enumerate(value)]
    return {key: tensor for inner, each in items for key, tensor in _flat(each, inner).items()}
