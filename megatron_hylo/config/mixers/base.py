"""The interface of a mixer's description: everything that is known of a mixer without a tensor."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from megatron_hylo.config.errors import ConfigError

if TYPE_CHECKING:
    from megatron_hylo.config.model import ModelConfig

Shape = tuple[int, ...]
Fields = dict[str, Any]  # field of ModelConfig -> value


class Matrix(NamedTuple):
    """A weight matrix as it is trained: whole, over all tensor-parallel ranks, which have a part of a `divided` one each."""

    rows: int
    columns: int
    divided: bool = True


def trained_matrices(
    tensors: Mapping[str, Shape], joined: tuple[str, ...] = (), undivided: tuple[str, ...] = ()
) -> list[Matrix]:
    """List the weight matrices of a layer; convolutions, biases, norms and the like are none.

    Args:
        tensors: Hugging Face names and shapes.
        joined: last words of the names of projections that are computed in one product, and so are one matrix.
        undivided: last words of those that every tensor-parallel rank has whole.
    """
    shapes = {name.split(".")[-2]: shape for name, shape in tensors.items() if name.endswith(".weight") and len(shape) == 2}
    together = [shapes.pop(name) for name in joined if name in shapes]
    found = [Matrix(sum(rows for rows, _ in together), together[0][1])] if together else []
    return found + [Matrix(*shape, name not in undivided) for name, shape in shapes.items()]


class MixerDescription(abc.ABC):
    """Description of one kind of token mixer, in numbers. Subclasses hold no state; `config` is the model the mixer belongs to.

    Numbers "a token" are counts of tensor elements, not bytes.
    """

    symbol: ClassVar[str]  # one character of a pattern
    name: ClassVar[str]  # in messages
    block: ClassVar[str]  # prefix of its tensors in a Hugging Face layer
    recurrent: ClassVar[bool]  # carries a state of fixed size in place of a KV cache
    size_fields: ClassVar[tuple[str, ...]] = ()  # fields of ModelConfig that must be positive where the mixer occurs
    fp32_parameters: ClassVar[tuple[str, ...]] = ()  # kept in fp32 whatever the model's dtype
    joined: ClassVar[tuple[str, ...]] = ()  # projections that are one matrix in training
    undivided: ClassVar[tuple[str, ...]] = ()  # projections that every tensor-parallel rank has whole
    rotary_pairs_by_layer: ClassVar[bool] = False  # a layer has an entry of its own in ModelConfig.mla_rotary_pairs
    norm_after_gate: ClassVar[bool] = False  # its output norm sees the gated outputs, so a gate of one number a head is lost
    # what `calibrate.solve` does with the output projection: keep it (a copied layer), fit it with the initialiser's as the
    # prior, or fit it from zero
    output_fit: ClassVar[Literal["keep", "from_initial", "from_zero"]] = "from_zero"
    decay_range: ClassVar[tuple[float, float] | None] = None  # a fresh A_log is the log of a uniform draw from it

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the model's sizes do not suit this mixer."""
        for name in self.size_fields:
            if getattr(config, name) < 1:
                raise ConfigError(f"{self.name} layer `{self.symbol}` needs {name} >= 1, got {getattr(config, name)}")

    @abc.abstractmethod
    def default_sizes(self, base: ModelConfig, base_name: str | None, teacher_shapes: bool) -> Fields:
        """Fields of ModelConfig for a hybrid of `base`.

        Args:
            base: the Transformer that is converted.
            base_name: its name in `layouts.BASES`, or None.
            teacher_shapes: shapes like the teacher's attention, for the calibrated initialisation; else the paper's.
        """

    @abc.abstractmethod
    def tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """Hugging Face names with the block's prefix, e.g. "self_attn.q_proj.weight", and shapes."""

    def parameters(self, config: ModelConfig) -> int:
        """Number of parameters, without the layer norm before the mixer."""
        return sum(math.prod(shape) for shape in self.tensors(config).values())

    def matrices(self, config: ModelConfig) -> list[Matrix]:
        """Weight matrices of a layer as they are trained."""
        return trained_matrices(self.tensors(config), self.joined, self.undivided)

    def kv_numbers(self, config: ModelConfig) -> int:
        """Numbers that every further token adds to the cache; 0 for a recurrent mixer."""
        return 0

    def cached_numbers(self, config: ModelConfig, length: int) -> int:
        """Numbers cached of a sequence of `length` tokens, states left out."""
        return length * self.kv_numbers(config)

    def state_numbers(self, config: ModelConfig) -> int:
        """Numbers of the state carried for a sequence of any length: recurrence and convolution; 0 for attention."""
        return 0

    @abc.abstractmethod
    def sequence_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """FLOPs of a token's forward pass besides 2 a parameter: attention scores (causal mean) or state updates."""

    @abc.abstractmethod
    def kept_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Numbers a token that one of `ranks` tensor-parallel ranks keeps for the backward pass, the norm's output included."""

    def scratch_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Numbers a token that the backward pass has besides twice the kept ones (fitted to measured peaks)."""
        return 0.0

    @abc.abstractmethod
    def tensor_parallel_counts(self, config: ModelConfig) -> Mapping[str, int]:
        """Fields whose counts the tensor-parallel size must divide."""
