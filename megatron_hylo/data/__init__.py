"""Text to tokens: what can be fetched, Megatron-Core indexed datasets, packing into training windows."""
