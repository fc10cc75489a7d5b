"""The command line. Torch and transformers are imported by the commands that need them, once they run."""
