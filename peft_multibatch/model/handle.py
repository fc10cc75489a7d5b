"""The core of the handle: which layers are patched, which calls take ids, and the way back."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from peft_multibatch.adapters.registry import unwatch, watch
from peft_multibatch.adapters.shards import GATHERED, check_same
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.router import Router
from peft_multibatch.compat import BaseTuner, PeftMixedModel, PeftModel
from peft_multibatch.errors import (
    AdapterIdsError,
    BackendUnavailableError,
    ModelStateError,
    MultibatchError,
    NotEnabledError,
    UnsupportedError,
)
from peft_multibatch.layers import table as handlers
from peft_multibatch.layers.fusion import Group, find_groups
from peft_multibatch.layers.patch import STATE, check_state
from peft_multibatch.model.replay import CHECKPOINT, WithIds
from peft_multibatch.model.scan import Place, Survey
from peft_multibatch.model.wrap import check_length, wrap
from peft_multibatch.plan.ids import check_live, resolve
from peft_multibatch.report import LayerReport, Report


logger = logging.get_logger(__name__)


class Handle:
    """What is known of an enabled model; ``Multibatch`` adds what users call beside.

    Attributes:
        adapter_names: names of the adapters; the index is the integer id, in the order in which adapters were added.
            An id stays with its name: where an adapter was deleted there is None, and the others keep their ids.
    """

    def __init__(self, model: nn.Module, inner: nn.Module, backend: str, fuse: bool | str) -> None:
        self._asked_backend = backend
        self._backend, self._backend_reason, kernels = _choose_backend(backend)
        logger.info(f"backend {self._backend}: {self._backend_reason}")
        self._inner = inner
        self._fuse = fuse
        self._names: list[str | None] = []
        self._ever: dict[str, None] = {}  # every name that ever had an id, in the order of the ids
        self._seen: tuple[dict[str, Any] | None, int] = None, 0  # configurations, and their changes, at the last look
        self._router = Router(kernels, self._names, self._check)
        self._groups: list[Group] = []
        self._survey: Survey | None = None
        self._places: dict[nn.Module, Place] = {}
        self._attached: dict[nn.Module, list[Callable[[], object]]] = {}
        self._lock = threading.RLock()
        self._is_enabled = True
        self._router.is_gathered = isinstance(model, GATHERED)
        self._refresh()
        self._attach(inner)
        for part in inner.modules():
            if isinstance(part, PreTrainedModel):
                self._attach(part, methods=("forward",))  # users call `model.model(...)`, too
        self._attach(model)

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
            adapter_ids: one id, name or mixture such as ``{"sql": 0.7, "poet": 0.3}`` for every sample, ``-1`` or
                ``"__base__"`` for the base model alone: a list, tuple, 1-D integer tensor or array.

        Raises:
            AdapterIdsError: ids of a wrong type, or of an adapter that isn't there.
            ModelStateError: adapters are merged, or there are none; with disabled ones rows are the base model's.

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
        for place in self._places.values():
            how, reason = handlers.PER_SEGMENT, place.reason
            if place.handler is handlers.linear:
                group = groups.get(place.module)
                how = handlers.SEGMENTED if group is None or group.is_split else group.label
                reason = group.reason if group is not None else reason
            entries.append(LayerReport(place.name, how, reason))
        return Report(tuple(entries), self._backend, self._backend_reason)

    def disable(self) -> None:
        """Undo ``enable``; the handle can't be used any more. Does nothing the second time."""
        with self._lock:
            self._is_enabled = False
            for place in self._places.values():
                place.restore()
            for group in self._groups:
                group.part_weights()
            for module in self._inner.modules():
                if isinstance(module.__dict__.get(CHECKPOINT), WithIds):
                    module.__dict__[CHECKPOINT] = module.__dict__[CHECKPOINT].original
            for undo in [undo for undos in self._attached.values() for undo in reversed(undos)]:
                undo()
            # let go of the model
            self._places, self._groups, self._attached, self._seen = {}, [], {}, (None, 0)
            unwatch(self._inner)
            self._survey = None
            self._router.is_enabled = False
            self._router = Router(None, [], self._check)
            self._inner = nn.Module()

    def _attach(self, model: nn.Module, methods: Iterable[str] = ("forward", "generate")) -> None:
        """Let calls take ids: of the model that holds the layers, of parts of it, of the ``PeftModel`` around it."""
        if model in self._attached:
            return
        model.__dict__[STATE] = self
        undos: list[Callable[[], object]] = [lambda: model.__dict__.pop(STATE, None)]
        undos.extend(wrap(model, method) for method in methods)
        self._attached[model] = undos

    @contextmanager
    def _routing(self, adapter_ids: Any, expands: bool, samples: int | None = None) -> Iterator[Call]:
        try:
            self._refresh()
            slots = resolve(adapter_ids, self._names)
            check_length(len(slots), samples)
            self._check_state()
        except MultibatchError:
            if self._router.split is not None:  # for whose sake the other ranks wait
                with suppress(AdapterIdsError):
                    check_same([None], self._names, self._router.split)
            raise
        with self._router.routing(slots, expands) as call:
            yield call

    def _has_layers(self, model: nn.Module) -> bool:
        """Whether any patched layer is in this part of the model."""
        return any(part in self._places for part in model.modules())

    def _check(self, live: Iterable[int]) -> None:
        """What a new call checks, for one whose ids have been in force for a while."""
        self._refresh()
        check_live(live, self._names)
        self._check_state()

    def _check_state(self) -> None:
        for place in self._places.values():
            check_state(place.name, place.module)
        for group in self._groups:
            group.check_weights()
        if torch.is_grad_enabled():
            assert self._survey is not None
            for module in self._survey.modules:
                checkpoint = module.__dict__.get(CHECKPOINT)
                if checkpoint is not None and not isinstance(checkpoint, WithIds):
                    module.__dict__[CHECKPOINT] = WithIds(self._router, checkpoint)

    def _refresh(self) -> None:
        """Patch what was added since the last call, and let go of what is no longer part of the model.

        Other threads may be in the middle of a forward: layers that stay keep their patch, and nothing is changed
        before everything is known to be supported.
        """
        with self._lock:
            if not self._is_enabled:
                raise NotEnabledError(
                    "this handle was disabled: call peft_multibatch.enable(model) again and use its result."
                )
            configs = watch(self._inner)
            same_configs = configs is self._seen[0] and configs.changes == self._seen[1]
            is_gathered = self._router.is_gathered or any(isinstance(model, GATHERED) for model in self._attached)
            same_kind = same_configs and is_gathered == self._router.is_gathered
            if same_kind and self._survey is not None and self._survey.holds():
                return
            changes = configs.changes
            survey = Survey(self._inner)
            found, is_gathered = survey.layers, is_gathered or survey.is_gathered()
            same_kind = same_configs and is_gathered == self._router.is_gathered
            if same_kind and found.keys() == self._places.keys():
                self._survey = survey
                self._router.forget()
                return
            check_configs(configs)
            if not configs and any(layer._get_available_adapters() for layer in found):
                raise UnsupportedError(
                    f"{next(iter(found.values()))} has adapters of which the {type(self._inner).__name__} knows "
                    "nothing: expected the model to which they were added. Pass that one to enable."
                )
            config = getattr(self._inner, "config", None)
            chosen = {layer: handlers.find_handler(name, layer, config, is_gathered) for layer, name in found.items()}
            for layer, name in found.items():
                if layer.__dict__.get(STATE) is not None and layer not in self._places:
                    raise ModelStateError(
                        f"{name} is part of another enabled model: expected one handle for a layer. Disable the other "
                        "one."
                    )

            self._ever.update(configs.ever)
            self._names[:] = [name if found and name in configs else None for name in self._ever]
            self._seen = configs, changes
            self._router.is_gathered = is_gathered
            self._router.forget()
            before, self._places = self._places, {}
            for layer, name in found.items():
                place = before.pop(layer, None)
                if place is None or (place.handler, place.reason) != chosen[layer]:
                    if place is not None:
                        place.restore()
                    place = Place(layer, name, *chosen[layer])
                    place.patch(self._router)
                self._places[layer] = place
            for place in before.values():
                place.restore()
            self._regroup()
            self._survey = survey

    def _regroup(self) -> None:
        """Fuse siblings; groups that are as they were stay the same objects, which calls under way may hold."""
        segmented = {place.name: place.module for place in self._places.values() if place.handler is handlers.linear}
        known = {group.layers: group for group in self._groups}
        found = find_groups(segmented) if self._fuse else []
        self._groups = [known.get(group.layers, group) for group in found]
        for group in known.values():
            if group not in self._groups:
                group.part_weights()
        grouped = {layer for group in self._groups for layer in group.layers}
        for layer in segmented.values():
            if layer not in grouped:
                layer.__dict__[STATE].group = None
        for group in self._groups:
            if not group.is_split:
                group.join()
            if self._fuse == "weights" and group not in known.values():
                group.join_weights()
        self._router.layers = list(segmented.values())
        banks = [layer.__dict__[STATE].bank for layer in segmented.values()]
        self._router.split = next((split for bank in banks for split in bank.splits if split), None)
        self._router.graph.banks = banks + [group.bank for group in self._groups]

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copy of an enabled model is a plain one, on which enable may be called

    def __reduce__(self) -> tuple:
        return type(None), ()


