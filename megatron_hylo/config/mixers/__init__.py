"""Descriptions of the token mixers: symbol, sizes and their checks, tensors, and all counts derived from them.

To add a mixer, add its file here and its row in `MIXERS`. Every table elsewhere that has an entry for each mixer calls
`complete`, so that a missing entry fails at import.
"""

from collections.abc import Iterable
from typing import Any

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.mixers.attention import Attention
from megatron_hylo.config.mixers.base import Fields, MixerDescription
from megatron_hylo.config.mixers.gdn import GatedDeltaNet
from megatron_hylo.config.mixers.kda import KimiDeltaAttention
from megatron_hylo.config.mixers.mamba2 import Mamba2
from megatron_hylo.config.mixers.mla import MultiLatentAttention
from megatron_hylo.config.mixers.window import WindowAttention
from megatron_hylo.config.mlps import MLPS

__all__ = [
    "ATTENTION_SYMBOL",
    "COPIED_SYMBOLS",
    "LINEAR_SYMBOLS",
    "MIXERS",
    "MLA_SYMBOL",
    "WINDOW_SYMBOL",
    "Fields",
    "MixerDescription",
    "check_tensor_parallel",
    "complete",
    "get_mixer",
    "tensor_parallel_sizes",
]

MIXERS: dict[str, MixerDescription] = {
    mixer.symbol: mixer
    for mixer in (
        Attention(), MultiLatentAttention(), Mamba2(), GatedDeltaNet(), KimiDeltaAttention(), WindowAttention(),
    )
}  # fmt: skip
ATTENTION_SYMBOL, MLA_SYMBOL, WINDOW_SYMBOL = Attention.symbol, MultiLatentAttention.symbol, WindowAttention.symbol
COPIED_SYMBOLS = ATTENTION_SYMBOL + WINDOW_SYMBOL  # layers with the tensors of the teacher's, which are copied
LINEAR_SYMBOLS = "".join(symbol for symbol, mixer in MIXERS.items() if mixer.recurrent)


def get_mixer(symbol: str) -> MixerDescription:
    """Look up a mixer by its symbol.

    Raises:
        ConfigError: an unknown symbol.
    """
    if symbol not in MIXERS:
        known = ", ".join(f"{mixer.symbol} {mixer.name}" for mixer in MIXERS.values())
        raise ConfigError(f"unknown mixer symbol {symbol!r}; known mixers: {known}")
    return MIXERS[symbol]


def complete(symbols: Iterable[str], where: str, besides: str = "") -> None:
    """Check that a table has an entry for every mixer; called where the table is defined.

    Args:
        symbols: the table's keys.
        where: what the table is called in the message.
        besides: symbols that need no entry.

    Raises:
        RuntimeError: a mixer without an entry, or an entry of no mixer.
    """
    missing = set(MIXERS) - set(besides) - set(symbols)
    unknown = set(symbols) - set(MIXERS)
    if missing or unknown:
        problem = (
            f"has no entry for mixer {min(missing)!r}" if missing else f"has an entry for {min(unknown)!r}, which is no mixer"
        )
        raise RuntimeError(f'{where} {problem}; see "Add a mixer" in CONTRIBUTING.md')


def tensor_parallel_counts(config: Any) -> dict[str, int]:
    """Counts of a model that a tensor-parallel size must divide, by field; the vocabulary is padded."""
    pattern, counts = config.hybrid_layer_pattern.replace("|", ""), dict[str, int]()
    for symbol in dict.fromkeys(pattern[1::2]):
        counts |= MLPS[symbol].tensor_parallel_counts(config)
    for symbol in dict.fromkeys(pattern[0::2]):
        counts |= MIXERS[symbol].tensor_parallel_counts(config)
    return counts


def tensor_parallel_sizes(config: Any) -> list[int]:
    """Tensor-parallel sizes up to 64 that work for a model."""
    counts = tensor_parallel_counts(config).values()
    return [n for n in range(1, 65) if all(count % n == 0 for count in counts)]


def check_tensor_parallel(config: Any, size: int, setting: str = "tensor_model_parallel_size") -> None:
    """Refuse a tensor-parallel size that does not divide the heads.

    Args:
        config: ModelConfig, or the description in an exported folder.
        size: ranks.
        setting: what the size is called where it was given.

    Raises:
        ConfigError: naming the head count and the sizes that work.
    """
    for name, count in tensor_parallel_counts(config).items():
        if count % size:
            raise ConfigError(
                f"{setting} {size} does not divide {name} {count}; sizes that work for this model: "
                f"{', '.join(map(str, tensor_parallel_sizes(config)))}"
            )
