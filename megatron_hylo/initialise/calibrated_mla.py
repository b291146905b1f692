"""Attention -> MLA from calibration statistics: whole rotary pairs, a shared key by PCA, the rest kept, joint low rank.

Sources: TransMLA (arXiv:2502.07864: PCA over the KV heads of each frequency commutes with RoPE), MHA2MLA (2502.14837:
choose pairs by their energy), CARE (2603.17946: low rank by the covariance of the outputs). Ours: what of a key is not
rotated is kept without rotation; components are chosen by energy times how far they turn; the low rank is two-sided,
weighted by the queries that meet the keys and by W_O behind the values. At full rank the layer equals the attention.

A teacher's rotary pair j is rows (j, j + dh/2) of a head and is never split. The columns of U_j are the principal
directions of pair j over the KV heads; component c of pair j is k'_{j,c} = sum_g U_j[g,c] k_{g,j}, and a query head of
KV head g meets it with U_j[g,c] q_{h,j}. A rotary slot of the student is one (j, c).
"""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.initialise.moments import damped, factor_outputs, leading_eigenvectors, square_roots
from megatron_hylo.initialise.registry import CalibrationStatistics, TeacherLayer, needed_statistics, register_initialiser
from megatron_hylo.kernels.rope import rope_frequencies


@dataclass
class AttentionMoments:
    """Weights of one teacher layer by heads and moments from its statistics, float64."""

    query: Tensor  # [Hq, dh, d]
    key: Tensor  # [Hkv, dh, d]
    value: Tensor  # [Hkv, dh, d]
    output: Tensor  # [Hq, d, dh], columns of W_O by head
    input_mean: Tensor  # [d] E[x]
    input_moment: Tensor  # [d, d] E[x x^T]
    query_moment: Tensor  # [Hq, dh, dh] E[q q^T] as the scores see q (bias and norm applied), before the rotation
    key_moment: Tensor  # [Hkv, dh, dh]
    principal: Tensor  # [dh/2, Hkv, Hkv], U_j
    pair_energy: Tensor  # [dh/2, Hkv], E|k'_{j,c}|^2, falling in c
    head_weight: Tensor  # [Hq] tr(W_O,h Cov(v) W_O,h^T): what an error of this head's scores costs

    @property
    def repeats(self) -> int:
        """Query heads of a KV head."""
        return len(self.query) // len(self.key)


