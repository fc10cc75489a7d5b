"""``enable``: routes ids from a model's calls to its layers, and undoes itself."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from peft_multibatch import layers as handlers
from peft_multibatch.bank import Bank
from peft_multibatch.errors import (
    AdapterIdsError,
    AdapterIdsLengthError,
    AdaptersDisabledError,
    BackendUnavailableError,
    MergedAdaptersError,
    NotEnabledError,
    UnsupportedError,
)
from peft_multibatch.fusion import Group, find_groups
from peft_multibatch.ids import resolve
from peft_multibatch.layers import STATE, Patch
from peft_multibatch.report import LayerReport, Report
from peft_multibatch.routing import Router
from peft_multibatch.segments import Segments


logger = logging.get_logger(__name__)

# Arguments that may carry the samples, in the order in which they are looked for.
INPUTS = (
    "input_ids",
    "inputs",
    "inputs_embeds",
    "input_features",
    "input_values",
    "pixel_values",
    "decoder_input_ids",
)


def enable(model: nn.Module, backend: str = "auto", fuse: bool = True) -> Multibatch:
    """Let a model's ``forward`` and ``generate`` take ``adapter_ids``, one for every sample.

    Parameters keep their names, their values and their places in memory; calls without ids run as PEFT runs them.

    Args:
        model: a ``PeftModel`` of LoRA adapters, or a transformers model to which ``add_adapter()`` or
            ``load_adapter()`` added them; adapters may also be added later.
        backend: ``"torch"``, torch's own matrix products; ``"auto"`` takes the fastest that is available, which this
            version has only one of; ``"triton"`` is refused for now.
        fuse: run q/k/v as one op of three slices, gate/up as one of two, wherever they read the same tensor.

    Returns:
        The handle. A model that is enabled already gives back the handle it has.

    Raises:
        UnsupportedError: this is no model, or one whose rows can't be routed; the message names the layer.
        BackendUnavailableError: ``backend`` is none that can run here.

    Example:
        ```python
        mb = peft_multibatch.enable(model)
        model.generate(**inputs, adapter_ids=[0, -1, 1])
        ```
    """
    inner = _inner_model(model)
    if not isinstance(inner, nn.Module) or not (isinstance(inner, PreTrainedModel) or hasattr(inner, "peft_config")):
        raise UnsupportedError(
            f"enable got an object of type {type(model).__name__}: expected a PeftModel, or a transformers model to "
            "which adapters are added with add_adapter() or load_adapter()."
        )
    if isinstance(model, PeftMixedModel):
        raise UnsupportedError(
            "enable got a PeftMixedModel, which mixes tuners: expected a PeftModel of LoRA adapters. Load the "
            "adapters with PeftModel."
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        _check_configs(model.peft_config)
    present = inner.__dict__.get(STATE)
    if present is None:
        return Multibatch(model, inner, backend, fuse)
    if STATE not in model.__dict__:
        present._attach(model)
    return present


def disable(model: nn.Module) -> None:
    """Undo ``enable``: the model runs as if it had never been called. Does nothing where it wasn't.

    Args:
        model: the model, or the ``PeftModel`` around it.
    """
    handle = _inner_model(model).__dict__.get(STATE)
    if handle is not None:
        handle.disable()


class Multibatch:
    """The handle that ``enable`` returns.

    Attributes:
        adapter_names: names of the adapters; the index is the integer id, in the order in which adapters were added.
            An id stays with its name: where an adapter was deleted there is None, and the others keep their ids.
    """

    def __init__(self, model: nn.Module, inner: nn.Module, backend: str, fuse: bool) -> None:
        self._backend_reason = _check_backend(backend)
        self._inner = inner
        self._fuse = fuse
        self._names: list[str | None] = []
        self._ever: dict[str, None] = {}  # every name that ever had an id, in the order of the ids
        self._configs: list[tuple[str, Any]] = []
        self._router = Router()
        self._groups: list[Group] = []
        self._places: list[_Place] = []
        self._undo: list[Callable[[], object]] = []
        self._refresh()
        for each in dict.fromkeys([inner, model]):
            self._attach(each)

    @property
    def adapter_names(self) -> list[str | None]:
        """Names by integer id; None where an adapter was deleted. A new list: changing it changes nothing."""
        self._refresh()
        return list(self._names)

    @contextmanager
    def batch(self, adapter_ids: Any) -> Iterator[None]:
        """Put ids in force for every call of the model inside the block, on this thread.

        For pipelines, custom loops, encoders: whatever calls the model without passing ``adapter_ids`` on.

        Args:
            adapter_ids: one id or name for every sample, ``-1`` or ``"__base__"`` for the base model alone: a list,
                tuple, 1-D integer tensor or array.

        Raises:
            AdapterIdsError: ids of a wrong type, or of an adapter that isn't there.
            ModelStateError: adapters are merged or disabled, or there are none.

        Example:
            ```python
            with mb.batch(["sql", "__base__"]):
                hidden = model.get_base_model().model(**inputs).last_hidden_state
            ```
        """
        with self._routing(adapter_ids, expands=False):
            yield

    def report(self) -> Report:
        """How every patched layer runs, and why. Printed, a summary; a sequence of ``LayerReport`` otherwise."""
        self._refresh()
        groups = {layer: group for group in self._groups for layer in group.layers}
        entries = []
        for place in self._places:
            how, reason = handlers.PER_SEGMENT, place.reason
            if place.handler is handlers.linear:
                group = groups.get(place.module)
                how = handlers.SEGMENTED if group is None or group.reason else group.label
                reason = group.reason if group is not None else reason
            entries.append(LayerReport(place.name, how, reason))
        return Report(tuple(entries), "torch", self._backend_reason)

    def disable(self) -> None:
        """Undo ``enable``; the handle can't be used any more. Does nothing the second time."""
        self._detach_layers()
        while self._undo:
            self._undo.pop()()

    def _attach(self, model: nn.Module) -> None:
        """Let a model's calls take ids: the model that holds the layers, and the ``PeftModel`` around it."""
        model.__dict__[STATE] = self
        self._undo.append(lambda: model.__dict__.pop(STATE, None))
        self._undo.extend(_wrap(model, method) for method in ("forward", "generate"))

    @contextmanager
    def _routing(self, adapter_ids: Any, expands: bool, samples: int | None = None) -> Iterator[None]:
        if not self._undo:
            raise NotEnabledError(
                "this handle was disabled: call peft_multibatch.enable(model) again and use its result."
            )
        self._refresh()
        slots = resolve(adapter_ids, self._names)
        _check_length(len(slots), samples)
        self._check_state()
        with self._router.routing(Segments.from_ids(slots), expands):
            yield

    def _refresh(self) -> None:
        """Patch what was added since the last call, and let go of what is no longer part of the model."""
        configs = list(getattr(self._inner, "peft_config", {}).items())
        unchanged = len(configs) == len(self._configs) and all(
            name == known and config is seen for (name, config), (known, seen) in zip(configs, self._configs)
        )
        if unchanged and all(place.is_current() for place in self._places):
            return
        self._detach_layers()
        self._configs = configs
        _check_configs(dict(configs))
        found = _find_layers(self._inner)
        places = [_Place(*each, *handlers.find_handler(each[0], each[1])) for each in found]

        present = [name for name, _ in configs] if found else []
        self._ever.update(dict.fromkeys(present))
        self._names[:] = [name if name in present else None for name in self._ever]
        for place in places:
            place.patch(self._router, self._names)
            self._places.append(place)
        segmented = {place.name: place.module for place in places if place.handler is handlers.linear}
        self._groups = find_groups(segmented, self._names) if self._fuse else []
        banks = [layer.__dict__[STATE].bank for layer in segmented.values()]
        self._router.graph.banks = banks + [group.bank for group in self._groups]

    def _detach_layers(self) -> None:
        while self._places:
            self._places.pop().restore()

    def _check_state(self) -> None:
        for place in self._places:
            module = place.module
            if module.merged_adapters:
                raise MergedAdaptersError(
                    f"adapter_ids was passed while {module.merged_adapters} is merged into the base weights of "
                    f"{place.name}: expected unmerged adapters. Call model.unmerge_adapter() first."
                )
            if module._disable_adapters:
                raise AdaptersDisabledError(
                    f"adapter_ids was passed while the adapters of {place.name} are disabled: expected enabled "
                    "adapters. Leave model.disable_adapter(), or call model.enable_adapters(), first; for single rows "
                    "of the base model pass the id -1."
                )
        if (
            self._inner.training
            and torch.is_grad_enabled()
            and any(getattr(module, "gradient_checkpointing", False) for module in self._inner.modules())
        ):
            raise UnsupportedError(
                "adapter_ids was passed to a model that trains with gradient checkpointing, which runs layers again "
                "after the ids are gone: expected a model without it. Call model.gradient_checkpointing_disable() "
                "first."
            )

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copy of an enabled model is a plain one, on which enable may be called

    def __reduce__(self) -> tuple:
        return type(None), ()


