"""Training many adapters in one run, each of which moves as it would in a run of its own."""

from peft_multibatch.training.losses import sample_losses
from peft_multibatch.training.optimizer import AdapterOptimizer
from peft_multibatch.training.runs import Run


__all__ = ["AdapterOptimizer", "Run", "sample_losses"]
