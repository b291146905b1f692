"""Rates that training reaches: shares of a data sheet's figures, measured or fitted, from rates.yaml."""

import functools
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_hylo.config import ConfigError
from megatron_hylo.config.mixers import LINEAR_SYMBOLS, complete
from megatron_hylo.plan.yaml_files import read_yaml


@dataclass(frozen=True)
class Rates:
    """Constants of the model of a step's time; rates.yaml says each one's unit and source."""

    products: float
    products_fp8: float
    attention_forward: dict[int, float]
    attention_backward: dict[int, float]
    recurrence: dict[str, float]
    recurrence_forward: float
    recurrence_bandwidth: float
    elementwise: float
    elementwise_frozen: float
    softmax_bytes: float
    optimizer_bytes: float
    launch: dict[str, float]
    link: float
    network: float
    host: float
    decode: float

    def __post_init__(self) -> None:
        complete(self.recurrence, "recurrence of plan/rates.yaml", besides="*+W")

    def attention(self, width: int, backward: bool = False) -> float:
        """Share of the peak that attention reaches with heads of `width` channels, between the measured widths linearly."""
        table = sorted((self.attention_backward if backward else self.attention_forward).items())
        (low, slow), (high, fast) = table[0], table[-1]
        place = min(max((width - low) / (high - low), 0.0), 1.0)
        return slow + place * (fast - slow)

    def launch_seconds(self, symbol: str) -> float:
        """Host seconds of one pass over a mixer of this kind and its MLP."""
        return self.launch["linear" if symbol in LINEAR_SYMBOLS else "other"]


@functools.cache
def get_rates(file: Path | None = None) -> Rates:
    """Read rates.yaml.

    Args:
        file: other values of some of its keys, as `hylo plan --calibrate` writes them.

    Raises:
        ConfigError: no such file, or keys that are none.
    """
    values = yaml.safe_load((Path(__file__).parent / "rates.yaml").read_text())
    if file is None:
        return Rates(**values)
    if not file.is_file():
        raise ConfigError(f"there are no rates in {file}; hylo plan --calibrate --rates {file} measures them")
    others = read_yaml(file.read_text(), file, "write keys as hylo plan --calibrate does")
    if unknown := sorted(set(others) - set(values)):
        raise ConfigError(f"{file}: unknown key {unknown[0]!r}; known keys: {', '.join(values)}")
    return Rates(**values | others)
