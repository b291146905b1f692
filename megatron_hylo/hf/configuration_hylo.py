"""Hugging Face configuration of a HyLo model: the project's own model description under the key `hylo`.

The standard fields (vocab_size, hidden_size, ...) that other libraries read are derived from it where they are
not given. An exported folder holds this file beside its weights, so it imports nothing but transformers. transformers loads it
before any other file of the folder, so the versions that the folder works with are checked here.
"""

import math
import re
from types import SimpleNamespace
from typing import Any, cast

import transformers
from transformers.utils import logging

logger = logging.get_logger(__name__)
TRANSFORMERS_VERSIONS = ("4.57.1", "5.17.0")  # oldest and newest that tests run with

OTHERS_NAMES = {  # sizes that other libraries read (PEFT, estimates of memory), and the fields of `hylo` that hold them
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size",
}


def check_transformers(version: str) -> None:
    """Refuse a transformers that this code does not work with; a warning where it is newer than any it was tested with.

    Raises:
        ImportError: older than the oldest, or of a later generation than the newest.
    """
    found, oldest, newest = (
        tuple(int(part) for part in re.findall(r"\d+", text)[:2]) for text in (version, *TRANSFORMERS_VERSIONS)
    )
    if found < oldest or found[0] > newest[0]:
        raise ImportError(
            f"HyLo models need transformers {oldest[0]}.{oldest[1]} or later, before {newest[0] + 1}, but {version} is "
            f"installed; pip install 'transformers>={oldest[0]}.{oldest[1]},<{newest[0] + 1}'"
        )
    if found > newest:
        logger.warning("HyLo models were tested with transformers up to %s; %s is installed", TRANSFORMERS_VERSIONS[1], version)


check_transformers(transformers.__version__)


