"""From a pretrained Transformer to an untrained hybrid: initialisers of its mixers and per-layer assembly, on plain tensors."""
