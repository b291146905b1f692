"""Megatron-Core's Muon for the matrices of mixers and MLPs, AdamW for everything else."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import batched
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    HAVE_EMERGING_OPTIMIZERS,
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    get_megatron_optimizer,
)
from megatron.core.optimizer.emerging_optimizers import (
    _EMERGING_OPTIMIZERS,
    EmergingOptimizerEntry,
    TensorParallelMuon,
    _muon_config_to_kwargs,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.mixers import MIXERS
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.plan.muon import TOGETHER, check_muon_shape

FP32_PARAMETERS = tuple(sorted({f"*.{name}" for mixer in MIXERS.values() for name in mixer.fp32_parameters}))
NO_MATRICES = (".rotary_mix", *(name.removeprefix("*") for name in FP32_PARAMETERS))  # though some have two dimensions
NAME = "hylo_muon"  # in Megatron-Core's registry


class BatchedMuon(TensorParallelMuon):
    """Megatron-Core's Muon with the matrices of one shape orthogonalised together.

    A hybrid has tens of layers of few shapes, and small products, one after the other, take longer to launch than to compute.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update all matrices that have a gradient: weight decay, momentum, orthogonalised steps.

        Args:
            closure: unsupported, None.
        """
        ranks = get_pg_size(self.pg_collection.tp)
        for group in self.param_groups:
            self._init_group(group)
            matrices = [p for p in group["params"] if p.grad is not None]
            if not matrices:
                continue
            gradients, moments = [p.grad for p in matrices], [self.state[p]["momentum_buffer"] for p in matrices]
            torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
            alike = defaultdict[tuple[Any, ...], list[tuple[Tensor, Tensor, Tensor]]](list)
            for p, gradient, moment in zip(matrices, gradients, moments, strict=True):
                alike[*p.shape, getattr(p, "partition_dim", -1) if ranks > 1 else -1].append((p, gradient, moment))
            for (rows, columns, divided), found in alike.items():
                whole = rows * columns * (1 if divided == -1 else ranks)
                for batch in batched(found, max(1, TOGETHER // whole)):
                    self._take(batch, None if divided == -1 else divided, group)

    def _take(self, batch: Sequence[tuple[Tensor, Tensor, Tensor]], divided: int | None, group: dict[str, Any]) -> None:
        """Take steps of matrices of one shape, which tensor-parallel ranks divide by dimension `divided`.

        Args:
            batch: matrices [rows, columns], their gradients and new momenta; updates are made of these alone, for less memory.
            divided: None: every rank has them whole.
            group: its "lr", a number or a tensor [], "weight_decay", and "momentum", that one's weight in Nesterov's update.
        """
        from emerging_optimizers.utils import fp32_matmul_precision

        matrices, gradients, moments = zip(*batch, strict=True)
        updates = torch.stack(torch._foreach_lerp(gradients, moments, group["momentum"]) if self.nesterov else moments)
        dimension = None if divided is None else divided - 2  # from the end, as the matrices are stacked
        with fp32_matmul_precision(self.fp32_matmul_prec):
            steps = self.scaled_orthogonalize_fn(updates, self.pg_collection.tp, dimension)
        steps = steps.contiguous()  # tall matrices come transposed, which foreach functions take one by one
        if group["weight_decay"]:  # decoupled, as the optimizer's settings have it
            torch._foreach_add_(steps.unbind(), matrices, alpha=group["weight_decay"])
        steps *= group["lr"]
        torch._foreach_sub_(matrices, steps.unbind())


_EMERGING_OPTIMIZERS[NAME] = EmergingOptimizerEntry(optimizer_cls=BatchedMuon, config_to_kwargs=_muon_config_to_kwargs)


def check_muon(config: TrainConfig, shapes: Sequence[ModelConfig]) -> None:
    """Refuse `optimizer.name muon` where it does not work, before models are read.

    Args:
        config: settings of the run.
        shapes: its models, the student first.

    Raises:
        ConfigError: the package that has Muon is not installed, or the student has experts.
    """
    if config.optimizer.name != "muon":
        return
    if not HAVE_EMERGING_OPTIMIZERS:
        raise ConfigError(
            "optimizer.name muon needs the package emerging-optimizers: pip install 'megatron-hylo[muon]', or set it to adamw"
        )
    if shapes:
        check_muon_shape(shapes[0])


def build_muon(
    config: OptimizerConfig, wrapped: list[DistributedDataParallel], config_overrides: dict[ParamKey, ParamGroupOverride]
) -> MegatronOptimizer:
    """Build Muon, and AdamW for what is no matrix; bf16 training has a third part, AdamW for fp32 parameters.

    Those are apart since Megatron-Core's optimizer of bf16 weights cannot save the state of fp32 ones beside them.

    Args:
        config: AdamW's settings and those of `muon_...`.
        wrapped: this rank's chunks.
        config_overrides: settings of groups of parameters.
    """
    config = replace(config, optimizer=NAME)
    for name, p in (named for wrapper in wrapped for named in wrapper.named_parameters()):
        if name.endswith(NO_MATRICES):
            p.is_embedding_or_output_parameter = True  # Megatron-Core's mark of a matrix that AdamW has
    if not config.bf16:
        return get_megatron_optimizer(config, wrapped, config_overrides=config_overrides)
    trained = [p for wrapper in wrapped for p in wrapper.parameters() if p.requires_grad]
    parts: list[Any] = []
    for fp32, settings in ((False, config), (True, replace(config, optimizer="adam", bf16=False))):
        for p in trained:  # Megatron-Core takes what has requires_grad
            p.requires_grad = (p.dtype == torch.float32) == fp32
        parts += get_megatron_optimizer(settings, wrapped, config_overrides=dict(config_overrides)).chained_optimizers
    for p in trained:
        p.requires_grad = True
    parts = [part for part in parts if not part.is_stub_optimizer]  # alike on all ranks: whether any has fp32 parameters
    for part in parts:
        part.config = config  # as Megatron-Core chains Muon and AdamW
    return ChainedOptimizer(parts)
