"""`accelerate launch`: two processes on a CPU train as PEFT and torch do, one adapter at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import peft_model
from test_multi_adapter_trainer import alone, arguments, runs
from tolerances import relative_error


# Runs in every process: the trainer, and a loop over a loader prepared by accelerate.
SCRIPT = """
import sys, torch
from accelerate import Accelerator
from models import peft_model
from test_multi_adapter_trainer import arguments, dataset, runs
from torch.utils.data import DataLoader
import peft_multibatch
from peft_multibatch.training import (
    AdapterBatchSampler, AdapterCollator, AdapterOptimizer, MixedDataset, MultiAdapterTrainer, Run, sample_losses,
)

folder = sys.argv[1]
model = peft_model()
peft_multibatch.enable(model)
trainer = MultiAdapterTrainer(model, arguments(folder), runs())
assert trainer.args.world_size == 2
trainer.train()
trainer.save_model()

accelerator, model = Accelerator(cpu=True), peft_model()
peft_multibatch.enable(model)
rows = MixedDataset({name: dataset(name, 8) for name in ("three", "eight")})
sampler = AdapterBatchSampler(rows.sizes, {"three": 1, "eight": 1})
collator = AdapterCollator()
loader = accelerator.prepare(DataLoader(rows, batch_sampler=sampler, collate_fn=collator))
optimizer = AdapterOptimizer(model, {name: Run(lr=0.02, optimizer=torch.optim.SGD) for name in rows.sizes})
for batch in loader:
    losses, items = sample_losses(model(batch["input_ids"], adapter_ids=batch["adapter_ids"]).logits, batch["labels"])
    accelerator.backward(optimizer.loss(losses, items, batch["adapter_ids"]))
    optimizer.step()
assert optimizer.steps == {"three": 4, "eight": 4}  # of eight batches, two at a time
if accelerator.is_main_process:
    torch.save({key: each for key, each in model.named_parameters()}, f"{folder}/loop.pt")
"""
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    (folder / "script.py").write_text(SCRIPT)
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    given = {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0"]  # picks a free one
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(folder)], env={**os.environ, **given}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_the_trainer(launched):
    model = peft_model()
    for name, run in runs().items():
        expected, _ = alone(peft_model(), name, run, arguments(launched))
        model.load_adapter(launched / name, adapter_name=name)
        for key, value in expected.items():
            assert relative_error(dict(model.named_parameters())[key], value) <= 2e-5, key
    assert json.loads((launched / "three" / "adapter_config.json").read_text())["r"] == 3


def test_a_loop(launched):
    from test_multi_adapter_trainer import dataset

    from peft_multibatch.training import AdapterBatchSampler, MixedDataset

    found, model = torch.load(launched / "loop.pt", weights_only=True), peft_model()
    rows = MixedDataset({name: dataset(name, 8) for name in ("three", "eight")})
    batches = list(AdapterBatchSampler(rows.sizes, {"three": 1, "eight": 1}))
    for name in rows.sizes:
        model.set_adapter(name)
        own = [each for each in model.parameters() if each.requires_grad]
        sgd = torch.optim.SGD(own, lr=0.02)
        for step in range(4):
            both = [rows[row] for batch in batches[2 * step : 2 * step + 2] for row in batch]
            both = [row for row in both if row["adapter_ids"] == name]
            inputs, labels = (torch.stack([row[key] for row in both]) for key in ("input_ids", "labels"))
            model(inputs, labels=labels).loss.backward()
            sgd.step()
            sgd.zero_grad()
        for key, value in model.named_parameters():
            if f".{name}." in key:
                assert relative_error(found[key], value) <= 2e-5, key
