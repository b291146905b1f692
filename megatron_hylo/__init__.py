"""Long-context upcycling on Megatron-Core: a pretrained Transformer goes in, a hybrid comes out."""

__version__ = "0.2.0"
