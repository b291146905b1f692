"""Description of a layer, a mixer or an MLP, without a tensor: sizes and their checks, tensors, parameters, matrices."""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from megatron_hylo.config.errors import ConfigError

if TYPE_CHECKING:
    from megatron_hylo.config.model import ModelConfig

Shape = tuple[int, ...]


class Matrix(NamedTuple):
    """A weight matrix as it is trained: whole, over all tensor-parallel ranks, which have a part of a `divided` one each."""

    rows: int
    columns: int
    divided: bool = True


class LayerDescription(abc.ABC):
    """Description of one kind of layer, in numbers. Subclasses hold no state; `config` is the model the layer belongs to.

    Numbers "a token" are counts of tensor elements, not bytes.
    """

    symbol: ClassVar[str]  # one character of a pattern
    name: ClassVar[str]  # in messages
    tensor_parallel_fields: ClassVar[tuple[str, ...]]  # fields of ModelConfig that the tensor-parallel size must divide
    size_fields: ClassVar[tuple[str, ...]] = ()  # fields of ModelConfig that must be positive where the layer occurs
    joined: ClassVar[tuple[str, ...]] = ()  # projections that are computed in one product, and so are one matrix in training
    undivided: ClassVar[tuple[str, ...]] = ()  # projections that every tensor-parallel rank has whole

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where the model's sizes do not suit this layer."""
        for name in self.size_fields:
            if getattr(config, name) < 1:
                raise ConfigError(f"{self.name} layer `{self.symbol}` needs {name} >= 1, got {getattr(config, name)}")

    @abc.abstractmethod
    def tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """Hugging Face names with the block's prefix, e.g. "self_attn.q_proj.weight", and shapes."""

    def parameters(self, config: ModelConfig) -> int:
        """Number of parameters, without the norm before the layer."""
        return sum(math.prod(shape) for shape in self.tensors(config).values())

    def matrices(self, config: ModelConfig) -> list[Matrix]:
        """Weight matrices as they are trained; convolutions, biases, norms and the like are none."""
        tensors = self.tensors(config)
        shapes = {name.split(".")[-2]: s for name, s in tensors.items() if name.endswith(".weight") and len(s) == 2}
        together = [shapes.pop(name) for name in self.joined if name in shapes]
        found = [Matrix(sum(rows for rows, _ in together), together[0][1])] if together else []
        return found + [Matrix(*shape, name not in self.undivided) for name, shape in shapes.items()]

    @abc.abstractmethod
    def kept_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Numbers a token that one of `ranks` tensor-parallel ranks keeps for the backward pass, the norm's output included."""

    def tensor_parallel_counts(self, config: ModelConfig) -> dict[str, int]:
        """Counts that the tensor-parallel size must divide, by field."""
        return {name: getattr(config, name) for name in self.tensor_parallel_fields}
