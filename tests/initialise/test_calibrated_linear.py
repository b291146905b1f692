"""Gated DeltaNet and Mamba2 from calibration statistics: shapes, what each tensor means, and predictions on data."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.initialise import calibrated_linear as calibrated
from megatron_hylo.kernels.rope import apply_rope, rope_cos_sin, rope_frequencies
from tests.calibrate.tiny import attention_layer, measure, mixer_of, random_teacher, uneven_input, with_mixer
from tests.conftest import tiny_config

MAKERS = {
    "G": calibrated.gated_delta_net_from_attention,
    "M": calibrated.mamba2_from_attention,
    "K": calibrated.kda_from_attention,
}
# heads, key and value channels of Gated DeltaNet; the attention: 6 query heads, 2 KV heads of 16
SHAPES = {
    "the attention's heads": (6, 16, 16),
    "wide values": (6, 16, 40),
    "two KV heads a head": (3, 32, 32),
    "fewer heads": (2, 24, 20),
    "more room than KV heads": (4, 40, 60),
    "more room than there is": (1, 60, 100),
}


@pytest.fixture(scope="module")
def made(one_rank) -> SimpleNamespace:
    base = tiny_config("*-")
    teacher, x = random_teacher(base), uneven_input(base)
    return SimpleNamespace(
        base=base, teacher=teacher, x=x, layer=attention_layer(teacher), statistics=measure(teacher, x)
    )  # fmt: skip


def student(made, symbol: str, shape: str = "the attention's heads") -> ModelConfig:
    heads, keys, values = SHAPES[shape]
    return made.base.replace(
        hybrid_layer_pattern=f"{symbol}-",
        linear_num_heads=heads,
        linear_key_head_dim=keys,
        linear_value_head_dim=values,
        kda_decay_rank=20,
    )


def mixer(made, config: ModelConfig) -> dict[str, Tensor]:
    symbol = config.mixers
    tensors = MAKERS[symbol](made.layer, config, made.base, torch.Generator(), made.statistics)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == get_mixer(symbol).tensors(config)
    assert all(t.dtype == torch.float32 and t.is_contiguous() and t.isfinite().all() for t in tensors.values())
    mine = {t.data_ptr() for t in tensors.values()}
    assert not mine & {t.data_ptr() for t in made.layer.values()} and len(mine) == len(tensors)
    return {name.split(".", 1)[1]: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("shape", ["wide values", "more room than KV heads", "more room than there is"])
def test_values_beyond_the_attentions_are_leading_directions_as_long_as_its_rows(shape, made):
    """Each of length |W_V| / sqrt(rows), along the input moment's eigenvectors in falling order."""
    heads, _, width = SHAPES[shape]
    rows = mixer(made, student(made, "G", shape))["v_proj.weight"].unflatten(0, (heads, width))
    source = made.layer["v_proj.weight"]
    directions = torch.linalg.eigh(made.statistics["input_second_moment"]).eigenvectors.flip(-1).T[: width - 32]
    length = source.norm(dim=1).square().mean().sqrt()
    for head in rows:
        assert head[:32].norm() == pytest.approx(float(source.norm()))
        cosines = (head[32:][: len(directions)] / length * directions).sum(1)
        torch.testing.assert_close(cosines.abs(), torch.ones(len(directions)), rtol=1e-3, atol=1e-3)


ALL = [(symbol, shape) for symbol in "GK" for shape in SHAPES] + [("M", "the attention's heads")]


@pytest.mark.parametrize("symbol, shape", ALL)
def test_every_shape_runs(symbol, shape, made):
    config = student(made, symbol, shape)
    tensors = MAKERS[symbol](made.layer, config, made.base, torch.Generator(), made.statistics)
    leaf = made.x[:, :2].clone().requires_grad_()
    out = mixer_of(with_mixer(made.teacher, config, tensors))(leaf)[0]
    assert out.shape == leaf.shape and out.isfinite().all() and float(out.detach().abs().max()) > 0
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("symbol, shape", ALL)
def test_convolutions_pass_the_current_token_only(symbol, shape, made):
    tensors = mixer(made, student(made, symbol, shape))
    taps = {name: t for name, t in tensors.items() if "conv1d.weight" in name}
    for name, t in taps.items():
        assert not t[..., :-1].any(), name
    tap = calibrated.VALUE_TAP
    if symbol in "GK":
        for part, value in (("q", 1.0), ("k", 1.0), ("v", tap)):
            assert torch.equal(
                taps[f"{part}_conv1d.weight"][..., -1], torch.full_like(tensors[f"{part}_proj.weight"][:, :1], value)
            )
    else:
        last = taps["conv1d.weight"][:, 0, -1]
        assert torch.equal(last, torch.cat([torch.full((32,), tap), torch.ones(32 + 96)]))
        assert not tensors["conv1d.bias"].any() and not tensors["D"].any()