class _Place:
    """A patched layer, and where it stands in its model."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        siblings: dict[str, nn.Module | None],
        key: str,
        handler: Callable[..., Tensor],
        reason: str,
    ) -> None:
        self.name, self.module, self.handler, self.reason = name, module, handler, reason
        self._siblings, self._key = siblings, key

    def is_current(self) -> bool:
        """Whether the layer is still where it was: unloading or replacing adapters puts another module there."""
        return self._siblings.get(self._key) is self.module

    def patch(self, router: Router, names: list[str | None]) -> None:
        """Put the handler in the place of the layer's forward."""
        attributes = self.module.__dict__
        # accelerate's hooks call the forward that they found, under this name, after moving inputs and weights
        attribute = "_old_forward" if "_hf_hook" in attributes and "_old_forward" in attributes else "forward"
        patch = Patch(router, getattr(self.module, attribute), names)
        if self.handler is handlers.linear:
            patch.bank = Bank([self.module], names)
        attributes[STATE] = patch
        self._unpatch = _replace(self.module, attribute, types.MethodType(self.handler, self.module))

    def restore(self) -> None:
        """Put the layer's own forward back."""
        self._unpatch()
        self.module.__dict__.pop(STATE, None)


def _replace(module: nn.Module, attribute: str, method: Callable) -> Callable[[], None]:
    """Set an instance attribute and return what undoes it, also where somebody else wrapped it in the meantime."""
    attributes = module.__dict__
    missing = object()
    before = attributes.get(attribute, missing)
    attributes[attribute] = method

    def undo() -> None:
        # accelerate moves a forward to this name when it adds a hook, and back when it removes one
        for name in dict.fromkeys([attribute, *(["forward", "_old_forward"] if attribute != "generate" else [])]):
            if attributes.get(name) is not method:
                continue
            if before is not missing:
                attributes[name] = before
            elif name == attribute:
                del attributes[name]
            else:
                attributes[name] = types.MethodType(getattr(type(module), attribute), module)

    return undo


