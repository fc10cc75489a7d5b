"""Sweep learning rates and ranks on one dataset in a single run, and plot the losses.

    python examples/sweep_learning_rates.py --steps 60 --plot sweep.png

Every step runs the same rows once for each pair of settings, in one batch. The best pair is trained again with PEFT
alone, to show that the losses are the same.
"""

from pathlib import Path

import torch
import typer
from peft import LoraConfig, get_peft_model

import peft_multibatch
from peft_multibatch.demo.model import load_model
from peft_multibatch.training import AdapterOptimizer, Run, sample_losses


TEXT = Path(__file__).parent.parent / "tests" / "data" / "held_out" / "devil.txt"
RATES, RANKS = [1e-4, 1e-3, 1e-2], [4, 16]
SETTINGS = {f"rate {rate:g}, rank {rank}".replace(".", "_"): (rate, rank) for rank in RANKS for rate in RATES}


def adapted(base, names):
    """Add an adapter for each pair of settings; those of the same rank start with the same weights."""
    model = None
    for name in names:
        rank = SETTINGS[name][1]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(rank)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


def main(steps: int = 30, rows: int = 1, length: int = 64, plot: Path = Path("sweep.png")) -> None:
    """Train for STEPS steps on ROWS rows of LENGTH tokens."""
    base, tokenizer = load_model(device="cuda" if torch.cuda.is_available() else "cpu")
    tokens = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[0].to(base.device)
    parts = torch.stack([part for part in tokens.split(length) if len(part) == length])
    batches = [parts[torch.arange(step * rows, (step + 1) * rows) % len(parts)] for step in range(steps)]

    model = adapted(base, SETTINGS)
    peft_multibatch.enable(model)
    ids = [name for name in SETTINGS for _ in range(rows)]
    losses = {name: [] for name in SETTINGS}
    runs = {name: Run(lr=rate, schedule="linear", steps=steps) for name, (rate, _) in SETTINGS.items()}
    with AdapterOptimizer(model, runs) as optimizer:
        for batch in batches:
            inputs = batch.repeat(len(SETTINGS), 1)
            found, items = sample_losses(model(inputs, adapter_ids=ids).logits, inputs)
            optimizer.loss(found, items, ids).backward()
            for name, metrics in optimizer.step().items():
                losses[name].append(metrics["loss"])
    model.unload()
    best = min(losses, key=lambda name: sum(losses[name][-5:]))
    draw(losses, plot)

    rate, _ = SETTINGS[best]
    alone = adapted(base, [best])
    adamw = torch.optim.AdamW([each for each in alone.parameters() if each.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: 1 - step / steps)
    for step, batch in enumerate(batches):
        loss = alone(batch, labels=batch).loss
        assert abs(loss.item() - losses[best][step]) < 1e-3
        loss.backward()
        adamw.step()
        schedule.step()
        adamw.zero_grad()
    print(f"best of {len(SETTINGS)}: {best}, loss {losses[best][-1]:.3f} (matches PEFT); see {plot}")


def draw(losses, path):
    """Plot one line per pair of settings."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for name, values in losses.items():
        rate, rank = SETTINGS[name]
        style = {"color": f"C{RATES.index(rate)}", "linestyle": ["-", "--"][RANKS.index(rank)]}
        axes.plot(range(1, len(values) + 1), values, label=name.replace("_", "."), **style)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
