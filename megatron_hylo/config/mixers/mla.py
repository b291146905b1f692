"""`+`: Multi-head Latent Attention with grouped key/value heads (HyLo, section 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.layer import Shape
from megatron_hylo.config.mixers.base import Fields, MixerDescription

if TYPE_CHECKING:
    from megatron_hylo.config.model import ModelConfig

BIASED = ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # projections that `mla_bias` gives a bias
# by base model: q_lora_rank, kv_lora_rank, qk_pos_emb_head_dim, qk_head_dim, v_head_dim (HyLo model cards)
PAPER_SIZES = {
    "llama3.2-1b": (1344, 128, 32, 32, 64),
    "llama3.2-3b": (1536, 128, 64, 64, 128),
    "qwen3-1.7b": (1344, 256, 64, 64, 128),
    "smollm2-135m": (576, 96, 32, 32, 64),
}
# with teacher shapes, where measured (docs/upcycling.md): kv_lora_rank, qk_pos_emb_head_dim
TEACHER_SIZES = {"smollm2-135m": (112, 48)}


class MultiLatentAttention(MixerDescription):
    """Attention whose keys and values are computed from one cached latent and one shared rotary key."""

    symbol, name, block, recurrent = "+", "MLA", "self_attn", False
    rotary_pairs_by_layer, output_fit = True, "from_initial"
    undivided = ("q_a_proj", "kv_a_proj_with_mqa")
    tensor_parallel_fields = ("num_attention_heads", "num_query_groups")
    size_fields = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")

    def check(self, config: ModelConfig) -> None:
        """Check that ranks fit what they factor, rotary channels come in pairs, and a q/k-norm has a meaning.

        Raises:
            ConfigError: a rank is larger than that, there is an odd number of rotary channels, a norm's channels are not the
                teacher's, or a size is not positive.
        """
        super().check(config)
        c = config
        kv_width = c.num_query_groups * (c.qk_head_dim + c.v_head_dim)
        q_width = c.num_attention_heads * (c.qk_head_dim + c.qk_pos_emb_head_dim)
        for name, rank, width in (
            ("q_lora_rank", c.q_lora_rank, min(c.hidden_size, q_width)),
            ("kv_lora_rank", c.kv_lora_rank, min(c.hidden_size, kv_width)),
        ):
            if rank > width:
                raise ConfigError(f"{name} {rank} is larger than {width}, the rank of what it factors; use at most {width}")
        if c.qk_pos_emb_head_dim % 2:
            raise ConfigError(f"qk_pos_emb_head_dim must be even, got {c.qk_pos_emb_head_dim}")
        nope, rope, head_dim = c.qk_head_dim, c.qk_pos_emb_head_dim, c.kv_channels
        placed = bool(c.mla_rotary_pairs) or rope == head_dim  # where the rotary slots lie in the teacher's head
        if c.qk_layernorm and nope + rope != head_dim and not (nope == head_dim and placed):
            raise ConfigError(
                f"with q/k-norm, qk_head_dim {nope} and qk_pos_emb_head_dim {rope} do not suit kv_channels {head_dim}: either "
                f"their sum must equal it (HyLo's norm), or qk_head_dim must (the whole-head norm), with mla_rotary_pairs "
                f"given or qk_pos_emb_head_dim equal to it too"
            )

    def default_sizes(self, base: ModelConfig, base_name: str | None, teacher_shapes: bool) -> Fields:
        """The paper's: the head is half rotary; listed ranks, else full-rank queries and half of [W_K; W_V]'s rank cached.

        With teacher shapes the unrotated channels are as many as the teacher's head has and rotary ones come on top (the cache
        stays as small: both are computed from it), frequencies are the teacher's and QKV biases stay.
        """
        d, head_dim = base.hidden_size, base.kv_channels
        half, q_width, kv_width = head_dim // 2, base.num_attention_heads * head_dim, base.num_query_groups * head_dim
        query_rank = min(d, q_width)
        sizes = (query_rank, max(8, kv_width // 2 // 8 * 8), half, head_dim - half, head_dim)
        sizes = PAPER_SIZES.get(base_name or "", sizes)
        if not teacher_shapes:
            names = ("q_lora_rank", "kv_lora_rank", "qk_pos_emb_head_dim", "qk_head_dim", "v_head_dim")
            return dict(zip(names, sizes))
        kv_rank, rotary = TEACHER_SIZES.get(base_name or "", sizes[1:3])
        return dict(
            q_lora_rank=query_rank, kv_lora_rank=kv_rank, qk_pos_emb_head_dim=rotary, qk_head_dim=head_dim,
            v_head_dim=head_dim, mla_rope_scaling=base.rope_scaling, mla_bias=base.add_qkv_bias,
        )  # fmt: skip

    def tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """Down- and up-projections, biases, norms; `rotary_mix` where the norm is the whole head's."""
        c, d, qk = config, config.hidden_size, config.qk_head_dim + config.qk_pos_emb_head_dim
        shapes = {
            "q_a_proj": (c.q_lora_rank, d),
            "q_b_proj": (c.num_attention_heads * qk, c.q_lora_rank),
            "kv_a_proj_with_mqa": (c.kv_lora_rank + c.qk_pos_emb_head_dim, d),
            "kv_b_proj": (c.num_query_groups * (c.qk_head_dim + c.v_head_dim), c.kv_lora_rank),
            "o_proj": (d, c.num_attention_heads * c.v_head_dim),
        }
        names: dict[str, Shape] = {}
        for name, shape in shapes.items():
            names[f"self_attn.{name}.weight"] = shape
            if c.mla_bias and name in BIASED:
                names[f"self_attn.{name}.bias"] = shape[:1]
        if c.qk_layernorm:
            names |= {f"self_attn.{part}_norm.weight": (qk,) for part in "qk"}
        if c.mla_whole_head_norm:
            names["self_attn.k_norm.rotary_mix"] = (c.num_query_groups, c.qk_pos_emb_head_dim // 2)
        return names

    def kv_numbers(self, config: ModelConfig) -> int:
        """Latent and rotary key: kv_lora_rank + qk_pos_emb_head_dim."""
        return config.kv_lora_rank + config.qk_pos_emb_head_dim

    def sequence_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """Half of 2 T d_qk for the scores and of 2 T d_v for their sum, a head."""
        width = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
        return config.num_attention_heads * width * sequence_length

    def kept_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Latents whole; queries before and after rotation, keys and values, output by heads."""
        c, heads = config, config.num_attention_heads
        width, latent = c.qk_head_dim + c.qk_pos_emb_head_dim, c.kv_lora_rank + c.qk_pos_emb_head_dim
        keys = c.num_query_groups * (c.qk_head_dim + c.v_head_dim + width)
        return c.hidden_size + c.q_lora_rank + latent + (2 * heads * width + keys + heads * c.v_head_dim) / ranks