def attention_moments(teacher: TeacherLayer, config: ModelConfig, statistics: CalibrationStatistics | None) -> AttentionMoments:
    """Take one layer apart; float64 on the statistics' device.

    Args:
        teacher: the layer's tensors.
        config: of the teacher.
        statistics: of this layer, see `megatron_hylo.calibrate.statistics`.

    Raises:
        ConfigError: there are no statistics.
    """
    statistics = needed_statistics(statistics)
    moment = statistics["input_second_moment"].double()
    mean = statistics["input_mean"].double()
    wide = {name: tensor.to(moment) for name, tensor in teacher.items()}
    dh, heads, groups = config.kv_channels, config.num_attention_heads, config.num_query_groups
    query, key, value = (wide[f"{part}_proj.weight"].unflatten(0, (-1, dh)) for part in "qkv")
    output = wide["o_proj.weight"].unflatten(1, (heads, dh)).transpose(0, 1)
    value_covariance = value @ (moment - torch.outer(mean, mean)) @ value.transpose(1, 2)
    head_weight = torch.einsum("hde,hef,hdf->h", output, value_covariance.repeat_interleave(heads // groups, 0), output)
    pairs = (key * wide["k_norm.weight"][:, None] if config.qk_layernorm else key).unflatten(1, (2, dh // 2))
    energy, principal = torch.linalg.eigh(torch.einsum("gajd,de,faje->jgf", pairs, moment, pairs))
    return AttentionMoments(
        query, key, value, output, mean, moment, statistics["query_second_moment"].to(moment),
        statistics["key_second_moment"].to(moment), principal.flip(-1), energy.flip(-1), head_weight,
    )  # fmt: skip


def choose_rotary_pairs(
    teacher: TeacherLayer,
    config: ModelConfig,
    teacher_config: ModelConfig,
    statistics: CalibrationStatistics | None,
    choice: str,
    span: int = 2048,
) -> tuple[int, ...]:
    """The base model's rotary pairs that an MLA layer's rotary slots take: what `ModelConfig.mla_rotary_pairs` holds.

    The n-th time that a pair occurs, its n-th principal component is meant.

    Args:
        teacher, statistics: of the layer.
        config, teacher_config: of student and teacher.
        choice: "energy" takes the components with the largest sum_h w_h E|q'|^2 E|k'|^2 mean_{D < span} (2 - 2 cos w_j D),
            the score error that leaving out their rotation would cost; "all" the first component of every pair (needs
            qk_pos_emb_head_dim = kv_channels: the standard table); "fastest" that of the fastest pairs (a standard table
            with theta^(qk_pos_emb_head_dim / kv_channels)).
        span: longest distance in tokens that counts, the training length.

    Returns:
        qk_pos_emb_head_dim / 2 pair numbers, rising.

    Raises:
        ConfigError: an unknown choice, or one that the dimensions exclude.
    """
    slots, pairs = config.qk_pos_emb_head_dim // 2, teacher_config.kv_channels // 2
    if choice == "all" and slots != pairs:
        raise ConfigError(
            f"rotary choice `all` needs qk_pos_emb_head_dim {2 * pairs} (the teacher's kv_channels), got {2 * slots}; "
            f"use `energy` or `fastest`"
        )
    if choice in ("all", "fastest") and slots <= pairs:
        return tuple(range(slots))
    if choice != "energy" or slots > pairs * teacher_config.num_query_groups:
        most = pairs if choice == "fastest" else pairs * teacher_config.num_query_groups
        raise ConfigError(
            f"rotary choice {choice!r} with qk_pos_emb_head_dim {2 * slots}: use energy, all or fastest, at most {2 * most}"
        )
    m = attention_moments(teacher, teacher_config, statistics)
    query_energy = m.query_moment.diagonal(dim1=1, dim2=2).unflatten(1, (2, pairs)).sum(1)  # [Hq, dh/2]
    shared = m.principal.repeat_interleave(m.repeats, dim=1).square()  # [dh/2, Hq, Hkv]: U_j[g(h), c]^2
    met = torch.einsum("h,hj,jhc->jc", m.head_weight, query_energy, shared)
    frequency = rope_frequencies(2 * pairs, teacher_config.rotary_base, teacher_config.rope_scaling).to(m.query)
    turned = (2 - 2 * torch.cos(torch.arange(span).to(frequency)[:, None] * frequency)).mean(0)
    score = met * m.pair_energy * turned[:, None]
    # of one pair the components must be taken in order: what occurs n times means the first n
    score = torch.cummin(score, dim=1).values
    chosen = score.flatten().argsort(descending=True, stable=True)[:slots] // score.shape[1]
    return tuple(sorted(chosen.tolist()))


def rotary_slots(config: ModelConfig, layer: int, pairs: int) -> list[tuple[int, int]]:
    """Rotary slots of a layer as (pair, component), by `mla_rotary_pairs` or, without it, the standard table's pairs.

    Raises:
        ConfigError: the standard table of qk_pos_emb_head_dim has no pair of the teacher for some slot.
    """
    slots = config.qk_pos_emb_head_dim // 2
    if config.mla_rotary_pairs:
        chosen = config.mla_rotary_pairs[layer]
        return [(pair, chosen[:i].count(pair)) for i, pair in enumerate(chosen)]
    if slots > pairs or pairs % slots:
        raise ConfigError(
            f"layer {layer}: the standard table of qk_pos_emb_head_dim {2 * slots} has other frequencies than the teacher's "
            f"{2 * pairs} channels; give mla_rotary_pairs, or a divisor of {2 * pairs}"
        )
    return [(i * (pairs // slots), 0) for i in range(slots)]


@register_initialiser("calibrated", "+")
def mla_from_attention(
    teacher: TeacherLayer,
    config: ModelConfig,
    teacher_config: ModelConfig,
    generator: Generator,
    statistics: CalibrationStatistics | None = None,
) -> dict[str, Tensor]:
    """MLA that keeps as much of the attention's function as its ranks allow; see the module's description.

    With qk_head_dim = kv_channels (teacher shapes) nothing but the ranks is approximate: unrotated queries are the
    teacher's, biases are kept (mla_bias), q/k-norm is the teacher's own. With fewer channels (the paper's shapes) each KV
    head's unrotated part is cut to its leading directions (the best rank-n form q^T P k on the data), and q/k-norm, which is
    then over other channels than the teacher's, is right on average only. W_O is copied; `calibrate.solve` improves it.

    Args:
        teacher: one attention layer.
        config: of the student; v_head_dim = kv_channels, the teacher's heads.
        teacher_config: of the teacher.
        generator: unused, nothing is random.
        statistics: of this layer.

    Returns:
        The `self_attn.*` tensors of `get_mixer("+").tensors(config)`, fp32.

    Raises:
        ConfigError: no statistics, or dimensions that do not fit.
    """
    _check_dimensions(config, teacher_config)
    statistics = needed_statistics(statistics)
    m = attention_moments(teacher, teacher_config, statistics)
    dh, nope, groups = teacher_config.kv_channels, config.qk_head_dim, len(m.key)
    normed = teacher_config.qk_layernorm
    norm = {part: teacher[f"{part}_norm.weight"].to(m.key) for part in "qk"} if normed else {}
    folded = normed and nope != dh
    if folded:  # the student's norms are over other channels than the teacher's weights are for
        m = replace(m, query=m.query * norm["q"][:, None], key=m.key * norm["k"][:, None])
    slots = rotary_slots(config, int(statistics["layer"]), dh // 2)
    pair, component = (torch.tensor(x, device=m.key.device) for x in zip(*slots))
    shared = m.principal[pair, :, component]  # [slots, Hkv]: U_j[g, c]
    bias = {part: teacher[f"{part}_proj.bias"].to(m.key).unflatten(0, (-1, dh)) for part in "qkv"} if config.mla_bias else {}

    def rotary(rows: Tensor) -> Tensor:
        """Select both members of each slot's pair: [heads, dh, ...] -> [heads, slots, 2, ...]."""
        return rows.unflatten(1, (2, dh // 2))[:, :, pair].transpose(1, 2)

    def shared_key(key: Tensor) -> Tensor:
        """Combine the heads into the rotary key, in MLA's interleaved order: [Hkv, dh, ...] -> [slots * 2, ...]."""
        return torch.einsum("sg,gs...->s...", shared, rotary(key)).flatten(0, 1)

    def unrotated(key: Tensor) -> Tensor:
        """Remove the components that slots hold: [Hkv, dh, ...] -> the same shape."""
        members = torch.einsum("sg,s...->gs...", shared, shared_key(key).unflatten(0, (-1, 2)))
        rest = key.unflatten(1, (2, dh // 2)).clone()
        rest.index_add_(2, pair, members.transpose(1, 2), alpha=-1)
        return rest.flatten(1, 2)

    # what an error of an unrotated key costs, by KV head: the queries that meet it, each with its head's weight
    query_cost = (m.head_weight[:, None, None] * m.query_moment).unflatten(0, (groups, -1)).sum(1) / dh
    if normed:  # the scores see a key times its norm's weight and inverse length, on average the ratio of energies
        weight = torch.ones_like(norm["k"]) if folded else norm["k"]
        scale = _energy(m.key_moment) / _energy((m.key * weight[:, None]) @ m.input_moment @ (m.key * weight[:, None]).mT)
        query_cost = query_cost * weight[:, None] * weight * scale[:, None, None]
    query_cost = damped(query_cost)
    keys = unrotated(m.key)
    down_key, up_query = _cut_heads(keys, query_cost, m.input_moment, nope)
    value_cost = damped((m.output.transpose(1, 2) @ m.output).unflatten(0, (groups, -1)).sum(1))
    cost = [*(up_query.transpose(1, 2) @ query_cost @ up_query), *value_cost]
    rows = torch.cat([(down_key @ keys).flatten(0, 1), m.value.flatten(0, 1)])
    moment = m.input_moment - torch.outer(m.input_mean, m.input_mean) if config.mla_bias else m.input_moment
    latent_down, latent_up = factor_outputs(rows, moment, cost, config.kv_lora_rank)

    def by_head(stacked: Tensor) -> Tensor:
        """Reorder rows from [all keys; all values] to each KV head's key, then its value."""
        key, value = stacked.split([groups * nope, groups * dh])
        return torch.cat([key.unflatten(0, (groups, nope)), value.unflatten(0, (groups, dh))], dim=1).flatten(0, 1)

    query_down, query_up = _factor_queries(m, config.q_lora_rank)

    def query_rows(query: Tensor) -> Tensor:
        """Make MLA's query rows: [Hq, dh, ...] -> [Hq * (nope + rope), ...]."""
        to_nope = torch.einsum("hdn,hd...->hn...", up_query.repeat_interleave(m.repeats, 0), query)
        to_rope = torch.einsum("hs,hs...->hs...", shared.T.repeat_interleave(m.repeats, 0), rotary(query)).flatten(1, 2)
        return torch.cat([to_nope, to_rope], dim=1).flatten(0, 1)

    # MLA divides scores by sqrt(nope + rope), the attention by sqrt(dh)
    sharpness = ((nope + 2 * len(slots)) / dh) ** 0.5
    mixer = {
        "self_attn.q_a_proj.weight": query_down,
        "self_attn.q_b_proj.weight": query_rows(query_up) * (1.0 if normed else sharpness),
        "self_attn.kv_a_proj_with_mqa.weight": torch.cat([latent_down, shared_key(m.key)]),
        "self_attn.kv_b_proj.weight": by_head(latent_up),
        "self_attn.o_proj.weight": teacher["o_proj.weight"],
    }
    if config.mla_bias:
        lost = (rows - latent_up @ latent_down) @ m.input_mean
        offset = torch.cat([torch.einsum("gnd,gd->gn", down_key, unrotated(bias["k"])).flatten(), bias["v"].flatten()])
        mixer |= {
            "self_attn.q_b_proj.bias": query_rows(bias["q"]) * (1.0 if normed else sharpness),
            "self_attn.kv_a_proj_with_mqa.bias": torch.cat([offset.new_zeros(config.kv_lora_rank), shared_key(bias["k"])]),
            "self_attn.kv_b_proj.bias": by_head(offset + lost),
        }
    if folded:
        drawn = (
            query_rows(m.query).unflatten(0, (len(m.query), -1)),
            torch.cat([down_key @ keys, shared_key(m.key).expand(groups, -1, -1)], dim=1),
        )
        for part, rows_of, of in zip("qk", drawn, (m.query / norm["q"][:, None], m.key / norm["k"][:, None])):
            ratio = _energy(rows_of @ m.input_moment @ rows_of.mT).sum() / _energy(of @ m.input_moment @ of.mT).sum()
            mixer[f"self_attn.{part}_norm.weight"] = ratio.sqrt().expand(config.kv_channels)
    elif normed:
        weights = {part: torch.cat([weight, rotary(weight[None])[0].flatten()]) for part, weight in norm.items()}
        mixer |= {"self_attn.q_norm.weight": weights["q"] * sharpness, "self_attn.k_norm.weight": weights["k"]}
        mixer["self_attn.k_norm.rotary_mix"] = shared.T
    return {name: tensor.to("cpu", torch.float32, copy=True).contiguous() for name, tensor in mixer.items()}


def _cut_heads(keys: Tensor, cost: Tensor, input_moment: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Per KV head T [Hkv, nope, dh] and S [Hkv, dh, nope] with least E (q^T k - q^T S T k)^2; identities where nope = dh."""
    groups, dh, _ = keys.shape
    if nope == dh:
        identity = torch.eye(dh, dtype=keys.dtype, device=keys.device).expand(groups, -1, -1)
        return identity, identity
    root, inverse_root = square_roots(cost)
    met = root @ keys @ input_moment @ keys.transpose(1, 2) @ root
    leading = torch.stack([leading_eigenvectors(part, nope) for part in met])
    return leading.transpose(1, 2) @ root, inverse_root @ leading


def _factor_queries(m: AttentionMoments, rank: int) -> tuple[Tensor, Tensor]:
    """Down projection [rank, d] and, by head, up projection [Hq, dh, rank] of the teacher's queries; exact at full rank."""
    heads, dh, d = m.query.shape
    if rank >= d:
        return torch.eye(rank, d, dtype=m.query.dtype, device=m.query.device), torch.nn.functional.pad(m.query, (0, rank - d))
    used = min(rank, heads * dh)
    cost = m.head_weight[:, None, None] * m.key_moment.repeat_interleave(m.repeats, 0)
    down, up = factor_outputs(m.query.flatten(0, 1), m.input_moment, [*damped(cost)], used)
    down, up = (torch.nn.functional.pad(x, (0, 0, 0, n)) for x, n in ((down, rank - used), (up, 0)))
    return down, torch.nn.functional.pad(up, (0, rank - used)).unflatten(0, (heads, dh))


def _energy(moment: Tensor) -> Tensor:
    """Traces: [heads, n, n] -> [heads]."""
    return moment.diagonal(dim1=1, dim2=2).sum(1)


def _check_dimensions(config: ModelConfig, teacher_config: ModelConfig) -> None:
    dh = teacher_config.kv_channels
    for name, needed, what in (
        ("num_attention_heads", teacher_config.num_attention_heads, "the teacher's query heads"),
        ("num_query_groups", teacher_config.num_query_groups, "the teacher's key/value heads"),
        ("v_head_dim", dh, "the teacher's kv_channels"),
        ("qk_layernorm", teacher_config.qk_layernorm, "the teacher's setting"),
        ("mla_bias", teacher_config.add_qkv_bias, "the teacher's add_qkv_bias"),
    ):
        if getattr(config, name) != needed:
            raise ConfigError(f"{name} {getattr(config, name)} does not fit the calibrated initialisation: {needed} ({what})")
    if config.qk_head_dim > dh:
        raise ConfigError(f"qk_head_dim {config.qk_head_dim} is more than the teacher's kv_channels {dh}; use at most that")
