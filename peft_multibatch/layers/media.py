"""Parts of a model that encode images, videos or audio: every row runs under the adapter of its own sample."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.calls.router import Router
from peft_multibatch.errors import RowMappingError, UnsupportedError
from peft_multibatch.layers.media_rows import (
    ADVICE,
    AUDIO,
    IMAGES,
    TEXTS,
    VIDEOS,
    Kind,
    Media,
    MediaRows,
    parameters,
    placeholder,
)
from peft_multibatch.layers.patch import STATE, PatchedLayer, Replacement, handles, own_attribute
from peft_multibatch.layers.per_segment import run_base


KINDS = {kind.method: kind for kind in (IMAGES, VIDEOS, AUDIO)}

BLIP = {"vision_model": IMAGES, "qformer": IMAGES, "language_projection": IMAGES}

CHILDREN = {
    "Blip2ForConditionalGeneration": BLIP,
    "Blip2Model": BLIP,
    "Qwen2AudioModel": {"audio_tower": AUDIO, "multi_modal_projector": AUDIO},
}
"""By class of model, the modules that encode media if the model calls them directly instead of through a method."""

ENCODERS = "_multibatch_encoders"
"""Attribute of a module that holds its encoders, by the name of the method."""


class MediaPlan(NamedTuple):
    """The arguments of ``Call.of_media``, and the media; None if no text told whose they are, as with one adapter."""

    plan: BatchPlan
    images: tuple[BatchPlan, int] | None
    rows: int | None = None
    media: Media | None = None


class MediaEncoder:
    """Runs what encodes media under the adapters of the samples that the media belong to.

    Args:
        model: the model whose configuration has the placeholder token.
        kind: what is encoded.
        name: the model's name, for messages.
        router: knows the active call.
    """

    def __init__(self, model: nn.Module, kind: Kind, name: str, router: Router) -> None:
        self.name, self.kind, self.router = f"{name}.{kind.method}" if name else kind.method, kind, router
        self._rows = MediaRows(model, kind, self.name)

    def remove(self) -> None:
        """Restore the model's own methods."""

    def plan(self, call: Call, given: dict[str, Any]) -> MediaPlan:
        """The plan in which every row runs under the adapter of its sample.

        Args:
            call: the active call, for samples.
            given: arguments of the method, by name.

        Raises:
            RowMappingError: the inputs don't tell which sample each one belongs to.
        """
        entries = list(dict.fromkeys(call.plan.entries))
        if len(entries) == 1:
            return MediaPlan(call.plan.alone(entries[0]), None)
        arguments = {**(call.arguments or {}), **{name: each for name, each in given.items() if each is not None}}
        has_text = call.arguments is not None and self.kind.inputs not in call.arguments
        media, shares = self._rows.find(arguments, len(call.plan.entries), has_text)
        plan = call.plan.of_runs(shares.rows)
        images = (call.plan.of_runs(shares.media), len(media.tokens)) if media.is_flat else None
        has_tokens = any(arguments.get(name) is not None for name in TEXTS)
        rows = sum(media.rows) if media.is_exact else None
        return MediaPlan(plan, images, rows, media if has_tokens else None)


class MediaMethod(MediaEncoder):
    """A method that encodes media, replaced by one that runs it like that."""

    def __init__(self, model: nn.Module, kind: Kind, name: str, router: Router) -> None:
        super().__init__(model, kind, name, router)
        attribute = own_attribute(model, kind.method)
        self.original: Callable[..., Any] = getattr(model, attribute)
        self._parameters = parameters(model, kind.method)
        self._encoders = model.__dict__.setdefault(ENCODERS, {})
        self._encoders[kind.method] = self
        method: Any = _method(type(model), kind.method)  # type: ignore[arg-type]
        self._method = Replacement(model, attribute, types.MethodType(method, model))

    def remove(self) -> None:
        self._method.undo()
        del self._encoders[self.kind.method]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        call = self.router.current(self)
        if isinstance(call, Graph):  # only the inputs tell which images there are
            return torch.compiler.disable(self.run)(*args, **kwargs)
        if call is None or call.is_media:
            return self.original(*args, **kwargs)
        try:
            found = self.plan(call, {**dict(zip(self._parameters, args)), **kwargs})
        except RowMappingError as error:  # raised by the first layer in which an adapter of the batch has weights
            call.media_error = str(error)
            return self.original(*args, **kwargs)
        with self.router.routing(functools.partial(call.of_media, *found[:3])):
            output = self.original(*args, **kwargs)
        if found.media is not None:
            self._rows.check(found.media, output)
        return output

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


