"""Text to tokens to training windows: fetched sets, indexed datasets, blends, packing, synthetic recall exercises."""
