"""Run every case in docs/support.md, compare it with PEFT, one adapter at a time, and write the page.

    python tests/docs/support.py            # writes the page
    python tests/docs/support.py --check    # fails if the page is out of date

test_support.py runs it with --check, so the page can't become outdated.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(path) for path in (TESTS.parent, TESTS, TESTS / "adapters", TESTS / "layers")]

import peft  # noqa: E402
import test_quantized  # noqa: E402
import test_tuners  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from models import left_padded, row_by_row  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from tolerances import RELATIVE_ERROR, relative_error  # noqa: E402
from torch import nn  # noqa: E402

import peft_multibatch  # noqa: E402
from peft_multibatch.adapters.checks import TUNERS  # noqa: E402


NAMES = ["one", "two", "__base__", "two", "one"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
PAGE = TESTS.parent / "docs" / "support.md"
Case = tuple[Any, Callable[[Any, dict], torch.Tensor], dict[str, torch.Tensor]]


def language_model(options: dict, second: dict | None = None, kind: str = "Llama", **sizes: Any) -> Case:
    """Build a small decoder with two adapters."""
    torch.manual_seed(0)
    arguments = {"vocab_size": 160, "pad_token_id": 0, **(sizes or {**SMALL, "num_key_value_heads": 1})}
    config = getattr(transformers, f"{kind}Config")(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    shared = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(model, LoraConfig(**shared), "one")
    model.add_adapter("two", LoraConfig(**{**shared, "r": 3, **(second or {})}))
    test_tuners.perturb(model.eval())
    return model, lambda model, inputs, **ids: model(**inputs, **ids).logits, left_padded(len(NAMES), 6)


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.layer, nn.MultiheadAttention) or hasattr(self.layer, "out_proj"):
            return self.layer(x, x, x)[0]
        return self.layer(x)


def one_layer(layer: nn.Module, x: torch.Tensor) -> Case:
    torch.manual_seed(0)
    model = get_peft_model(One(layer), LoraConfig(r=4, target_modules=["layer"]), "one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["layer"]))
    test_tuners.perturb(model.eval())
    return model, lambda model, inputs, **ids: model(x=inputs["x"], **ids), {"x": x}


def tuner(name: str) -> Case:
    return test_tuners.build(name), lambda model, inputs, **ids: model(**inputs, **ids).logits, left_padded(5)


def quantized(kind: str) -> Case:
    package = test_quantized.KINDS[kind][0]
    if not test_quantized.is_installed(package):
        raise ModuleNotFoundError(f"needs the package {package}")
    dtype = test_quantized.dtype_of(kind)  # the dtype that its layers compute in
    return (
        test_quantized.build(kind),
        lambda model, inputs, **ids: model(**inputs, **ids).logits.to(dtype),
        left_padded(5),
    )


def unbuilt(reason: str) -> Case:
    raise NotImplementedError(reason)


INVOCATION = left_padded(len(NAMES), 6)["input_ids"][0, 2:4].tolist()
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
MIXTRAL = {**SMALL, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 4}
CASES: dict[str, dict[str, Callable[[], Case]]] = {
    "Layers": {
        "Linear": lambda: language_model({}),
        "GPT-2's Conv1D": lambda: language_model({"target_modules": ["c_attn"]}, None, "GPT2", **GPT2),
        "Embedding of tokens": lambda: language_model({"target_modules": ["embed_tokens"]}),
        "Embedding of positions": lambda: language_model({"target_modules": ["wpe"]}, None, "GPT2", **GPT2),
        "lm_head": lambda: language_model({"target_modules": ["lm_head"]}),
        "Conv1d": lambda: one_layer(nn.Conv1d(3, 6, 3), torch.randn(5, 3, 9)),
        "Conv2d": lambda: one_layer(nn.Conv2d(3, 6, 3), torch.randn(5, 3, 8, 8)),
        "Conv3d": lambda: one_layer(nn.Conv3d(3, 6, 3), torch.randn(5, 3, 5, 5, 5)),
        "MultiheadAttention": lambda: one_layer(nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(5, 3, 8)),
        "target_parameters: experts": lambda: language_model(EXPERTS, {"r": 4}, "Mixtral", **MIXTRAL),
        "target_parameters: experts of Llama 4": lambda: language_model(EXPERTS, {"r": 4}, "Llama4Text", **MIXTRAL),
        "Linear on OPT's flattened rows": lambda: language_model(
            {"target_modules": ["q_proj", "fc1"]}, None, "OPT", hidden_size=16, ffn_dim=24, num_hidden_layers=1,
            num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=32,
        ),
    },
    "Variants and options of LoRA": {
        "DoRA": lambda: language_model({"use_dora": True}, {"use_dora": False}),
        "rsLoRA": lambda: language_model({"use_rslora": True}),
        "rank_pattern, alpha_pattern": lambda: language_model(
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}
        ),
        "lora_bias": lambda: language_model({"target_modules": ["c_attn"], "lora_bias": True}, None, "GPT2", **GPT2),
        "PiSSA": lambda: language_model({"init_lora_weights": "pissa"}, {"init_lora_weights": True}),
        "OLoRA": lambda: language_model({"init_lora_weights": "olora"}, {"init_lora_weights": True}),
        "LoftQ": lambda: unbuilt("needs scipy to be initialised; plain LoRA afterwards"),
        "LoRA-GA": lambda: unbuilt("needs a training step to be initialised; plain LoRA afterwards"),
        "Arrow": lambda: unbuilt("refused: it weighs all adapters for every token"),
        "MiCA": lambda: language_model({"init_lora_weights": "mica"}),
        "BD-LoRA": lambda: language_model({"use_bdlora": peft.BdLoraConfig(["q_proj"], ["v_proj"], 2)}, {"r": 4}),
        "VeLoRA": lambda: language_model({"velora_config": peft.VeloraConfig()}),
        "MonteCLoRA": lambda: language_model({"monteclora_config": peft.MontecloraConfig()}),
        "KaSA": lambda: language_model({"kasa_config": peft.KasaConfig()}),
        "aLoRA": lambda: language_model({"alora_invocation_tokens": INVOCATION}),
        "modules_to_save": lambda: language_model({"modules_to_save": ["lm_head"]}, {"modules_to_save": None}),
        "trainable_token_indices": lambda: language_model(
            {"trainable_token_indices": {"embed_tokens": [3, 5]}}, {"trainable_token_indices": None}
        ),
    },
    "Other tuners": {name: (lambda name=name: tuner(name)) for name in TUNERS if name != "lora"},
    "Quantized base models": {
        **{kind: (lambda kind=kind: quantized(kind)) for kind in test_quantized.KINDS},
        "EETQ": lambda: unbuilt("needs a GPU, and a package without wheels"),
        "Intel Neural Compressor": lambda: unbuilt("needs a Gaudi accelerator"),
        "Transformer Engine": lambda: unbuilt("needs a GPU; PEFT's class was run around a plain layer"),
    },
}  # fmt: skip

COLUMN = {
    "Layers": "Layer",
    "Variants and options of LoRA": "Variant or option",
    "Other tuners": "Tuner",
    "Quantized base models": "Quantization",
}

PEFT_SUITES = """
## Versions

