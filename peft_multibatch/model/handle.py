"""The core of the handle: which layers are patched, which calls take ids, and the way back."""

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
from peft_multibatch.layers import architectures
from peft_multibatch.layers import table as handlers
from peft_multibatch.layers.fusion import Fuse, Group, find_groups
from peft_multibatch.layers.patch import STATE, PatchedLayer, check_merged
from peft_multibatch.layers.shared_positions import SharedPositions, attach
from peft_multibatch.model.scan import LayerScan
from peft_multibatch.model.stored import StoredLayers
from peft_multibatch.model.wrap import check_length, wrap
from peft_multibatch.ops.backends import Backend, choose_backend
from peft_multibatch.plan.ids import AdapterIds, check_live, resolve
from peft_multibatch.plan.names import AdapterNames
from peft_multibatch.report import LayerReport, Report


logger = logging.get_logger(__name__)


class Handle:
    """What is known of an enabled model; ``Multibatch`` adds what users call beside.

    Attributes:
        adapter_names: names of the adapters; the index is the integer id, in the order in which adapters were added.
            An id stays with its name: where an adapter was deleted there is None, and the others keep their ids.
    """

    def __init__(self, model: nn.Module, inner: nn.Module, backend: Backend, fuse: Fuse) -> None:
        self._asked_backend = backend
        self._backend, self._backend_reason, kernels = choose_backend(backend)
        logger.info(f"backend {self._backend}: {self._backend_reason}")
        self._inner, self._outer = inner, model
        self._fuse = fuse
        self._registry = Registry()
        self._changes = -1  # of adapters, at the last look
        self._router = Router(kernels, self._registry, self._check)
        self._groups: list[Group] = []
        self._scan: LayerScan | None = None
        self._layers: dict[nn.Module, PatchedLayer] = {}
        self._stored = StoredLayers(self._look, functools.partial(PatchedLayer, self._router), inner)
        self._positions: dict[nn.Module, SharedPositions] = {}
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
        for part in inner.modules():
            if isinstance(part, PreTrainedModel):
                self._attach(part, methods=("forward",))  # users call `model.model(...)`, too
        self._attach(model)

    @property
    def adapter_names(self) -> list[str | None]:
        """Names by integer id; None where an adapter was deleted. A new list: changing it changes nothing."""
        self._refresh()
        return self._registry.names.listed()

    def batch(self, adapter_ids: AdapterIds) -> AbstractContextManager[Any]:
        """Make ids active for every call of the model inside a block, on this thread.

        For pipelines, custom loops, encoders: whatever calls the model without passing ``adapter_ids`` on.

        Args:
            adapter_ids: one id, name or mixture such as ``{"sql": 0.7, "poet": 0.3}`` for every sample, ``-1`` or
                ``"__base__"`` for the base model alone: a list, tuple, 1-D integer tensor or array.

        Returns:
            What ``with`` takes. It raises when the block is entered.

        Raises:
            AdapterIdsError: ids of a wrong type, or of an adapter that isn't there.
            ModelStateError: adapters are merged, or there are none; with disabled ones rows are the base model's.

        Example:
            ```python
            with mb.batch(["sql", "__base__"]):
                hidden = model.get_base_model().model(**inputs).last_hidden_state
            ```
        """
        return self._routing(adapter_ids, expands=False)

    def report(self, check_weights: bool = False) -> Report:
        """How every patched layer runs, and every adapter's state. Printed, a summary; in notebooks, tables.

        Args:
            check_weights: read all weights, to find some that aren't finite, and adapters that change nothing.

        Returns:
            A sequence of ``LayerReport``, with the adapters beside it.
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
        """Undo ``enable``; the handle can't be used any more. Does nothing the second time.

        Raises:
            ModelStateError: calls with ids are under way, or a block of ``mb.batch()`` is open.
        """
        with self._lock:
            if not self._is_enabled:
                return
            calls = self._router.graph.close()
            if calls:
                names = ", ".join(sorted({call.thread.name if call.thread else "?" for call in calls}))
                raise ModelStateError(
                    f"disable was called during {len(calls)} calls with ids, or blocks of mb.batch(), on the threads "
                    f"{names}: expected none, which would go on without ids. Wait for them, and call it again."
                )
            self._is_enabled = False
            self._remove()

    def _remove(self) -> None:
        if self._registry.store is not None:
            self._registry.store.close()
        self._stored.remove()
        for layer in self._layers.values():
            layer.remove()
        for attention in self._positions.values():
            attention.remove()
        for group in self._groups:
            group.part_weights()
        self._router.replays.end()
        for undo in [undo for undos in self._attached.values() for undo in reversed(undos)]:
            undo()
        notices.listeners.discard(self)
        attached = [self._outer, *self._attached]
        # let go of the model
        self._layers, self._groups, self._positions, self._attached = {}, [], {}, {}
        unwatch(self._inner, attached)
        self._scan = None
        self._stored = StoredLayers(self._look, functools.partial(PatchedLayer, self._router), nn.Module())
        self._registry = Registry()
        self._router = Router(None, self._registry, self._check)
        self._inner = self._outer = nn.Module()

    def _attach(self, model: nn.Module, methods: Iterable[str] = ("forward", "generate")) -> None:
        """Let calls take ids: of the model that holds the layers, of parts of it, of the ``PeftModel`` around it."""
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
                if router.split is not None:  # for whose sake the other ranks wait
                    with suppress(AdapterIdsError):
                        check_same([None], names.listed(), router.split)
                raise
            return router.begin(ids, expands, base_layers=base_layers)

        return self._router.routing(begin)

    def _has_layers(self, model: nn.Module) -> bool:
        """Whether any patched layer is in this part of the model."""
        return any(part in self._layers for part in model.modules())

    def _check(self, live: Iterable[int]) -> frozenset:
        """What a new call checks, for one whose ids have been active for a while."""
        self._refresh()
        check_live(live, self._registry.names)
        return self._check_state()

    def _check_state(self) -> frozenset:
        """The layers whose adapters are disabled.

        Raises:
            MergedAdaptersError: an adapter is merged into the base weights.
        """
        disabled = []
        for layer in list(self._layers.values()):  # another thread may be adding some
            module = layer.module
            if module._disable_adapters and layer.is_disabled:
                disabled.append(module)
            elif module.merged_adapters:
                check_merged(layer.name, module)
        if disabled:
            disabled += self._stored.layers  # which PEFT doesn't know
            if self._stored.layers and self._router.graph.is_traced:
                raise UnsupportedError(
                    "adapters were disabled in a model that was compiled, and that has layers which only stored "
                    "adapters know, where graphs don't see it: expected enabled adapters. Pass -1 for all rows."
                )
        for group in self._groups:
            group.check_weights()
        return frozenset(disabled)

    def _refresh(self, is_looked_at: bool = False) -> None:
        """Patch what was added since the last call, and let go of what is no longer part of the model.

        Layers that stay keep their patch. An exception at any point leaves a state from which the next call begins.

        Args:
            is_looked_at: whether somebody will look at all layers before any of them runs, so that adapters' names are
                all that is needed now.
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
            self._changes = -1  # until all is done
            if self._scan is not None and not self._scan.holds_dictionaries():
                self._registry.forget()
            scan = LayerScan(self._inner)
            is_gathered = is_gathered or scan.is_gathered()
            before = {each: known.refusal for each, known in self._layers.items()}
            for layer, name in scan.layers.items():
                if not names.of_peft and layer not in self._layers and layer._get_available_adapters():
                    raise UnsupportedError(
                        f"{name} has adapters of which the {type(self._inner).__name__} knows nothing: expected the "
                        "model to which they were added. Pass that one to enable."
                    )
                self._patch(layer, name, is_gathered)
            for layer in self._layers.keys() - scan.layers.keys() - self._stored.layers.keys():
                self._layers.pop(layer).remove()
            layers = {layer: self._layers[layer] for layer in scan.layers}  # in the order of the model
            self._layers = layers | self._stored.update(scan, layers)
            router.is_gathered, router.buffers = is_gathered, scan.buffers
            if before != {each: known.refusal for each, known in self._layers.items()}:
                self._registry.forget()  # what was read elsewhere may be inside of another layer by now
            self._registry.source.layers = tuple(layers.values())
            self._registry.source.configs = self._inner.__dict__.get(CONFIGS) or {}
            attach(self._positions, scan.names, router)
            self._regroup()
            router.forget()
            self._scan, self._changes = scan, changes

    def _look(self, is_changed: bool) -> tuple[dict[str, PatchedLayer], LayerScan]:
        """What there is, by names, after layers that aren't PEFT's may have changed."""
        with self._lock:
            if is_changed:
                self._changes = -1
            self._refresh()
            assert self._scan is not None
            return {layer.name: layer for layer in self._layers.values()}, self._scan

    def _patch(self, layer: Any, name: str, is_gathered: bool) -> None:
        """Have a handler in the place of a layer's forward, if it has none yet."""
        known = self._layers.get(layer)
        is_same = known is not None and is_gathered == self._router.is_gathered
        if is_same and not isinstance(layer, AuxiliaryTrainingWrapper):  # whose inside may get adapters
            return
        choice = handlers.choose(name, layer, self._inner, is_gathered)
        if known is None:
            if layer.__dict__.get(STATE) is not None:
                raise ModelStateError(
                    f"{name} is part of another enabled model: expected one handle for a layer. Disable the other one."
                )
            self._layers[layer] = PatchedLayer(self._router, layer, name, *choice)
            self._stored.names[layer] = name
        elif choice != (known.handler, known.reason, known.refusal):
            known.change(*choice)

    def layer_comes(self, parent: nn.Module, key: str, layer: Any) -> None:
        """Patch a layer that PEFT is about to put into the model, before any call can run it."""
        scan = self._scan
        prefix = scan.names.get(parent) if scan is not None else None
        if prefix is not None and layer.__dict__.get(STATE) is None:
            with self._lock:
                self._patch(layer, f"{prefix}{key}", self._router.is_gathered)

    def _regroup(self) -> None:
        """Fuse siblings; groups that are as they were stay the same objects, which calls under way may hold."""
        fast = {layer.name: layer.module for layer in self._layers.values() if layer.is_fast}
        known = {group.layers: group for group in self._groups}
        found = find_groups(fast) if self._fuse else []
        self._groups = [known.get(group.layers, group) for group in found]
        for group in known.values():
            if group not in self._groups:
                group.part_weights()
        grouped = {layer for group in self._groups for layer in group.layers}
        for layer in fast.values():
            if layer not in grouped:
                layer.__dict__[STATE].group = None
        for group in self._groups:
            if not group.is_split:
                group.join()
            if self._fuse == "weights" and group not in known.values():
                group.join_weights()
        banks = [layer.__dict__[STATE].bank for layer in fast.values()]
        self._router.split = next((split for bank in banks for split in bank.splits if split), None)
        self._router.graph.banks = banks + [group.bank for group in self._groups]
        if self._registry.store is not None:
            for bank in self._router.graph.banks:
                bank.expects = self._registry.store.expect

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copy of an enabled model is a plain one, on which enable may be called

    def __reduce__(self) -> tuple:
        return type(None), ()
