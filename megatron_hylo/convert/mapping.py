"""Conversion table: the Hugging Face tensors of each Megatron tensor, and the maps both ways.

One `Entry` a Megatron tensor. Families differ in which entries exist (QKV bias, q/k-norm, head), mixers in theirs;
both directions are permutations and concatenations, so a round trip is bit-exact.
"""

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.mixers import complete
from megatron_hylo.config.mixers.mla import BIASED


@dataclass(frozen=True)
class Entry:
    """One row of the table: `megatron` = merge(tensors of `hugging_face`); split is the inverse."""

    megatron: str
    hugging_face: tuple[str, ...]
    merge: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    interleaved: bool = False  # else the merged tensor holds them one after the other, and split returns views


def _same(megatron: str, hugging_face: str) -> Entry:
    return Entry(megatron, (hugging_face,), lambda tensors: tensors[0], lambda tensor: [tensor])


def _stacked(megatron: str, hugging_face: tuple[str, ...], rows: tuple[int, ...]) -> Entry:
    """Entry that concatenates tensors along dimension 0."""
    return Entry(megatron, hugging_face, torch.cat, lambda tensor: list(tensor.split(rows)))


def _interleaved_qkv(megatron: str, hugging_face: tuple[str, ...], config: ModelConfig) -> Entry:
    """Entry of Megatron's linear_qkv: for each KV head its query heads, its key, its value."""
    groups, head_dim = config.num_query_groups, config.kv_channels
    per_group = config.num_attention_heads // groups

    def merge(tensors: list[Tensor]) -> Tensor:
        """Interleave q, k and v, [heads x head_dim, ...] each, to [groups x (queries a group + 2) x head_dim, ...]."""
        parts = [t.reshape(groups, n * head_dim, *t.shape[1:]) for t, n in zip(tensors, (per_group, 1, 1))]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def split(tensor: Tensor) -> list[Tensor]:
        """Divide the interleaved tensor into q, k and v; inverse of `merge`."""
        grouped = tensor.reshape(groups, (per_group + 2) * head_dim, *tensor.shape[1:])
        return [part.flatten(0, 1) for part in grouped.split([per_group * head_dim, head_dim, head_dim], dim=1)]

    return Entry(megatron, hugging_face, merge, split, interleaved=True)


def _attention(m: str, h: str, c: ModelConfig) -> list[Entry]:
    names = tuple(f"{h}self_attn.{n}_proj" for n in "qkv")
    entries = [
        _interleaved_qkv(f"{m}linear_qkv.weight", tuple(f"{n}.weight" for n in names), c),
        _same(f"{m}linear_proj.weight", f"{h}self_attn.o_proj.weight"),
    ]
    if c.add_qkv_bias:
        entries.append(_interleaved_qkv(f"{m}linear_qkv.bias", tuple(f"{n}.bias" for n in names), c))
    return entries + _qk_norm(m, h, c)


def _qk_norm(m: str, h: str, c: ModelConfig) -> list[Entry]:
    return [_same(f"{m}{n}_layernorm.weight", f"{h}self_attn.{n}_norm.weight") for n in "qk"] if c.qk_layernorm else []


def _mla(m: str, h: str, c: ModelConfig) -> list[Entry]:
    pairs = {
        "linear_q_down_proj": "q_a_proj",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    entries = [_same(f"{m}{a}.weight", f"{h}self_attn.{b}.weight") for a, b in pairs.items()]
    if c.mla_bias:
        entries += [_same(f"{m}{a}.bias", f"{h}self_attn.{b}.bias") for a, b in pairs.items() if b in BIASED]
    mix = [_same(f"{m}k_layernorm.rotary_mix", f"{h}self_attn.k_norm.rotary_mix")] if c.mla_whole_head_norm else []
    return entries + _qk_norm(m, h, c) + mix


def _mamba2(m: str, h: str, c: ModelConfig) -> list[Entry]:
    names = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "dt_bias", "D", "norm.weight", "out_proj.weight")
    return [_same(f"{m}{name}", f"{h}mamba.{name}") for name in names]


def _gated_deltanet(m: str, h: str, c: ModelConfig) -> list[Entry]:
    return _delta_rule(m, h, c, "qkvgba")


def _kda(m: str, h: str, c: ModelConfig) -> list[Entry]:
    decay = [_same(f"{m}decay_{a}_proj.weight", f"{h}linear_attn.f_{b}_proj.weight") for a, b in (("down", "a"), ("up", "b"))]
    return _delta_rule(m, h, c, "qkvgb") + decay


