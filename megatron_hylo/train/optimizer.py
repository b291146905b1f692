"""Megatron-Core's data-parallel wrapper, optimizer and schedule, set up the way upcycling needs them."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import USING_APEX_OPTIMIZER, DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.models.transformer_config import HyloTransformerConfig
from megatron_hylo.plan.muon import ITERATIONS
from megatron_hylo.train.multi_tensor import copy_weights_together, fuse_adamw, use_foreach_functions
from megatron_hylo.train.muon import FP32_PARAMETERS, build_muon
from megatron_hylo.train.optimizer_offload import OffloadedState

logger = logging.getLogger("megatron_hylo.train")
MIXER_PARAMETERS = "*.self_attention.*"
COPIES = "fp32_from_fp16_params"  # Megatron-Core's key of the fp32 copies of bf16 weights in a state, by group


@dataclass
class TrainingState:
    """A student in training: its data-parallel wrappers (one a virtual pipeline stage), optimizer and schedule."""

    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    take_step: Callable[[], tuple[bool, Tensor | float | None, int | None]]  # the optimizer's step, or its CUDA graph
    offloaded: OffloadedState | None = None  # the optimizer's state, where it is on the CPU between steps
    capturable: bool = False  # whether the update reads all that changes from step to step from tensors that stay

    @property
    def chunks(self) -> list[HyloModel]:
        """The chunks inside their data-parallel wrappers."""
        return [wrapper.module for wrapper in self.wrapped]

    @property
    def config(self) -> HyloTransformerConfig:
        """Transformer config shared by all model chunks."""
        return self.wrapped[0].module.config

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the optimizer's state is on the device, to be read or changed."""
        return self.offloaded.resident() if self.offloaded else contextlib.nullcontext()

    def update(self) -> Tensor | float:
        """Take the optimizer's step; returns the norm of all gradients before clipping, a number or a tensor of one."""
        with self.resident():
            norm = self.take_step()[1]
        return 0.0 if norm is None else norm

    @contextlib.contextmanager
    def portable(self) -> Iterator[None]:
        """Context for saving and loading: the optimizer's state is on the device and its settings are plain numbers."""
        with self.resident(), plain_numbers(self.optimizer):
            yield

    def learning_rates(self) -> dict[str, float]:
        """Return the current learning rate of each group: {"rest": ..., "mixers": ...}."""
        rates = {}
        for group in self.optimizer.param_groups:
            name = "mixers" if group.get("max_lr") != self.scheduler.max_lr else "rest"
            rates[name] = self.scheduler.get_lr(group)  # the group's own may be a tensor, which the GPU has to be asked for
        return rates


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Optimizers that an update consists of.

    AdamW is one, and under expert parallelism another one for the experts, last; for Muon's see `build_muon`.
    """
    return list(optimizer.chained_optimizers)


def is_expert_parallel(parameter: Tensor) -> bool:
    """Whether a parameter is divided over expert-parallel ranks, so that fewer ranks have the same (Megatron's `allreduce`)."""
    return not getattr(parameter, "allreduce", True)


def rates_as_tensors(optimizer: MegatronOptimizer) -> None:
    """Turn each group's learning rate into an fp32 tensor [] beside its parameters, which the schedule fills.

    Transformer Engine's Adam has such tensors by itself where it can be captured.
    """
    for group in (group for part in optimizer_parts(optimizer) for group in part.param_groups):
        if group["params"] and not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)