CI runs all tests with the newest releases of torch, transformers, PEFT and Triton that install together, and some of
them with the oldest supported versions. There is one gap with the newest: since transformers 5.24, `add_adapter`,
`set_adapter`, `enable_adapters`, `disable_adapters` and `delete_adapter` of a transformers model require PEFT 0.22,
which isn't released yet. `load_adapter` works, and so does everything on a `PeftModel`; CI tests these methods with
older versions.

## PEFT's own tests

`make test-peft` runs PEFT 0.21.2's own mixed-batch tests through this package: decoders, encoder-decoders, experts
as parameters, trainable tokens and custom models. Nearly all of them compare rows with PEFT, one adapter at a time.
Of the 84 that PEFT itself passes, 53 pass unchanged. 20 expect an error for something that works here (DoRA, training
mode and experts as parameters); the rows are compared before the missing error is reported. The remaining 11 get the
expected error with different wording. `tests/peft_suites/deviations.py` lists each deviation with its reason. Any
other failure fails the run, and so does a test that passes without running a batch through this package.
"""


NOTES = {
    "Variants and options of LoRA": """\
PiSSA, OLoRA, LoftQ and LoRA-GA change the base weights when they are initialised. As in PEFT, this affects all rows,
including those of other adapters and of the base model alone. Convert such adapters to plain LoRA
(`save_pretrained(..., path_initial_model_for_weight_conversion=...)`) to leave the base model unchanged.