def _delta_rule(m: str, h: str, c: ModelConfig, projections: str) -> list[Entry]:
    p, heads = f"{h}linear_attn.", c.linear_num_heads
    keys, values = heads * c.linear_key_head_dim, heads * c.linear_value_head_dim
    rows = dict(q=keys, k=keys, v=values, g=values, b=heads, a=heads)
    widths = tuple(rows[n] for n in projections)
    return [
        _stacked(f"{m}in_proj.weight", tuple(f"{p}{n}_proj.weight" for n in projections), widths),
        _stacked(f"{m}conv1d.weight", tuple(f"{p}{n}_conv1d.weight" for n in "qkv"), widths[:3]),
        _same(f"{m}A_log", f"{p}A_log"),
        _same(f"{m}dt_bias", f"{p}dt_bias"),
        _same(f"{m}out_norm.weight", f"{p}o_norm.weight"),
        _same(f"{m}out_proj.weight", f"{p}o_proj.weight"),
    ]


MIXER_ENTRIES: dict[str, Callable[[str, str, ModelConfig], list[Entry]]] = {
    "*": _attention,
    "+": _mla,
    "M": _mamba2,
    "G": _gated_deltanet,
    "K": _kda,
    "W": _attention,
}
complete(MIXER_ENTRIES, "convert/mapping.py: MIXER_ENTRIES")


def _swiglu(m: str, h: str, ffn: int) -> list[Entry]:
    return [
        _stacked(f"{m}linear_fc1.weight", (f"{h}gate_proj.weight", f"{h}up_proj.weight"), (ffn, ffn)),
        _same(f"{m}linear_fc2.weight", f"{h}down_proj.weight"),
    ]


def _mlp(m: str, h: str, c: ModelConfig) -> list[Entry]:
    return _swiglu(m, h, c.ffn_hidden_size)


def _experts(m: str, h: str, c: ModelConfig) -> list[Entry]:
    entries = [_same(f"{m}router.weight", f"{h}gate.weight")]
    for expert in range(c.num_moe_experts):
        entries += _swiglu(f"{m}experts.local_experts.{expert}.", f"{h}experts.{expert}.", c.moe_ffn_hidden_size)
    return entries


MLP_ENTRIES: dict[str, Callable[[str, str, ModelConfig], list[Entry]]] = {"-": _mlp, "E": _experts}


def layer_entries(config: ModelConfig, layer: int) -> list[Entry]:
    """List the entries of one Transformer layer (Megatron's layers 2 l and 2 l + 1)."""
    h, mixer, mlp = f"model.layers.{layer}.", f"decoder.layers.{2 * layer}.", f"decoder.layers.{2 * layer + 1}."
    return [
        _same(f"{mixer}input_layernorm.weight", f"{h}input_layernorm.weight"),
        *MIXER_ENTRIES[config.mixers[layer]](f"{mixer}self_attention.", h, config),
        _same(f"{mlp}pre_mlp_layernorm.weight", f"{h}post_attention_layernorm.weight"),
        *MLP_ENTRIES[config.mlps[layer]](f"{mlp}mlp.", f"{h}mlp.", config),
    ]


def model_entries(config: ModelConfig) -> list[Entry]:
    """List the entries of a whole model, in the order of its layers."""
    entries = [_same("embedding.word_embeddings.weight", "model.embed_tokens.weight")]
    for layer in range(config.num_hidden_layers):
        entries += layer_entries(config, layer)
    entries.append(_same("decoder.final_norm.weight", "model.norm.weight"))
    if config.untie_embeddings_and_output_weights:
        entries.append(_same("output_layer.weight", "lm_head.weight"))
    return entries


def parameter_reader(config: ModelConfig, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Turn a reader of Hugging Face tensors into one of Megatron parameters, by their names.

    Args:
        config: of the model.
        read: Hugging Face name -> tensor.

    Returns:
        Name of a parameter in the whole Megatron model -> tensor; KeyError for a name that the model does not have.
    """
    entries = {entry.megatron: entry for entry in model_entries(config)}

    def read_parameter(name: str) -> Tensor:
        """Read one of Megatron-Core's parameters, by its name, from its Hugging Face tensors."""
        entry = entries[name]
        return entry.merge([read(part) for part in entry.hugging_face])

    return read_parameter
