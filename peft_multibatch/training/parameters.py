"""Find the parameters of each adapter, and make several adapters trainable at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from peft_multibatch.compat import set_requires_grad
from peft_multibatch.errors import NotEnabledError, UnsupportedError
from peft_multibatch.layers.patch import STATE
from peft_multibatch.model.handle import Handle
from peft_multibatch.plan.ids import BASE_NAME, resolve


def handle_of(model: nn.Module) -> Handle:
    """Return the handle of an enabled model, which DistributedDataParallel or ``torch.compile`` may wrap.

    Raises:
        NotEnabledError: the model isn't enabled.
    """
    handle: Any = getattr(extract_model_from_parallel(model, keep_torch_compile=False), STATE, None)
    if handle is None:
        raise NotEnabledError(
            f"training got a {type(model).__name__} on which peft_multibatch.enable was not called: expected an "
            "enabled model. Call enable(model) first."
        )
    handle._refresh()
    return handle


def make_trainable(
    handle: Handle, names: Sequence[str]
) -> tuple[dict[str, dict[str, nn.Parameter]], Callable[[], None]]:
    """Make exactly these adapters trainable; PEFT's ``set_adapter`` freezes all except one.

    If only some parameters of an adapter are trainable, the user froze the others, and they stay frozen.

    Args:
        handle: the model's handle.
        names: names of the adapters.

    Returns:
        The parameters of every adapter by their names in the model, and a function that undoes it.

    Raises:
        UnknownAdapterError: there is no such adapter.
        UnsupportedError: gradients of different adapters would mix, or the model is split over devices.
    """
    _check(handle, names)
    inner = handle._inner
    parameters = dict(inner.named_parameters())
    before = {name: each.requires_grad for name, each in parameters.items()}

    def restore() -> None:
        for name, each in parameters.items():
            each.requires_grad_(before[name])

    def trainable(adapters: Sequence[str]) -> dict[str, nn.Parameter]:
        for each in parameters.values():
            each.requires_grad_(False)
        set_requires_grad(inner, list(adapters))
        return {name: each for name, each in parameters.items() if each.requires_grad}

    known = handle._registry.names
    try:
        of_adapters = trainable([name for name in known.ids if name not in known.stored])
        others = [name for name, is_trained in before.items() if is_trained and name not in of_adapters]
        if others:
            raise UnsupportedError(
                f"{others[0]} is trainable but belongs to no adapter, so all adapters in a batch would train it "
                f"(one of {len(others)} such parameters): expected a frozen base model. Call requires_grad_(False) on "
                "it, or train with bias='none'."
            )
        found = {name: trainable([name]) for name in names}
        for name, own in found.items():
            some = {key: each for key, each in own.items() if before[key]}
            found[name] = some or own
        owners: dict[nn.Parameter, str] = {}
        for name, own in found.items():
            for key, each in own.items():
                if each in owners:
                    raise UnsupportedError(
                        f"{key} belongs to both {owners[each]!r} and {name!r}: expected adapters that share no "
                        "parameters. Train them in separate runs."
                    )
                owners[each] = name
        trainable([])
        for own in found.values():
            for each in own.values():
                each.requires_grad_(True)
    except BaseException:
        restore()
        raise
    return found, restore


def _check(handle: Handle, names: Sequence[str]) -> None:
    known = handle._registry.names
    resolve(list(names), known)
    if BASE_NAME in names:
        raise UnsupportedError(f"a run was given for {BASE_NAME!r}, the base model: expected names of adapters.")
    stored = [name for name in names if name in known.stored]
    if stored:
        raise UnsupportedError(
            f"a run was given for {stored[0]!r}, which is in an adapter store, and stored adapters can't be trained: "
            "expected adapters in PEFT's modules. Load it with load_adapter under another name."
        )
    router = handle._router
    if router.is_gathered or router.split is not None:
        how = "sharded by FSDP" if router.is_gathered else "split by tensor parallelism"
        raise UnsupportedError(
            f"training several adapters in a batch got a model that is {how}: expected every process to hold the "
            "whole model. Use DistributedDataParallel, or load the base model in 4 bits."
        )
    config = getattr(handle._inner, "config", None)
    for each in (config, getattr(config, "text_config", None)):
        if getattr(each, "output_router_logits", False):
            raise UnsupportedError(
                "the model's configuration has output_router_logits=True, which adds one load-balancing loss for all "
                "adapters of a batch: expected False. Set model.config.output_router_logits = False."
            )
