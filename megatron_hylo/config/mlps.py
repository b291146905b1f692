"""Descriptions of the MLPs behind the mixers: `-` SwiGLU, `E` a mixture of such experts, and all counts derived from them."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.layer import LayerDescription, Shape

if TYPE_CHECKING:
    from megatron_hylo.config.model import ModelConfig
    from megatron_hylo.config.parallel import ParallelConfig


class MlpDescription(LayerDescription):
    """Description of one kind of MLP."""

    joined = ("gate_proj", "up_proj")

    def expert_parameters(self, config: ModelConfig) -> int:
        """Number of those parameters that expert parallelism divides."""
        return 0

    @abc.abstractmethod
    def active_parameters(self, config: ModelConfig) -> int:
        """Number of parameters that a token is multiplied with."""


class SwiGlu(MlpDescription):
    """SwiGLU without biases: down(silu(gate(x)) up(x)), `ffn_hidden_size` wide."""

    symbol, name = "-", "MLP"
    tensor_parallel_fields = ("ffn_hidden_size",)

    def tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """Its three matrices."""
        return _swiglu("mlp.", config.hidden_size, config.ffn_hidden_size)

    def active_parameters(self, config: ModelConfig) -> int:
        """All of them."""
        return self.parameters(config)

    def kept_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Norm's output; both halves of SwiGLU and their product."""
        return config.hidden_size + 3 * config.ffn_hidden_size / ranks


class MixtureOfExperts(MlpDescription):
    """Router and `num_moe_experts` SwiGLUs of `moe_ffn_hidden_size`, of which each token goes through `moe_router_topk`."""

    symbol, name = "E", "mixture of experts"
    tensor_parallel_fields = ()  # an expert is whole on its rank
    size_fields = ("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk")

    def check(self, config: ModelConfig) -> None:
        """Check that sizes are positive, a token's experts are there, and the router gets a gradient.

        Raises:
            ConfigError: one of them does not hold.
        """
        super().check(config)
        if config.moe_router_topk > config.num_moe_experts:
            raise ConfigError(
                f"moe_router_topk {config.moe_router_topk} is more than num_moe_experts {config.num_moe_experts}; a token goes "
                "through each expert once at most"
            )
        if config.moe_router_topk == 1 and not config.moe_router_pre_softmax:
            raise ConfigError(
                "moe_router_topk 1 with moe_router_pre_softmax false (num_experts_per_tok 1 with norm_topk_prob true) gives "
                "every token's expert the weight 1, so that its router learns nothing; Megatron-Core does not run it"
            )

    def tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """The router's matrix and three matrices an expert."""
        names: dict[str, Shape] = {"mlp.gate.weight": (config.num_moe_experts, config.hidden_size)}
        for expert in range(config.num_moe_experts):
            names |= _swiglu(f"mlp.experts.{expert}.", config.hidden_size, config.moe_ffn_hidden_size)
        return names

    def parameters(self, config: ModelConfig) -> int:
        """Router and experts."""
        return config.num_moe_experts * config.hidden_size + self.expert_parameters(config)

    def expert_parameters(self, config: ModelConfig) -> int:
        """All experts."""
        return config.num_moe_experts * 3 * config.hidden_size * config.moe_ffn_hidden_size

    def active_parameters(self, config: ModelConfig) -> int:
        """Router and `moe_router_topk` experts."""
        experts = config.moe_router_topk * 3 * config.hidden_size * config.moe_ffn_hidden_size
        return config.num_moe_experts * config.hidden_size + experts

    def kept_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Norm's output, router's probabilities; for each of a token's experts its input, SwiGLU's parts and its output.

        Sequence parallelism, without which experts do not train, divides the tokens.
        """
        c = config
        each = 2 * c.hidden_size + 3 * c.moe_ffn_hidden_size
        return c.hidden_size + (2 * c.num_moe_experts + c.moe_router_topk * each) / ranks


def _swiglu(prefix: str, hidden: int, ffn: int) -> dict[str, Shape]:
    return {
        f"{prefix}gate_proj.weight": (ffn, hidden),
        f"{prefix}up_proj.weight": (ffn, hidden),
        f"{prefix}down_proj.weight": (hidden, ffn),
    }


MLPS: dict[str, MlpDescription] = {mlp.symbol: mlp for mlp in (SwiGlu(), MixtureOfExperts())}
MLP_SYMBOL, EXPERTS_SYMBOL = SwiGlu.symbol, MixtureOfExperts.symbol


def get_mlp(symbol: str) -> MlpDescription:
    """Look up an MLP by its symbol.

    Raises:
        ConfigError: an unknown symbol.
    """
    if symbol not in MLPS:
        raise ConfigError(f"unknown MLP symbol {symbol!r}; known: {', '.join(f'{s} {m.name}' for s, m in MLPS.items())}")
    return MLPS[symbol]


def check_expert_parallel(config: ModelConfig, parallel: ParallelConfig, trained: bool) -> None:
    """Refuse a division of experts that Megatron-Core does not compute.

    Args:
        config: a model, with or without experts.
        parallel: sizes of the parallel groups.
        trained: whether gradients are computed.

    Raises:
        ConfigError: ranks that do not divide the experts, or tensor parallelism of trained ones without sequence parallelism.
    """
    if not config.has_experts:
        return
    ranks, experts = parallel.expert_model_parallel_size, config.num_moe_experts
    if experts % ranks:
        sizes = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        raise ConfigError(
            f"expert_model_parallel_size {ranks} does not divide num_moe_experts {experts}; sizes that work: {sizes}"
        )
    if trained and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"tensor_model_parallel_size {parallel.tensor_model_parallel_size} trains mixtures of experts with "
            "sequence_parallel alone; set it true"
        )