class HyloConfig(transformers.PretrainedConfig):
    """Configuration of model_type "hylo".

    Args:
        hylo: the model description, field names as in Megatron-Core: `hybrid_layer_pattern` (mixer symbols `*`, `W`,
            `+`, `M`, `G`, `K`, each followed by an MLP `-` or experts `E`), sizes of the backbone, of the mixers and of the
            experts, RoPE scalings as mappings. It may be absent, as transformers makes empty configurations to compare with.
        vocab_size, hidden_size, num_hidden_layers, max_position_embeddings, tie_word_embeddings: follow from `hylo` unless
            given.
        use_cache: whether a forward pass makes a cache.
        initializer_range: standard deviation of new weights.
        bos_token_id, eos_token_id, pad_token_id: token ids that begin, end and pad a text; None: there is none.
        kwargs: other standard fields of a Hugging Face configuration.

    Raises:
        ValueError: `hylo` is no dictionary, or has MLA settings that the modelling code would read wrongly.
        AttributeError: `hylo` lacks a name.
    """

    model_type = "hylo"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        hylo: dict | None = None,
        vocab_size: int | None = None,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        max_position_embeddings: int | None = None,
        tie_word_embeddings: bool | None = None,
        use_cache: bool = True,
        initializer_range: float = 0.02,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        # None is for the empty configurations that transformers compares with; no model is built of them
        if not isinstance(hylo, dict | None):
            raise ValueError(
                f"config.json: hylo must be a dictionary of the architecture, got {hylo!r}; export the model again"
            )
        self.hylo = cast(dict[str, Any], hylo)
        self.vocab_size = cast(int, vocab_size)
        self.hidden_size = cast(int, hidden_size)
        self.num_hidden_layers = cast(int, num_hidden_layers)
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        if hylo is not None:
            c = self.architecture()
            if "+" in self.mixers:
                _check_latent_attention(c, self.mixers)
            derived = {name: getattr(c, name) for name in ("vocab_size", "hidden_size", "max_position_embeddings")}
            for name, value in (derived | {"num_hidden_layers": len(self.mixers)}).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
            if tie_word_embeddings is None:
                tie_word_embeddings = not c.untie_embeddings_and_output_weights
        # transformers 4 takes these as arguments with defaults of its own; 5 sets what it does not know
        tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        standard: dict[str, Any] = {"tie_word_embeddings": bool(tie_word_embeddings), **tokens, **kwargs}
        standard |= {name: getattr(c, field) for name, field in OTHERS_NAMES.items()} if hylo is not None else {}
        super().__init__(**standard)

    @property
    def mixers(self) -> str:
        """The mixer symbols, one a layer, e.g. "G+GG" for "G-+-G-G-"."""
        return self._pattern[0::2]

    @property
    def mlps(self) -> str:
        """The MLP symbols, one a layer: `-`, or `E` for a mixture of experts."""
        return self._pattern[1::2]

    @property
    def _pattern(self) -> str:
        if self.hylo is None:
            raise ValueError("config.json has no hylo, the architecture of the model; export the model again")
        pattern = self.hylo.get("hybrid_layer_pattern")
        if not isinstance(pattern, str):
            raise ValueError(f"config.json: hybrid_layer_pattern of hylo must be text, got {pattern!r}; export the model again")
        return pattern.replace("|", "")

    def architecture(self) -> SimpleNamespace:
        """Return `hylo` with attribute access, with `mla_whole_head_norm` and its RoPE scalings' `cos_sin_multiplier`.

        The multiplier is YaRN's attention factor on cos and sin, 0.1 ln(factor) + 1 where none is given (Peng et al.,
        2023, equation 22), and 1 for other scalings. Older folders have neither `mla_bias` nor `mla_rotary_pairs`.

        Raises:
            AttributeError: `hylo` lacks a name; also where that attribute is read later.
            ValueError: a RoPE scaling is no mapping.
        """
        c = _Architecture(**{"mla_bias": False, "mla_rotary_pairs": (), **self.hylo})
        c.mla_whole_head_norm = c.qk_layernorm and c.qk_head_dim == c.kv_channels
        for name in ("rope_scaling", "mla_rope_scaling"):
            if not isinstance(given := getattr(c, name), dict):
                raise ValueError(f"config.json: {name} of hylo must be a mapping, got {given!r}; export the model again")
            scaling = _Architecture(**given)
            scaling.cos_sin_multiplier = 1.0
            if scaling.rope_type == "yarn":
                factor = scaling.attention_factor
                scaling.cos_sin_multiplier = 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor
            setattr(c, name, scaling)
        return c


class _Architecture(SimpleNamespace):
    """Names of `hylo` or of a scaling in it, of which a missing one is said to be missing there."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"config.json: hylo has no {name}; export the model again")


def _check_latent_attention(c: SimpleNamespace, mixers: str) -> None:
    """Refuse rotary pairs that do not fit the layers, and a q/k-norm that is neither HyLo's nor the aligned one."""
    nope, rope, head_dim = c.qk_head_dim, c.qk_pos_emb_head_dim, c.kv_channels
    aligned = c.mla_whole_head_norm and (c.mla_rotary_pairs or rope == head_dim)
    if c.qk_layernorm and nope + rope != head_dim and not aligned:
        raise ValueError(
            f"hylo: with q/k-norm, qk_head_dim {nope} + qk_pos_emb_head_dim {rope} must equal kv_channels {head_dim}, or "
            f"qk_head_dim must, with mla_rotary_pairs given or qk_pos_emb_head_dim equal to it too"
        )
    wanted = [rope // 2 if symbol == "+" else 0 for symbol in mixers]
    outside = [j for pairs in c.mla_rotary_pairs for j in pairs if j not in range(head_dim // 2)]
    if c.mla_rotary_pairs and (list(map(len, c.mla_rotary_pairs)) != wanted or outside):
        raise ValueError(
            f"hylo: mla_rotary_pairs needs {wanted} numbers from 0 to {head_dim // 2 - 1} in its layers, "
            f"got {list(map(len, c.mla_rotary_pairs))}{f' with {outside[0]}' if outside else ''}"
        )
