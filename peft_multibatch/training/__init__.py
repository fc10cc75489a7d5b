"""Train many adapters in one run; each takes the same steps as in a run of its own."""

from peft_multibatch.training.data import AdapterBatchSampler, AdapterCollator, MixedDataset
from peft_multibatch.training.losses import sample_losses
from peft_multibatch.training.optimizer import AdapterOptimizer
from peft_multibatch.training.runs import Run
from peft_multibatch.training.trainer import MultiAdapterTrainer


__all__ = [
    "AdapterBatchSampler",
    "AdapterCollator",
    "AdapterOptimizer",
    "MixedDataset",
    "MultiAdapterTrainer",
    "Run",
    "sample_losses",
]
