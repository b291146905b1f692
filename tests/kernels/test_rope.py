"""RoPE frequencies and rotation against transformers and against complex multiplication."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from megatron_hylo.config import RopeScaling
from megatron_hylo.kernels.rope import apply_rope, rope_cos_sin, rope_frequencies, unfold_rotary_key

LLAMA3 = RopeScaling("llama3", 32.0, 8192)
YARN = [
    (32, 5e5, RopeScaling("yarn", 4.0, 2048)),
    (64, 5e5, RopeScaling("yarn", 4.0, 2048)),
    (32, 1e4, RopeScaling("yarn", 32.0, 2048)),
    (64, 1e4, RopeScaling("yarn", 32.0, 2048)),
    (64, 1e6, RopeScaling("yarn", 2.0, 32768)),
    (64, 1e6, RopeScaling("yarn", 2.0, 32768, beta_fast=16.0, beta_slow=2.0)),
    (64, 1e6, RopeScaling("yarn", 2.0, 32768, attention_factor=0.9)),
]


def hugging_face(dim: int, base: float, scaling: RopeScaling) -> tuple[torch.Tensor, float]:
    """transformers' frequencies and cos/sin multiplier for one head of `dim` channels."""
    parameters = {
        "rope_type": scaling.rope_type,
        "rope_theta": base,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
    if scaling.rope_type == "llama3":
        parameters |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    else:
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        parameters["attention_factor"] = scaling.attention_factor
    context = int(scaling.factor * scaling.original_max_position_embeddings)
    config = LlamaConfig(
        hidden_size=dim, num_attention_heads=1, head_dim=dim, max_position_embeddings=context, rope_parameters=parameters
    )
    return ROPE_INIT_FUNCTIONS[scaling.rope_type](config, torch.device("cpu"))


@pytest.mark.parametrize(("dim", "base", "scaling"), [(64, 5e5, LLAMA3), (128, 5e5, LLAMA3), *YARN])
def test_scaled_frequencies_match_transformers(dim: int, base: float, scaling: RopeScaling) -> None:
    expected, multiplier = hugging_face(dim, base, scaling)
    torch.testing.assert_close(rope_frequencies(dim, base, scaling), expected, rtol=1e-6, atol=0)
    assert scaling.cos_sin_multiplier == pytest.approx(multiplier, rel=1e-12)


def test_plain_frequencies_match_formula() -> None:
    expected = torch.tensor([5e5 ** (-2 * i / 64) for i in range(32)])
    torch.testing.assert_close(rope_frequencies(64, 5e5), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(rope_frequencies(64, 5e5, RopeScaling()), expected, rtol=1e-6, atol=0)


def test_half_split_rotation_matches_transformers() -> None:
    """Positions far out, different in each sequence of the batch, with YaRN's multiplier."""
    positions = torch.stack([torch.arange(7), torch.arange(100_000, 100_007)])
    cos, sin = rope_cos_sin(positions, rope_frequencies(16, 1e4), 1.3)
    q, k = torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16)
    truth = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    for x, expected in zip((q, k), truth, strict=True):
        torch.testing.assert_close(apply_rope(x, cos, sin, False), expected.transpose(1, 2), rtol=1e-6, atol=1e-6)


def test_interleaved_rotation_matches_complex_multiplication() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    angles = torch.rand(5, 4, dtype=torch.float64) * 2 * math.pi
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(apply_rope(x, angles.cos(), angles.sin(), True), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_distance_only(interleaved: bool) -> None:
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        cos, sin = rope_cos_sin(torch.tensor([i, j]), rope_frequencies(8, 1e4))
        turned = apply_rope(torch.stack([q, k])[None, :, None], cos, sin, interleaved)[0, :, 0]
        return float(turned[0] @ turned[1])

    assert score(7, 3) == pytest.approx(score(107, 103), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-2)


def test_bfloat16_is_float32_inside() -> None:
    x = torch.randn(1, 4, 2, 16).bfloat16()
    cos, sin = rope_cos_sin(torch.arange(4), rope_frequencies(16, 1e4))
    out = apply_rope(x, cos, sin, False)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, apply_rope(x.double(), cos, sin, False).bfloat16(), rtol=2**-7, atol=1e-6)


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        rope_frequencies(7, 1e4)
    x, (cos, sin) = torch.randn(1, 4, 2, 16), rope_cos_sin(torch.arange(3), rope_frequencies(16, 1e4))
    with pytest.raises(ValueError, match="cos and sin"):
        apply_rope(x, cos, sin, False)


def test_unfolded_key_is_the_sum_slot_by_slot() -> None:
    pairs = [3, 0, 3, 5]  # one pair twice
    plain, rotary, mix = torch.randn(2, 7, 3, 12), torch.randn(2, 7, 8), torch.randn(3, 4)
    truth = plain.double().clone()
    for head in range(3):
        for slot, j in enumerate(pairs):
            truth[:, :, head, j] += mix[head, slot] * rotary[..., 2 * slot]
            truth[:, :, head, j + 6] += mix[head, slot] * rotary[..., 2 * slot + 1]
    out = unfold_rotary_key(plain, rotary, mix, torch.tensor(pairs))
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)
    narrow = unfold_rotary_key(plain.bfloat16(), rotary.bfloat16(), mix.bfloat16(), torch.tensor(pairs))
    assert narrow.dtype == torch.float32


def test_tables_are_exact_at_two_million_tokens_and_transformers_at_the_start() -> None:
    frequencies = rope_frequencies(64, 5e5)
    positions = torch.tensor([32_768, 1_000_003, 2**21 - 1])
    angles = positions.double()[:, None] * frequencies.double()
    for found, exact in zip(rope_cos_sin(positions, frequencies), (angles.cos(), angles.sin())):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-7)
    start = torch.arange(32_768)
    rounded = start.float()[:, None] * frequencies
    assert torch.equal(torch.stack(rope_cos_sin(start, frequencies)), torch.stack([rounded.cos(), rounded.sin()]))
