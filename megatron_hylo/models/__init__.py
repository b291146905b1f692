"""Token mixers and layer specs for Megatron-Core's HybridModel; model folders, frozen and streamed models, kernel checks."""
