"""The paper's Mamba2 and Gated DeltaNet against the teacher's rows, linear attention, torch's and fla's defaults."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import BASES, LAYOUTS, hybrid_config
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.initialise.defaults import delta_rule_defaults, mamba2_defaults, uniform_fan_in
from megatron_hylo.initialise.paper import gated_delta_net_from_attention, mamba2_from_attention


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _make(initialiser, symbol, layer, config, teacher_config, seed=0):
    mixer = initialiser(layer, config, teacher_config, _generator(seed), None)
    assert {name: tuple(t.shape) for name, t in mixer.items()} == get_mixer(symbol).tensors(config)
    assert all(t.dtype == torch.float32 and t.is_contiguous() and t.isfinite().all() for t in mixer.values())
    return {name.split(".", 1)[1]: tensor for name, tensor in mixer.items()}


def _mamba2(layer, teacher_config, **fields):
    return _make(mamba2_from_attention, "M", layer, hybrid_config(teacher_config, "MMMM", **fields), teacher_config)


def test_mamba2_rows_equal_teacher_projections(teacher_config, make_layer):
    layer = make_layer(teacher_config)
    mixer = _mamba2(layer, teacher_config)
    rows = mixer["in_proj.weight"]
    assert torch.equal(rows[32:48], layer["v_proj.weight"])  # x, after 32 rows of z
    assert torch.equal(rows[48:64], layer["k_proj.weight"])  # B
    assert torch.equal(rows[64:96], layer["q_proj.weight"])  # C
    assert rows.shape[0] == 100  # and dt of 4 heads
    assert torch.equal(mixer["out_proj.weight"], layer["o_proj.weight"])


def test_mamba2_without_decay_equals_attention_without_softmax(teacher_config, make_layer):
    layer = make_layer(teacher_config)
    mixer = _mamba2(layer, teacher_config)
    length, heads, dim = 7, 4, 8
    hidden = torch.randn(length, 24, generator=_generator(1))

    _, x, b, c, _ = (hidden @ mixer["in_proj.weight"].T).split([32, 16, 16, 32, 4], dim=-1)
    x, b = (t.view(length, 2, dim).repeat_interleave(2, dim=1) for t in (x, b))
    c = c.view(length, heads, dim)
    state, outputs = torch.zeros(heads, dim, dim), []
    for t in range(length):
        state = state + x[t, :, :, None] * b[t, :, None, :]
        outputs.append((state @ c[t, :, :, None]).flatten())
    made = torch.stack(outputs) @ mixer["out_proj.weight"].T

    q, k, v = (hidden @ layer[f"{part}_proj.weight"].T for part in "qkv")
    heads_out = []
    for head in range(heads):
        own, shared = slice(head * dim, head * dim + dim), slice(head // 2 * dim, head // 2 * dim + dim)
        heads_out.append((q[:, own] @ k[:, shared].T).tril() @ v[:, shared])
    wanted = torch.cat(heads_out, dim=-1) @ layer["o_proj.weight"].T
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mamba_state_dim": 16}, "mamba_state_dim 16 .*must be 8"),
        ({"mamba_head_dim": 16}, "mamba_head_dim 16 .*must be 8"),
        ({"mamba_num_heads": 8}, "mamba_num_heads 8 .*must be 4"),
        ({"num_query_groups": 4, "num_attention_heads": 4}, "num_query_groups 4 .*must be 2"),
    ],
)
def test_mamba2_dimensions_that_do_not_fit_are_refused_by_name(teacher_config, make_layer, changes, message):
    config = hybrid_config(teacher_config, "MMMM", **changes)
    with pytest.raises(ConfigError, match=message):
        mamba2_from_attention(make_layer(teacher_config), config, teacher_config, _generator(), None)


def test_linear_default_equals_torch_linear_of_the_same_seed():
    torch.manual_seed(5)
    wanted = nn.Linear(24, 10, bias=False).weight
    torch.testing.assert_close(uniform_fan_in((10, 24), _generator(5)), wanted.detach())


def test_conv_default_equals_torch_conv1d_of_the_same_seed():
    torch.manual_seed(5)
    wanted = nn.Conv1d(12, 12, 4, groups=12)
    generator = _generator(5)
    torch.testing.assert_close(uniform_fan_in((12, 1, 4), generator), wanted.weight.detach())
    torch.testing.assert_close(uniform_fan_in((12,), generator, fan_in=4), wanted.bias.detach())


def test_mamba2_defaults_lie_in_the_published_ranges(teacher_config):
    config = hybrid_config(teacher_config, "MMMM", num_attention_heads=512, mamba_num_heads=512)
    mixer = mamba2_defaults(config, _generator())
    decay, step = mixer["mamba.A_log"].exp(), softplus(mixer["mamba.dt_bias"])
    assert 1 <= decay.min() < 2 and 15 < decay.max() <= 16 + 1e-4
    assert abs(decay.mean() - 8.5) < 0.6  # uniform
    assert 1e-3 * 0.999 <= step.min() < 1.2e-3 and 0.08 < step.max() <= 0.1 * 1.001
    assert abs(step.log().mean() - math.log(1e-2)) < 0.2  # log-uniform
    assert mixer["mamba.D"].eq(1).all() and mixer["mamba.norm.weight"].eq(1).all()


def _fla_layer(config):
    layers = pytest.importorskip("fla.layers")
    return layers.GatedDeltaNet(
        hidden_size=config.hidden_size,
        head_dim=config.linear_key_head_dim,
        num_heads=config.linear_num_heads,
        expand_v=config.linear_value_head_dim / config.linear_key_head_dim,
    )


def test_gdn_names_and_shapes_equal_fla_layer():
    config = LAYOUTS["smollm2-135m-8mla22gdn"].config
    wanted = {f"linear_attn.{name}": tuple(p.shape) for name, p in _fla_layer(config).state_dict().items()}
    assert get_mixer("G").tensors(config) == wanted


def test_gdn_defaults_are_distributed_like_fla_layer():
    base = BASES["smollm2-135m"]
    config = hybrid_config(base, "G" * 30, linear_num_heads=600, linear_key_head_dim=2, linear_value_head_dim=4)
    torch.manual_seed(0)
    wanted = {f"linear_attn.{name}": p.detach() for name, p in _fla_layer(config).state_dict().items()}
    made = delta_rule_defaults("G", config, _generator(1))
    assert made.keys() == wanted.keys()
    for name, tensor in made.items():
        # two samples of at least 600 draws; a bounded distribution's quantiles agree within a few percent of its width
        points = torch.tensor([0.1, 0.5, 0.9])
        ours, theirs = (t.flatten()[:100_000].quantile(points) for t in (tensor, wanted[name]))
        width = wanted[name].flatten()[:100_000].quantile(0.9) - wanted[name].flatten()[:100_000].quantile(0.1)
        assert (ours - theirs).abs().max() <= 0.15 * width, name
    assert made["linear_attn.o_norm.weight"].eq(1).all()


def test_gdn_overlap_equals_teacher_rows_at_the_sizes_of_smollm2_135m(make_layer):
    base, config = BASES["smollm2-135m"], LAYOUTS["smollm2-135m-8mla22gdn"].config
    assert (config.linear_num_heads, config.linear_key_head_dim, config.linear_value_head_dim) == (3, 144, 288)
    layer = make_layer(base)
    mixer = _make(gated_delta_net_from_attention, "G", layer, config, base)
    fresh = delta_rule_defaults("G", config, _generator())
    # attention channel r belongs to query head r // 64, which reads key/value head (r // 64) // 3
    rows = torch.tensor([(r // 64) // 3 * 64 + r % 64 for r in range(576)])
    assert torch.equal(mixer["q_proj.weight"], layer["q_proj.weight"][:432])
    assert torch.equal(mixer["k_proj.weight"], layer["k_proj.weight"][rows[:432]])
    assert torch.equal(mixer["v_proj.weight"][:576], layer["v_proj.weight"][rows])
    assert torch.equal(mixer["v_proj.weight"][576:], fresh["linear_attn.v_proj.weight"][576:])
    assert torch.equal(mixer["o_proj.weight"][:, :576], layer["o_proj.weight"])
    assert torch.equal(mixer["o_proj.weight"][:, 576:], fresh["linear_attn.o_proj.weight"][:, 576:])
    for name in ("g_proj.weight", "b_proj.weight", "a_proj.weight", "A_log", "dt_bias", "v_conv1d.weight"):
        assert torch.equal(mixer[name], fresh[f"linear_attn.{name}"])


@pytest.mark.parametrize("key_dim, value_dim", [(3, 5), (8, 16), (20, 4)])
def test_gdn_overlap_equals_teacher_rows_when_student_is_narrower_or_wider(teacher_config, make_layer, key_dim, value_dim):
    config = hybrid_config(
        teacher_config, "GGGG", linear_num_heads=3, linear_key_head_dim=key_dim, linear_value_head_dim=value_dim
    )
    layer = make_layer(teacher_config)
    mixer = _make(gated_delta_net_from_attention, "G", layer, config, teacher_config)
    fresh = delta_rule_defaults("G", config, _generator())
    for part, width in (("q", 3 * key_dim), ("k", 3 * key_dim), ("v", 3 * value_dim), ("o", 3 * value_dim)):
        made, weight = mixer[f"{part}_proj.weight"], layer[f"{part}_proj.weight"]
        untouched = fresh[f"linear_attn.{part}_proj.weight"]
        for channel in range(width):
            source = channel if part in "qo" else channel // 16 * 8 + channel % 8
            column = part == "o"
            got = made[:, channel] if column else made[channel]
            teachers = (weight[:, source] if column else weight[source]) if channel < 32 else None
            wanted = teachers if teachers is not None else (untouched[:, channel] if column else untouched[channel])
            assert torch.equal(got, wanted), (part, channel)


@pytest.mark.parametrize("initialiser, symbol", [(mamba2_from_attention, "M"), (gated_delta_net_from_attention, "G")])
def test_same_seed_gives_same_tensors_and_another_seed_other_random_ones(teacher_config, make_layer, initialiser, symbol):
    config, layer = hybrid_config(teacher_config, symbol * 4), make_layer(teacher_config)
    first, again, other = (_make(initialiser, symbol, layer, config, teacher_config, seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["dt_bias"], other["dt_bias"])


def test_global_random_state_is_neither_used_nor_moved(teacher_config, make_layer):
    config, layer = hybrid_config(teacher_config, "GGGG"), make_layer(teacher_config)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = _make(gated_delta_net_from_attention, "G", layer, config, teacher_config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = _make(gated_delta_net_from_attention, "G", layer, config, teacher_config)
    assert all(torch.equal(first[name], again[name]) for name in first)
