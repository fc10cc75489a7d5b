"""Check whether an adapter fits a model, reading only the model's configuration."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedModel

from peft_multibatch.adapters.store.contents import Contents
from peft_multibatch.api import enable
from peft_multibatch.demo.model import gguf_path
from peft_multibatch.errors import AdapterUnsupportedError, MultibatchError
from peft_multibatch.serve.cli import DEMO


LARGEST_RANK = 1 << 20
MEMORY = "1TB"  # not allocated until a call needs it

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""transformers' auto class for each of PEFT's task types."""


class Fitting:
    """Checks adapters against a model without weights.

    Args:
        model: a folder, a name on the hub, or ``"demo"``.
        may_download: whether its configuration may be downloaded from the hub.
    """

    def __init__(self, model: str, may_download: bool = False) -> None:
        options: dict[str, Any] = {"local_files_only": not may_download, "trust_remote_code": False}
        if model == DEMO:
            path = gguf_path()
            model, options["gguf_file"] = str(path.parent), path.name
        self._config = AutoConfig.from_pretrained(model, **options)
        self._stores: dict[str, Any] = {}  # by task

    def check(self, contents: Contents) -> tuple[str, str]:
        """Check whether an adapter fits.

        Returns:
            The reason why it doesn't fit, and the reason why an adapter store can't hold it; empty strings if it can.
        """
        refusal = contents.refusal
        if not refusal:
            try:
                self._store(contents.task).register(contents.name, contents.folder)
                return "", ""
            except AdapterUnsupportedError as error:
                refusal = str(error)
            except MultibatchError as error:
                return str(error), ""
        return self._check_with_peft(contents), refusal

    def _store(self, task: str) -> Any:
        if task not in self._stores:
            model = self._model(task).requires_grad_(False)
            with FakeTensorMode(allow_non_fake_inputs=True):  # stores look for layers on the CPU
                model = model.to_empty(device="cpu")
            self._stores[task] = enable(model).adapter_store(
                max_host_memory=MEMORY, max_device_memory=MEMORY, max_rank=LARGEST_RANK
            )
        return self._stores[task]

    def _check_with_peft(self, contents: Contents) -> str:
        """Compare an adapter's tensors with those that PEFT creates for its configuration."""
        name = contents.name
        try:
            config = PeftConfig.from_pretrained(contents.folder)
            model = get_peft_model(self._model(contents.task), config, low_cpu_mem_usage=True)
        except (ValueError, TypeError, KeyError) as error:
            return f"PEFT can't add adapter {name!r} to this model: {error}"
        has_embeddings = any(each in contents.targets for each in EMBEDDING_LAYER_NAMES)
        state = get_peft_model_state_dict(model, save_embedding_layers=has_embeddings)
        expected = {key: tuple(value.shape) for key, value in state.items()}
        for key, tensor in contents.tensors.items():
            if key in expected and expected[key] != tensor.shape:
                return (
                    f"adapter {name!r} has {key} of shape {[*tensor.shape]}: expected {[*expected[key]]} in this "
                    "model. Use the base model that it was trained with."
                )
        missing, extra = expected.keys() - contents.tensors.keys(), contents.tensors.keys() - expected.keys()
        for what, keys in (("has no", missing), ("has", extra)):
            if keys:
                return (
                    f"adapter {name!r} {what} {min(keys)}, and {len(keys) - 1} more like it: expected the tensors "
                    "that its configuration creates in this model. Use the base model that it was trained with."
                )
        try:
            enable(model)
        except MultibatchError as error:
            return str(error)
        return ""

    def _model(self, task: str) -> PreTrainedModel:
        """Build the model with parameters on the meta device."""
        names = [] if task in CLASSES else self._config.architectures or []
        own: Any = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        by_task: Any = getattr(transformers, CLASSES.get(task, "AutoModelForCausalLM"))
        with torch.device("meta"):
            model = by_task.from_config(self._config) if own is None else own._from_config(self._config)
        return model.eval()
