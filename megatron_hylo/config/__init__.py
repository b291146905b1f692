"""Configuration in numbers: models, parallelism, training settings, layouts; imports no torch."""

from megatron_hylo.config.model import (
    MIXER_SYMBOLS,
    ConfigError,
    Fp8,
    ModelConfig,
    ParallelConfig,
    RopeScaling,
    from_dict,
    recomputed_layers,
)

__all__ = [
    "MIXER_SYMBOLS",
    "ConfigError",
    "Fp8",
    "ModelConfig",
    "ParallelConfig",
    "RopeScaling",
    "from_dict",
    "recomputed_layers",
]
