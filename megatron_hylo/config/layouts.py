"""Named layouts of the HyLo paper, their exact sizes, and the pattern algebra for one's own.

A layout is a base model, a pattern, MLA ranks and linear dimensions. Sources: HyLo (arXiv:2604.24715)
model cards; parameter counts reproduce the released checkpoints to the parameter.
"""

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_hylo.config import MIXER_SYMBOLS, MLP_SYMBOLS, ConfigError, ModelConfig, RopeScaling, interleaved
from megatron_hylo.config.mixers import COPIED_SYMBOLS, MIXERS, MLA_SYMBOL, Fields, get_mixer
from megatron_hylo.config.mlps import get_mlp

logger = logging.getLogger("megatron_hylo.config")
LLAMA3_ROPE = RopeScaling(
    "llama3", factor=32.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
)

BASES: dict[str, ModelConfig] = {
    "llama3.2-1b": ModelConfig(
        hybrid_layer_pattern="*-" * 16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, num_query_groups=8,
        kv_channels=64, vocab_size=128256, max_position_embeddings=131072, untie_embeddings_and_output_weights=False,
        rotary_base=500000.0, rope_scaling=LLAMA3_ROPE,
    ),
    "llama3.2-3b": ModelConfig(
        hybrid_layer_pattern="*-" * 28, hidden_size=3072, ffn_hidden_size=8192, num_attention_heads=24, num_query_groups=8,
        kv_channels=128, vocab_size=128256, max_position_embeddings=131072, untie_embeddings_and_output_weights=False,
        rotary_base=500000.0, rope_scaling=LLAMA3_ROPE,
    ),
    "llama3.1-8b": ModelConfig(
        hybrid_layer_pattern="*-" * 32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        kv_channels=128, vocab_size=128256, max_position_embeddings=131072,
        rotary_base=500000.0, rope_scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
    ),
    "qwen3-1.7b": ModelConfig(
        hybrid_layer_pattern="*-" * 28, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=16, num_query_groups=8,
        kv_channels=128, vocab_size=151936, model_family="qwen3", max_position_embeddings=40960, layernorm_epsilon=1e-6,
        untie_embeddings_and_output_weights=False, qk_layernorm=True, rotary_base=1000000.0,
    ),
    "qwen3-8b": ModelConfig(
        hybrid_layer_pattern="*-" * 36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32, num_query_groups=8,
        kv_channels=128, vocab_size=151936, model_family="qwen3", max_position_embeddings=40960, layernorm_epsilon=1e-6,
        qk_layernorm=True, rotary_base=1000000.0,
    ),
    "qwen3-30b-a3b": ModelConfig(
        hybrid_layer_pattern="*E" * 48, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=32, num_query_groups=4,
        kv_channels=128, vocab_size=151936, model_family="qwen3_moe", max_position_embeddings=40960, layernorm_epsilon=1e-6,
        qk_layernorm=True, rotary_base=1000000.0, num_moe_experts=128, moe_ffn_hidden_size=768, moe_router_topk=8,
    ),
    "smollm2-135m": ModelConfig(
        hybrid_layer_pattern="*-" * 30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9, num_query_groups=3,
        kv_channels=64, vocab_size=49152, max_position_embeddings=8192, untie_embeddings_and_output_weights=False,
        rotary_base=100000.0,
    ),
}  # fmt: skip

# MLA layers of layouts with teacher shapes, chosen by `hylo select --method greedy` beside Gated DeltaNet (docs/upcycling.md)
_CHOSEN_LAYERS = {"smollm2-135m": (0, 1, 2, 16, 17, 18, 20, 23)}

Shapes = Literal["paper", "teacher"]

_EVERY_SECOND_28 = tuple(range(0, 28, 2))


