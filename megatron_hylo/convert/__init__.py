"""Conversion of Hugging Face checkpoints to Megatron model folders and back, with verification of both."""
