"""Taylor-Calibrate's start against its published formulas, written out number by number in Python's floats."""

import math

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.initialise.registry import get_initialiser
from megatron_hylo.initialise.taylor import silu_rms
from tests.calibrate.tiny import attention_layer, measure, mixer_of, random_teacher, uneven_input, with_mixer
from tests.conftest import tiny_config

HEADS, GROUPS, DIM = 6, 2, 16


@pytest.fixture(scope="module")
def layer(one_rank):
    base = tiny_config("*-")
    teacher, x = random_teacher(base), uneven_input(base)
    return base, teacher, x, attention_layer(teacher), measure(teacher, x)


def student(base):
    sizes = dict(linear_num_heads=HEADS, linear_key_head_dim=DIM, linear_value_head_dim=DIM)
    return base.replace(hybrid_layer_pattern="G-", **sizes)


def make(layer, config=None, statistics=None):
    base, _, _, weights, measured = layer
    config, generator = config or student(base), torch.Generator().manual_seed(3)
    return get_initialiser("taylor", "G")(weights, config, base, generator, measured if statistics is None else statistics)


def test_gates_follow_the_published_formulas(layer):
    base, _, x, weights, statistics = layer
    made = {name.removeprefix("linear_attn."): tensor.double() for name, tensor in make(layer).items()}
    distance, entropy = (statistics[f"attention_{name}"].tolist() for name in ("distance", "entropy"))
    assert max(entropy) - min(entropy) > 0.01 and max(distance) > 1, "heads differ"
    for head in range(HEADS):
        decay = min(5.0, max(1e-3, math.log(2) / max(distance[head], 0.5)))
        assert made["A_log"][head] == 0 and math.log1p(math.exp(made["dt_bias"][head])) == pytest.approx(decay, rel=1e-5)
        narrow = 1 - (entropy[head] - min(entropy)) / (max(entropy) - min(entropy))
        beta = 0.3 + 0.4 * narrow
        size = float(made["b_proj.weight"][head].abs().mean())
        assert size == pytest.approx(abs(math.log(beta / (1 - beta))) / math.sqrt(base.hidden_size), rel=1e-4, abs=1e-7)
        rows, group = slice(head * DIM, (head + 1) * DIM), head // (HEADS // GROUPS)
        for part in "kv":
            own = weights[f"{part}_proj.weight"][group * DIM : (group + 1) * DIM]
            assert torch.equal(made[f"{part}_proj.weight"][rows], own.double()), "a head keeps its own KV head"
    assert torch.equal(made["q_proj.weight"], weights["q_proj.weight"].double())
    assert torch.equal(made["o_proj.weight"], weights["o_proj.weight"].double())
    alpha = made["g_proj.weight"] / made["v_proj.weight"]
    assert torch.allclose(alpha, alpha[0, 0].expand_as(alpha), rtol=1e-4)
    context = math.sqrt(float(statistics["head_energy"].mean()) / DIM)
    assert float(alpha[0, 0]) == pytest.approx(0.01 * context / float(silu_rms(variances(layer))), rel=1e-4)


def variances(layer) -> torch.Tensor:
    _, _, _, weights, statistics = layer
    value = weights["v_proj.weight"].double().unflatten(0, (GROUPS, DIM)).repeat_interleave(HEADS // GROUPS, 0).flatten(0, 1)
    return torch.stack([row @ statistics["input_second_moment"].double() @ row for row in value])


def test_the_length_of_gated_values_is_that_of_normal_samples():
    variance = torch.tensor([0.01, 1.0, 9.0], dtype=torch.float64)
    samples = torch.randn(400_000, 3, dtype=torch.float64) * variance.sqrt()
    sampled = (samples * samples.sigmoid()).square().mean().sqrt()
    assert float(silu_rms(variance)) == pytest.approx(float(sampled), rel=5e-3)


def test_a_layer_runs_and_is_nearly_silent(layer):
    base, teacher, x, _, _ = layer
    out = mixer_of(with_mixer(teacher, student(base), make(layer)))(x[:, :2])[0]
    assert out.isfinite().all() and 0 < out.norm() < 0.2 * mixer_of(teacher)(x[:, :2])[0].norm()


def test_other_heads_and_older_statistics_are_refused(layer):
    base, _, _, _, statistics = layer
    with pytest.raises(ConfigError, match="keeps the attention's 6 heads of 16, got 6 of 16 and 32 channels"):
        make(layer, student(base).replace(linear_value_head_dim=32))
    with pytest.raises(ConfigError, match="no attention_entropy, which `taylor` needs; run `hylo calibrate` again"):
        make(layer, statistics={k: v for k, v in statistics.items() if k != "attention_entropy"})
    with pytest.raises(ConfigError, match="`taylor`|'taylor' does not make mixer 'M'"):
        get_initialiser("taylor", "M")
