"""Access to internals of PEFT and torch, and a warning about versions that weren't tested.

Besides these classes, the package reads attributes of PEFT's layers, which are listed in ``ATTRIBUTES``; ``check``
looks for them in the installed version. torch's internals are used to detect layers that ``backward`` runs again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from peft import PeftMixedModel, PeftModel
from peft.functional import set_adapter, set_requires_grad
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.lora import layer as lora
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft.tuners.lora.variants import calculate_alora_offsets
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch._C import DisableTorchFunction, DispatchKey, DispatchKeySet
from torch._C import _current_autograd_node as current_node
from torch._C import _current_graph_task_id as current_backward
from torch._C import _ForceDispatchKeyGuard as ForcedKeys
from torch._C import _FunctionBase as FunctionNode
from torch._C import _is_fwd_grad_enabled as is_forward_mode_enabled
from torch._C._autograd import _pop_saved_tensors_default_hooks as pop_saved_tensors_hooks
from torch._C._autograd import _push_saved_tensors_default_hooks as push_saved_tensors_hooks
from torch._C._autograd import _top_saved_tensors_default_hooks as saved_tensors_hooks
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.variable import Variable
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import _CheckpointFrame as CheckpointFrame
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging


__all__ = [
    "ALORA_OFFSETS",
    "SPLITS_ADAPTERS",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "CheckpointFrame",
    "Conv1D",
    "FunctionNode",
    "LoraLayer",
    "LoraParallelLinear",
    "ModulesToSaveWrapper",
    "PeftMixedModel",
    "PeftModel",
    "TrainableTokensWrapper",
    "after_backward",
    "calculate_alora_offsets",
    "check",
    "check_serving",
    "check_target_module_exists",
    "current_backward",
    "current_node",
    "dequantize_module_weight",
    "is_fake",
    "is_forward_mode_enabled",
    "lora",
    "outside_of_tracing",
    "pop_saved_tensors_hooks",
    "push_saved_tensors_hooks",
    "saved_tensors_hooks",
    "set_adapter",
    "set_requires_grad",
]


@contextlib.contextmanager
def outside_of_tracing() -> Iterator[None]:
    """A block whose operations run on tensors themselves, whatever this thread is tracing, transforming or observing.

    torch keeps that in the thread's dispatch keys, and in modes, which subclasses of tensors see without these keys.
    """
    with (
        DisableTorchFunction(),
        _disable_current_modes(),
        ForcedKeys(DispatchKeySet(DispatchKey.BackendSelect), DispatchKeySet(DispatchKey.Undefined)),
    ):
        yield


def after_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that is running has completed."""
    Variable._execution_engine.queue_callback(function)


logger = logging.get_logger(__name__)

ALORA_OFFSETS = "alora_offsets"
"""The argument with which PEFT's hooks pass the offsets of aLoRA adapters to layers."""

SPLITS_ADAPTERS = hasattr(lora_model, "add_lora_tp_hooks_dtensor")
"""Whether PEFT splits adapters of models that transformers 5.17 and newer split over devices; 0.21.1 is the first."""

# The oldest and the newest release that were tested; patch releases of the newest count as tested.
TESTED = {"peft": ("0.21.0", "0.21"), "transformers": ("5.17.0", "5.24"), "torch": ("2.11.0", "2.15")}

ATTRIBUTES = (
    "lora_A",
    "lora_B",
    "scaling",
    "lora_variant",
    "lora_magnitude_vector",
    "merged_adapters",
    "_disable_adapters",
    "_active_adapter",
    "_get_available_adapters",
)


SERVING_TESTED = "5.24"
"""The release of transformers with which the server was tested; older ones lack some of these methods."""

SERVING: dict[str, tuple[str, ...]] = {
    "model_runner.ModelRunner.__init__": ("pad_inputs",),
    "model_runner.ModelRunner._forward_process_and_sample": ("logit_processor", "_sample"),
    "model_runner.ModelRunner._sample": ("argmax",),
    "input_outputs.ContinuousBatchingIOs.prepare_batch_update": ("output_ids", "requests_in_batch"),
    "input_outputs.ContinuousBatchingIOs.get_graph": ("_get_graph_key",),
    "input_outputs.ContinuousBatchingIOs.set_graph": ("_get_graph_key",),
    "cb_logits_processors.ContinuousBatchingLogitsProcessorList.__init__": ("logits_processor", "tensors_required"),
    "cb_logits_processors.ContinuousBatchingLogitsProcessorList._retrieve_processors_kwargs": ("supported_keys",),
    "cb_logits_processors.ContinuousBatchingLogitsProcessorList.prepare_tensor_args": (),
    "cb_logits_processors.ContinuousBatchingLogitsProcessorList.fill_defaults": (),
    "continuous_api.ContinuousBatchingManager._create_batch_processor": ("logit_processor",),
    "continuous_api.ContinuousBatchingManager._run_generation_loop": ("current_batch",),
    "continuous_api.ContinuousBatchingManager._handle_critical_error": ("record_fatal_error",),
    "requests.RequestState.create_equivalent_initial_request": ("_true_initial_tokens",),
    "requests.RequestState.to_generation_output": ("generated_tokens", "logprobs", "status"),
    "continuous_api.ContinuousBatchProcessor.update_batch": ("streaming", "deliver_batch", "to_generation_output"),
}
"""Internal methods of transformers' continuous batching -> the names that they must use for the server to work."""


@functools.cache
def check() -> None:
    """Warn once if the installed versions weren't tested. Called when the first model is enabled.

    Raises:
        ImportError: the installed PEFT or torch lacks an attribute that this package reads.
    """
    untested = []
    for package, (oldest, newest) in TESTED.items():
        installed = Version(version(package))
        if installed < Version(oldest) or installed.release[:2] > Version(newest).release[:2]:
            untested.append(f"{package} {oldest} to {newest}, and {installed} is installed")
    if untested:
        logger.warning(
            f"peft_multibatch was tested with {'; with '.join(untested)}: results may be wrong if internals have "
            "changed. Compare with PEFT through mb.verify(...), or install a tested version."
        )
    layer = lora.Linear(nn.Linear(1, 1), "default", LoraConfig(r=1), r=1)
    missing = [name for name in ATTRIBUTES if not hasattr(layer, name)]
    if missing:
        raise ImportError(
            f"peft {version('peft')} is installed, whose layers have no {', '.join(missing)}: expected peft "
            f"{TESTED['peft'][0]} to {TESTED['peft'][1]}. Install one of these versions."
        )
    if "recompute_fn" not in CheckpointFrame.__init__.__code__.co_names:
        raise ImportError(
            f"torch {version('torch')} is installed, whose checkpoints have no recompute_fn: expected torch "
            f"{TESTED['torch'][0]} to {TESTED['torch'][1]}. Install one of these versions."
        )


def check_serving() -> None:
    """Check the internals of transformers' continuous batching that the server reads and replaces.

    Raises:
        ImportError: the installed version lacks some of them.
    """
    for place, names in SERVING.items():
        module, owner, method = place.split(".")
        found: Any = None
        with contextlib.suppress(ImportError):
            found = import_module(f"transformers.generation.continuous_batching.{module}")
        code = getattr(getattr(getattr(found, owner, None), method, None), "__code__", None)
        missing = [name for name in names if code is not None and name not in code.co_names]
        if code is None or missing:
            raise ImportError(
                f"transformers {version('transformers')} is installed, whose {owner}.{method} "
                f"{'has no ' + ', '.join(missing) if missing else 'is not there'}: expected transformers "
                f"{SERVING_TESTED}, which the server was tested with. Install that version."
            )