@functools.cache
def _method(cls: type, name: str) -> Callable[..., Any]:
    """What replaces a method of a class, with the same signature: ``generate`` asks for it."""

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        encoder = (self.__dict__.get(ENCODERS) or {}).get(name)
        return getattr(type(self), name)(self, *args, **kwargs) if encoder is None else encoder.run(*args, **kwargs)

    handles()(method)
    method.__name__ = name  # bound methods are pickled by their name
    method.__signature__ = inspect.signature(getattr(cls, name))  # type: ignore[attr-defined]
    return method


def _has_rows(number: int, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a layer's input has this number of rows."""
    tensors = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim())
    return len(next(tensors, ())) == number


@functools.cache
def in_encoder(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler of a layer that encodes media, which needs to know the sample of each row.

    Args:
        handler: the handler that the layer would have in a text model.
    """

    @handles(is_fast=getattr(handler, "is_fast", False))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch = getattr(self, STATE)
        call = None if patch is None else patch.router.current(patch)
        if call is None:
            return handler(self, *args, **kwargs)
        if isinstance(call, Graph):
            if self._disable_adapters and patch.is_disabled_on(call.here.thread):
                return handler(self, *args, **kwargs)
            raise UnsupportedError(
                f"{patch.name} encodes images, videos or audio, and was compiled: expected it to run uncompiled, "
                "because only the inputs tell which sample each row belongs to. Run the model without torch.compile."
            )
        if not any(adapter.has(self) for adapter in call.plan.adapters.values()):
            return run_base(self, patch, *args, **kwargs)
        if call.is_media or len(call.plan.runs[1]) == 1:
            if call.images is None or not _has_rows(call.images[1], args, kwargs):
                return handler(self, *args, **kwargs)
            with patch.router.routing(functools.partial(call.of_media, call.images[0], None)):
                return handler(self, *args, **kwargs)
        if patch.encoder is None:
            raise RowMappingError(
                call.media_error
                or f"{patch.name} ran under several adapters outside of a call of the whole model, so the sample of "
                f"each row isn't known: expected such a call. {ADVICE}"
            )
        known = call.media.get(patch.encoder)
        if known is None:  # once for all layers of a forward
            known = call.media[patch.encoder] = patch.encoder.plan(call, {})[:3]
        with patch.router.routing(functools.partial(call.of_media, *known)):
            return handler(self, *args, **kwargs)

    forward.encodes_media = True  # type: ignore[attr-defined]
    return forward


def attach(
    known: dict[tuple[nn.Module, str], MediaEncoder],
    names: dict[nn.Module, str],
    layers: Iterable[PatchedLayer],
    router: Router,
) -> None:
    """Replace all methods that encode media, if layers with adapters are inside; restore all others.

    Args:
        known: encoders that are attached, by module and method; changed in place.
        names: the model's modules, and the prefix of their children's names.
        layers: the model's layers with adapters.
        router: knows the active call.
    """
    inside = [layer for layer in layers if getattr(layer.handler, "encodes_media", False)]
    found: dict[tuple[nn.Module, str], tuple[type[MediaEncoder], Kind, str]] = {}
    for model, prefix in names.items() if inside else ():
        for kind in KINDS.values():
            if placeholder(model, kind) is not None and parameters(model, kind.method):
                found[model, kind.method] = MediaMethod, kind, prefix
        for child, kind in CHILDREN.get(type(model).__name__, {}).items():
            found[model, child] = MediaEncoder, kind, prefix
    for key in known.keys() - found.keys():
        known.pop(key).remove()
    for (model, part), (make, kind, prefix) in found.items():
        if (model, part) not in known:
            known[model, part] = make(model, kind, prefix.rstrip("."), router)
        if make is MediaEncoder:
            for layer in inside:
                if f"{layer.name}.".startswith(f"{prefix}{part}."):
                    layer.encoder = known[model, part]
