"""The initialisation of the HyLo paper (arXiv:2604.24715), as exactly as it is known.

MLA by SVD is X-EcoMLA's and Zebra-Llama's, Mamba2 is the map of Mamba-in-the-Llama, Gated DeltaNet copies overlapping
sub-matrices. None of them preserves the teacher's function: the layers are aligned with it afterwards (stage 1).
What these maps have no place for is dropped: the QKV biases of Qwen2.5, and in linear mixers the q/k-norm of Qwen3.
"""

import torch
from torch import Generator, Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.initialise.defaults import delta_rule_defaults, mamba2_defaults
from megatron_hylo.initialise.registry import CalibrationStatistics, TeacherLayer, register_initialiser


@register_initialiser("paper", "+")
def mla_from_attention(
    teacher: TeacherLayer,
    config: ModelConfig,
    teacher_config: ModelConfig,
    generator: Generator,
    statistics: CalibrationStatistics | None = None,
) -> dict[str, Tensor]:
    """MLA by truncated SVD of W_Q and of [W_K; W_V] in fp32 (X-EcoMLA's method, as in the code of Zebra-Llama).

    All singular values go to the down projections. Of each head the first `qk_head_dim` rows carry no rotation and the
    last `qk_pos_emb_head_dim` do; the one rotary key is the mean over key heads of W_K's last rows. W_O is copied, and
    q/k-norm too where the model has it. The biases of Qwen2.5's projections are dropped.

    Rotary pairs are not kept: the teacher pairs rows (i, i + dh/2) of a head, MLA rows (2i, 2i + 1) of the rotary part.

    Args:
        teacher: one attention layer.
        config: of the student; must have the teacher's heads, qk_head_dim + qk_pos_emb_head_dim = v_head_dim = kv_channels.
        teacher_config: of the teacher.
        generator: unused, nothing is random.
        statistics: unused.

    Returns:
        The `self_attn.*` tensors of `get_mixer("+").tensors(config)`, fp32.

    Raises:
        ConfigError: the student's dimensions do not fit.
    """
    head_dim, key_heads = teacher_config.kv_channels, teacher_config.num_query_groups
    nope, rope = config.qk_head_dim, config.qk_pos_emb_head_dim
    _require(config, "num_attention_heads", teacher_config.num_attention_heads, "the teacher's query heads")
    _require(config, "num_query_groups", key_heads, "the teacher's key/value heads")
    _require(config, "v_head_dim", head_dim, "the teacher's kv_channels")
    _require(config, "qk_head_dim", head_dim - rope, f"the teacher's kv_channels {head_dim} - qk_pos_emb_head_dim {rope}")
    _require(config, "qk_layernorm", teacher_config.qk_layernorm, "the teacher's setting")
    key, value = _fp32(teacher["k_proj.weight"]), _fp32(teacher["v_proj.weight"])
    query_down, query_up = _truncated_svd(_fp32(teacher["q_proj.weight"]), config.q_lora_rank)
    latent_down, latent_up = _truncated_svd(torch.cat([key, value]), config.kv_lora_rank)
    key_up, value_up = latent_up.view(2, key_heads, head_dim, config.kv_lora_rank)
    rotary_key = key.view(key_heads, head_dim, -1)[:, nope:].mean(dim=0)
    mixer = {
        "self_attn.q_a_proj.weight": query_down,
        # a query head is [nope | rope] = [its first rows | its last rows], the order it already has
        "self_attn.q_b_proj.weight": query_up,
        "self_attn.kv_a_proj_with_mqa.weight": torch.cat([latent_down, rotary_key]),
        "self_attn.kv_b_proj.weight": torch.cat([key_up[:, :nope], value_up], dim=1).flatten(0, 1),
        "self_attn.o_proj.weight": _fp32(teacher["o_proj.weight"]),
    }
    if config.qk_layernorm:
        mixer |= {f"self_attn.{part}_norm.weight": _fp32(teacher[f"{part}_norm.weight"]) for part in "qk"}
    return {name: tensor.contiguous() for name, tensor in mixer.items()}


