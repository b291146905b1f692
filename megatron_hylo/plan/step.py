"""Time of a training step by term: products, attention, recurrences, what is bound by memory, communication, bubble.

The time of a term is its work over a share of what the data sheet has (rates.yaml); terms are added, since kernels of one rank
follow one another and collectives inside a layer wait for its numbers. benchmarks/plan_accuracy.py compares the sum with
measured steps.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_hylo.config import ModelConfig, recomputed_layers
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.mlps import MLPS, get_mlp
from megatron_hylo.config.teacher_window import repeats
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.plan.communication import Traffic, traffic
from megatron_hylo.plan.flops import forward_flops_per_token, mlp_flops, teacher_flops_per_token
from megatron_hylo.plan.hardware import Hardware
from megatron_hylo.plan.memory import MASTER, kept_numbers, moments
from megatron_hylo.plan.muon import newton_schulz_flops, rank_matrices
from megatron_hylo.plan.parameters import (
    layer_counts,
    mixer_counts,
    rank_parameters,
    stage_layers,
    stage_parameters,
    trained_parameters,
)
from megatron_hylo.plan.rates import Rates, get_rates
from megatron_hylo.plan.schedule import idle_seconds

Source = Literal["COUNTED", "MEASURED", "ESTIMATED"]
COMPUTE = ("products", "attention", "recurrences", "elementwise", "loss")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank, by term.

    Args:
        terms: seconds by name; those of `COMPUTE`, launch, optimizer, muon (products of its update), offload, tensor, context,
            expert, pipeline, data, bubble.
        traffic: bytes received.
        flops: model FLOPs of the step on all ranks, recomputation not counted.
        micro_batches: forward passes of a rank.
    """

    terms: dict[str, float]
    traffic: Traffic
    flops: float
    micro_batches: int

    @property
    def seconds(self) -> float:
        """Sum of all terms."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class _Pass:
    """Seconds of one pass of a micro-batch over one layer on one rank, by kind of kernel."""

    products: float = 0.0
    attention: float = 0.0
    recurrences: float = 0.0
    elementwise: float = 0.0


class LayerTimes:
    """Times of one model's layers on one rank.

    Args:
        shape: the model.
        config: the run.
        hardware, rates: what it runs on.
        fp8: linear maps compute in FP8.
        frozen: a teacher.
    """

    def __init__(
        self, shape: ModelConfig, config: TrainConfig, hardware: Hardware, rates: Rates, fp8: bool = False, frozen: bool = False
    ) -> None:
        p = config.parallel
        self.shape, self.hardware, self.rates = shape, hardware, rates
        self.tensor, self.length = p.tensor_model_parallel_size, config.sequence_length
        self.tokens = config.micro_batch_size * self.length / p.context_parallel_size
        self.read = self.tokens  # by the layers; a teacher that reads overlapping windows reads most tokens twice
        if frozen and (window := config.teacher_window.window(shape, self.length)):
            self.read *= repeats(self.length, window)
            self.length = window
        self.number = 2 if config.precision == "bf16" else 4
        bf16 = hardware.peak() * rates.products / (1 if self.number == 2 else 2)
        self.products_rate = hardware.peak(True) * rates.products_fp8 if fp8 else bf16
        self.head_rate = bf16
        self.elementwise = rates.elementwise_frozen if frozen else rates.elementwise
        self.sequence = self.tensor if p.sequence_parallel else 1

    def passes(self, symbol: str) -> tuple[_Pass, _Pass]:
        """Forward and backward pass of one mixer or MLP."""
        c, per_rank = self.shape, self.read / self.tensor
        parameters = get_mlp(symbol).active_parameters(c) if symbol in MLPS else get_mixer(symbol).parameters(c)
        products = 2.0 * parameters * per_rank / self.products_rate
        numbers = kept_numbers(c, symbol, self.tensor) + c.hidden_size * (1 / self.sequence - 1)
        moved = self.elementwise * self.read * self.number * numbers / self.hardware.memory_gb_s / 1e9
        if symbol in MLPS:
            return _Pass(products, elementwise=moved), _Pass(2 * products, elementwise=2 * moved)
        mixer = get_mixer(symbol)
        if mixer.recurrent:
            width = mixer.kept_numbers(c, self.tensor) - c.hidden_size
            slower = self.rates.recurrence_bandwidth / self.hardware.memory_gb_s
            whole, share = self.rates.recurrence[symbol] * slower * width * self.read, self.rates.recurrence_forward
            return _Pass(products, 0.0, share * whole, moved), _Pass(2 * products, 0.0, (1 - share) * whole, 2 * moved)
        flops = mixer.sequence_flops(c, self.length) * per_rank
        peak, rates = self.hardware.peak(), self.rates
        forward = flops / (peak * rates.attention(c.kv_channels))
        backward = 2.5 * flops / (peak * rates.attention(c.kv_channels, backward=True))
        return _Pass(products, forward, 0.0, moved), _Pass(2 * products, backward, 0.0, 2 * moved)

    def head(self) -> float:
        """Seconds of the output head's matrix product, one pass."""
        return 2.0 * self.shape.vocab_size * self.shape.hidden_size * self.tokens / self.tensor / self.head_rate

    def softmax(self) -> float:
        """Seconds of the loss's soft-max over this model's logits, both passes."""
        return self.rates.softmax_bytes * self.shape.vocab_size * self.tokens / self.tensor / self.hardware.memory_gb_s / 1e9


