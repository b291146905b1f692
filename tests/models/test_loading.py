"""A model that is loaded: no weight is drawn at random first, none is left as the memory was."""

import pytest
import torch

from megatron_hylo.config import ParallelConfig
from megatron_hylo.convert.hf_start import load_model_chunks
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from tests.conftest import tiny_config

EXPERTS = dict(num_moe_experts=4, moe_ffn_hidden_size=20, moe_router_topk=2, qk_layernorm=True)


@pytest.mark.parametrize(
    "pattern, changes",
    [("G-+-M-*-K-W-", {}), ("*-*-", dict(untie_embeddings_and_output_weights=False)), ("*E*E", EXPERTS)],
)
def test_every_parameter_is_the_saved_one_where_new_memory_holds_nan(pattern, changes, one_rank, tmp_path):
    saved = build_model(tiny_config(pattern, **changes))
    save_model(saved, tmp_path / "model")
    paths = [str(tmp_path / "model")]
    if set(pattern) <= set("*-E"):
        convert_megatron_to_hf(tmp_path / "model", tmp_path / "hf")
        paths.append(f"hf:{tmp_path / 'hf'}")
    torch.use_deterministic_algorithms(True)  # torch.empty fills with NaN
    try:
        assert torch.empty(3).isnan().all()
        for path in paths:
            state = torch.get_rng_state()
            (loaded,) = load_model_chunks(path, ParallelConfig(), torch.float32)
            assert torch.equal(state, torch.get_rng_state())  # nothing was drawn
            found = dict(loaded.named_parameters())
            assert found.keys() == dict(saved.named_parameters()).keys()
            for name, parameter in saved.named_parameters():
                torch.testing.assert_close(found[name], parameter, rtol=0, atol=0, msg=name)
    finally:
        torch.use_deterministic_algorithms(False)
