"""The public API: ``enable``, ``disable`` and the handle, ``Multibatch``."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_multibatch.adapters.checks import check_any_kind
from peft_multibatch.adapters.store.layout import StoreDtype
from peft_multibatch.adapters.store.store import AdapterStore
from peft_multibatch.compat import PeftMixedModel, PeftModel, check
from peft_multibatch.continuous.generate_batch import Batching, BatchingOptions, with_requests
from peft_multibatch.errors import ModelStateError, UnsupportedError
from peft_multibatch.layers.fusion import Fuse
from peft_multibatch.layers.linear import linear
from peft_multibatch.layers.patch import STATE
from peft_multibatch.layers.per_segment import per_segment
from peft_multibatch.model.handle import Handle
from peft_multibatch.model.scan import inner_model
from peft_multibatch.model.sentence_transformers import is_sentence_model, model_inside, with_samples
from peft_multibatch.model.stored import device_of
from peft_multibatch.model.verify import Verifier
from peft_multibatch.ops.backends import Backend
from peft_multibatch.plan.ids import AdapterIds, ids_of, resolve
from peft_multibatch.report import Verification, html_table


if TYPE_CHECKING:
    from peft_multibatch.continuous.manager import AdapterBatchingManager


SHOWN = 5
"""The most adapters that the handle's ``repr`` names."""

SHOWN_ROWS = 20
"""The most adapters in the handle's table in notebooks."""


def enable(model: nn.Module, backend: Backend = "auto", fuse: Fuse = True) -> Multibatch:
    """Add ``adapter_ids``, with one adapter per sample, to a model's ``forward`` and ``generate``.

    Parameters keep their names, values and memory; calls without ids run as in plain PEFT.

    Args:
        model: a ``PeftModel`` with LoRA adapters, or a transformers model with adapters from ``add_adapter()`` or
            ``load_adapter()``; adapters can also be added later. A ``SentenceTransformer`` or ``CrossEncoder`` that
            contains such a model also gets ids in ``encode`` or ``predict``.
        backend: ``"triton"`` for kernels on CUDA devices; ``"torch"`` for torch's matrix products; ``"auto"`` for
            Triton if there is a CUDA device. Tensors on a CPU always run on torch. For debugging, ``"triton"`` with
            Triton's interpreter (``TRITON_INTERPRET=1``) runs the kernels on a CPU.
        fuse: run q/k/v as one op with three slices and gate/up as one with two, if they read the same tensor. With
            ``"weights"``, their base weights are also concatenated, and base parameters become views of the result,
            which saves matrix products in calls with ids; ``report()`` says if that isn't possible, and why.

    Returns:
        The handle. If the model is enabled already, its existing handle.

    Raises:
        UnsupportedError: this isn't a model, or none of its adapters can run in mixed batches; the message says why.
        BackendUnavailableError: ``backend`` isn't available here.
        ModelStateError: the model is enabled already, with other options.

    Example:
        ```python
        mb = peft_multibatch.enable(model)
        model.generate(**inputs, adapter_ids=[0, -1, 1])
        ```
    """
    check()
    if fuse not in (True, False, "weights"):
        raise UnsupportedError(f"enable was called with fuse={fuse!r}: expected True, False or 'weights'.")
    around, model = model, model_inside(model) if is_sentence_model(model) else model
    inner = inner_model(model)
    if not isinstance(inner, nn.Module) or not (isinstance(inner, PreTrainedModel) or hasattr(inner, "peft_config")):
        raise UnsupportedError(
            f"enable got an object of type {type(model).__name__}: expected a PeftModel, or a transformers model. Add "
            "adapters to it with add_adapter() or load_adapter()."
        )
    if isinstance(model, (PeftModel, PeftMixedModel)):
        check_any_kind(model.peft_config)  # which the model inside may not have
    present = inner.__dict__.get(STATE)
    if present is None:
        present = Multibatch(model, inner, backend, fuse)
    elif (backend, fuse) not in (("auto", True), (present._asked_backend, present._fuse)):
        raise ModelStateError(
            f"enable was called with backend={backend!r} and fuse={fuse!r} on a model that is enabled with "
            f"backend={present._asked_backend!r} and fuse={present._fuse!r}: expected the same options. Call disable "
            "first."
        )
    present._attach(model)
    present._attach(around)
    return present


