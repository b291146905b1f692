"""Every tensor of a model, by its canonical (Hugging Face) name, with its shape.

The names are those of the released checkpoints' conventions: linear weights are [out, in], layer `l`
lives under `model.layers.{l}.`. Conversion, upcycling and export all take a model's list of tensors
from here, so that it is written down once.
"""

from megatron_hylo.config import ConfigError, ModelConfig

Shape = tuple[int, ...]
MLA_BIASED = ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # MLA's projections that `mla_bias` gives a bias


def mixer_tensor_names(config: ModelConfig, symbol: str) -> dict[str, Shape]:
    """Tensors of one token mixer.

    Args:
        config: the model the mixer belongs to.
        symbol: `*` attention, `+` MLA, `M` Mamba2 or `G` Gated DeltaNet.

    Returns:
        Name relative to the layer, with its block's prefix (e.g. "self_attn.q_proj.weight") -> shape.

    Raises:
        ConfigError: an unknown symbol.
    """
    builders = {"*": _attention, "+": _mla, "M": _mamba2, "G": _gated_delta_net}
    if symbol not in builders:
        raise ConfigError(f"unknown mixer symbol {symbol!r}; use one of {' '.join(builders)}")
    return builders[symbol](config)


def layer_tensor_names(config: ModelConfig, symbol: str) -> dict[str, Shape]:
    """Tensors of one decoder layer (norms, mixer, SwiGLU MLP), named relative to `model.layers.{l}.`.

    Args:
        config: the model the layer belongs to.
        symbol: the layer's mixer.

    Raises:
        ConfigError: an unknown symbol.
    """
    d, ffn = config.hidden_size, config.ffn_hidden_size
    return {
        "input_layernorm.weight": (d,),
        **mixer_tensor_names(config, symbol),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (ffn, d),
        "mlp.up_proj.weight": (ffn, d),
        "mlp.down_proj.weight": (d, ffn),
    }


def tensor_names(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a model, in the order embedding, layers, final norm, output head.

    Args:
        config: a teacher (`*-*-...`) or a hybrid; with tied embeddings there is no `lm_head.weight`.

    Returns:
        Full canonical name (e.g. "model.layers.0.mamba.in_proj.weight") -> shape.
    """
    d = config.hidden_size
    names: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for layer, symbol in enumerate(config.mixers):
        names |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_tensor_names(config, symbol).items()}
    names["model.norm.weight"] = (d,)
    if config.untie_embeddings_and_output_weights:
        names["lm_head.weight"] = (config.vocab_size, d)
    return names


def _attention(c: ModelConfig) -> dict[str, Shape]:
    d, query, key = c.hidden_size, c.num_attention_heads * c.kv_channels, c.num_query_groups * c.kv_channels
    names: dict[str, Shape] = {
        "self_attn.q_proj.weight": (query, d),
        "self_attn.k_proj.weight": (key, d),
        "self_attn.v_proj.weight": (key, d),
        "self_attn.o_proj.weight": (d, query),
    }
    if c.add_qkv_bias:
        names |= {f"self_attn.{part}_proj.bias": (width,) for part, width in (("q", query), ("k", key), ("v", key))}
    if c.qk_layernorm:
        names |= {f"self_attn.{part}_norm.weight": (c.kv_channels,) for part in "qk"}
    return names


def _mla(c: ModelConfig) -> dict[str, Shape]:
    d, qk = c.hidden_size, c.qk_head_dim + c.qk_pos_emb_head_dim
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
        if c.mla_bias and name in MLA_BIASED:
            names[f"self_attn.{name}.bias"] = shape[:1]
    if c.qk_layernorm:
        names |= {f"self_attn.{part}_norm.weight": (qk,) for part in "qk"}
    if c.mla_aligned_norm:
        names["self_attn.k_norm.rotary_mix"] = (c.num_query_groups, c.qk_pos_emb_head_dim // 2)
    return names


def _mamba2(c: ModelConfig) -> dict[str, Shape]:
    d, heads = c.hidden_size, c.mamba_num_heads
    inner = heads * c.mamba_head_dim
    # the convolution runs over x, B (key/value heads, not yet repeated) and C
    conv = c.mamba_key_value_dim + (c.num_query_groups + heads) * c.mamba_state_dim
    return {
        "mamba.in_proj.weight": (inner + conv + heads, d),
        "mamba.conv1d.weight": (conv, 1, c.linear_conv_kernel_dim),
        "mamba.conv1d.bias": (conv,),
        "mamba.dt_bias": (heads,),
        "mamba.A_log": (heads,),
        "mamba.D": (heads,),
        "mamba.norm.weight": (inner,),
        "mamba.out_proj.weight": (d, inner),
    }


def _gated_delta_net(c: ModelConfig) -> dict[str, Shape]:
    d, heads, kernel = c.hidden_size, c.linear_num_heads, c.linear_conv_kernel_dim
    keys, values = heads * c.linear_key_head_dim, heads * c.linear_value_head_dim
    return {
        "linear_attn.q_proj.weight": (keys, d),
        "linear_attn.k_proj.weight": (keys, d),
        "linear_attn.v_proj.weight": (values, d),
        "linear_attn.g_proj.weight": (values, d),
        "linear_attn.b_proj.weight": (heads, d),
        "linear_attn.a_proj.weight": (heads, d),
        "linear_attn.q_conv1d.weight": (keys, 1, kernel),
        "linear_attn.k_conv1d.weight": (keys, 1, kernel),
        "linear_attn.v_conv1d.weight": (values, 1, kernel),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.o_norm.weight": (c.linear_value_head_dim,),
        "linear_attn.o_proj.weight": (d, values),
    }
