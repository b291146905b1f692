"""Plan of a run as plain numbers: what `hylo plan` prints, each term with where it comes from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_hylo.config.layouts import active_parameter_count, kv_bytes_per_token, kv_percent, parameter_count
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.mlps import MLPS, get_mlp
from megatron_hylo.plan.flops import flops_by_layer, forward_flops_per_token
from megatron_hylo.plan.hardware import Hardware
from megatron_hylo.plan.inference import dense_base, longest_context, serving, state_bytes
from megatron_hylo.plan.job import Job
from megatron_hylo.plan.memory import GIB, activation_parts, update_bytes
from megatron_hylo.plan.search import MARGIN, Candidate, Found
from megatron_hylo.plan.step import Source

FLOPS_LENGTHS = (2_048, 8_192, 32_768, 131_072, 1_048_576)
COUNTED_MEMORY = ("weights", "gradients", "optimizer", "teacher")  # exact; the rest follows measured peaks


def describe_job(job: Job) -> dict[str, Any]:
    """Shapes of a job: parameters, FLOPs a token by kind of layer and length, cache."""
    lengths = sorted({*FLOPS_LENGTHS, job.config.sequence_length})
    models = {"student": job.student} | ({"teacher": job.teacher} if job.teacher else {})
    return {
        "recipe": job.name,
        "stage": job.config.stage,
        "student": job.student_name,
        "teacher": job.teacher_name,
        "mixers": job.student.mixers,
        "tokens": job.config.total_tokens,
        "sequence_length": job.config.sequence_length,
        "global_batch_size": job.config.global_batch_size,
        "parameters": {name: parameter_count(shape) for name, shape in models.items()},
        "active_parameters": {name: active_parameter_count(shape) for name, shape in models.items()},
        "parameters_by_mixer": {
            get_mixer(s).name: get_mixer(s).parameters(job.student) for s in dict.fromkeys(job.student.mixers)
        },
        "forward_flops_per_token": {
            name: {
                str(length): {_layer_name(symbol): value for symbol, value in flops_by_layer(shape, length).items()}
                | {"total": forward_flops_per_token(shape, length)}
                for length in lengths
            }
            for name, shape in models.items()
        },
        "kv_bytes_per_token": kv_bytes_per_token(job.student),
        "kv_percent": kv_percent(job.student),
        "state_bytes_per_sequence": state_bytes(job.student),
    }


def describe(one: Candidate, job: Job, gpus: int, hardware: Hardware, price: float | None = None) -> dict[str, Any]:
    """Predictions of one configuration, terms with their source.

    Args:
        one: the configuration.
        job: the run.
        gpus: number of GPUs.
        hardware: their kind.
        price: of one GPU for an hour, in any currency.
    """
    tokens, steps = job.config.total_tokens, job.config.train_steps
    seconds, moved = one.time.seconds, asdict(one.time.traffic)
    hours = steps * seconds / 3600
    _, workspace = activation_parts(one.config, job.student, job.teacher, gpus // one.config.parallel.model_parallel_size)
    workspace["update"] = update_bytes(one.config, job.student)
    known = "MEASURED" if hardware.measured else "ESTIMATED"

    def source(term: str) -> Source:
        """Say whether the term's rate was measured on this hardware."""
        if term in ("bubble", "pipeline", "launch", "expert", "muon") or not hardware.measured:
            return "ESTIMATED"
        node = gpus <= hardware.gpus_per_node
        return "MEASURED" if node or term not in ("tensor", "context", "data") else "ESTIMATED"

    made = {
        "gpu": hardware.name,
        "gpus": gpus,
        "data_parallel": gpus // one.config.parallel.model_parallel_size,
        "micro_batches": one.time.micro_batches,
        "settings": one.settings(),
        "fits": one.memory.total <= MARGIN * hardware.memory_gib * GIB,
        "memory_gib": {
            term: {
                "value": value / GIB,
                "source": "COUNTED" if term in COUNTED_MEMORY else "ESTIMATED" if term == "graphs" else known,
            }
            for term, value in asdict(one.memory).items()
            if value or term != "graphs"
        },
        "peak_gib": one.memory.total / GIB,
        "workspace_gib": {
            part: value / GIB for part, value in workspace.items()
        },  # one after the other: `passing` is the largest
        "received_gb": {
            term: {"value": value / 1e9, "source": "COUNTED"} for term, value in moved.items() if term != "context_forward"
        },
        "seconds": {term: {"value": value, "source": source(term)} for term, value in one.time.terms.items()},
        "step_seconds": seconds,
        "bubble_percent": 100 * one.time.terms["bubble"] / seconds,
        "tokens_per_second": one.tokens_per_second,
        "mfu_percent": 100 * one.time.flops / seconds / gpus / hardware.peak(),
        "steps": steps,
        "tokens": tokens,
        "hours": hours,
        "gpu_hours": hours * gpus,
        "energy_kwh": hours * gpus * hardware.watts / 1000,
    }
    return made | ({"price": hours * gpus * price} if price is not None else {})