def disable(model: nn.Module) -> None:
    """Undo ``enable``. Does nothing if the model isn't enabled.

    Args:
        model: the model that was passed to ``enable``, or the model inside it.

    Raises:
        ModelStateError: calls with ids are running, or a block of ``mb.batch()`` is open.
    """
    handle = inner_model(model).__dict__.get(STATE)
    if handle is not None:
        handle.disable()


class Multibatch(Handle):
    """The handle that ``enable`` returns.

    Attributes:
        adapter_names: the adapters' names by integer id, in the order in which they were added. Ids never change: the
            entry of a deleted adapter is None.
    """

    def continuous_batching(
        self, mixtures: int = 1, **options: Unpack[BatchingOptions]
    ) -> AbstractContextManager[AdapterBatchingManager]:
        """transformers' ``continuous_batching_context_manager`` with an adapter per request.

        Args:
            mixtures: the most adapters in a request's mixture; CUDA graphs are captured for this many.
            **options: as in transformers: ``generation_config``, ``continuous_batching_config``, ``warmup``,
                ``block``, ``timeout`` and, in newer versions, ``workload_hints``.

        Returns:
            A context manager for an ``AdapterBatchingManager``, whose ``add_request`` takes ``adapter_id``.

        Example:
            ```python
            with mb.continuous_batching(generation_config=GenerationConfig(max_new_tokens=32)) as manager:
                manager.add_request(tokenizer("LOVE, n.").input_ids, adapter_id="devil")
                print(manager.get_result().generated_tokens)
            ```
        """
        self._refresh()
        return Batching(self, mixtures=mixtures).continuous_batching_context_manager(**options)

    def adapter_store(
        self,
        max_host_memory: int | str = "8GB",
        max_device_memory: int | str = "2GB",
        max_rank: int = 64,
        slots: int = 64,
        roots: Sequence[str | os.PathLike] | None = None,
        dtype: StoreDtype = None,
        timeout: float = 60.0,
    ) -> AdapterStore:
        """Create a store, which keeps thousands of adapters in files, and those in use in memory.

        Batches name stored adapters like PEFT's, and can combine both. The model must be on a CPU, or on one CUDA
        device. See docs/store.md.

        Args:
            max_host_memory: the most memory for adapters on the host: bytes, or a string such as ``"64GB"``.
            max_device_memory: the most memory for adapters on a CUDA device; not used for a model on a CPU.
            max_rank: the largest rank that an adapter may have.
            slots: the number of adapters in use at the same time, over all running batches, for which CUDA graphs are
                captured. With more, graphs are captured again.
            roots: folders that may contain adapters, after links are resolved; any folder by default.
            dtype: the dtype of adapters in memory. By default the one that PEFT's ``load_adapter`` uses, which is
                float32 in most models. ``"file"`` keeps the file's dtype, which halves the memory of float16 and
                bfloat16 adapters.
            timeout: seconds that a batch waits for its adapters before it raises ``StoreFullError``.

        Returns:
            The store.

        Raises:
            ModelStateError: the model has a store already.
            UnsupportedError: the model is on several devices, or on one that is neither a CPU nor a CUDA device, or
                ``dtype`` isn't supported.
            StoreFullError: a size is invalid.
            AdapterFileError: ``roots`` is an empty list, or contains something other than paths.

        Example:
            ```python
            store = mb.adapter_store(max_host_memory="64GB", roots=["adapters"])
            store.register("sql", "adapters/sql")
            model.generate(**inputs, adapter_ids=["sql", "__base__"])
            ```
        """
        self._refresh()
        registry, router = self._registry, self._router
        if registry.store is not None:
            raise ModelStateError(
                "adapter_store was called on a model that has a store: expected one store per model. Use the store "
                "that the first call returned, or call disable and enable."
            )
        if router.split is not None or router.is_gathered:
            raise UnsupportedError(
                "adapter_store was called on a model that is split over devices: expected a whole model on every "
                "rank. Use load_adapter."
            )
        if dtype not in (None, "file", torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise UnsupportedError(
                f"adapter_store got dtype={dtype!r}: expected 'file', torch.float64, torch.float32, torch.float16 or "
                "torch.bfloat16."
            )
        for what, value, kind, least in (
            ("max_rank", max_rank, Integral, 1), ("slots", slots, Integral, 1), ("timeout", timeout, Real, 0),
        ):  # fmt: skip
            if not isinstance(value, kind) or isinstance(value, bool) or not value >= least:
                raise UnsupportedError(
                    f"adapter_store got {what}={value!r}: expected {'an integer' if kind is Integral else 'seconds'} "
                    f"of {least} or more."
                )
        registry.store = AdapterStore(
            self._stored, registry.names, registry.slots, device_of(self._inner), max_host_memory, max_device_memory,
            max_rank, roots, dtype, timeout, router.let_go, lambda: router.live() is not None, registry.changing,
        )  # fmt: skip
        registry.slots.reserve(slots)
        self._look(is_changed=True)
        return registry.store

    def verify(self, adapter_ids: AdapterIds, tolerance: float | None = None, **inputs: Any) -> Verification:
        """Compare a mixed batch with PEFT, one adapter at a time, and find layers whose rows aren't in sample order.

        Use it for model types that weren't tested, or adapters on unusual layers. It calls the model about twice per
        sample, so pass a small batch of different samples. Other threads must not use the model meanwhile, because the
        active adapter changes. The model is in the same state afterwards.

        Args:
            adapter_ids: as for ``forward``; at least two entries.
            tolerance: the largest acceptable error, relative to an output's largest value; by default, what rounding
                explains in the model's dtype.
            **inputs: keyword arguments of the model's ``forward``.

        Returns:
            The differences, per output and per layer; true if there are none. It prints as a summary.

        Raises:
            MultibatchError: the batch can't run mixed.

        Example:
            ```python
            inputs = tokenizer(["one", "two", "three"], return_tensors="pt")
            print(mb.verify(**inputs, adapter_ids=["sql", "poet", -1]))
            ```
        """
        self._refresh()
        entries = resolve(adapter_ids, self._registry.names)
        names = {number: self._registry.names.by_id[number] for entry in {*entries} for number in ids_of(entry)}
        stored = sorted(name for name in names.values() if name in self._registry.names.stored)
        if stored:
            raise UnsupportedError(
                f"verify was called for {stored[0]!r}, a stored adapter, which PEFT can't run for comparison: "
                "expected adapters in PEFT's modules. Load it with load_adapter under another name, and verify that."
            )
        layers = {each.place: each.name for each in self._layers.values()}
        in_order = {each.name for each in self._layers.values() if each.handler in (linear, per_segment)}
        verifier = Verifier(self._outer, self._inner, layers, in_order, entries, names, inputs, tolerance)
        is_tried = self._router.is_tried
        self._router.is_tried = True  # turns off the check of row order, so that verify can find errors
        try:
            found = verifier.run(adapter_ids)
            is_tried = is_tried or found.ok
        finally:
            self._router.is_tried = is_tried
        return found

    def __repr__(self) -> str:
        """Doesn't read the model, so that it is fast and can't fail."""
        known = self.__dict__
        if not known.get("_is_enabled") or "_stored" not in known:
            return "Multibatch(disabled)"
        names = [*self._registry.names.ids]
        more = f", … {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        listed = ", ".join(map(repr, names[:SHOWN]))
        counts = f"backend={self._backend!r}, layers={len(self._layers)}"
        return f"Multibatch({type(self._inner).__name__}, {counts}, adapters=[{listed}{more}])"

    def _repr_html_(self) -> str:
        if not self.__dict__.get("_is_enabled"):
            return f"<p>{html.escape(repr(self))}</p>"
        known = sorted(self._registry.names.by_id.items())
        stored = self._registry.names.stored
        rows = [(str(number), name, "store" if name in stored else "PEFT") for number, name in known[:SHOWN_ROWS]]
        more = f"<p>… {len(known) - SHOWN_ROWS} more</p>" if len(known) > SHOWN_ROWS else ""
        return (
            f"<p><b>Multibatch</b>: {html.escape(type(self._inner).__name__)}, backend {html.escape(self._backend)}, "
            f"{len(self._layers)} layers, {len(known)} adapters</p>{html_table(('id', 'name', 'source'), rows)}{more}"
        )

    def _attach(self, model: nn.Module, methods: Iterable[str] = ("forward", "generate")) -> None:
        is_new, has_loops = model not in self._attached, is_sentence_model(model)
        super()._attach(model, () if has_loops and model is not self._inner else methods)
        if is_new:
            self._attached[model].extend(with_samples(model) if has_loops else [with_requests(model)])