def step_time(
    config: TrainConfig,
    ranks: int,
    ours: ModelConfig,
    theirs: ModelConfig | None,
    hardware: Hardware,
    rates: Rates | None = None,
) -> StepTime:
    """Predict the time of one step.

    Args:
        config: the run; `parallel` divides `ranks`, and the batch is divided evenly.
        ranks: GPUs of the run.
        ours: the student.
        theirs: a teacher on the same ranks; None without one.
        hardware: the GPU.
        rates: shares of its figures that are reached; rates.yaml by default.

    Raises:
        ConfigError: the ranks do not share the batch evenly.
    """
    rates, p = rates or get_rates(), config.parallel
    replicas = max(ranks // p.model_parallel_size, 1)
    passes = config.micro_batches(replicas)
    align, again = config.stage == "align", recomputed_layers(config.recompute)
    student = LayerTimes(ours, config, hardware, rates, config.linear_precision == "fp8", False)
    teacher = LayerTimes(theirs, config, hardware, rates, config.teacher_precision == "fp8", True) if theirs else None
    times = {"student": {s: student.passes(s) for s in layer_counts(ours)}}
    if teacher and theirs:
        times["teacher"] = {s: teacher.passes(s) for s in layer_counts(theirs)}

    def one(model: str, symbol: str, trained: bool) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of a layer's forward and of its backward pass with what that recomputes, by kind."""
        forward, backward = ({kind: getattr(way, kind) for kind in COMPUTE[:4]} for way in times[model][symbol])
        if trained and not align and symbol in again:
            backward = {kind: seconds + forward[kind] for kind, seconds in backward.items()}
        return forward, backward if trained else dict.fromkeys(COMPUTE[:4], 0.0)

    pipeline, virtual = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size
    stages = [(dict.fromkeys(COMPUTE, 0.0), dict.fromkeys(COMPUTE, 0.0)) for _ in range(pipeline * virtual)]
    host, given = 0.0, tuple(p.pipeline_layers) if p.pipeline_layers else None
    models = [("student", ours, True)] + ([("teacher", theirs, False)] if theirs else [])
    for model, shape, trained in models:
        has_mlp = not (align and trained) or config.align.loss == "ild"
        costs = {symbol: one(model, symbol, trained) for symbol in times[model]}
        for ways, layers in zip(stages, stage_layers(shape, pipeline * virtual, given if trained else None)):
            for symbol, count in layers.items():
                for way, cost in zip(ways, costs[symbol]) if has_mlp or symbol not in MLPS else ():
                    for kind, seconds in cost.items():
                        way[kind] += count * seconds
        for mixer, count in mixer_counts(shape).items():
            host += count * rates.launch_seconds(mixer) * ((3 + (mixer in again)) if trained else 1) / pipeline
    if not align:
        forward, backward = stages[-1]
        forward["products"] += student.head() + (teacher.head() if teacher else 0.0)
        if config.stage == "distil" and theirs is None:  # the teacher's head alone is on these ranks
            forward["products"] += student.head()
        backward["products"] += 2 * student.head()
        forward["loss"] += student.softmax() * (1 if config.stage == "pretrain" else 2)
    by_rank = [
        {kind: sum(way[kind] for ways in stages[rank::pipeline] for way in ways) for kind in COMPUTE}
        for rank in range(pipeline)
    ]
    slowest = max(by_rank, key=lambda kinds: sum(kinds.values()))
    busy = sum(slowest.values())
    terms = {kind: passes * seconds for kind, seconds in slowest.items()}
    if not config.cuda_graphs:
        terms["launch"] = passes * max(0.0, host - busy)
    there, back = ([sum(ways[way].values()) for ways in stages] for way in (0, 1))
    if align:  # its gradients are made layer by layer, during the teacher's forward pass
        there, back = [sum(both) for both in zip(there, back)], [0.0] * len(back)
    terms["bubble"] = idle_seconds(pipeline, passes, there, back, chunks=virtual)
    parameters = rank_parameters(config, ours, trained=True)
    moved = traffic(config, ranks, ours, theirs, parameters)
    terms |= _communication(moved, config, ranks, hardware, rates)
    updated = parameters  # by this rank: its share of its pipeline stage's
    if config.optimizer.use_distributed_optimizer:
        updated = rank_parameters(config, ours, trained=True, divided=False) / max(ranks // pipeline, 1)
    terms["optimizer"] = rates.optimizer_bytes * updated / hardware.memory_gb_s / 1e9
    orthogonalised = max(map(newton_schulz_flops, rank_matrices(config, ours)))
    terms["muon"] = orthogonalised / student.head_rate  # in bf16 or fp32, whatever the precision of linear maps
    terms["offload"] = _offload(config, ours, updated, theirs, times.get("teacher"), passes, hardware, rates)
    return StepTime(terms, moved, step_flops(config, ours, theirs), passes)


def _communication(moved: Traffic, config: TrainConfig, ranks: int, hardware: Hardware, rates: Rates) -> dict[str, float]:
    """Seconds of each kind; groups are consecutive ranks: tensor parallel innermost, then context, data and pipeline."""
    p = config.parallel

    def seconds(moved: float, span: int) -> float:
        """Seconds that so many bytes take among `span` consecutive ranks: within a node by its links, else over the network."""
        share = rates.link if span <= hardware.gpus_per_node else rates.network
        return moved / (hardware.bandwidth(span) * share)

    inner = p.tensor_model_parallel_size * p.context_parallel_size
    return {
        "tensor": seconds(moved.tensor, p.tensor_model_parallel_size),
        "context": seconds(moved.context, inner),
        "expert": seconds(moved.expert, p.expert_model_parallel_size),
        "data": seconds(moved.data, ranks // p.pipeline_model_parallel_size),
        "pipeline": seconds(moved.pipeline, ranks),
    }


def _offload(
    config: TrainConfig,
    ours: ModelConfig,
    share: float,
    theirs: ModelConfig | None,
    teacher: dict[str, tuple[_Pass, _Pass]] | None,
    passes: int,
    hardware: Hardware,
    rates: Rates,
) -> float:
    """Seconds of copies from and to the CPU that nothing hides: the optimizer's state, and a teacher slower than its copies."""
    link = hardware.host_gb_s * 1e9 * rates.host
    state = moments(config, ours) / trained_parameters(config, ours) + (MASTER if config.precision == "bf16" else 0)
    seconds = 2 * state * share / link if config.optimizer.offload else 0.0
    if config.teacher_offload and theirs and teacher:
        p = config.parallel
        counts, sizes = layer_counts(theirs), (p.tensor_model_parallel_size, p.expert_model_parallel_size)
        each = stage_parameters(theirs, counts, *sizes) * 2 / p.pipeline_model_parallel_size / link
        computed = sum(count * sum(vars(teacher[symbol][0]).values()) for symbol, count in counts.items())
        computed /= p.pipeline_model_parallel_size
        seconds += passes * max(0.0, each - computed)
    return seconds


def step_flops(config: TrainConfig, ours: ModelConfig, theirs: ModelConfig | None) -> float:
    """Model FLOPs of a step on all ranks, as a run counts them for MFU (train/setup.py); recomputation counts nothing.

    Args:
        config: settings of the run.
        ours: the student.
        theirs: a teacher that this run computes, or None.
    """
    head, length = config.stage != "align", config.sequence_length
    each = 3 * forward_flops_per_token(ours, length, head)
    each += teacher_flops_per_token(theirs, length, config.teacher_window.window(theirs, length), head) if theirs else 0.0
    if config.stage == "align" and config.align.loss != "ild":  # MLPs of the student are not computed
        each -= 3 * mlp_flops(ours)
    return each * config.global_batch_size * length
