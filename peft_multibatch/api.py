"""What users call: ``enable``, ``disable``, and the handle with all that hangs on it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from peft_multibatch.adapters.checks import check_any_kind
from peft_multibatch.compat import PeftMixedModel, PeftModel, check
from peft_multibatch.continuous.generate_batch import Batching, with_requests
from peft_multibatch.errors import ModelStateError, UnsupportedError
from peft_multibatch.layers.linear import linear
from peft_multibatch.layers.patch import STATE
from peft_multibatch.layers.per_segment import per_segment
from peft_multibatch.model.handle import Handle, inner_model
from peft_multibatch.model.sentence_transformers import is_sentence_model, model_inside, with_samples
from peft_multibatch.model.verify import Verifier
from peft_multibatch.plan.ids import ids_of, resolve
from peft_multibatch.report import Verification


if TYPE_CHECKING:
    from peft_multibatch.continuous.manager import AdapterBatchingManager


def enable(model: nn.Module, backend: str = "auto", fuse: bool | str = True) -> Multibatch:
    """Let a model's ``forward`` and ``generate`` take ``adapter_ids``, one for every sample.

    Parameters keep their names, their values and their places in memory; calls without ids run as PEFT runs them.

    Args:
        model: a ``PeftModel`` of LoRA adapters, or a transformers model to which ``add_adapter()`` or
            ``load_adapter()`` added them; adapters may also be added later. Of Sentence Transformers, a
            ``SentenceTransformer`` or ``CrossEncoder`` with such a model inside, whose ``encode`` or ``predict`` then
            takes ids as well.
        backend: ``"triton"``, kernels for CUDA devices; ``"torch"``, torch's own matrix products; ``"auto"`` takes
            triton where there is a CUDA device. Tensors on a CPU and gradients always run on torch. To debug, Triton's
            interpreter (``TRITON_INTERPRET=1``) runs the kernels on a CPU where ``"triton"`` is asked for.
        fuse: run q/k/v as one op of three slices, gate/up as one of two, wherever they read the same tensor. With
            ``"weights"`` their base weights become one as well, and base parameters views of it, which saves matrix
            products for calls with ids; where that can't be, ``report()`` says why.

    Returns:
        The handle. A model that is enabled already gives back the handle it has.

    Raises:
        UnsupportedError: this is no model, or none of its adapters can run in a mixed batch; the message says why.
        BackendUnavailableError: ``backend`` is none that can run here.

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
            f"enable got an object of type {type(model).__name__}: expected a PeftModel, or a transformers model to "
            "which adapters are added with add_adapter() or load_adapter()."
        )
    if isinstance(model, (PeftModel, PeftMixedModel)):
        check_any_kind(model.peft_config)  # of which the model inside may know nothing
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
    """Undo ``enable``: the model runs as if it had never been called. Does nothing where it wasn't.

    Args:
        model: the model, or what was passed to ``enable``.
    """
    handle = inner_model(model).__dict__.get(STATE)
    if handle is not None:
        handle.disable()


class Multibatch(Handle):
    """The handle that ``enable`` returns.

    Attributes:
        adapter_names: names of the adapters; the index is the integer id, in the order in which adapters were added.
            An id stays with its name: where an adapter was deleted there is None, and the others keep their ids.
    """

    def continuous_batching(self, mixtures: int = 1, **options: Any) -> AbstractContextManager[AdapterBatchingManager]:
        """transformers' ``continuous_batching_context_manager`` with an adapter per request.

        Args:
            mixtures: most adapters that a request's mixture may have; CUDA graphs are captured for that many.
            **options: as in transformers: ``generation_config``, ``continuous_batching_config``, ``warmup`` and more.

        Returns:
            A context manager that gives an ``AdapterBatchingManager``, whose ``add_request`` takes ``adapter_id``.

        Example:
            ```python
            with mb.continuous_batching(generation_config=GenerationConfig(max_new_tokens=32)) as manager:
                manager.add_request(tokenizer("LOVE, n.").input_ids, adapter_id="devil")
                print(manager.get_result().generated_tokens)
            ```
        """
        self._refresh()
        return Batching(self, mixtures=mixtures).continuous_batching_context_manager(**options)

    def verify(self, adapter_ids: Any, tolerance: float | None = None, **inputs: Any) -> Verification:
        """Compare a mixed batch with PEFT, one adapter at a time, and look for layers whose rows aren't the samples'.

        For a model that this package doesn't know, or an adapter on unusual layers. It calls the model about twice as
        often as there are samples, so pass a small batch, of samples that differ; other threads must not use the model
        meanwhile, whose active adapter changes. Nothing of the model is different afterwards.

        Args:
            adapter_ids: as for ``forward``; at least two entries.
            tolerance: the largest error that counts as right, as a part of an output's largest value; by default what
                rounding explains in the dtype of the model.
            **inputs: keyword arguments of the model's ``forward``.

        Returns:
            What differs, per output and per layer; true if nothing does. Printed, a summary.

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
        layers = {each.module: each.name for each in self._layers.values()}
        in_order = {each.name for each in self._layers.values() if each.handler in (linear, per_segment)}
        verifier = Verifier(self._outer, self._inner, layers, in_order, entries, names, inputs, tolerance)
        is_tried = self._router.is_tried
        self._router.is_tried = True  # whatever the order is, it is found
        try:
            found = verifier.run(adapter_ids)
            is_tried = is_tried or found.ok
        finally:
            self._router.is_tried = is_tried
        return found

    def _attach(self, model: nn.Module, methods: Iterable[str] = ("forward", "generate")) -> None:
        is_new, has_loops = model not in self._attached, is_sentence_model(model)
        super()._attach(model, () if has_loops and model is not self._inner else methods)
        if is_new:
            self._attached[model].extend(with_samples(model) if has_loops else [with_requests(model)])