@dataclass(frozen=True)
class NamedLayout:
    """A base model and the indices of its layers that become MLA; the others become `linear`."""

    base: str
    mla_layers: tuple[int, ...]
    linear: str  # "G" or "M"
    shapes: Shapes = "paper"

    @property
    def config(self) -> ModelConfig:
        """The hybrid's full configuration."""
        base = BASES[self.base]
        mixers = "".join(MLA_SYMBOL if i in self.mla_layers else self.linear for i in range(base.num_hidden_layers))
        return hybrid_config(base, mixers, base_name=self.base, shapes=self.shapes)


def _layouts() -> dict[str, NamedLayout]:
    rows = [
        ("llama3.2-1b", "4mla12", (1, 5, 10, 14)),
        ("llama3.2-1b", "8mla8", (0, 2, 4, 6, 8, 10, 12, 14)),
        ("llama3.2-3b", "6mla22", (0, 5, 10, 16, 21, 26)),
        ("llama3.2-3b", "14mla14", _EVERY_SECOND_28),
        ("qwen3-1.7b", "7mla21", (1, 5, 9, 13, 17, 21, 25)),
        ("qwen3-1.7b", "14mla14", _EVERY_SECOND_28),
        ("qwen3-30b-a3b", "12mla36", tuple(range(1, 48, 4))),
        ("smollm2-135m", "8mla22", (1, 5, 9, 13, 17, 21, 25, 28)),
    ]
    layouts = {
        f"{base}-{counts}{suffix}": NamedLayout(base, indices, symbol)
        for base, counts, indices in rows
        for suffix, symbol in (("gdn", "G"), ("m2", "M"))
    }
    return layouts | {
        f"{name}-teacher": dataclasses.replace(layout, shapes="teacher", mla_layers=_CHOSEN_LAYERS[layout.base])
        for name, layout in layouts.items()
        if layout.base in _CHOSEN_LAYERS
    }


LAYOUTS: dict[str, NamedLayout] = _layouts()


def expand_pattern(pattern: str, num_layers: int, base_mlps: str | None = None) -> str:
    """Expand a user's pattern to one mixer symbol a layer.

    Args:
        pattern: with MLPs ("G-+-G-") or without ("G+G").
        num_layers: Transformer layers of the base model.
        base_mlps: its MLPs, which a pattern with MLPs must repeat.

    Raises:
        ConfigError: an unknown symbol, a number of mixers other than `num_layers`, or MLPs that are not the base model's.
    """
    mixers = pattern.translate(dict.fromkeys(map(ord, MLP_SYMBOLS + "|")))
    unknown = sorted(set(mixers) - set(MIXER_SYMBOLS))
    if unknown:
        raise ConfigError(
            f"pattern {pattern!r} holds {unknown[0]!r}; use {' '.join(MIXER_SYMBOLS)} for mixers and - or E for MLPs"
        )
    if len(mixers) != num_layers:
        raise ConfigError(
            f"pattern {pattern!r} has {len(mixers)} mixers, but the base model has {num_layers} layers; give one for each"
        )
    mlps = "".join(symbol for symbol in pattern if symbol in MLP_SYMBOLS)
    if mlps and (len(mlps) != len(mixers) or pattern.replace("|", "") != interleaved(mixers, mlps)):
        raise ConfigError(f"pattern {pattern!r}: every mixer must be followed by its MLP, e.g. 'G-+-G-'")
    if base_mlps is not None and mlps and mlps != base_mlps:
        raise ConfigError(
            f"pattern {pattern!r} has the MLPs {mlps}, the base model {base_mlps}, which are copied: leave them out"
        )
    return mixers


def uniform_mixers(num_layers: int, num_mla: int, linear: str = "G") -> str:
    """Mixers of `num_mla` MLA layers spread evenly and linear layers elsewhere: "G+GGG+GG" for 8 and 2.

    Args:
        num_layers: of the model.
        num_mla: of them.
        linear: symbol of the others.

    Raises:
        ConfigError: num_mla is negative or larger than num_layers.
    """
    if not 0 <= num_mla <= num_layers:
        raise ConfigError(f"number of MLA layers must lie between 0 and {num_layers}, got {num_mla}")
    chosen = {int((i + 0.5) * num_layers / num_mla) for i in range(num_mla)}
    return "".join(MLA_SYMBOL if i in chosen else linear for i in range(num_layers))