@contextlib.contextmanager
def plain_numbers(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Context in which learning rates and step counts that are tensors are numbers; afterwards the tensors have the new values.

    So checkpoints with and without captured updates are alike.
    """
    parts = optimizer_parts(optimizer)
    tensors = [
        {name: x for name in ("lr", "step") if isinstance(x := group.get(name), Tensor)}
        for part in parts
        for group in part.param_groups
    ]
    for group, found in zip((group for part in parts for group in part.param_groups), tensors):
        group |= {name: x.item() for name, x in found.items()}
    yield
    for group, found in zip((group for part in parts for group in part.param_groups), tensors):  # loading makes new groups
        group |= {name: x.fill_(group[name]) for name, x in found.items()}


def choose_trainable(chunks: Sequence[HyloModel], config: TrainConfig) -> None:
    """Freeze parameters that the stage does not train: all but the mixers on request; in `align`, embedding and head always.

    Stage 1 feeds every layer the teacher's hidden state, so nothing there could give those two a gradient; and its
    losses but `ild` end at the mixers' outputs, so there all but the mixers are frozen whatever `trainable` says.
    """
    align = config.stage == "align"
    mixers_only = config.trainable == "mixers" or (align and config.align.loss != "ild")
    for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
        outside = name.startswith(("embedding.", "output_layer."))
        parameter.requires_grad = ".self_attention." in name or not (mixers_only or (align and outside))


def build_training_state(chunks: Sequence[HyloModel], config: TrainConfig) -> TrainingState:
    """Wrap a model for data-parallel training with fp32 gradients and fp32 master weights.

    Args:
        chunks: this rank's part, with `requires_grad` set.
        config: optimizer settings, number of steps, precision.
    """
    settings = config.optimizer
    transformer_config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=settings.use_distributed_optimizer, overlap_grad_reduce=False
    )
    wrapped = [DistributedDataParallel(transformer_config, ddp_config, chunk) for chunk in chunks]
    for wrapper in wrapped:
        wrapper.broadcast_params()
    # offloaded state has another place at every step; with Apex the gradient norm is a number in Python
    capturable = config.cuda_graphs and not settings.offload and not USING_APEX_OPTIMIZER
    bf16 = config.precision == "bf16"
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=transformer_config.params_dtype,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        optimizer_cuda_graph=capturable,
        muon_momentum=settings.muon_momentum,
        muon_nesterov=True,
        muon_num_ns_steps=ITERATIONS,
        muon_split_qkv=False,
        muon_scale_mode="spectral",
        muon_extra_scale_factor=settings.muon_extra_scale_factor,
        muon_fp32_matmul_prec="medium" if bf16 else "highest",  # of its matrix products: medium is bf16
        muon_tp_mode="duplicated",  # the whole matrix on every tensor-parallel rank, so that their number changes nothing
    )
    # Megatron's own rule first (no weight decay on biases and one-dimensional tensors), then ours.
    overrides = dict(get_standard_config_overrides(optimizer_config))
    overrides[ParamKey(name="*.rotary_mix")] = ParamGroupOverride(wd_mult=0.0)  # a part of MLA's q/k-norm
    # fp32 parameters in groups of their own: the distributed optimizer's checkpoints mix up groups of two dtypes.
    overrides[ParamKey(name=FP32_PARAMETERS)] = ParamGroupOverride(start_wd=0.0, end_wd=0.0)
    if settings.mixer_lr is not None and settings.mixer_lr != settings.lr:
        group = ParamGroupOverride(max_lr=settings.mixer_lr, min_lr=settings.mixer_lr * settings.min_lr_ratio)
        overrides[ParamKey(name=MIXER_PARAMETERS)] = group
    use_foreach_functions()
    build = build_muon if settings.name == "muon" else get_megatron_optimizer
    optimizer = build(optimizer_config, wrapped, config_overrides=overrides)
    fuse_adamw(part.optimizer for part in optimizer_parts(optimizer))
    copy_weights_together(optimizer_parts(optimizer))
    if capturable:
        rates_as_tensors(optimizer)
    no_sync = [wrapper.no_sync for wrapper in wrapped]
    transformer_config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    offloaded = OffloadedState(optimizer, chunks) if settings.offload else None
    scheduler = _scheduler(optimizer, settings, config.train_steps)
    return TrainingState(wrapped, optimizer, scheduler, optimizer.step, offloaded, capturable)


def allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Allocate the moments of a fresh optimizer, all zero, for a checkpoint to be loaded into.

    Megatron-Core does so itself except for torch's AdamW, whose empty state its distributed optimizer refuses.
    """
    for part in optimizer_parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):
            for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                zeros = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0)} | zeros


def number_copies(state: dict[Any, Any]) -> None:
    """Key the fp32 copies in an optimizer's state by their group's number; of a list an empty group would vanish in the file.

    Args:
        state: of an optimizer or of each of its parts; `_load_part` undoes it.
    """
    for part in [state, *state.values()]:
        if isinstance(part, dict) and COPIES in part:
            part[COPIES] = {number: group for number, group in enumerate(part[COPIES]) if group}


