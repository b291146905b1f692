"""The interface of a mixer's description: everything that is known of a mixer without a tensor."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megatron_hylo.config.layer import LayerDescription

if TYPE_CHECKING:
    from megatron_hylo.config.model import ModelConfig

Fields = dict[str, Any]  # field of ModelConfig -> value


class MixerDescription(LayerDescription):
    """Description of one kind of token mixer."""

    block: ClassVar[str]  # prefix of its tensors in a Hugging Face layer
    recurrent: ClassVar[bool]  # carries a state of fixed size in place of a KV cache
    fp32_parameters: ClassVar[tuple[str, ...]] = ()  # kept in fp32 whatever the model's dtype
    rotary_pairs_by_layer: ClassVar[bool] = False  # a layer has an entry of its own in ModelConfig.mla_rotary_pairs
    norm_after_gate: ClassVar[bool] = False  # its output norm sees the gated outputs, so a gate of one number a head is lost
    # what `calibrate.solve` does with the output projection: keep it (a copied layer), fit it with the initialiser's as the
    # prior, or fit it from zero
    output_fit: ClassVar[Literal["keep", "from_initial", "from_zero"]] = "from_zero"
    decay_range: ClassVar[tuple[float, float] | None] = None  # a fresh A_log is the log of a uniform draw from it

    @abc.abstractmethod
    def default_sizes(self, base: ModelConfig, base_name: str | None, teacher_shapes: bool) -> Fields:
        """Fields of ModelConfig for a hybrid of `base`.

        Args:
            base: the Transformer that is converted.
            base_name: its name in `layouts.BASES`, or None.
            teacher_shapes: shapes like the teacher's attention, for the calibrated initialisation; else the paper's.
        """

    def kv_numbers(self, config: ModelConfig) -> int:
        """Numbers that every further token adds to the cache; 0 for a recurrent mixer."""
        return 0

    def cached_numbers(self, config: ModelConfig, length: int) -> int:
        """Numbers cached of a sequence of `length` tokens, states left out."""
        return length * self.kv_numbers(config)

    def state_numbers(self, config: ModelConfig) -> int:
        """Numbers of the state carried for a sequence of any length: recurrence and convolution; 0 for attention."""
        return 0

    @abc.abstractmethod
    def sequence_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """FLOPs of a token's forward pass besides 2 a parameter: attention scores (causal mean) or state updates."""

    def scratch_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Numbers a token that the backward pass has besides twice the kept ones (fitted to measured peaks)."""
        return 0.0