def hybrid_config(
    base: ModelConfig, pattern: str, base_name: str | None = None, shapes: Shapes = "paper", **overrides: Any
) -> ModelConfig:
    """A hybrid of `base`: its backbone, `pattern` for the mixers, the dimensions that `shapes` names.

    The paper's rules (HyLo model cards): MLA keeps the head size, half of it rotary, with the listed ranks for
    known bases and otherwise full-rank queries and about half of W_K;W_V's rank in the cache; Gated
    DeltaNet has key width 0.75 d in heads of 256 (144 where 256 does not divide) and values twice as
    wide; Mamba2 has the attention's heads and sizes. The output head is untied. "teacher" shapes can
    hold what the calibrated initialisation knows of the teacher: MLA's unrotated channels are as many
    as the teacher's head has and rotary ones come on top (same cache: both are computed from it), its
    rotary frequencies are the teacher's, QKV biases stay, Gated DeltaNet has the attention's heads.
    Any field of `ModelConfig` can be overridden.

    Raises:
        ConfigError: the pattern does not fit the base, or an override is not a field.
    """
    mixers = expand_pattern(pattern, base.num_hidden_layers, base.mlps)
    name = base_name or next((n for n, b in BASES.items() if _same_backbone(b, base)), None)
    fields: Fields = dict(
        hybrid_layer_pattern=interleaved(mixers, base.mlps),
        untie_embeddings_and_output_weights=True,
        add_qkv_bias=base.add_qkv_bias and bool(set(mixers) & set(COPIED_SYMBOLS)),
    )
    for mixer in MIXERS.values():
        fields |= mixer.default_sizes(base, name, teacher_shapes=shapes == "teacher")
    if shapes == "teacher":
        rotary: int = (fields | overrides)["qk_pos_emb_head_dim"]
        if base.qk_layernorm and rotary != base.kv_channels:  # the norm asks which pairs of the head are rotary: the fastest
            fields["mla_rotary_pairs"] = [tuple(range(rotary // 2)) if MIXERS[m].rotary_pairs_by_layer else () for m in mixers]
    unknown = sorted(set(overrides) - set(ModelConfig.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is not a field of the model configuration")
    return base.replace(**{**fields, **overrides})


def pipeline_pattern(config: ModelConfig, num_stages: int, layers: Sequence[int] | None = None) -> str:
    """The pattern with `|` between pipeline stages.

    Args:
        config: of the model.
        num_stages: pipeline ranks x virtual stages of each.
        layers: of every stage, as `pipeline_layers` takes them.
    """
    cuts = set(itertools.accumulate(pipeline_layers(config, num_stages, layers)[:-1]))
    pairs = enumerate(zip(config.mixers, config.mlps))
    return "".join(("|" if i in cuts else "") + mixer + mlp for i, (mixer, mlp) in pairs)


def pipeline_layers(config: ModelConfig, num_stages: int, given: Sequence[int] | None = None) -> list[int]:
    """Transformer layers of each pipeline stage.

    Args:
        config, num_stages: see `pipeline_pattern`.
        given: a split of one's own; by default the most loaded stage has as few parameters as can be, the embedding
            counted on the first, the output head on the last.

    Raises:
        ConfigError: more stages than layers, or a split that is not of the model's layers.
    """
    mixers, d = config.mixers, config.hidden_size
    if given:
        if sum(given) != len(mixers):
            raise ConfigError(f"pipeline_layers {list(given)} are {sum(given)} layers, the model has {len(mixers)}")
        return list(given)
    if num_stages > len(mixers):
        raise ConfigError(
            f"{num_stages} pipeline stages (pipeline_model_parallel_size x virtual_pipeline_model_parallel_size) are more than "
            f"the model's {len(mixers)} layers"
        )
    costs = [MIXERS[mixer].parameters(config) + get_mlp(mlp).parameters(config) for mixer, mlp in zip(mixers, config.mlps)]
    costs[0] += config.vocab_size * d
    costs[-1] += config.vocab_size * d
    sums = list(itertools.accumulate(costs, initial=0))

    @functools.cache
    def best(start: int, stages: int) -> tuple[int, tuple[int, ...]]:
        """Split the layers from `start` on: (parameters of the largest pipeline stage, where pipeline stages end)."""
        if stages == 1:
            return sums[-1] - sums[start], ()
        options = []
        for end in range(start + 1, len(mixers) - stages + 2):
            rest, cuts = best(end, stages - 1)
            options.append((max(sums[end] - sums[start], rest), (end, *cuts)))
        return min(options)

    edges = [0, *best(0, num_stages)[1], len(mixers)]
    return [end - start for start, end in itertools.pairwise(edges)]


def _same_backbone(a: ModelConfig, b: ModelConfig) -> bool:
    keys = (
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "mlps",
        "num_moe_experts",
    )
    return all(getattr(a, k) == getattr(b, k) for k in keys)


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters; an untied output head counts beside the embedding, as in the released checkpoints."""
    d = config.hidden_size
    layers = sum(get_mixer(m).parameters(config) + 2 * d for m in config.mixers)
    layers += sum(get_mlp(m).parameters(config) for m in config.mlps)
    embeddings = config.vocab_size * d * (2 if config.untie_embeddings_and_output_weights else 1)
    return layers + embeddings + d


def active_parameter_count(config: ModelConfig) -> int:
    """Number of parameters that a token's forward pass uses: all but the experts of others."""
    idle = sum(get_mlp(m).parameters(config) - get_mlp(m).active_parameters(config) for m in config.mlps)
    return parameter_count(config) - idle


def kv_elements(config: ModelConfig, length: int) -> int:
    """Numbers cached of a sequence of `length` tokens, over all layers; recurrent states left out."""
    return sum(get_mixer(m).cached_numbers(config, length) for m in config.mixers)


def kv_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes of KV cache a token costs (bf16 by default); with windowed layers the mean over `max_position_embeddings`."""
    length = config.max_position_embeddings
    return round(bytes_per_element * kv_elements(config, length) / length)


def kv_percent(config: ModelConfig) -> float:
    """KV cache of a sequence of `max_position_embeddings` tokens as a percentage of the all-attention base's.

    The length matters to windowed layers alone.
    """
    base = 2 * config.num_hidden_layers * config.num_query_groups * config.kv_channels
    return 100.0 * kv_elements(config, config.max_position_embeddings) / (base * config.max_position_embeddings)


def layout_rows(names: Iterable[str] | None = None) -> list[dict[str, object]]:
    """Table of the named layouts: one {name, params, kv_percent, kv_bytes_per_token} each."""
    rows = []
    for name in names or LAYOUTS:
        config = LAYOUTS[name].config
        rows.append(
            dict(name=name, params=parameter_count(config), kv_percent=round(kv_percent(config), 4),
                 kv_bytes_per_token=kv_bytes_per_token(config))
        )  # fmt: skip
    return rows


def get_layout(name: str) -> NamedLayout:
    """Look a named layout up.

    Raises:
        ConfigError: no such layout.
    """
    renamed = re.sub("-aligned$", "-teacher", name)
    if renamed != name and renamed in LAYOUTS:
        logger.warning("layout %s is now called %s: its shapes are the teacher's; aligned is what stage 1 makes", name, renamed)
        name = renamed
    if name not in LAYOUTS:
        raise ConfigError(f"unknown layout {name!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
