"""Exported tensors and the parameters of the served model that they are loaded into: a table, checked from both sides."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.mixers import complete
from megatron_hylo.hf import HyloForCausalLM

Table = dict[str, tuple[str, ...]]  # parameter -> the exported tensors whose rows it holds, one after the other


def _same(mixer: str, *names: str) -> Table:
    return {f"{mixer}.{name}": (f"{mixer}.{name}",) for name in names}


def _delta_rule(*decay: str) -> Table:
    return _same("linear_attn", "A_log", "dt_bias", *decay) | {
        "linear_attn.in_proj_qkvz.weight": tuple(f"linear_attn.{part}_proj.weight" for part in "qkvg"),
        "linear_attn.conv1d.weight": tuple(f"linear_attn.{part}_conv1d.weight" for part in "qkv"),
        "linear_attn.norm.weight": ("linear_attn.o_norm.weight",),
        "linear_attn.out_proj.weight": ("linear_attn.o_proj.weight",),
    }


MLP: Table = {"mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")} | _same("mlp", "down_proj.weight")
MIXERS: dict[str, Table] = {
    "*": {"self_attn.qkv_proj.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv")}
    | _same("self_attn", "o_proj.weight"),
    "+": _same("self_attn", "kv_a_proj_with_mqa.weight", *(f"{part}_proj.weight" for part in ("q_a", "q_b", "kv_b", "o"))),
    "M": _same("mamba", "in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "D", "norm.weight", "out_proj.weight")
    | {"mamba.A": ("mamba.A_log",)},
    "G": _delta_rule() | {"linear_attn.in_proj_ba.weight": ("linear_attn.b_proj.weight", "linear_attn.a_proj.weight")},
    "K": _delta_rule("b_proj.weight", "f_a_proj.weight", "f_b_proj.weight"),
}
complete(MIXERS, "serve/vllm/weights.py: MIXERS", besides="W")
# symbols of mixers, a setting of the model, and the tensors that they have besides with it
OPTIONAL: tuple[tuple[str, str, Table], ...] = (
    ("*", "add_qkv_bias", {"self_attn.qkv_proj.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv")}),
    ("+", "mla_bias", _same("self_attn", "q_b_proj.bias", "kv_a_proj_with_mqa.bias", "kv_b_proj.bias")),
    ("*+", "qk_layernorm", _same("self_attn", "q_norm.weight", "k_norm.weight")),
    ("+", "mla_whole_head_norm", _same("self_attn", "k_norm.rotary_mix")),
)


def tensor_table(config: Any) -> Table:
    """List every parameter of the served model with the exported tensors it is made of."""
    c = config.architecture()
    table: Table = {name: (name,) for name in ("model.embed_tokens.weight", "model.norm.weight")}
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = ("lm_head.weight",)
    norms = {name: (name,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    for i, symbol in enumerate(config.mixers):
        layer = norms | MLP | MIXERS[symbol]
        for symbols, setting, more in OPTIONAL:
            layer |= more if symbol in symbols and getattr(c, setting) else {}
        for name, sources in layer.items():
            table[f"model.layers.{i}.{name}"] = tuple(f"model.layers.{i}.{source}" for source in sources)
    return table


def repeat_mamba_groups(tensor: Tensor, name: str, c: Any) -> Tensor:
    """Repeat rows of x and B, which have the base model's KV heads, for all heads that share them, as vLLM's Mamba2 wants them.

    The tensor is in_proj.weight [z | x | B | C | dt, hidden], conv1d.weight or conv1d.bias [x | B | C, ...], by its name.
    """
    heads, groups, width, state = c.mamba_num_heads, c.num_query_groups, c.mamba_head_dim, c.mamba_state_dim
    before, after = (heads * width, heads) if "in_proj" in name else (0, 0)
    z, x, b, rest = tensor.split([before, groups * width, groups * state, heads * state + after])
    x, b = (part.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0).flatten(0, 1) for part in (x, b))
    return torch.cat([z, x, b, rest])


def load_tensors(
    config: Any, parameters: dict[str, Any], weights: Iterable[tuple[str, Tensor]], default: Callable[[Any, Tensor], None]
) -> set[str]:
    """Load exported tensors, in any order, into parameters, and check that all were there and none is left.

    A parameter's own `weight_loader` takes this rank's part, or `default` loads it. Returns the names of all parameters.

    Raises:
        ConfigError: a tensor missing, unknown or of another shape, or a parameter that no tensor is for.
    """
    c, table = config.architecture(), tensor_table(config)
    if wrong := set(table) ^ set(parameters):
        raise ConfigError(f"the served model and its table of tensors differ in {sorted(wrong)[:3]}, {len(wrong)} in all")
    target = {source: name for name, sources in table.items() for source in sources}
    read: dict[str, Tensor] = {}
    with torch.device("meta"):  # loaders of ranks take their part of a tensor that is too large, and say nothing
        left = {name: value.shape for name, value in HyloForCausalLM(config).state_dict().items() if name in target}
    for source, tensor in weights:
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue  # the embedding's
        if source not in left:
            raise ConfigError(f"{source} is {'there twice' if source in target else 'unknown'}; export the model again")
        if tensor.shape != (shape := left.pop(source)):
            raise ConfigError(f"{source} is {list(tensor.shape)}, for config.json {list(shape)}; export the model again")
        name, read[source] = target[source], tensor
        if any(part in left for part in table[name]):
            continue
        parts = [read.pop(part) for part in table[name]]
        value = torch.cat(parts) if len(parts) > 1 else tensor
        if ".mamba." in name and name.split(".mamba.")[1] in ("in_proj.weight", "conv1d.weight", "conv1d.bias"):
            value = repeat_mamba_groups(value, name, c)
        getattr(parameters[name], "weight_loader", default)(parameters[name], value)
    if left:
        raise ConfigError(f"the folder lacks {len(left)} of {len(target)} tensors, as {min(left)}; export the model again")
    return set(parameters)
