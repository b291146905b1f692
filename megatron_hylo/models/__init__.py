"""Token mixers and layer specs that plug into Megatron-Core's HybridModel."""
