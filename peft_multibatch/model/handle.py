"""The core of the handle: patching layers, adding ids to calls, and undoing both."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from peft_multibatch.adapters import notices
from peft_multibatch.adapters.configs import CONFIGS, unwatch, watch
from peft_multibatch.adapters.registry import Registry
from peft_multibatch.adapters.shards import GATHERED, check_same
from peft_multibatch.calls.active import ActiveCall
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.router import Router
from peft_multibatch.compat import AuxiliaryTrainingWrapper
from peft_multibatch.errors import AdapterIdsError, ModelStateError, MultibatchError, NotEnabledError, UnsupportedError
from peft_multibatch.layers import architectures, media, shared_positions
from peft_multibatch.layers import table as handlers
from peft_multibatch.layers.fusion import Fuse, Group, find_groups
from peft_multibatch.layers.patch import STATE, PatchedLayer, check_merged
from peft_multibatch.model.decoding import Decoding
from peft_multibatch.model.scan import LayerScan
from peft_multibatch.model.stored import StoredLayers
from peft_multibatch.model.wrap import check_length, wrap
from peft_multibatch.ops.backends import Backend, choose_backend
from peft_multibatch.plan.ids import AdapterIds, check_live, resolve
from peft_multibatch.plan.names import AdapterNames
from peft_multibatch.report import LayerReport, Report


logger = logging.get_logger(__name__)


class Handle:
    """The state of an enabled model. ``Multibatch`` adds the rest of the public API."""

    def __init__(self, model: nn.Module, inner: nn.Module, backend: Backend, fuse: Fuse) -> None:
        self._asked_backend = backend
        self._backend, self._backend_reason, kernels = choose_backend(backend)
        logger.info(f"backend {self._backend}: {self._backend_reason}")
        self._inner, self._outer, self._fuse = inner, model, fuse
        self._registry = Registry()
        self._changes = -1  # the registry's counter of changes at the last refresh
        self._router = Router(kernels, self._registry, self._check)
        self._groups: list[Group] = []
        self._scan: LayerScan | None = None
        self._layers: dict[nn.Module, PatchedLayer] = {}
        self._stored = StoredLayers(self._look, functools.partial(PatchedLayer, self._router), inner)
        self._decoding = Decoding(self._router.graph, self._router.live, lambda: list(self._layers.values()))
        self._positions, self._encoders = dict[Any, Any](), dict[Any, Any]()
        self._attached: dict[nn.Module, list[Callable[[], object]]] = {}
        self._lock = threading.RLock()
        self._is_enabled = True
        self._router.is_gathered = isinstance(model, GATHERED)
        try:
            self._refresh()
            self._registry.check_any_runs()
        except BaseException:
            self._remove()
            raise
        self._router.is_tried = architectures.look_up(inner)
        notices.listeners.add(self)
        self._attach(inner)
        self._attached[inner].append(self._decoding.attach(inner))
        for part in inner.modules():
            if isinstance(part, PreTrainedModel):
                self._attach(part, methods=("forward",))  # users also call `model.model(...)`
        self._attach(model)

    @property
    def adapter_names(self) -> list[str | None]:
        """The adapters' names by integer id, in the order in which they were added, as a new list.

        Ids never change: the entry of a deleted adapter is None.
        """
        self._refresh()
        return self._registry.names.listed()

    def batch(self, adapter_ids: AdapterIds) -> AbstractContextManager[Any]:
        """Use these ids for every call of the model inside a ``with`` block, on this thread.

        For pipelines, custom loops, encoders and other code that doesn't pass ``adapter_ids`` on to the model. While
        adapters are disabled, all rows get the base model's output.

        Args:
            adapter_ids: one id, name or mixture such as ``{"sql": 0.7, "poet": 0.3}`` per sample, with ``-1`` or
                ``"__base__"`` for the base model: a list, tuple, 1-D integer tensor or array.

        Returns:
            A context manager. Errors are raised when the block is entered.

        Raises:
            AdapterIdsError: ids have the wrong type, or name an adapter that doesn't exist.
            ModelStateError: adapters are merged, or there are none.

        Example:
            ```python
            with mb.batch(["sql", "__base__"]):
                hidden = model.get_base_model().model(**inputs).last_hidden_state
            ```
        """
        return self._routing(adapter_ids, expands=False)

    def report(self, check_weights: bool = False) -> Report:
        """Report how every patched layer runs, and the state of every adapter.

        Args:
            check_weights: also read all weights, to find values that aren't finite and adapters that have no effect.

        Returns:
            A sequence of ``LayerReport`` with an attribute ``adapters``. It prints as a summary, and as tables in
            notebooks.
        """
        self._refresh()
        groups = {layer: group for group in self._groups for layer in group.layers}
        entries = []
        for layer in self._layers.values():
            how, reason = handlers.PER_SEGMENT, layer.reason
            if layer.is_fast:
                group = groups.get(layer.module)
                how = handlers.SEGMENTED if group is None or group.is_split else group.label
                reason = group.reason if group is not None else reason
            entries.append(LayerReport(layer.name, how, reason))
        adapters = tuple(self._registry.describe(check_weights))
        stats = None if self._registry.store is None else self._registry.store.stats()
        return Report(tuple(entries), self._backend, self._backend_reason, adapters, stats)

    def disable(self) -> None:
        """Undo ``enable``. The handle can't be used afterwards; disabling it again does nothing.

        Raises:
            ModelStateError: calls with ids are running, or a block of ``mb.batch()`` is open.
        """
        with self._lock:
            if not self._is_enabled:
                return
            if calls := self._router.graph.close():
                names = ", ".join(sorted({call.thread.name if call.thread else "?" for call in calls}))
                raise ModelStateError(
                    f"disable was called during {len(calls)} calls with ids or open blocks of mb.batch(), on threads "
                    f"{names}: expected none, because they would continue without ids. Wait for them to end, then "
                    "call disable again."
                )
            self._is_enabled = False
            self._remove()

    def _remove(self) -> None:
        if self._registry.store is not None:
            self._registry.store.close()
        self._stored.remove()
        for part in (*self._layers.values(), *self._positions.values(), *self._encoders.values()):
            part.remove()
        for group in self._groups:
            group.part_weights()
        self._router.replays.end()
        for undo in [undo for undos in self._attached.values() for undo in reversed(undos)]:
            undo()
        notices.listeners.discard(self)
        attached = [self._outer, *self._attached]
        # drop all references to the model
        self._layers, self._groups, self._positions, self._encoders, self._attached = {}, [], {}, {}, {}
        unwatch(self._inner, attached)
        self._scan = None
        self._stored = StoredLayers(self._look, functools.partial(PatchedLayer, self._router), nn.Module())
        self._registry = Registry()
        self._router = Router(None, self._registry, self._check)
        self._inner = self._outer = nn.Module()

    def _attach(self, model: nn.Module, methods: Iterable[str] = ("forward", "generate")) -> None:
        """Add ids to the methods of the model that contains the layers, of a part of it, or of its ``PeftModel``."""
        if model in self._attached:
            return
        model.__dict__[STATE] = self
        undos: list[Callable[[], object]] = [lambda: model.__dict__.pop(STATE, None)]
        undos.extend(wrap(model, method) for method in methods)
        self._attached[model] = undos

    def _routing(self, adapter_ids: Any, expands: bool, samples: int | None = None) -> ActiveCall:
        def begin() -> Call:
            router, names = self._router, self._registry.names
            try:
                self._refresh()
                ids = resolve(adapter_ids, names if self._layers else AdapterNames())
                check_length(len(ids), samples)
                base_layers = self._check_state()
            except MultibatchError:
                if router.split is not None:  # other ranks wait for this one to compare ids
                    with suppress(AdapterIdsError):
                        check_same([None], names.listed(), router.split)
                raise
            return router.begin(ids, expands, base_layers=base_layers)

        return self._router.routing(begin)

    def _has_layers(self, model: nn.Module) -> bool:
        """Whether this part of the model contains patched layers."""
        places = {layer.place for layer in list(self._layers.values())}  # stored adapters' keys are outside
        return any(part in places for part in model.modules())

    def _check(self, live: Iterable[int]) -> frozenset:
        """Repeat the checks of a new call, for one whose block was opened earlier."""
        self._refresh()
        check_live(live, self._registry.names)
        return self._check_state()

    def _check_state(self) -> frozenset:
        """The layers whose adapters are disabled.

        Raises:
            MergedAdaptersError: an adapter is merged into the base weights.
            UnsupportedError: adapters are disabled in a compiled model with layers that only stored adapters use.
        """
        disabled = []
        for layer in list(self._layers.values()):  # another thread may be adding layers
            module = layer.module
            if module._disable_adapters and layer.is_disabled:
                disabled.append(module)
            elif module.merged_adapters:
                check_merged(layer.name, module)
        if disabled:
            disabled += self._stored.layers  # PEFT doesn't disable these
            if self._stored.layers and self._router.graph.is_traced:
                raise UnsupportedError(
                    "adapters were disabled in a compiled model that has layers used only by stored adapters, which "
                    "compiled code can't detect: expected enabled adapters. Pass -1 for all rows instead."
                )
        for group in self._groups:
            group.check_weights()
        return frozenset(disabled)

    def _refresh(self, is_looked_at: bool = False) -> None:
        """Patch layers that were added since the last call, and drop those that are no longer part of the model.

        Other layers keep their patch. After an exception, the next refresh starts over.

        Args:
            is_looked_at: whether the layers will be scanned again before any of them runs, so that only the adapters'
                names have to be up to date now.
        """
        with self._lock:
            if not self._is_enabled:
                raise NotEnabledError(
                    "this handle was disabled: call peft_multibatch.enable(model) again and use its result."
                )
            names, router = self._registry.names, self._router
            watch(self._inner, names, [self._outer, *self._attached])
            changes = names.changes
            is_gathered = router.is_gathered or any(isinstance(model, GATHERED) for model in self._attached)
            is_same = changes == self._changes and is_gathered == router.is_gathered
            if is_same and self._scan is not None and (is_looked_at or self._scan.holds()):
                return
            self._changes = -1  # in case of an exception
            if self._scan is not None and not self._scan.holds_dictionaries():
                self._registry.forget()
            scan = LayerScan(self._inner)
            is_gathered = is_gathered or scan.is_gathered()
            before = {each: known.refusal for each, known in self._layers.items()}
            for layer, name in scan.layers.items():
                if not names.of_peft and layer not in self._layers and layer._get_available_adapters():
                    raise UnsupportedError(
                        f"{name} has adapters that the {type(self._inner).__name__} has no configuration for: "
                        "expected the model to which they were added. Pass that model to enable."
                    )
                self._patch(layer, name, is_gathered)
            for layer in self._layers.keys() - scan.layers.keys() - self._stored.layers.keys():
                self._layers.pop(layer).remove()
            layers = {layer: self._layers[layer] for layer in scan.layers}  # in the order of the model
            self._layers = layers | self._stored.update(scan, layers)
            router.is_gathered, router.buffers = is_gathered, scan.buffers
            if before != {each: known.refusal for each, known in self._layers.items()}:
                self._registry.forget()  # a layer that was read before may be inside another layer now
            self._registry.source.layers = tuple(layers.values())
            self._registry.source.configs = self._inner.__dict__.get(CONFIGS) or {}
            shared_positions.attach(self._positions, scan.names, router)
            media.attach(self._encoders, scan.names, self._layers.values(), router)
            self._regroup()
            router.forget()
            self._scan, self._changes = scan, changes

    def _look(self, is_changed: bool) -> tuple[dict[str, PatchedLayer], LayerScan]:
        """The patched layers by name, and the last scan, after layers for stored adapters may have changed."""
        with self._lock:
            if is_changed:
                self._changes = -1
            self._refresh()
            assert self._scan is not None
            return {layer.name: layer for layer in self._layers.values()}, self._scan

    def _patch(self, layer: Any, name: str, is_gathered: bool) -> None:
        """Replace a layer's forward with a handler, if it has none yet."""
        known = self._layers.get(layer)
        is_same = known is not None and is_gathered == self._router.is_gathered
        if is_same and not isinstance(layer, AuxiliaryTrainingWrapper):  # modules inside these may get adapters
            return
        choice = handlers.choose(name, layer, self._inner, is_gathered)
        if known is None:
            if layer.__dict__.get(STATE) is not None:
                raise ModelStateError(
                    f"{name} is part of another enabled model: expected one handle per layer. Disable the other model."
                )
            self._layers[layer] = PatchedLayer(self._router, layer, name, *choice)
            self._stored.names[layer] = name
        elif choice != (known.handler, known.reason, known.refusal):
            known.change(*choice)

    def layer_comes(self, parent: nn.Module, key: str, layer: Any) -> None:
        """Patch a layer that PEFT is about to insert into the model, before any call can run it."""
        scan = self._scan
        prefix = scan.names.get(parent) if scan is not None else None
        if prefix is not None and layer.__dict__.get(STATE) is None:
            with self._lock:
                self._patch(layer, f"{prefix}{key}", self._router.is_gathered)

    def _regroup(self) -> None:
        """Fuse siblings. Groups that didn't change stay the same objects, because running calls may reference them."""
        fast = {layer.name: layer.module for layer in self._layers.values() if layer.is_fast}
        known = {group.layers: group for group in self._groups}
        found = find_groups(fast, self._registry.tables) if self._fuse else []
        self._groups = [known.get(group.layers, group) for group in found]
        for group in known.values():
            if group not in self._groups:
                group.part_weights()
        for layer in {*fast.values()}.difference(*(group.layers for group in self._groups)):
            layer.__dict__[STATE].group = None
        for group in self._groups:
            if not group.is_split:
                group.join()
            if self._fuse == "weights" and group not in known.values():
                group.join_weights()
        banks = [layer.__dict__[STATE].bank for layer in fast.values()]
        self._router.split = next((split for bank in banks for split in bank.splits if split), None)
        layers = {layer: each.name for layer, each in self._layers.items()}
        self._router.graph.adapt(banks + [group.bank for group in self._groups], layers)
        if self._registry.store is not None:
            for bank in self._router.graph.banks:
                bank.expects = self._registry.store.expect

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copy of an enabled model is a plain one, and can be enabled itself

    def __reduce__(self) -> tuple:
        return type(None), ()