@pytest.mark.parametrize("symbol, shape", ALL)
def test_heads_forget_half_in_their_half_life(symbol, shape, made):
    """exp(g)^n = 1/2 after n tokens; heads that share keys have all lengths from shortest to longest."""
    tensors = mixer(made, student(made, symbol, shape))
    step = softplus(tensors["dt_bias"].double())
    rate = tensors["A_log"].double().exp()
    if symbol == "K":  # channels of a head decay alike
        channels = step.view(len(rate), -1)
        step = channels[:, 0]
        assert torch.equal(channels, step[:, None].expand_as(channels))
    decay = (-rate * step).exp()
    half_lives = -1 / decay.log2()
    heads = len(decay)
    cycle = 3 if heads == 6 else heads  # query heads of a KV head
    shortest, longest = calibrated.MAMBA2_HALF_LIVES if symbol == "M" else calibrated.DELTA_RULE_HALF_LIVES
    for head, found in enumerate(half_lives.tolist()):
        share = (head % cycle) / (cycle - 1) if cycle > 1 else 0.5
        assert found == pytest.approx(shortest ** (1 - share) * longest**share, rel=1e-5)
    assert decay[0] ** half_lives[0] == pytest.approx(0.5)
    if symbol == "M":
        assert step.tolist() == pytest.approx([calibrated.STEP] * heads, rel=1e-5)
    else:
        assert not tensors["a_proj.weight" if symbol == "G" else "f_b_proj.weight"].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_kda_computes_what_gated_deltanet_does(shape, made):
    """The initialisers agree, and so do the two mixers where all channels of a head decay alike."""
    outputs = []
    for symbol in "GK":
        config = student(made, symbol, shape)
        tensors = MAKERS[symbol](made.layer, config, made.base, torch.Generator(), made.statistics)
        outputs.append(mixer_of(with_mixer(made.teacher, config, tensors))(made.x)[0])
    assert (outputs[0] - outputs[1]).norm() < 1e-5 * outputs[0].norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_writing_strength_is_as_meant_on_average(shape, made):
    tensors = mixer(made, student(made, "G", shape))
    beta = (made.x.flatten(0, 1) @ tensors["b_proj.weight"].T).sigmoid().mean(0)
    heads = len(beta)
    wanted = torch.full((heads,), calibrated.WRITING)
    print(beta.tolist(), wanted.tolist())
    assert (beta / wanted - 1).abs().max() < 0.5 and float(beta.mean()) == pytest.approx(0.2, abs=0.06)


