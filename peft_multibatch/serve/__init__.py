"""An OpenAI-compatible server for one base model and its adapters: ``peft-multibatch serve``."""