def counts_on_cpu(state: dict[Any, Any]) -> None:
    """Move the counts of steps in an optimizer's state to the CPU, where checkpoints have them; a fused AdamW's are on the GPU.

    Args:
        state: of an optimizer or of each of its parts, changed; Megatron-Core has one count for all parameters of a part.
    """
    for key, value in state.items():
        if isinstance(value, dict):
            counts_on_cpu(value)
        elif key == "common_step" and isinstance(value, Tensor):
            state[key] = value.cpu()


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Load moments and step count of an optimizer; settings stay those of this start.

    The resume check has compared them, and Megatron-Core would find no group whose settings were changed on purpose.

    The distributed optimizer's own loading fails on the "step" of torch's AdamW (Transformer Engine's has none) and
    shares one counter among all parameters, each of which would then advance it.
    """
    parts = optimizer_parts(optimizer)
    for part, state in zip(parts, _states_of_parts(loaded, len(parts)), strict=True):
        _load_part(part, state)


def _states_of_parts(loaded: dict[Any, Any], count: int) -> list[dict[str, Any]]:
    """Divide a loaded state among an optimizer's parts; it may be of another number of parts, whose moments have the same keys.

    Groups of parameters differ then: every part gets one with the step count, which is the same for all.
    """
    parts = [loaded] if count == 1 else [loaded[number] for number in range(count)]
    saved = sum(isinstance(key, int) for key in loaded) or 1
    if count > 1 and ("param_groups" in loaded or "optimizer" in loaded):  # numbers are those that were asked for
        saved = 1
    if saved == count:
        return parts
    first = loaded if saved == 1 else loaded[0]
    groups = (first["optimizer"] if "optimizer" in first else first)["param_groups"]
    step = {"step": groups[0]["step"]} if "step" in groups[0] else {}
    found = [{name: part[name] for name in ("param_state", "state") if name in part} | {"step": step} for part in parts]
    if "common_step" in (plain := first.get("state", {})):  # of the plain optimizer, beside its moments
        for part in found:
            part["state"] = part["state"] | {"common_step": plain["common_step"]}
    return found


def _load_part(part: Any, loaded: dict[str, Any]) -> None:
    mine = part.param_groups
    distributed = isinstance(part, DistributedOptimizer)
    if (step := loaded.pop("step", None)) is None:
        groups = loaded.get("optimizer", loaded)["param_groups"]
    else:
        numbers = [{"params": group["params"]} for group in part.optimizer.state_dict()["param_groups"]]
        groups = [({} if distributed else numbered) | step for numbered in numbers]
        loaded |= {"optimizer": {"param_groups": groups}} if distributed else {"param_groups": groups}
    # Transformer Engine counts no steps of a group without parameters, which another pipeline stage may have
    counts = [{"step": group["step"]} for group in groups if "step" in group]
    for saved, own in zip(groups, mine, strict=True):
        kept = (counts[0] if counts else {}) | {name: saved[name] for name in ("params", "step") if name in saved}
        saved.clear()
        saved |= {name: value for name, value in own.items() if name not in ("params", "step")} | kept
    if COPIES in loaded:  # as `number_copies` has them
        loaded[COPIES] = [loaded[COPIES].get(number, []) for number in range(len(mine))]
    if not (distributed and isinstance(part.optimizer, torch.optim.Adam)):
        part.load_state_dict(loaded)
        return
    moments = loaded.pop("param_state")
    part.load_state_dict(loaded)
    steps = [(state, state.pop("step").clone()) for state in part.optimizer.state.values()]
    part.load_parameter_state_from_fully_reshardable(moments)
    for state, count in steps:
        state["step"] = count


def load_schedule(scheduler: OptimizerParamScheduler, saved: dict[str, Any]) -> None:
    """Set a schedule to the step of a saved one, with this start's settings; warn where they give another learning rate."""
    before = copy.copy(scheduler)
    for name in ("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "num_steps"):
        setattr(before, name, saved[name])
    scheduler.load_state_dict(saved)
    if (now := scheduler.get_lr({})) != (then := before.get_lr({})):
        logger.warning(
            "learning rate at step %d: %.3g, where the schedule so far has %.3g (now warm-up to step %d, cosine to step %d)",
            scheduler.num_steps, now, then, scheduler.lr_warmup_steps, scheduler.lr_decay_steps,
        )  # fmt: skip


def _scheduler(optimizer: MegatronOptimizer, settings: OptimizerSettings, steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        lr_warmup_steps=min(round(steps * settings.warmup_ratio), steps - 1) if steps > 1 else 0,
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,  # the resume check has compared the settings
        override_opt_param_scheduler=True,
    )