@register_initialiser("paper", "M")
def mamba2_from_attention(
    teacher: TeacherLayer,
    config: ModelConfig,
    teacher_config: ModelConfig,
    generator: Generator,
    statistics: CalibrationStatistics | None = None,
) -> dict[str, Tensor]:
    """Mamba2 with x from W_V, B from W_K, C from W_Q, its output from W_O (Mamba-in-the-Llama); the rest random.

    Without convolution, decay and step size this is the teacher's attention without softmax and rotation.

    Args:
        teacher: one attention layer.
        config: of the student; must have the teacher's heads and mamba_head_dim = mamba_state_dim = kv_channels.
        teacher_config: of the teacher.
        generator: draws z and dt rows, convolution, A_log and dt_bias (see `mamba2_defaults`).
        statistics: unused.

    Returns:
        The `mamba.*` tensors of `get_mixer("M").tensors(config)`, fp32.

    Raises:
        ConfigError: the student's dimensions do not fit.
    """
    head_dim = teacher_config.kv_channels
    _require(config, "mamba_num_heads", teacher_config.num_attention_heads, "the teacher's query heads")
    _require(config, "num_query_groups", teacher_config.num_query_groups, "the teacher's key/value heads")
    _require(config, "mamba_head_dim", head_dim, "the teacher's kv_channels")
    _require(config, "mamba_state_dim", head_dim, "the teacher's kv_channels")
    mixer = mamba2_defaults(config, generator)
    in_proj, start = mixer["mamba.in_proj.weight"], config.mamba_num_heads * head_dim  # past the z rows
    for part in "vkq":
        weight = teacher[f"{part}_proj.weight"]
        in_proj[start : start + len(weight)] = weight
        start += len(weight)
    mixer["mamba.out_proj.weight"] = _fp32(teacher["o_proj.weight"])
    return mixer


@register_initialiser("paper", "G")
def gated_delta_net_from_attention(
    teacher: TeacherLayer,
    config: ModelConfig,
    teacher_config: ModelConfig,
    generator: Generator,
    statistics: CalibrationStatistics | None = None,
) -> dict[str, Tensor]:
    """Gated DeltaNet with what of W_Q, W_K, W_V, W_O overlaps its own projections (paper section 3.2); the rest random.

    W_K and W_V are first expanded to one head a query head. Rows are counted from the first, heads are not aligned:
    with the paper's sizes q and k keep the first 0.75 d rows, v and o are the teacher's on their first d channels.

    Args:
        teacher: one attention layer.
        config: of the student; any number and size of heads.
        teacher_config: of the teacher.
        generator: draws everything that is not copied (see `delta_rule_defaults`).
        statistics: unused.

    Returns:
        The `linear_attn.*` tensors of `get_mixer("G").tensors(config)`, fp32.
    """
    return _overlap(delta_rule_defaults("G", config, generator), teacher, teacher_config)


@register_initialiser("paper", "K")
def kda_from_attention(
    teacher: TeacherLayer,
    config: ModelConfig,
    teacher_config: ModelConfig,
    generator: Generator,
    statistics: CalibrationStatistics | None = None,
) -> dict[str, Tensor]:
    """KDA by the paper's map for Gated DeltaNet (HyLo has no KDA); arguments as `gated_delta_net_from_attention`.

    Returns:
        The `linear_attn.*` tensors of `get_mixer("K").tensors(config)`, fp32.
    """
    return _overlap(delta_rule_defaults("K", config, generator), teacher, teacher_config)


def _overlap(mixer: dict[str, Tensor], teacher: TeacherLayer, teacher_config: ModelConfig) -> dict[str, Tensor]:
    """Copy the overlapping rows and columns of the teacher's projections into `mixer`."""
    repeat = teacher_config.num_attention_heads // teacher_config.num_query_groups
    sources = {
        "q": teacher["q_proj.weight"],
        "k": expand_heads(teacher["k_proj.weight"], teacher_config.kv_channels, repeat),
        "v": expand_heads(teacher["v_proj.weight"], teacher_config.kv_channels, repeat),
        "o": teacher["o_proj.weight"],
    }
    for part, source in sources.items():
        target = mixer[f"linear_attn.{part}_proj.weight"]
        rows, columns = (min(sizes) for sizes in zip(target.shape, source.shape, strict=True))
        target[:rows, :columns] = source[:rows, :columns]
    return mixer


def _truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of `weight` [out, in] of that rank as a product: down [rank, in] and up [out, rank]."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return s[:rank, None] * vh[:rank], u[:, :rank].contiguous()


def expand_heads(weight: Tensor, head_dim: int, repeat: int) -> Tensor:
    """Repeat each head `repeat` times in a row: [Hkv * head_dim, d] -> [Hkv * repeat * head_dim, d]."""
    return weight.unflatten(0, (-1, head_dim)).repeat_interleave(repeat, dim=0).flatten(0, 1)


def _fp32(tensor: Tensor) -> Tensor:
    """A fp32 copy, the teacher's memory is not shared."""
    return tensor.to(torch.float32, copy=True)


def _require(config: ModelConfig, name: str, needed: object, what: str) -> None:
    if getattr(config, name) != needed:
        raise ConfigError(
            f"{name} {getattr(config, name)} does not fit the paper's initialisation: it must be {needed} ({what})"
        )
