"""Windowed attention layers `W` of HyLo models.

A layer that sees the last tokens alone is a recurrent one: its state is their keys and values, of fixed size, in which padding
is not written. So the cache treats it as it does the linear layers: going back, beams, decoding by a captured graph.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.kernels.window_attention import window_attention

from .attention_hylo import HyloAttention, Rope
from .cache_hylo import HyloCache, States
from .configuration_hylo import HyloConfig
from .fused_hylo import linear
from .inputs_hylo import SequenceInputs


class HyloWindowAttention(HyloAttention):
    """`W`: attention `*` of each token to the last `attention_window` ones, itself included; padding does not count."""

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.window = config.architecture().attention_window

    def forward(self, x: Tensor, inputs: SequenceInputs, rope: Rope, cache: HyloCache | None) -> Tensor:
        """Apply the mixer to x: [batch, new tokens, hidden] -> the same shape."""
        b, t, _ = x.shape
        parts = self.query_key_value(x, rope)
        step = functools.partial(attend_to_window, window=self.window)
        if cache is None:
            out, _ = step(parts, inputs.padding, (None, None))
        else:
            out = cache.advance(self.layer, step, parts, inputs.padding)
        return linear(self.o_proj, out.reshape(b, t, -1))


def attend_to_window(
    parts: tuple[Tensor, ...], padding: Tensor | None, states: States, window: int, in_place: bool = False
) -> tuple[Tensor, States]:
    """Attend to the window before each token and keep the last one.

    Args:
        parts: query [batch, new tokens, heads, channels], key and value [batch, new tokens, groups, channels], rotated.
        padding: bool [batch, new tokens], False at padding.
        states: keys beside values of the last tokens, [batch, window, groups, 2 channels], and bool [batch, window], False in
            rows that hold no token yet; None before the first token.
        window: tokens that a query sees.
        in_place: unused, new states are returned.

    Returns:
        Outputs [batch, new tokens, heads, channels], which mean nothing at padding, and the states afterwards.
    """
    query, key, value = parts
    (b, t), scale = query.shape[:2], query.shape[-1] ** -0.5
    rows, filled = states
    new = torch.cat([key, value], -1)
    if padding is not None:
        new = new.masked_fill(~padding[..., None, None], 0.0)
    first = rows is None or filled is None
    if rows is None or filled is None:
        rows, filled = new.new_zeros(b, window, *new.shape[2:]), torch.zeros(b, window, dtype=torch.bool, device=new.device)
    joined = torch.cat([rows, new], 1)  # [b, window + t, g, 2 channels]
    real = torch.cat([filled, filled.new_ones(b, t) if padding is None else padding], 1)
    if padding is None:
        keys, values = (new if first else joined).chunk(2, -1)
        out = window_attention(query, keys, values, scale, window, None if first else real)
    else:  # tokens are moved behind all padding, so that a token's neighbours are tokens
        order = real.to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
        joined, real = joined.gather(1, order.expand_as(joined)), real.gather(1, order[..., 0, 0])
        asked = F.pad(query, (0, 0, 0, 0, window, 0))
        places = order.expand_as(asked)
        keys, values = joined.chunk(2, -1)
        moved = window_attention(asked.gather(1, places), keys, values, scale, window, real)
        out = torch.empty_like(moved).scatter(1, places, moved)[:, window:]
    return out, (joined[:, -window:].clone(), real[:, -window:].clone())  # slices would keep the whole tensors