If the reason is a property of the adapter ("it uses the variant", "its lora_B has a bias"), only that adapter runs
per segment; plain adapters in the same batch stay in the fused product.

The kernels run every rank that fits into the GPU's shared memory: on an H100 ranks up to 1,024, or 512 in training,
and on an L4 or RTX 4090 up to 256, or 512 for eager inference with 16-bit weights. Torch's products run larger ones,
but CUDA graphs and compiled code refuse them.""",
    "Quantized base models": """\
The base layer runs once for the whole batch, however its weights are stored. LLM.int8() looks for outliers in all
rows, as it does without adapters, so a row may be rounded differently than in a batch of its own. If a package isn't
installed when the script runs, its row in this table is kept from the previous run.""",
}


def run(case: Callable[[], Case]) -> tuple[str, str]:
    """Return how a case runs, and the reason if it isn't the fast way."""
    try:
        model, call, inputs = case()
    except NotImplementedError as error:
        return "not run", str(error)
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, NAMES, inputs, lambda row: call(model, row)))
        try:
            mb = peft_multibatch.enable(model)
            actual = call(model, inputs, adapter_ids=NAMES)
        except peft_multibatch.MultibatchError as error:
            return "refused", str(error).split(":")[0].split(", which")[0]
    error = relative_error(actual, expected)
    if not error <= RELATIVE_ERROR[actual.dtype]:
        raise SystemExit(f"relative error {error:.1e}")
    slow = [entry for entry in mb.report() if entry.how == "per segment"]
    if slow:
        return "per segment", slow[0].reason
    apart = [entry.reason for entry in mb.report().adapters if entry.reason]
    return ("per segment", apart[0].removeprefix("runs per segment, because ")) if apart else ("fast", "")


def page() -> str:
    lines = [
        "# What is supported",
        "",
        "`tests/docs/support.py` generates this page: it runs every case in a mixed batch and compares it with PEFT,",
        "one adapter at a time, in float32. The versions here are",
        f"peft {peft.__version__} and transformers {transformers.__version__}.",
        "*Fast* means one product for the whole batch. *Per segment* means PEFT's own module, run once for each",
        "adapter in the batch: correct, but slower. *Refused* raises an error that says why. `examples/` has scripts",
        "for classifiers, images, encoder-decoders and experts.",
    ]
    written = {line.split(" | ")[0]: line for line in PAGE.read_text().splitlines()}
    for section, cases in CASES.items():
        note = [NOTES[section], ""] if section in NOTES else []
        lines += ["", f"## {section}", "", *note, f"| {COLUMN[section]} | How it runs | Why |", "|---|---|---|"]
        for name, case in cases.items():
            try:
                how, why = run(case)
            except ModuleNotFoundError as error:
                lines.append(written.get(f"| {name}", f"| {name} | not run | {error} |"))
            else:
                lines.append(f"| {name} | {how} | {why} |")
    return "\n".join(lines) + "\n" + PEFT_SUITES


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = page()
    if "--check" in sys.argv:
        sys.exit(0 if found == PAGE.read_text() else f"{PAGE} is out of date, expected:\n{found}")
    PAGE.write_text(found)
