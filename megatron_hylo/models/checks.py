"""Checks of a loaded model and of the windows it is to read, for verbs that would otherwise go on silently."""

import logging
from pathlib import Path

import torch
from torch import nn

from megatron_hylo.config import ConfigError, ModelConfig

logger = logging.getLogger("megatron_hylo.models")


def require_finite(model: nn.Module, path: str | Path) -> None:
    """Refuse a model with NaN or infinite weights.

    Args:
        model: this rank's part.
        path: its folder, for the message.

    Raises:
        ConfigError: names the first such tensor.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ConfigError(
                f"{path}: tensor {name} holds NaN or infinite values, as after a training that diverged; take an earlier "
                "checkpoint, or make the model again"
            )


def warn_beyond_context(config: ModelConfig, tokens: int, path: str | Path) -> None:
    """Warn where a sequence is longer than the model's positions, so that results are not taken for its usual quality.

    Args:
        config: of the model.
        tokens: length of the sequence.
        path: the model's folder, for the message.
    """
    if tokens > config.max_position_embeddings:
        logger.warning(
            "%s was made for %s positions, but sequences have %s tokens: what it says of the later ones is extrapolation; "
            "give --sequence_length %s or less to stay inside",
            path, f"{config.max_position_embeddings:,}", f"{tokens:,}", config.max_position_embeddings,
        )  # fmt: skip
