"""Initialisers: one attention layer's weights and statistics to one mixer's weights; pure tensors."""
