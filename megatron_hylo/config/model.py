"""Model configuration: the single source of every architectural setting.

A model is described by one pattern string in Megatron-Core's alphabet, two symbols a Transformer
layer (a token mixer, then an MLP):

    `*` attention    `+` MLA    `M` Mamba2    `G` Gated DeltaNet    `-` MLP

plus the numbers below, which carry Megatron's field names. Everything else (parameters, KV bytes,
checkpoint mapping, pipeline split) is derived from a `ModelConfig`, never configured twice.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Mapping

MIXER_SYMBOLS = "*+MG"
Fp8 = Literal["e4m3", "hybrid"]  # formats of linear maps in a frozen model, and in one that is trained (Megatron-Core's names)


class ConfigError(ValueError):
    """A setting that cannot work; the message names the value and what to do."""


def from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build dataclass `cls` from a mapping, refusing unknown keys.

    Args:
        cls: a dataclass type; fields that are dataclasses themselves may be given as mappings.
        values: field name -> value.
        where: what to call the source in an error message (a file name, an option).

    Raises:
        ConfigError: an unknown key, or a required one that is missing.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}")
    nested = {k: from_dict(fields[k].type, v, f"{where}.{k}") if isinstance(v, Mapping) else v for k, v in values.items()}
    try:
        return cls(**nested)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


LAYERS = "*+MG-"  # of a pattern: attention, MLA, Mamba2, Gated DeltaNet, MLP


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
            f"(attention, MLA, Mamba2, Gated DeltaNet, MLP), say 'G-'"
        )
    return setting


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks are divided; what is left over is data parallel.

    Args:
        tensor_model_parallel_size: ranks that share each layer, by heads and columns.
        pipeline_model_parallel_size: ranks that have different layers.
        virtual_pipeline_model_parallel_size: parts of the model on each pipeline rank, interleaved: smaller bubbles.
        pipeline_layers: layers of every stage in order; by default stages have about as many weights.
        context_parallel_size: ranks that share a sequence.
        cp_comm_type: what context-parallel ranks exchange: what is small, sequence for heads, or the faster that fits
            (docs/parallelism.md).
        sequence_parallel: with tensor parallelism: norms and residuals split over the sequence.
        distributed_timeout_minutes: a rank that hangs longer ends the job.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    pipeline_layers: list[int] | None = None
    context_parallel_size: int = 1
    cp_comm_type: Literal["auto", "all_gather", "a2a"] = "auto"
    sequence_parallel: bool = False
    distributed_timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
                     "context_parallel_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"virtual_pipeline_model_parallel_size {self.virtual_pipeline_model_parallel_size} needs "
                f"pipeline_model_parallel_size > 1"
            )
        if self.pipeline_layers is not None and (len(self.pipeline_layers) != self.stages or min(self.pipeline_layers) < 1):
            raise ConfigError(
                f"pipeline_layers {self.pipeline_layers} must be {self.stages} numbers of at least 1, one for each of "
                f"pipeline_model_parallel_size {self.pipeline_model_parallel_size} x virtual_pipeline_model_parallel_size "
                f"{self.virtual_pipeline_model_parallel_size} stages"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError("sequence_parallel needs tensor_model_parallel_size > 1; set one of them otherwise")

    @property
    def stages(self) -> int:
        """Pieces that the layers are cut into, one after the other: piece i is on pipeline rank i modulo the ranks."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pretrained one.

    Args:
        rope_type: none; linear: all frequencies divided by `factor`; Llama 3.1's rule; YaRN.
        factor: target length / original length.
        original_max_position_embeddings: tokens the frequencies were trained for.
        low_freq_factor: llama3 only.
        high_freq_factor: llama3 only.
        beta_fast: yarn only: rotations above which a frequency is left alone.
        beta_slow: yarn only: rotations below which it is divided by `factor`.
        attention_factor: yarn only: cos/sin multiplier; None: 0.1 ln(factor) + 1.
        truncate: yarn only: the ramp's ends are rounded to whole channels.
    """

    rope_type: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ("none", "linear", "llama3", "yarn"):
            raise ConfigError(f"rope_type {self.rope_type!r} is not supported; use none, linear, llama3 or yarn")
        if self.rope_type != "none" and not self.factor >= 1:
            raise ConfigError(f"{self.rope_type} needs factor >= 1, got {self.factor}")
        if self.rope_type in ("llama3", "yarn") and self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"{self.rope_type} needs original_max_position_embeddings >= 1, got {self.original_max_position_embeddings}"
            )
        if self.rope_type == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            raise ConfigError(
                f"llama3 needs high_freq_factor > low_freq_factor > 0, got {self.high_freq_factor} and {self.low_freq_factor}"
            )

    @property
    def cos_sin_multiplier(self) -> float:
        """Factor on cos and sin (YaRN's mscale, with mscale=1 and mscale_all_dim=0)."""
        if self.rope_type != "yarn":
            return 1.0
        return self.attention_factor if self.attention_factor is not None else 0.1 * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a teacher (`*-*-...`) or a hybrid. Sizes are counts of channels, heads or tokens."""

    hybrid_layer_pattern: str  # e.g. "G-+-G-G-"
    hidden_size: int
    ffn_hidden_size: int  # SwiGLU width
    num_attention_heads: int  # query heads
    num_query_groups: int  # key/value heads; MLA's kv_b_proj produces this many too
    kv_channels: int  # attention head dimension
    vocab_size: int
    model_family: Literal["llama", "qwen2", "qwen3"] = "llama"  # of the base model
    max_position_embeddings: int = 8192
    layernorm_epsilon: float = 1e-5
    untie_embeddings_and_output_weights: bool = True
    add_qkv_bias: bool = False  # Qwen2.5
    qk_layernorm: bool = False  # Qwen3: RMSNorm over each query/key head; kept in MLA
    rotary_base: float = 500000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)  # of `*` layers
    # MLA (`+`)
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_head_dim: int = 0  # without rotation ("nope"); kv_channels with q/k-norm: the aligned norm of models/mla.py
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
    # Gated DeltaNet (`G`)
    linear_num_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    # short convolution of both linear mixers
    linear_conv_kernel_dim: int = 4

    def __post_init__(self) -> None:
        mixers = self.mixers  # checks the pattern
        object.__setattr__(self, "mla_rotary_pairs", _tuples(self.mla_rotary_pairs))  # JSON and YAML give lists
        if self.num_query_groups < 1 or self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_query_groups {self.num_query_groups}"
            )
        if "+" in mixers:
            _positive(
                self, "an MLA layer `+`", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"
            )
            kv_width = self.num_query_groups * (self.qk_head_dim + self.v_head_dim)
            q_width = self.num_attention_heads * (self.qk_head_dim + self.qk_pos_emb_head_dim)
            for name, rank, width in (
                ("q_lora_rank", self.q_lora_rank, min(self.hidden_size, q_width)),
                ("kv_lora_rank", self.kv_lora_rank, min(self.hidden_size, kv_width)),
            ):
                if rank > width:
                    raise ConfigError(f"{name} {rank} is larger than {width}, the rank of what it factors; use at most {width}")
            if self.qk_pos_emb_head_dim % 2:
                raise ConfigError(f"qk_pos_emb_head_dim must be even, got {self.qk_pos_emb_head_dim}")
            self._check_qk_norm()
        if self.mla_rotary_pairs:
            self._check_rotary_pairs()
        if "M" in mixers:
            _positive(self, "a Mamba2 layer `M`", "mamba_num_heads", "mamba_head_dim", "mamba_state_dim")
            if self.mamba_num_heads % self.num_query_groups:
                raise ConfigError(
                    f"mamba_num_heads {self.mamba_num_heads} must be a multiple of num_query_groups {self.num_query_groups}"
                )
        if "G" in mixers:
            _positive(self, "a Gated DeltaNet layer `G`", "linear_num_heads", "linear_key_head_dim", "linear_value_head_dim")

    def _check_qk_norm(self) -> None:
        nope, rope, head_dim = self.qk_head_dim, self.qk_pos_emb_head_dim, self.kv_channels
        placed = bool(self.mla_rotary_pairs) or rope == head_dim  # where the rotary slots lie in the teacher's head
        if self.qk_layernorm and nope + rope != head_dim and not (nope == head_dim and placed):
            raise ConfigError(
                f"with q/k-norm, qk_head_dim {nope} and qk_pos_emb_head_dim {rope} do not suit kv_channels {head_dim}: either "
                f"their sum must equal it (HyLo's norm), or qk_head_dim must (the aligned norm), with mla_rotary_pairs given "
                f"or qk_pos_emb_head_dim equal to it too"
            )

    def _check_rotary_pairs(self) -> None:
        pairs, mixers, frequencies = self.mla_rotary_pairs, self.mixers, self.kv_channels // 2
        if len(pairs) != len(mixers):
            raise ConfigError(f"mla_rotary_pairs has {len(pairs)} entries, the model {len(mixers)} layers; give one a layer")
        for layer, (symbol, entry) in enumerate(zip(mixers, pairs)):
            wanted = self.qk_pos_emb_head_dim // 2 if symbol == "+" else 0
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
    def mla_aligned_norm(self) -> bool:
        """q/k-norm with the statistics of the teacher's whole head, not of MLA's channels (see models/mla.py)."""
        return self.qk_layernorm and self.qk_head_dim == self.kv_channels

    @property
    def mixers(self) -> str:
        """One mixer symbol a Transformer layer, e.g. "G+GG" for "G-+-G-G-".

        Raises:
            ConfigError: the pattern is not mixer, MLP, mixer, MLP, ...
        """
        pattern = self.hybrid_layer_pattern.replace("|", "")
        mixers, mlps = pattern[0::2], pattern[1::2]
        if not pattern or len(mixers) != len(mlps) or set(mlps) != {"-"} or not set(mixers) <= set(MIXER_SYMBOLS):
            raise ConfigError(
                f"pattern {self.hybrid_layer_pattern!r} must alternate a mixer out of {' '.join(MIXER_SYMBOLS)} "
                f"and an MLP '-', e.g. 'G-+-G-'"
            )
        return mixers

    @property
    def num_hidden_layers(self) -> int:
        """Transformer layers (mixer + MLP); Megatron counts twice as many."""
        return len(self.mixers)

    @property
    def mamba_key_value_dim(self) -> int:
        """Channels of Mamba2's x (d_xb = H_kv * head_dim); B has num_query_groups * state_dim."""
        return self.num_query_groups * self.mamba_head_dim

    def with_mixers(self, mixers: str) -> "ModelConfig":
        """Other mixers of the same shapes, one symbol a layer; only MLA layers keep rotary pairs of their own."""
        pairs = [entry if symbol == "+" else () for symbol, entry in zip(mixers, self.mla_rotary_pairs)]
        return self.replace(hybrid_layer_pattern="".join(f"{symbol}-" for symbol in mixers), mla_rotary_pairs=pairs)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """What JSON gives back unchanged; `from_dict(ModelConfig, ...)` is its inverse."""
        return dataclasses.asdict(self) | {"mla_rotary_pairs": [list(pairs) for pairs in self.mla_rotary_pairs]}


def _tuples(entries: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, (list, tuple)) for entry in entries):
        raise ConfigError(f"mla_rotary_pairs must hold one list of whole numbers a layer, got {entries!r}")
    return tuple(map(tuple, entries))


def _positive(config: ModelConfig, what: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{what} needs {name} >= 1, got {getattr(config, name)}")