def _wrap(module: nn.Module, method: str) -> Callable[[], None]:
    """Let a model's method take ids, and return what undoes it."""
    if not hasattr(type(module), method):
        return lambda: None
    own = module.__dict__.get(method)

    @functools.wraps(getattr(type(module), method))
    def wrapper(self, *args, **kwargs):
        handle = getattr(self, STATE, None)
        # in a copy of the model, what the original had as an attribute of its own belongs to the original
        original = (
            own if own is not None and handle is not None else functools.partial(getattr(type(self), method), self)
        )
        passed = "adapter_ids" in kwargs or "adapter_names" in kwargs
        if torch.compiler.is_compiling():
            if passed:
                raise UnsupportedError(
                    "adapter_ids was passed to a compiled model, whose graph can't take it: expected the ids to be in "
                    "force around the call. Write: with mb.batch(adapter_ids): compiled_model(...)"
                )
            return original(*args, **kwargs)
        if passed:
            adapter_ids = _pop_ids(kwargs)
            if adapter_ids is not None:
                if handle is None:
                    raise NotEnabledError(
                        "adapter_ids was passed to a copy of an enabled model: expected the model itself, or a copy "
                        "on which peft_multibatch.enable was called."
                    )
                with handle._routing(adapter_ids, method == "generate", _num_samples(args, kwargs)):
                    return original(*args, **kwargs)
        if handle is None or (call := handle._router.thread.call) is None or call.expands:
            return original(*args, **kwargs)
        _check_length(call.segments.num_entries, _num_samples(args, kwargs))
        if method == "generate":
            with handle._router.routing(call.segments, expands=True):
                return original(*args, **kwargs)
        call.refresh()
        return original(*args, **kwargs)

    return _replace(module, method, types.MethodType(wrapper, module))


def _pop_ids(kwargs: dict[str, Any]) -> Any:
    adapter_ids, adapter_names = kwargs.pop("adapter_ids", None), kwargs.pop("adapter_names", None)
    if adapter_ids is not None and adapter_names is not None:
        raise AdapterIdsError(
            "both adapter_ids and adapter_names were passed: expected one of them. adapter_ids takes names as well."
        )
    return adapter_names if adapter_ids is None else adapter_ids


def _num_samples(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """Size of the batch that a call of the model brings, or None where none of its arguments tells."""
    named = [kwargs.get(name) for name in INPUTS]
    tensor = next((value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor)), None)
    return tensor.shape[0] if tensor is not None and tensor.dim() else None


def _check_length(entries: int, samples: int | None) -> None:
    if samples is not None and entries != samples:
        raise AdapterIdsLengthError(
            f"adapter_ids has {entries} entries for a batch of {samples} samples: expected one entry for every "
            "sample, -1 for the base model alone."
        )


def _check_backend(backend: str) -> str:
    """Why this backend is the one in use."""
    if backend == "auto":
        return "the only backend of this version"
    if backend == "torch":
        return "asked for"
    raise BackendUnavailableError(
        f"backend is {backend!r}, which this version doesn't have: expected 'auto' or 'torch'."
    )


def _inner_model(model: nn.Module) -> nn.Module:
    """The model that holds the layers: what a ``PeftModel`` wraps."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_configs(configs: dict[str, Any]) -> None:
    for name, config in configs.items():
        if getattr(config.peft_type, "value", config.peft_type) != "LORA":
            raise UnsupportedError(
                f"adapter {name!r} is of the type {getattr(config.peft_type, 'value', config.peft_type)}: expected "
                "LoRA adapters only. Delete it, or run the adapters one at a time without adapter_ids."
            )


def _find_layers(inner: nn.Module) -> list[tuple[str, nn.Module, dict[str, nn.Module | None], str]]:
    """(name, layer, its parent's modules, its name among them) of every PEFT layer, outermost ones only."""
    found = []

    def visit(module: nn.Module, prefix: str) -> None:
        for key, child in module._modules.items():
            if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                found.append((prefix + key, child, module._modules, key))
            elif child is not None:
                visit(child, f"{prefix}{key}.")

    visit(inner, "")
    return found
