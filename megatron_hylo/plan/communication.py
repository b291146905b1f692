"""Bytes that a rank receives in a training step, by kind of communication (docs/parallelism.md has the formulas)."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_hylo.config import ConfigError, ModelConfig, ParallelConfig, recomputed_layers
from megatron_hylo.config.mixers import complete, get_mixer
from megatron_hylo.config.mlps import EXPERTS_SYMBOL, MLP_SYMBOL
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.plan.muon import gathered_bytes, rank_matrices
from megatron_hylo.plan.parameters import mixer_counts

STATE_BYTES = 4  # states and their transitions travel in fp32


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in one step.

    Args:
        tensor: activations, and parts of the matrices of Muon's update, from tensor-parallel ranks.
        context: what mixers exchange, from context-parallel ranks; student and teacher.
        context_forward: the student's part of `context` in forward passes, which benchmarks count.
        expert: tokens on their way to experts of other ranks and back, and their gradients; student and teacher.
        pipeline: hidden states and their gradients, from the pipeline stages beside it.
        data: gradients and updated weights, from ranks that share the optimizer's state.
    """

    tensor: float
    context: float
    context_forward: float
    expert: float
    pipeline: float
    data: float


def uses_all_to_all(config: ModelConfig, symbol: str, method: str, ranks: int, tensor: int) -> bool:
    """Whether context-parallel ranks exchange sequence for heads in this mixer, as `parallel.context.context_group` decides.

    Args:
        config: the model.
        symbol: the mixer.
        method: `cp_comm_type`.
        ranks, tensor: context- and tensor-parallel sizes.

    Raises:
        ConfigError: `a2a` does not divide the heads.
    """
    mixer = get_mixer(symbol)
    counts = {name: count // tensor for name, count in mixer.tensor_parallel_counts(config).items()}
    divides = all(count % ranks == 0 for count in counts.values())
    if method == "a2a" and not divides:
        raise ConfigError(f"cp_comm_type a2a needs heads that context_parallel_size {ranks} divides, {mixer.name} has {counts}")
    return ranks > 1 and divides and (method == "a2a" or (method == "auto" and not mixer.recurrent))


def context_bytes(config: ModelConfig, symbol: str, tokens: float, sequences: int, parallel: ParallelConfig) -> float:
    """Bytes that a rank's mixer receives from context-parallel ranks in one forward pass, in bf16 (states in fp32).

    Args:
        config: the model.
        symbol: the mixer.
        tokens: of this rank, over its sequences.
        sequences: of the micro-batch.
        parallel: sizes of the groups.
    """
    ranks, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if ranks == 1:
        return 0.0
    all_to_all = uses_all_to_all(config, symbol, parallel.cp_comm_type, ranks, tensor)
    return _RECEIVED[symbol](
        config, tokens, sequences, _Group(ranks, tensor, all_to_all, tensor if parallel.sequence_parallel else 1)
    )


@dataclass(frozen=True)
class _Group:
    """Context-parallel ranks of one mixer: how many, tensor-parallel ones, what they exchange, what divides the latents."""

    size: int
    tensor: int
    all_to_all: bool
    pieces: int  # tensor-parallel ranks that gather a piece of the latents each, under sequence parallelism


def _attention(c: ModelConfig, tokens: float, sequences: int, g: _Group) -> float:
    n, tensor = g.size, g.tensor
    heads, groups = c.num_attention_heads / tensor, c.num_query_groups / tensor
    if g.all_to_all:
        return 2 * (n - 1) / n * tokens * (2 * heads + 2 * groups) * c.kv_channels
    return 2 * ((n - 1) * tokens * 2 * groups * c.kv_channels + tokens / 2 * heads * 2 * c.kv_channels)


def _mla(c: ModelConfig, tokens: float, sequences: int, g: _Group) -> float:
    n, tensor = g.size, g.tensor
    latents = (n - 1) * tokens * (c.kv_lora_rank + c.qk_pos_emb_head_dim) / g.pieces
    share = (n - 1) / n if g.all_to_all else 0.5
    widths = c.qk_head_dim + c.qk_pos_emb_head_dim + c.v_head_dim
    return 2 * (latents + share * tokens * c.num_attention_heads / tensor * widths)


def _delta(c: ModelConfig, tokens: float, sequences: int, g: _Group) -> float:
    n, tensor = g.size, g.tensor
    heads, keys, values = c.linear_num_heads / tensor, c.linear_key_head_dim, c.linear_value_head_dim
    if g.all_to_all:
        return 2 * (n - 1) / n * tokens * heads * (2 * keys + 2 * values + 2)
    states = (n - 1) * sequences * heads * keys * (keys + values) * STATE_BYTES
    return states + 2 * (n - 1) * sequences * (c.linear_conv_kernel_dim - 1) * heads * (2 * keys + values)


def _mamba(c: ModelConfig, tokens: float, sequences: int, g: _Group) -> float:
    n, tensor = g.size, g.tensor
    heads, groups, width, state = c.mamba_num_heads / tensor, c.num_query_groups / tensor, c.mamba_head_dim, c.mamba_state_dim
    if g.all_to_all:
        return 2 * (n - 1) / n * tokens * (heads * (width + state + 1) + groups * (width + state))
    states = (n - 1) * sequences * heads * (width * state + 1) * STATE_BYTES
    return states + 2 * (n - 1) * sequences * (c.linear_conv_kernel_dim - 1) * (groups * (width + state) + heads * state)


_RECEIVED: dict[str, Callable[[ModelConfig, float, int, _Group], float]] = {
    "*": _attention, "+": _mla, "G": _delta, "K": _delta, "M": _mamba, "W": _attention,
}  # fmt: skip
complete(_RECEIVED, "_RECEIVED of plan/communication.py")


def traffic(config: TrainConfig, ranks: int, ours: ModelConfig, theirs: ModelConfig | None, parameters: float) -> Traffic:
    """Bytes that a rank in the middle of the pipeline receives in one step.

    Args:
        config: the run.
        ranks: of the run.
        ours: the student.
        theirs: a teacher on the same ranks.
        parameters: trained ones of this rank.
    """
    p = config.parallel
    tensor, context, pipeline = p.tensor_model_parallel_size, p.context_parallel_size, p.pipeline_model_parallel_size
    replicas = max(ranks // p.model_parallel_size, 1)
    passes = config.micro_batches(replicas)
    sequences = config.micro_batch_size
    tokens, number = sequences * config.sequence_length / context, 2 if config.precision == "bf16" else 4
    again = recomputed_layers(config.recompute)
    scale = passes / pipeline * number / 2  # a rank has 1 / pipeline of the layers

    def to_experts(shape: ModelConfig, trained: bool) -> float:
        """Bytes that experts of other ranks send and are sent, of a micro-batch; their tokens are spread evenly."""
        n, count = p.expert_model_parallel_size, shape.mlps.count(EXPERTS_SYMBOL)
        each = (n - 1) / n * tokens / tensor * shape.moe_router_topk * shape.hidden_size * 2
        return count * 2 * each * ((2 + (EXPERTS_SYMBOL in again)) if trained else 1)

    def moved(shape: ModelConfig, trained: bool) -> tuple[float, float, float]:
        """Tensor-parallel bytes, context-parallel ones, and those of the latter in forward passes, of a micro-batch."""
        hidden = (tensor - 1) / tensor * tokens * shape.hidden_size * 2
        by_tensor = by_context = forward = 0.0
        for symbol, count in mixer_counts(shape).items():
            twice = [trained and symbol in again, trained and MLP_SYMBOL in again]  # mixer, MLP
            received = context_bytes(shape, symbol, tokens, sequences, p)
            forward += count * received * (1 + twice[0])
            by_context += count * received * (1 + twice[0] + trained)
            backward = (3 if p.sequence_parallel else 2) if trained else 0  # what a linear map's input was is gathered again
            by_tensor += count * hidden * sum(2 + 2 * recomputed + backward for recomputed in twice)
        return by_tensor, by_context, forward

    student, teacher = moved(ours, True), moved(theirs, False) if theirs else (0.0, 0.0, 0.0)
    width = ours.hidden_size * (0 if config.stage == "align" else 2) + (theirs.hidden_size if theirs else 0)
    boundary = tokens * width * number / (tensor if p.sequence_parallel else 1) * p.virtual_pipeline_model_parallel_size
    shards = replicas * context
    back = number if config.optimizer.use_distributed_optimizer else 4  # new weights of a share; else summed fp32 gradients
    return Traffic(
        tensor=scale * (student[0] + teacher[0]) + max(gathered_bytes(one, tensor) for one in rank_matrices(config, ours)),
        context=scale * (student[1] + teacher[1]),
        context_forward=scale * student[2],
        expert=scale * (to_experts(ours, True) + (to_experts(theirs, False) if theirs else 0.0)),
        pipeline=passes * boundary if pipeline > 1 else 0.0,
        data=(shards - 1) / shards * parameters * (4 + back),
    )