def describe_search(found: Found, gpus: int, job: Job) -> dict[str, Any]:
    """Fastest configurations, and why the others fall out."""
    slowest = found.best[-1].time.seconds if found.best else 0.0
    return {
        "best": [
            {
                "settings": one.settings(),
                "data_parallel": gpus // one.config.parallel.model_parallel_size,
                "step_seconds": one.time.seconds,
                "tokens_per_second": one.tokens_per_second,
                "hours": job.config.train_steps * one.time.seconds / 3600,
                "peak_gib": one.memory.total / GIB,
            }
            for one in found.best
        ],
        "tried": found.tried,
        "too_large": found.too_large,
        "smallest_too_large_gib": found.nearest,
        "slower": found.slower,
        "slower_than_seconds": slowest,
        "refused": dict(found.refused.most_common()),
    }


def describe_inference(job: Job, hardware: Hardware) -> dict[str, Any]:
    """Longest context, batch and speed of the student and of its dense base on one GPU."""
    return {
        name: {
            "longest_context": longest_context(shape, hardware),
            "by_length": [asdict(row) for row in serving(shape, hardware)],
        }
        for name, shape in (("hybrid", job.student), ("dense", dense_base(job.student)))
    }


def assumptions(job: Job, hardware: Hardware, rates: Path | None = None) -> list[str]:
    """Sentences on what the figures rest on."""
    where = (
        "H100 and H200" if hardware.measured else f"H100 and H200, their shares of the data sheet assumed for {hardware.name}"
    )
    told = [f"of these rates {rates} replaces some with this machine's"] if rates else []
    told = [
        f"rates are shares of the data sheet, measured on {where} (plan/rates.yaml); how far predictions were from "
        "measured steps and peaks: benchmarks/results/plan_accuracy.md",
        f"{hardware.gpus_per_node} GPUs a node, {hardware.link_gb_s:g} GB/s between them, {hardware.network_gb_s:g} GB/s a GPU "
        "between nodes; communication is not overlapped with computing",
        f"a configuration fits where its peak is below {100 * MARGIN:.0f} % of {hardware.memory_gib:g} GiB",
        "hours are of steps alone: no start, compilation, evaluation, checkpoints or failures",
        f"energy is the GPUs' power limit ({hardware.watts:g} W) for all of that time",
        *told,
    ]
    if any(model.has_experts for model in (job.student, job.teacher) if model):
        told.append(
            "mixtures of experts are not measured: their products at the rate of others, tokens spread evenly over experts"
        )
    if job.config.optimizer.name == "muon":
        told.append(
            "Muon's update is not measured: its products are counted, at the rate of others, its other passes as AdamW's"
        )
    if job.remote_teacher:
        told.append("the teacher's outputs come from elsewhere as fast as they are needed")
    return told


def _layer_name(symbol: str) -> str:
    return "output head" if symbol == "head" else (get_mlp(symbol) if symbol in MLPS else get_mixer(symbol)).name
