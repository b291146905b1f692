"""Weights gathered from the ranks are those of a model that is not divided; several ranks: tests/train/test_checkpoint.py."""

import pytest
import torch

from megatron_hylo.models.gather import gather_model
from megatron_hylo.models.hylo_model import build_model
from tests.conftest import EXPERTS, tiny_config


@pytest.mark.parametrize("pattern", ["G-+-M-*-K-", "*-*-", "GE*-"])
def test_one_rank_gathers_its_own_parameters(one_rank, pattern):
    """Fused projections are stored by section, and come back in one piece; tied heads are no parameter of their own."""
    model = build_model(tiny_config(pattern, **EXPERTS, untie_embeddings_and_output_weights=pattern != "*-*-"))
    found, own = gather_model([model]), dict(model.named_parameters())
    assert set(found.parameters) >= set(own) and found.config is model.config
    assert all(torch.equal(found.parameters[name], own[name]) for name in own)