def head_lengths(made) -> Tensor:
    """|o| of each head on the data, float64 [tokens, heads], with plain loops."""
    c, x = made.base, made.x.double().transpose(0, 1)
    cos, sin = rope_cos_sin(torch.arange(x.shape[1]), rope_frequencies(16, c.rotary_base))
    part = {n: (x @ made.layer[f"{n}_proj.weight"].double().T).unflatten(-1, (-1, 16)) for n in "qkv"}
    query, key = (apply_rope(part[n], cos.double(), sin.double(), interleaved=False) for n in "qk")
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    lengths = []
    for head in range(6):
        scores = query[:, :, head] @ key[:, :, head // 3].mT / 4
        out = scores.masked_fill(future, -torch.inf).softmax(-1) @ part["v"][:, :, head // 3]
        lengths.append(out.norm(dim=-1))
    return torch.stack(lengths, -1).transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize("symbol", "GM")
def test_gates_follow_the_lengths_of_the_heads_outputs(symbol, made):
    tensors = mixer(made, student(made, symbol))
    gate = tensors["g_proj.weight"] if symbol == "G" else tensors["in_proj.weight"][:96]
    found = (made.x.flatten(0, 1) @ gate.T).unflatten(-1, (6, 16)).double()
    assert torch.equal(found, found[..., :1].expand_as(found))  # one number a head
    found, lengths = found[..., 0], head_lengths(made)
    correlation = [float(torch.corrcoef(torch.stack([found[:, h], lengths[:, h]]))[0, 1]) for h in range(6)]
    print(correlation)
    assert min(correlation) > 0.05
    # the best linear prediction of length over mean length, but for the damping of 1 %
    x = made.x.flatten(0, 1).double()
    best = x @ torch.linalg.lstsq(x, lengths / lengths.mean(0)).solution
    remaining = (found / calibrated.GATE - lengths / lengths.mean(0)).square().mean(0)
    assert (remaining <= 1.1 * (best - lengths / lengths.mean(0)).square().mean(0)).all()


def test_gated_delta_net_in_the_attentions_heads_has_its_rows(made):
    tensors = mixer(made, student(made, "G"))
    assert torch.equal(tensors["q_proj.weight"], made.layer["q_proj.weight"])
    for part in "kv":
        repeated = made.layer[f"{part}_proj.weight"].unflatten(0, (2, 16)).repeat_interleave(3, 0).flatten(0, 1)
        assert torch.equal(tensors[f"{part}_proj.weight"], repeated)
    assert torch.equal(tensors["o_proj.weight"], made.layer["o_proj.weight"])


def test_wider_heads_hold_several_kv_heads_and_then_the_input(made):
    tensors = mixer(made, student(made, "G", "more room than KV heads"))
    heads = {part: made.layer[f"{part}_proj.weight"].unflatten(0, (-1, 16)) for part in "qkv"}
    for head, first in enumerate((0, 0, 1, 1)):
        order = [first, 1 - first]
        key, query = (tensors[f"{part}_proj.weight"].unflatten(0, (4, 40))[head] for part in "kq")
        assert torch.equal(key[:32], heads["k"][order].flatten(0, 1)) and not key[32:].any()
        met = torch.cat([heads["q"][3 * g : 3 * g + 3].mean(0) for g in order])
        torch.testing.assert_close(query[:32], met)
        value = tensors["v_proj.weight"].unflatten(0, (4, 60))[head]
        assert torch.equal(value[:32], heads["v"][order].flatten(0, 1))
        room = value[32:].double()  # orthogonal directions of most energy, as long as the values' rows
        gram = room @ room.T
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(28, dtype=torch.float64), rtol=1e-5, atol=1e-5)
        energy = (room @ made.statistics["input_second_moment"].double() @ room.T).diagonal() / gram[0, 0]
        torch.testing.assert_close(
            energy, torch.linalg.eigvalsh(made.statistics["input_second_moment"].double()).flip(0)[:28], rtol=1e-5, atol=1e-6
        )


def test_mamba2_has_the_attentions_rows(made):
    tensors = mixer(made, student(made, "M"))
    _, x, state_in, state_out, _ = tensors["in_proj.weight"].split([96, 32, 32, 96, 6])
    for rows, part in ((x, "v"), (state_in, "k"), (state_out, "q")):
        assert torch.equal(rows, made.layer[f"{part}_proj.weight"])
    assert torch.equal(tensors["out_proj.weight"], made.layer["o_proj.weight"])


@pytest.mark.parametrize("symbol", "GM")
def test_statistics_are_needed(symbol, made):
    with pytest.raises(ConfigError, match="--calibration"):
        MAKERS[symbol](made.layer, student(made, symbol), made.base, torch.Generator())


@pytest.mark.parametrize(
    "changes", [dict(mamba_num_heads=4), dict(mamba_num_heads=4, num_attention_heads=4), dict(mamba_head_dim=8),
                dict(mamba_state_dim=32), dict(num_query_groups=3)]
)  # fmt: skip
def test_mamba2_of_other_dimensions_is_refused_by_name(changes, made):
    name, value = next(iter(changes.items()))
    with pytest.raises(ConfigError, match=f"{name} {value} .*must be"):
        mixer(made, student(made, "M").replace(**changes))


def test_spread_is_even_in_the_logarithm():
    assert calibrated.spread(7, 3, 1.0, 16.0).tolist() == pytest.approx([1, 4, 16, 1, 4, 16, 1])
    assert calibrated.spread(2, 1, 1.0, 16.0).tolist() == pytest.approx([4, 4])
