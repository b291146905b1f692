"""Configuration in numbers: models and their mixers, parallelism, training settings, layouts; imports no torch."""

from megatron_hylo.config.errors import ConfigError, RunFailure, from_dict
from megatron_hylo.config.model import LAYERS, MIXER_SYMBOLS, MLP_SYMBOLS, Fp8, ModelConfig, interleaved, recomputed_layers
from megatron_hylo.config.parallel import ParallelConfig
from megatron_hylo.config.rope import RopeScaling
from megatron_hylo.config.teacher_window import TeacherWindow

__all__ = [
    "LAYERS",
    "MIXER_SYMBOLS",
    "MLP_SYMBOLS",
    "ConfigError",
    "RunFailure",
    "Fp8",
    "ModelConfig",
    "ParallelConfig",
    "RopeScaling",
    "TeacherWindow",
    "from_dict",
    "interleaved",
    "recomputed_layers",
]
