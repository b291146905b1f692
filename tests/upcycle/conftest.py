"""Tiny teachers with random weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.tensor_names import tensor_names
from tests.calibrate.conftest import material  # noqa: F401  the fixture
from tests.data.conftest import tokenizer  # noqa: F401  the fixture


@pytest.fixture
def teacher_config() -> ModelConfig:
    """Four layers, two query heads a key head; attention is wider (32) than the hidden size (24)."""
    return ModelConfig(
        hybrid_layer_pattern="*-" * 4,
        hidden_size=24,
        ffn_hidden_size=40,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=50,
        untie_embeddings_and_output_weights=False,
    )


@pytest.fixture
def make_layer() -> Callable[..., dict[str, Tensor]]:
    """(config, seed, dtype) -> one attention layer without prefix, normally distributed."""

    def make(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = get_mixer("*").tensors(config)
        return {n.removeprefix("self_attn."): torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}

    return make


@pytest.fixture
def make_state() -> Callable[..., dict[str, Tensor]]:
    """(config, seed, dtype) -> a whole model by canonical name, normally distributed."""

    def make(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in tensor_names(config).items()}

    return make
