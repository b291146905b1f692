"""Model configuration: the single source of every architectural setting.

A model is described by one pattern string in Megatron-Core's alphabet, two symbols a Transformer layer (a token mixer, then
an MLP: `-`, or `E` a mixture of experts), e.g. "G-+-G-", plus the numbers below, which carry Megatron's field names. The
symbols and what follows from their sizes are in `mixers/` and `mlps.py`. Everything else (parameters, KV bytes, checkpoint
mapping, pipeline split) is derived from a `ModelConfig`, never configured twice.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.mixers import COPIED_SYMBOLS, MIXERS, get_mixer
from megatron_hylo.config.mlps import EXPERTS_SYMBOL, MLPS
from megatron_hylo.config.rope import RopeScaling

MIXER_SYMBOLS = "".join(MIXERS)
MLP_SYMBOLS = "".join(MLPS)
LAYERS = MIXER_SYMBOLS + MLP_SYMBOLS  # symbols of a pattern
_NAMES = [*(mixer.name for mixer in MIXERS.values()), *(mlp.name for mlp in MLPS.values())]
Fp8 = Literal["e4m3", "hybrid"]  # formats of linear maps in a frozen model, and in one that is trained (Megatron-Core's names)


def recomputed_layers(setting: bool | str) -> str:
    """Symbols of the layers to recompute; true means all.

    Raises:
        ConfigError: a symbol that is no layer's.
    """
    if isinstance(setting, bool):
        return LAYERS if setting else ""
    if unknown := sorted(set(setting) - set(LAYERS)):
        raise ConfigError(
            f"recompute {setting!r}: {unknown[0]!r} is no layer; use true, false or symbols of {' '.join(LAYERS)} "
            f"({', '.join(_NAMES)}), say 'G-'"
        )
    return setting


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a teacher (`*-*-...`) or a hybrid. Sizes are counts of channels, heads or tokens."""

    hybrid_layer_pattern: str  # e.g. "G-+-G-G-"
    hidden_size: int
    ffn_hidden_size: int  # SwiGLU width of `-` layers
    num_attention_heads: int  # query heads
    num_query_groups: int  # key/value heads; MLA's kv_b_proj produces this many too
    kv_channels: int  # attention head dimension
    vocab_size: int
    model_family: Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"] = "llama"  # of the base model
    max_position_embeddings: int = 8192
    layernorm_epsilon: float = 1e-5
    untie_embeddings_and_output_weights: bool = True
    add_qkv_bias: bool = False  # Qwen2.5
    qk_layernorm: bool = False  # Qwen3: RMSNorm over each query/key head; kept in MLA
    rotary_base: float = 500000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)  # of `*` and `W` layers
    attention_window: int = 0  # keys that a query of a `W` layer sees, its own included
    # MLA (`+`)
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_head_dim: int = 0  # without rotation ("nope"); kv_channels with q/k-norm: the whole-head norm of models/mla.py
    qk_pos_emb_head_dim: int = 0  # with rotation, one shared key ("rope")
    v_head_dim: int = 0
    mla_rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    mla_bias: bool = False  # on q_b_proj, kv_a_proj_with_mqa and kv_b_proj: room for Qwen2.5's QKV bias
    # One entry a layer, () where it is not `+`: the rotary pair (2i, 2i+1) turns with frequency number entry[i] of the
    # base model's kv_channels / 2; repeats allowed. Empty: the standard table of qk_pos_emb_head_dim channels.
    mla_rotary_pairs: tuple[tuple[int, ...], ...] = ()
    # Mamba2 (`M`): mamba_num_heads groups; x and B come from num_query_groups heads, repeated after the conv
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_state_dim: int = 0
    # Gated DeltaNet (`G`) and KDA (`K`)
    linear_num_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    kda_decay_rank: int = 0  # inner width of KDA's two maps to its decay
    # short convolution of all linear mixers
    linear_conv_kernel_dim: int = 4
    # mixture of experts (`E`)
    num_moe_experts: int = 0
    moe_ffn_hidden_size: int = 0  # SwiGLU width of an expert
    moe_router_topk: int = 0  # experts of a token
    moe_router_pre_softmax: bool = False  # a token's weights are its experts' shares of all experts; else they sum to 1

    def __post_init__(self) -> None:
        mixers = self.mixers  # checks the pattern
        object.__setattr__(self, "mla_rotary_pairs", _tuples(self.mla_rotary_pairs))  # JSON and YAML give lists
        if self.num_query_groups < 1 or self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_query_groups {self.num_query_groups}"
            )
        for symbol in dict.fromkeys(mixers):
            MIXERS[symbol].check(self)
        for symbol in dict.fromkeys(self.mlps):
            MLPS[symbol].check(self)
        if self.mla_rotary_pairs:
            self._check_rotary_pairs()

    def _check_rotary_pairs(self) -> None:
        pairs, mixers, frequencies = self.mla_rotary_pairs, self.mixers, self.kv_channels // 2
        if len(pairs) != len(mixers):
            raise ConfigError(f"mla_rotary_pairs has {len(pairs)} entries, the model {len(mixers)} layers; give one a layer")
        for layer, (symbol, entry) in enumerate(zip(mixers, pairs)):
            wanted = self.qk_pos_emb_head_dim // 2 if MIXERS[symbol].rotary_pairs_by_layer else 0
            if len(entry) != wanted:
                raise ConfigError(
                    f"mla_rotary_pairs of layer {layer} `{symbol}` has {len(entry)} numbers, it needs {wanted}: "
                    f"qk_pos_emb_head_dim / 2 for `+`, none for other mixers"
                )
            bad = [j for j in entry if type(j) is not int or not 0 <= j < frequencies]
            if bad:
                raise ConfigError(
                    f"mla_rotary_pairs of layer {layer} holds {bad[0]!r}; use whole numbers from 0 to {frequencies - 1}, "
                    f"the frequencies of kv_channels {self.kv_channels}"
                )

    @property
    def mla_whole_head_norm(self) -> bool:
        """Whether q/k-norm has the statistics of the teacher's whole head, not of MLA's channels (see models/mla.py)."""
        return self.qk_layernorm and self.qk_head_dim == self.kv_channels

    @property
    def mixers(self) -> str:
        """Mixer symbols, one for each Transformer layer, e.g. "G+GG" for "G-+-G-G-".

        Raises:
            ConfigError: the pattern is not mixer, MLP, mixer, MLP, ...
        """
        pattern = self.hybrid_layer_pattern.replace("|", "")
        mixers, mlps = pattern[0::2], pattern[1::2]
        known = set(mixers) <= set(MIXER_SYMBOLS) and set(mlps) <= set(MLP_SYMBOLS)
        if not pattern or len(mixers) != len(mlps) or not known:
            raise ConfigError(
                f"pattern {self.hybrid_layer_pattern!r} must alternate a mixer out of {' '.join(MIXER_SYMBOLS)} "
                f"and an MLP '-' (or 'E', a mixture of experts), e.g. 'G-+-G-'"
            )
        return mixers

    @property
    def mlps(self) -> str:
        """MLP symbols, one for each Transformer layer, e.g. "-EEE" for "G-+EGEGE"."""
        return self.hybrid_layer_pattern.replace("|", "")[1::2]

    @property
    def has_experts(self) -> bool:
        """Whether any MLP is a mixture of experts."""
        return EXPERTS_SYMBOL in self.mlps

    @property
    def is_transformer(self) -> bool:
        """Whether every mixer is attention, with a window or without, as in a teacher."""
        return set(self.mixers) <= set(COPIED_SYMBOLS)

    @property
    def num_hidden_layers(self) -> int:
        """Transformer layers (mixer + MLP); Megatron counts twice as many."""
        return len(self.mixers)

    def with_mixers(self, mixers: str) -> "ModelConfig":
        """Other mixers of the same shapes and MLPs, one symbol a layer; only MLA layers keep rotary pairs of their own."""
        pairs = [
            entry if get_mixer(symbol).rotary_pairs_by_layer else () for symbol, entry in zip(mixers, self.mla_rotary_pairs)
        ]
        return self.replace(hybrid_layer_pattern=interleaved(mixers, self.mlps), mla_rotary_pairs=pairs)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary that JSON keeps unchanged; `from_dict(ModelConfig, ...)` is its inverse."""
        return dataclasses.asdict(self) | {"mla_rotary_pairs": [list(pairs) for pairs in self.mla_rotary_pairs]}


def interleaved(mixers: str, mlps: str) -> str:
    """Pattern of mixers, each followed by its MLP: "GE+E" for "G+" and "EE"."""
    return "".join(mixer + mlp for mixer, mlp in zip(mixers, mlps, strict=True))


def _tuples(entries: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, (list, tuple)) for entry in entries):
        raise ConfigError(f"mla_rotary_pairs must hold one list of whole numbers a layer, got {entries!r}")
    return tuple(map(tuple, entries))
