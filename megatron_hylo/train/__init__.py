"""The training loop and its parts: optimizer, checkpoints, logging, resumption."""
