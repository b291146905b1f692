"""Search over parallelism, recomputation, offloading and FP8 for the fastest settings of a run that fit into the GPUs."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.config.mixers import LINEAR_SYMBOLS, check_tensor_parallel
from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.plan.hardware import Hardware
from megatron_hylo.plan.job import Job
from megatron_hylo.plan.memory import GIB, Memory, estimate_memory
from megatron_hylo.plan.rates import Rates
from megatron_hylo.plan.step import StepTime, step_time

MARGIN = 0.94  # of a GPU's memory: predictions were within 8 % of measured peaks, most above them; the allocator's own needs
VIRTUAL, MICRO = (1, 2, 4), (1, 2, 4, 8, 16)
FULL_TOKENS = 16_384  # of a micro-batch; with fewer, kernels leave parts of a GPU idle, which is not predicted
PASS_TOKENS = 65_536  # of a rank's micro-batch, at which kernels are as fast as they get


@dataclass(frozen=True)
class Candidate:
    """Settings that were tried, with what is predicted of them.

    Args:
        config: of the run.
        memory: of the fullest rank.
        time: of a step.
    """

    config: TrainConfig
    memory: Memory
    time: StepTime

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all GPUs."""
        return self.config.global_batch_size * self.config.sequence_length / self.time.seconds

    def settings(self) -> dict[str, Any]:
        """Keys of a recipe that the search chose, by name."""
        return settings_of(self.config)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Keys of a recipe among which the search chooses, by name."""
    p = config.parallel
    return {
        "parallel.tensor_model_parallel_size": p.tensor_model_parallel_size,
        "parallel.pipeline_model_parallel_size": p.pipeline_model_parallel_size,
        "parallel.virtual_pipeline_model_parallel_size": p.virtual_pipeline_model_parallel_size,
        "parallel.pipeline_layers": p.pipeline_layers,
        "parallel.context_parallel_size": p.context_parallel_size,
        "parallel.cp_comm_type": p.cp_comm_type,
        "parallel.expert_model_parallel_size": p.expert_model_parallel_size,
        "parallel.sequence_parallel": p.sequence_parallel,
        "micro_batch_size": config.micro_batch_size,
        "recompute": config.recompute,
        "cuda_graphs": config.cuda_graphs,
        "teacher_offload": config.teacher_offload,
        "optimizer.offload": config.optimizer.offload,
        "teacher_precision": config.teacher_precision,
        "linear_precision": config.linear_precision,
    }


@dataclass
class Found:
    """Result of a search.

    Args:
        best: settings that fit, fastest first.
        tried: combinations that were predicted.
        too_large, slower: of these, how many do not fit, and how many are not among the best.
        refused: reason -> number of combinations that cannot run.
        nearest: least memory of those that do not fit, GiB.
    """

    best: list[Candidate] = field(default_factory=list)
    tried: int = 0
    too_large: int = 0
    slower: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    nearest: float | None = None


def predict(job: Job, config: TrainConfig, gpus: int, hardware: Hardware, rates: Rates | None = None) -> Candidate:
    """Predict memory and time of one configuration of a run.

    Args:
        job: student and teacher.
        config: settings of the run.
        gpus: number of GPUs.
        hardware: kind of GPU and network.
        rates: measured ones; None: those of rates.yaml.

    Raises:
        ConfigError: settings that do not divide the GPUs, the batch or the heads, or CUDA graphs on several.
    """
    p = config.parallel
    config.check_graphs(gpus)
    if gpus % p.model_parallel_size:
        raise ConfigError(
            f"{gpus} GPUs do not divide into groups of tensor {p.tensor_model_parallel_size} x pipeline "
            f"{p.pipeline_model_parallel_size} x context {p.context_parallel_size} = {p.model_parallel_size}"
        )
    for model in (job.student, job.teacher):
        if model:
            check_tensor_parallel(model, p.tensor_model_parallel_size)
    teachers = [job.teacher] if job.teacher else []
    time = step_time(config, gpus, job.student, job.teacher, hardware, rates)
    return Candidate(config, estimate_memory(config, gpus, [job.student], teachers), time)


def search(job: Job, gpus: int, hardware: Hardware, keep: int = 10, fp8: bool = True, rates: Rates | None = None) -> Found:
    """Try all combinations; what costs time and saves memory is tried only where less of it does not fit.

    Args:
        job: the run; its batch, length and losses stay.
        gpus: number of GPUs.
        hardware: their kind.
        keep: fastest ones to return, one of each division of the GPUs and precision.
        fp8: also compute linear maps in FP8, where the GPU has it.
        rates: those of rates.yaml by default.
    """
    found, divided = Found(), dict[Any, Candidate]()  # the fastest of each division and precision
    fitting = 0
    for parallel, micro in _divisions(job, gpus, hardware, found):
        for precision in _precisions(job, hardware, fp8):
            fastest = sorted(one.time.seconds for one in divided.values())
            limit = fastest[keep - 1] if len(fastest) >= keep else math.inf
            settings = dict(parallel=parallel, micro_batch_size=micro, **precision)
            if best := _fastest_fit(job, gpus, hardware, settings, limit, found, rates):
                fitting += 1
                name = (str(replace(parallel, cp_comm_type="auto")), *precision.values())
                divided[name] = min(divided.get(name, best), best, key=_rank)
    found.best = sorted(divided.values(), key=_rank)[:keep]
    found.slower += fitting - len(found.best)
    return found


def _rank(one: Candidate) -> tuple[float, float, float]:
    """Fastest first; of equals the one whose passes fill a GPU, then the one that needs less memory."""
    c = one.config
    tokens = c.micro_batch_size * c.sequence_length / c.parallel.context_parallel_size
    return round(one.time.seconds, 4), -min(tokens, FULL_TOKENS), one.memory.total


def _fastest_fit(
    job: Job, gpus: int, hardware: Hardware, settings: dict[str, Any], limit: float, found: Found, rates: Rates | None
) -> Candidate | None:
    """Fastest recomputation and offloading with which a division fits, if a step takes less than `limit` seconds.

    Both lists begin with what is fastest, so the first that is too slow ends its list.
    """
    room, teachers = MARGIN * hardware.memory_gib * GIB, [job.teacher] if job.teacher else []
    best: Candidate | None = None
    for recompute in _recomputations(job):
        for number, offload in enumerate(_offloads(job, settings["teacher_precision"])):
            graphs = job.config.cuda_graphs and gpus == 1 and not recompute and not offload["teacher_offload"]
            graphs = graphs and settings["linear_precision"] == "same" and not job.student.has_experts
            try:
                config = replace(job.config, recompute=recompute, cuda_graphs=graphs, **settings, **offload)
            except ConfigError as error:
                found.refused[_reason(error)] += 1
                continue
            found.tried += 1
            time = step_time(config, gpus, job.student, job.teacher, hardware, rates)
            if time.seconds > limit or (best and time.seconds >= best.time.seconds):
                found.slower += 1
                if number == 0:
                    return best
                break
            memory = estimate_memory(config, gpus, [job.student], teachers)
            if memory.total <= room:
                found.slower += best is not None
                best = Candidate(config, memory, time)
                break
            found.too_large += 1
            found.nearest = min(found.nearest or memory.total / GIB, memory.total / GIB)
    return best


def _divisions(job: Job, gpus: int, hardware: Hardware, found: Found) -> Iterator[tuple[ParallelConfig, int]]:
    """Ways to divide the GPUs, with sequences of a micro-batch; what cannot be is counted by its reason."""
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0]
    layers, batch = job.student.num_hidden_layers, job.config.global_batch_size
    counts = {model.num_moe_experts for model in (job.student, job.teacher) if model and model.has_experts}
    for tensor, pipeline, context in itertools.product(sizes, sizes, sizes):
        if gpus % (tensor * pipeline * context) or tensor > hardware.gpus_per_node:
            continue
        try:
            for model in (job.student, job.teacher):
                if model:
                    check_tensor_parallel(model, tensor)
        except ConfigError as error:
            found.refused[_reason(error)] += 1
            continue
        if job.config.sequence_length % (tensor * context):
            found.refused[f"{tensor * context} tensor x context ranks do not divide {job.config.sequence_length} tokens"] += 1
            continue
        replicas = gpus // (tensor * pipeline * context)
        experts = [n for n in sizes if (gpus // pipeline) % n == 0 and all(c % n == 0 for c in counts)] if counts else [1]
        enough = max(PASS_TOKENS * context // job.config.sequence_length, 1)  # sequences of a pass; more are no faster
        options = {*(n for n in MICRO if n <= enough), job.config.micro_batch_size}
        micros = sorted(n for n in options if batch % (n * replicas) == 0)
        if not micros:
            found.refused[f"global_batch_size {batch} is not divisible by {replicas} data-parallel ranks"] += 1
            continue
        if pipeline > layers:
            found.refused[f"{pipeline} pipeline stages are more than {layers} layers"] += 1
            continue
        for virtual, micro in itertools.product(VIRTUAL if pipeline > 1 else (1,), micros):
            passes = batch // (micro * replicas)
            if pipeline * virtual > layers or (virtual > 1 and passes % pipeline):
                continue
            for method in ("auto", "all_gather") if context > 1 else ("auto",):
                minutes = job.config.parallel.distributed_timeout_minutes
                for expert in experts:
                    sizes_of: tuple[Any, ...] = (tensor, pipeline, virtual, None, context, method, expert, tensor > 1, minutes)
                    yield ParallelConfig(*sizes_of), micro


def _precisions(job: Job, hardware: Hardware, fp8: bool) -> list[dict[str, Any]]:
    kept: dict[str, Any] = dict(teacher_precision=job.config.teacher_precision, linear_precision=job.config.linear_precision)
    options = [kept]
    mixture = any(model.has_experts for model in (job.student, job.teacher) if model)  # which compute in no FP8
    if fp8 and not mixture and hardware.fp8_tflops and job.config.precision == "bf16" and job.config.backend != "local":
        options += [kept | {"teacher_precision": "fp8"}] if job.teacher else []
        options += [{"teacher_precision": "fp8" if job.teacher else "same", "linear_precision": "fp8"}]
    return [one for i, one in enumerate(options) if one not in options[:i]]


def _recomputations(job: Job) -> list[bool | str]:
    """Least first: nothing, MLPs, linear layers too, everything."""
    if job.config.stage == "align":
        return [False]  # a layer has its backward pass before the next
    linear = "".join(sorted(set(job.student.mixers) & set(LINEAR_SYMBOLS)))
    mlps = "".join(sorted(set(job.student.mlps)))
    return [False, mlps, *([linear + mlps] if linear else []), True]


def _offloads(job: Job, precision: str) -> list[dict[str, Any]]:
    """Nothing first, then what costs time."""
    plain, moved = job.config.optimizer, replace(job.config.optimizer, offload=True)
    teacher = [False, True] if job.teacher and precision == "same" else [False]
    options: list[tuple[bool, OptimizerSettings]] = [(t, o) for o in (replace(plain, offload=False), moved) for t in teacher]
    return [dict(teacher_offload=offload, optimizer=optimizer) for offload, optimizer in options]


def _reason(error: ConfigError) -> str:
    """First part of an error's sentence, without its advice."""
    return str(error).split(";")[0].split(", got")[0]
