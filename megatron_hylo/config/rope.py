"""Scaling of rotary frequencies."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_hylo.config.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies for contexts longer than the pretrained one.

    Args:
        rope_type: none; linear: all frequencies divided by `factor`; llama3: Llama 3.1's rule; yarn: YaRN; nope: NoPE, no
            rotation at all.
        factor: target length / original length.
        original_max_position_embeddings: tokens the frequencies were trained for.
        low_freq_factor: llama3 only.
        high_freq_factor: llama3 only.
        beta_fast: yarn only: rotations above which a frequency is left alone.
        beta_slow: yarn only: rotations below which it is divided by `factor`.
        attention_factor: yarn only: cos/sin multiplier; None: 0.1 ln(factor) + 1.
        truncate: yarn only: the ramp's ends are rounded to whole channels.
    """

    rope_type: Literal["none", "linear", "llama3", "yarn", "nope"] = "none"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ("none", "linear", "llama3", "yarn", "nope"):
            raise ConfigError(
                f"rope_scaling: rope_type {self.rope_type!r} is not supported; use none, linear, llama3, yarn or nope"
            )
        if self.rope_type not in ("none", "nope") and not self.factor >= 1:
            raise ConfigError(f"rope_scaling: {self.rope_type} needs factor >= 1, got {self.factor}")
        if self.rope_type in ("llama3", "yarn") and self.original_max_position_embeddings < 1:
            length = self.original_max_position_embeddings
            raise ConfigError(f"rope_scaling: {self.rope_type} needs original_max_position_embeddings >= 1, got {length}")
        if self.rope_type == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            factors = f"{self.high_freq_factor} and {self.low_freq_factor}"
            raise ConfigError(f"rope_scaling: llama3 needs high_freq_factor > low_freq_factor > 0, got {factors}")

    @property
    def cos_sin_multiplier(self) -> float:
        """Factor on cos and sin (YaRN's mscale, with mscale=1 and mscale_all_dim=0)."""
        if self.rope_type != "yarn":
            return 1.0
        return self.attention_factor if self.attention_factor is not None else 0.1 * math.log(self.factor) + 1.0
