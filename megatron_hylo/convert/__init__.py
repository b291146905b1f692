"""Hugging Face checkpoints to Megatron model folders and back, and the proof that both are the same."""
