"""Train three adapters of SmolLM2-135M in one run, each with the same result as if trained alone.

    python examples/train_many.py --steps 200
    accelerate launch --num_processes 2 examples/train_many.py --steps 200

The texts are Shakespeare, a dictionary and the Bible; tests/data/held_out has excerpts, and
`examples/train_adapters.py prepare texts` fetches the whole texts. The adapters differ in rank, modules, learning rate
and accumulation. OUT gets a folder per adapter, and checkpoints from which the run resumes if it is started again.
"""

from pathlib import Path

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import peft_multibatch
from peft_multibatch.demo.model import load_model
from peft_multibatch.training import MultiAdapterTrainer, Run


TEXTS = Path(__file__).parent.parent / "tests" / "data" / "held_out"
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "shakespeare": LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "devil": LoraConfig(r=16, lora_alpha=32, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "kjv": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=MLP, task_type="CAUSAL_LM"),
}
SETTINGS = {
    "shakespeare": {"lr": 1e-3},
    "devil": {"lr": 5e-4, "schedule": "cosine", "patience": 3},
    "kjv": {"lr": 2e-3, "accumulate": 2, "max_grad_norm": 0.3},
}


def main(
    texts: Path = TEXTS, out: Path = Path("adapters"), steps: int = 100, rows: int = 2, length: int = 128
) -> None:
    """Train on the files in TEXTS, with ROWS rows of LENGTH tokens of every text in a batch."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_model(device=device)
    model = None
    for name, config in CONFIGS.items():
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    peft_multibatch.enable(model)

    runs = {}
    for name in CONFIGS:
        tokens = tokenizer((texts / f"{name}.txt").read_text(), return_tensors="pt").input_ids[0]
        parts = [{"input_ids": part, "labels": part} for part in tokens.split(length) if len(part) == length]
        runs[name] = Run(batch_size=rows, train_dataset=parts[2:], eval_dataset=parts[:2], **SETTINGS[name])
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, logging_steps=1, eval_strategy="steps", eval_steps=50, save_steps=50,
        save_total_limit=1, report_to=[], use_cpu=device == "cpu",
    )  # fmt: skip
    trainer = MultiAdapterTrainer(model, arguments, runs, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if out.exists() else None)
    trainer.save_model()

    # mixed batches in evaluation give each adapter the same loss as PEFT alone
    metrics = trainer.evaluate()
    for name, run in runs.items():
        model.set_adapter(name)
        labels = torch.stack([row["labels"] for row in run.eval_dataset]).to(model.device)
        with torch.no_grad():
            alone = float(model(labels, labels=labels).loss)
        assert abs(metrics[f"eval_{name}_loss"] - alone) < 1e-3
        moved = trainer.optimizer.steps[name]
        print(f"{name}: {moved} steps, held-out loss {alone:.3f} (matches PEFT), saved in {out / name}")


if __name__ == "__main__":
    typer.run(main)
