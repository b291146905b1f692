"""MLA from calibration statistics: equal to the attention at full rank; better than blind methods below it."""

import pytest
import torch

from megatron_hylo.config import ConfigError, RopeScaling
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.initialise.calibrated_mla import attention_moments, choose_rotary_pairs, mla_from_attention, rotary_slots
from megatron_hylo.initialise.paper import mla_from_attention as paper_mla
from megatron_hylo.kernels.rope import rope_frequencies
from tests.calibrate.tiny import attention_layer, measure, mixer_of, random_teacher, uneven_input, with_mixer
from tests.conftest import tiny_config
from tests.kernels.compare import relative_error

FAMILIES = {
    "llama": dict(rope_scaling=RopeScaling("llama3", 8.0, 32)),
    "qwen2": dict(model_family="qwen2", add_qkv_bias=True),
    "qwen3": dict(model_family="qwen3", qk_layernorm=True),
    "bias and norm": dict(add_qkv_bias=True, qk_layernorm=True),
}
ROUNDING = 2e-6


class Case:
    """A teacher of one layer, its statistics on some inputs, and what students make of the same inputs."""

    def __init__(self, **settings):
        self.base = tiny_config("*-", **settings)
        self.teacher = random_teacher(self.base)
        self.x = uneven_input(self.base)
        self.layer = attention_layer(self.teacher)
        self.statistics = measure(self.teacher, self.x)
        with torch.no_grad():
            self.out = mixer_of(self.teacher)(self.x)[0]

    def student(self, **fields):
        """Aligned shapes, every component of every pair rotary, full ranks; `fields` are changes."""
        base, dh = self.base, self.base.kv_channels
        full = dict(
            hybrid_layer_pattern="+-", q_lora_rank=base.hidden_size, kv_lora_rank=base.num_query_groups * dh,
            qk_head_dim=dh, v_head_dim=dh, mla_bias=base.add_qkv_bias, mla_rope_scaling=base.rope_scaling,
        )  # fmt: skip
        if "qk_pos_emb_head_dim" not in fields:
            pairs = sorted(list(range(dh // 2)) * base.num_query_groups)
            full |= dict(qk_pos_emb_head_dim=base.num_query_groups * dh, mla_rotary_pairs=[pairs])
        return base.replace(**(full | fields))

    def mixer(self, config, make=mla_from_attention, statistics=None):
        """Checked tensors of the student's mixer."""
        statistics = statistics or self.statistics
        tensors = make(self.layer, config, self.base, torch.Generator(), statistics)
        assert {n: tuple(t.shape) for n, t in tensors.items()} == get_mixer("+").tensors(config)
        assert all(t.dtype == torch.float32 and t.is_contiguous() and t.isfinite().all() for t in tensors.values())
        assert tensors["self_attn.o_proj.weight"].data_ptr() != self.layer["o_proj.weight"].data_ptr()
        return tensors

    def build(self, config, **how):
        return mixer_of(with_mixer(self.teacher, config, self.mixer(config, **how)))

    def error(self, config, **how) -> float:
        """|student - teacher| / |teacher| on the data."""
        with torch.no_grad():
            return relative_error(self.build(config, **how)(self.x)[0], self.out)


@pytest.fixture
def case(one_rank):
    return Case


SMALL = dict(num_attention_heads=4, num_query_groups=2, kv_channels=8)  # queries of rank 32 of 48 channels


@pytest.mark.parametrize("q_lora_rank", [48, 32, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_ranks_and_all_rotary_equal_the_attention(family, q_lora_rank, case):
    made = case(**FAMILIES[family], **(SMALL if q_lora_rank < 48 else {}))
    results, cotangent = [], torch.randn(made.out.shape)
    for mixer in (mixer_of(made.teacher), made.build(made.student(q_lora_rank=q_lora_rank))):
        leaf = made.x.clone().requires_grad_()
        out = mixer(leaf)[0]
        results.append((out, *torch.autograd.grad((out * cotangent).sum(), leaf)))
    found = [relative_error(ours, theirs) for theirs, ours in zip(*results)]
    print(f"{family}, q_lora_rank {q_lora_rank}: output {found[0]:.1e}, input gradient {found[1]:.1e}")
    assert max(found) < ROUNDING, found


SLOW = RopeScaling("llama3", 1e9, 1)  # all angles next to 0: rotated or not makes no difference


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_components_are_kept_without_rotation(family, case):
    """Unrotated components must be whole in the latent, and rotary and unrotated scores must add up."""
    made = case(**(FAMILIES[family] | dict(rope_scaling=SLOW)))
    config = made.student(kv_lora_rank=48, qk_pos_emb_head_dim=10, mla_rotary_pairs=[[0, 0, 3, 5, 7]])
    assert made.error(config) < ROUNDING
    assert made.error(config.replace(kv_lora_rank=30)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_error_falls_with_the_latent(family, case):
    made = case(**FAMILIES[family])
    errors = [made.error(made.student(kv_lora_rank=rank)) for rank in (2, 6, 12, 18, 24, 32)]
    print([f"{e:.1e}" for e in errors])
    assert all(b < 0.9 * a for a, b in zip(errors, errors[1:])), errors
    partly = dict(qk_pos_emb_head_dim=12, mla_rotary_pairs=[[0, 0, 1, 1, 2, 3]])
    errors = [made.error(made.student(kv_lora_rank=rank, **partly)) for rank in (4, 12, 24, 48)]
    print([f"{e:.1e}" for e in errors])
    assert all(b < a for a, b in zip(errors, errors[1:])), errors


def test_what_a_latent_loses_of_the_mean_is_in_the_bias(case):
    """Values of a short latent are the attention's on average."""
    made = case(**FAMILIES["qwen2"])
    tensors = made.mixer(made.student(kv_lora_rank=6))
    down, up, bias = (
        tensors[f"self_attn.{name}"].double() for name in ("kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "kv_b_proj.bias")
    )
    mean = made.x.flatten(0, 1).double().mean(0)
    found = (up @ (down[:6] @ mean) + bias).unflatten(0, (2, 32))[:, 16:].flatten()
    wanted = made.layer["v_proj.weight"].double() @ mean + made.layer["v_proj.bias"].double()
    assert relative_error(found, wanted) < 1e-4


def blind(statistics):
    """Statistics of white noise: plain SVD instead of the data's."""
    made = dict(statistics)
    for name in ("input_second_moment", "query_second_moment", "key_second_moment"):
        made[name] = torch.eye(made[name].shape[-1]).expand_as(made[name]).clone()
    made["input_mean"] = torch.zeros_like(made["input_mean"])
    return made


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_beats_paper_and_plain_svd_at_equal_ranks(family, rank, case):
    made = case(**FAMILIES[family])
    pairs = [sorted(list(range(8)) * 2)]
    aligned = made.student(kv_lora_rank=rank, q_lora_rank=24, qk_pos_emb_head_dim=32, mla_rotary_pairs=pairs)
    paper = made.student(kv_lora_rank=rank, q_lora_rank=24, qk_head_dim=8, qk_pos_emb_head_dim=8)
    found = {
        "aligned": made.error(aligned), "aligned, blind": made.error(aligned, statistics=blind(made.statistics)),
        "paper's shapes": made.error(paper),
        "paper": made.error(paper.replace(mla_bias=False), make=paper_mla),
    }  # fmt: skip
    print({name: f"{e:.3f}" for name, e in found.items()})
    assert found["aligned"] < 0.9 * found["aligned, blind"]
    assert found["aligned"] < found["paper's shapes"] < 0.9 * found["paper"]


@pytest.mark.parametrize("family", FAMILIES)
def test_paper_shapes_lose_nothing_where_keys_need_no_more_channels(family, case):
    """Keys of rank 4 a head: what the two heads keep without rotation has rank 8, the student's qk_head_dim."""
    made = case(**(FAMILIES[family] | dict(rope_scaling=SLOW)))
    config = made.student(kv_lora_rank=48, qk_head_dim=8, qk_pos_emb_head_dim=8)
    assert rotary_slots(config, 0, 8) == [(0, 0), (2, 0), (4, 0), (6, 0)]
    full = made.error(config)
    rows = made.layer["k_proj.weight"].unflatten(0, (2, 16))
    made.layer["k_proj.weight"] = (rows[:, :, :4] @ rows[:, :4] / 2).flatten(0, 1)
    made.teacher = with_mixer(made.teacher, made.base, {f"self_attn.{n}": t for n, t in made.layer.items()})
    made.statistics = measure(made.teacher, made.x)
    with torch.no_grad():
        made.out = mixer_of(made.teacher)(made.x)[0]
    low = made.error(config)
    print(f"{family}: full keys {full:.3f}, keys of low rank {low:.1e}")
    # a norm over other channels than the teacher's is right on average only
    assert low < (0.5 if made.base.qk_layernorm else ROUNDING) and full < 0.5


def test_a_heads_weight_is_the_variance_of_what_it_can_write(one_rank):
    """Attention that goes to another token changes the output by what their values differ in, so their mean costs nothing."""
    made = Case()
    x = made.x.flatten(0, 1).double()
    value, output = (made.layer[f"{part}_proj.weight"].double() for part in "vo")
    weight = attention_moments(made.layer, made.base, made.statistics).head_weight
    for head in range(6):
        written = x @ value[head // 3 * 16 :][:16].T @ output[:, head * 16 :][:, :16].T
        assert float(weight[head]) == pytest.approx(float(written.var(0, correction=0).sum()), rel=1e-4)
        assert written.mean(0).square().sum() > 0.01 * weight[head]  # a mean that is no variance


def brute_force(made, slots: int, span: int) -> tuple[int, ...]:
    """Energy choice with plain loops over pairs, components and heads."""
    base, m = made.base, attention_moments(made.layer, made.base, made.statistics)
    pairs, groups = base.kv_channels // 2, base.num_query_groups
    frequency = rope_frequencies(base.kv_channels, base.rotary_base, base.rope_scaling).double()
    scores = []
    for j in range(pairs):
        turned = sum(2 - 2 * torch.cos(frequency[j] * distance) for distance in range(span)) / span
        least = torch.inf
        for c in range(groups):
            met = 0.0
            for h in range(base.num_attention_heads):
                q = m.query_moment[h]
                share = m.principal[j, h // (base.num_attention_heads // groups), c] ** 2
                met += m.head_weight[h] * share * (q[j, j] + q[j + pairs, j + pairs])
            least = min(least, float(met * m.pair_energy[j, c] * turned))
            scores.append((least, j))
    return tuple(sorted(j for _, j in sorted(scores, key=lambda entry: -entry[0])[:slots]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "second better"])
@pytest.mark.parametrize("slots", [3, 8, 16])
def test_energy_choice_equals_brute_force(family, slots, case):
    """Also where second components are worth more than the first ones, which are taken before them all the same."""
    made = case(**FAMILIES.get(family, {}))
    if family == "second better":
        made.layer["k_proj.weight"][:16] *= 3  # the first KV head has the first component, and next to no query meets it
        made.statistics["query_second_moment"][:3] *= 1e-4
        m = attention_moments(made.layer, made.base, made.statistics)
        assert (m.principal[:, 0, 0].square() > 0.5).all()
    config = made.student(qk_pos_emb_head_dim=2 * slots, qk_head_dim=16 if family == "qwen3" else 10,
                          mla_rotary_pairs=[[0] * slots])  # fmt: skip
    chosen = choose_rotary_pairs(made.layer, config, made.base, made.statistics, "energy", span=40)
    assert chosen == brute_force(made, slots, 40)
    config = config.replace(mla_rotary_pairs=[chosen])
    held = rotary_slots(config, 0, 8)
    assert len(set(held)) == slots and [pair for pair, _ in held] == list(chosen)
    assert all((pair, c - 1) in held for pair, c in held if c)  # components in order


def test_energy_takes_several_components_of_a_pair_where_they_pay(one_rank):
    made = Case()
    key = made.layer["k_proj.weight"].unflatten(0, (2, 2, 8))  # [KV head, member, pair, d]
    key[:, :, [0, 3, 4, 5, 6, 7]] *= 1e-3
    key[:, :, 1] *= 3  # fast, and different in both heads
    key[1, :, 2] = key[0, :, 2]  # the same in both heads: one component holds it all
    config = made.student(qk_pos_emb_head_dim=6, mla_rotary_pairs=[[0, 0, 0]])
    assert choose_rotary_pairs(made.layer, config, made.base, made.statistics, "energy", span=64) == (1, 1, 2)
    energy = attention_moments(made.layer, made.base, made.statistics).pair_energy
    assert energy[2, 1] < 1e-6 * energy[2, 0] and energy[1, 1] > 0.05 * energy[1, 0]
    assert (energy[:, :-1] >= energy[:, 1:]).all()


def test_energy_choice_costs_less_than_the_fastest_pairs(case):
    made = case(rotary_base=100.0)
    errors = {}
    for choice in ("energy", "fastest"):
        config = made.student(kv_lora_rank=48, qk_pos_emb_head_dim=12, mla_rotary_pairs=[[0] * 6])
        chosen = choose_rotary_pairs(made.layer, config, made.base, made.statistics, choice, span=96)
        errors[choice] = made.error(config.replace(mla_rotary_pairs=[chosen]))
    print(errors)
    assert errors["energy"] < errors["fastest"]


def test_simple_choices_and_their_limits(one_rank):
    made = Case()
    choose = lambda choice, dim: choose_rotary_pairs(  # noqa: E731
        made.layer, made.student(qk_pos_emb_head_dim=dim), made.base, made.statistics, choice
    )
    assert choose("all", 16) == choose("fastest", 16) == tuple(range(8))
    assert choose("fastest", 6) == (0, 1, 2)
    for choice, dim, message in (
        ("all", 8, "needs qk_pos_emb_head_dim 16 .*got 8"),
        ("fastest", 18, "'fastest' with qk_pos_emb_head_dim 18: .*at most 16"),
        ("energy", 34, "'energy' with qk_pos_emb_head_dim 34: .*at most 32"),
        ("slowest", 8, "'slowest' .*use energy, all or fastest"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(choice, dim)
    with pytest.raises(ConfigError, match="needs calibration statistics"):
        choose_rotary_pairs(made.layer, made.student(qk_pos_emb_head_dim=8), made.base, None, "energy")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_attention_heads=4), "num_attention_heads 4 .*6"),
        (dict(num_query_groups=3), "num_query_groups 3 .*2"),
        (dict(v_head_dim=8), "v_head_dim 8 .*16"),
        (dict(qk_layernorm=True), "qk_layernorm True .*False"),
        (dict(mla_bias=True), "mla_bias True .*False"),
        (dict(qk_head_dim=18), "qk_head_dim 18 .*16"),
        (dict(qk_pos_emb_head_dim=6), "layer 0: .*qk_pos_emb_head_dim 6 .*mla_rotary_pairs"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused_by_name(changes, message, case):
    made = case()
    with pytest.raises(ConfigError, match=message):
        made.mixer(made.student(**changes))


def test_statistics_are_needed(case):
    made = case()
    with pytest.raises(ConfigError, match="--calibration"):
        mla_from_attention(made.layer, made.student(), made.base, torch.Generator())
