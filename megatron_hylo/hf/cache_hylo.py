"""Cache of a HyLo model: latents or keys and values that grow with the sequence, and states of fixed size."""

import torch
from torch import Tensor


class HyloCache:
    """Cached tensors of all layers, for all sequences of a batch."""

    is_compileable = False  # asked by generate(): tensors grow, so nothing to compile for
    is_croppable = False  # recurrent states cannot go back

    def __init__(self) -> None:
        self.tokens: dict[int, tuple[Tensor, ...]] = {}  # layer -> tensors [batch, sequence, ...], one row a token
        self.states: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (convolution's inputs, recurrent state)
        self.positions: Tensor | None = None  # int64 [batch or 1, sequence], for the rotary embedding
        self.attention_mask: Tensor | None = None  # bool [batch, sequence], False at padding; None: there is none
        self.batch_size = 0  # 0 before the first token

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Append the rows of new tokens, [batch, new tokens, ...] each, and return those of all tokens."""
        if layer in self.tokens:
            new = tuple(torch.cat(pair, dim=1) for pair in zip(self.tokens[layer], new))
        self.tokens[layer] = new
        return new

    def state(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Return a linear layer's (convolution's inputs, recurrent state); None before the first token."""
        return self.states.get(layer, (None, None))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached tokens, padding included."""
        return 0 if self.positions is None else self.positions.shape[1]

    def token_nbytes(self) -> int:
        """Return the bytes that grow with the sequence: the KV cache in the narrow sense."""
        return sum(t.numel() * t.element_size() for tensors in self.tokens.values() for t in tensors)

    def nbytes(self) -> int:
        """Return the bytes of the whole cache, the linear layers' states included."""
        states = sum(t.numel() * t.element_size() for tensors in self.states.values() for t in tensors)
        return self.token_nbytes() + states

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace sequence i by a copy of sequence beam_idx[i] (beam search)."""
        for layer, tokens in self.tokens.items():
            self.tokens[layer] = tuple(t.index_select(0, beam_idx.to(t.device)) for t in tokens)
        for layer, (conv, state) in self.states.items():
            self.states[layer] = (
                conv.index_select(0, beam_idx.to(conv.device)),
                state.index_select(0, beam_idx.to(state.device)),
            )
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask.index_select(0, beam_idx.to(self.attention_mask.device))
        self.batch_size = len(beam_idx)