def _choose_backend(backend: str) -> tuple[str, str, ModuleType | None]:
    """The backend, why it is this one, and the module of the kernels where it has any."""
    if backend not in ("auto", "triton", "torch"):
        raise BackendUnavailableError(f"backend is {backend!r}: expected 'auto', 'triton' or 'torch'.")
    if backend == "torch":
        return "torch", "asked for", None
    missing = None
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        missing = "torch finds no CUDA device"
    elif importlib.util.find_spec("triton") is None:
        missing = "the package triton is not installed"
    if missing is None:
        kernels = importlib.import_module("peft_multibatch.ops.triton_backend")
        return "triton", "asked for" if backend == "triton" else "there is a CUDA device and triton", kernels
    if backend == "triton":
        raise BackendUnavailableError(
            f"backend is 'triton', and {missing}: expected a CUDA device and triton. Pass backend='auto' or 'torch'."
        )
    return "torch", missing, None


def inner_model(model: Any) -> Any:
    """The model that holds the layers: what a ``PeftModel`` wraps."""
    if isinstance(model, (PeftModel, PeftMixedModel)):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model


def check_configs(configs: dict[str, Any]) -> None:
    for name, config in configs.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind.lower() not in handlers.TUNERS:
            raise UnsupportedError(
                f"adapter {name!r} is of the type {kind}: expected LoRA, or a tuner whose layers compute a row from "
                "nothing but the row and the adapter. Delete it, or run the adapters one at a time without "
                "adapter_ids."
            )
