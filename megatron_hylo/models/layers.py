"""Small layers shared by the mixers: norms, a replicated linear map, rotary tables, fused-projection checkpoints.

Gradients under tensor parallelism, the rules kept here:
  - a weight applied to tokens that sequence parallelism has split carries `sequence_parallel`, and Megatron-Core
    sums its gradient over the tensor-parallel ranks (RMSNorm, ReplicatedLinear);
  - a weight shared by heads that tensor parallelism has split gets its gradient summed here, in the backward of
    `copy_to_tensor_model_parallel_region` (HeadNorm).
"""

from functools import lru_cache
from typing import Any

import torch
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn

from megatron_hylo.config import RopeScaling
from megatron_hylo.kernels.elementwise import elementwise
from megatron_hylo.kernels.norm import gated_rms_norm, rms_norm
from megatron_hylo.kernels.residual_norm import rms_norm_and_residual
from megatron_hylo.kernels.rope import rope_cos_sin, rope_frequencies
from megatron_hylo.models.placement import weights_device

fused_gated_rms_norm = elementwise(gated_rms_norm)


def set_attributes(parameter: nn.Parameter, **attributes: object) -> None:
    """Set attributes that Megatron-Core reads from a parameter, e.g. `sequence_parallel`."""
    for name, value in attributes.items():
        setattr(parameter, name, value)


class _HiddenNorm(nn.Module):
    """Weight of a root-mean-square norm over the hidden dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=weights_device()))
        set_attributes(self.weight, sequence_parallel=config.sequence_parallel)


class RMSNorm(_HiddenNorm):
    """Root-mean-square norm over the hidden dimension; statistics in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [sequence, batch, hidden]; same shape and dtype out."""
        return rms_norm_and_residual(x, self.weight, self.eps)[0]


class ResidualRMSNorm(_HiddenNorm):
    """RMSNorm before a mixer or an MLP that also returns its input, for the residual connection."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x [sequence, batch, hidden] normalised, and x."""
        return rms_norm_and_residual(x, self.weight, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm over the channels of each head, one weight for all heads; optionally gated by silu(gate)."""

    def __init__(self, config: TransformerConfig, head_dim: int) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = nn.Parameter(torch.ones(head_dim, dtype=config.params_dtype, device=weights_device()))

    def forward(self, x: Tensor, gate: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Normalise x, then gate it (Gated DeltaNet's order); x, gate: [batch, sequence, heads ..., head_dim].

        Without a gate, `reference` [batch, sequence, heads, any] gives the mean square in place of x.
        """
        weight = copy_to_tensor_model_parallel_region(self.weight)
        if gate is None:
            return rms_norm(x, weight, self.eps, reference)
        return fused_gated_rms_norm(x, gate, weight, self.eps, norm_before_gate=True)


class WholeHeadKeyNorm(HeadNorm):
    """HeadNorm of MLA's keys, with `rotary_mix`: what each key head of this rank has of each rotary pair, [groups, pairs].

    `rotary_mix` is split over the tensor-parallel ranks as the key heads are, so its gradient needs no sum.
    """

    def __init__(self, config: TransformerConfig, head_dim: int, groups: int, pairs: int, tp_group: object) -> None:
        super().__init__(config, head_dim)
        self.tp_group = tp_group
        self.rotary_mix = tensor_parallel_parameter(
            torch.ones(groups, pairs, device=weights_device()), dtype=config.params_dtype
        )

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Sharded state dict; only `rotary_mix` is split over the tensor-parallel ranks."""
        group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        own = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            own, prefix, {"rotary_mix": 0}, sharded_offsets, tp_group=self.tp_group, dp_cp_group=group
        )


class ReplicatedLinear(nn.Module):
    """A linear map held whole by every tensor-parallel rank (MLA's down-projections); a bias starts at zero."""

    def __init__(self, in_features: int, out_features: int, config: TransformerConfig, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=config.params_dtype, device=weights_device()))
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):  # equal on all tensor-parallel ranks
                config.init_method(self.weight)
        zeros = torch.zeros(out_features, dtype=config.params_dtype, device=weights_device()) if bias else None
        self.bias = nn.Parameter(zeros) if zeros is not None else None
        for parameter in self.parameters():
            set_attributes(parameter, sequence_parallel=config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """Project x [sequence, batch, in_features] to [sequence, batch, out_features]."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


@lru_cache(maxsize=16)
def rotary_table(dim: int, base: float, scaling: RopeScaling, length: int, where: torch.device) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of positions 0..length-1: two fp32 tensors [length, dim / 2]; the last 16 tables are kept.

    Args:
        dim: rotary channels, even.
        base: of the frequencies (rope_theta).
        scaling: of the frequencies.
        length: positions.
        where: device.
    """
    inverse = rope_frequencies(dim, base, scaling).to(where)
    return rope_cos_sin(torch.arange(length, device=where), inverse, scaling.cos_sin_multiplier)


def tensor_parallel_parameter(data: Tensor, keep_fp32: bool = False, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter whose first dimension is this rank's slice, in the attributes that Megatron-Core reads.

    Args:
        data: [this rank's rows, ...].
        keep_fp32: float32 whatever `dtype` is, as A_log, dt_bias and D are kept.
        dtype: of the parameter; None: data's.
    """
    parameter = nn.Parameter(data.float() if keep_fp32 else data.to(dtype or data.dtype))
    set_attributes(parameter, tensor_model_parallel=True, partition_dim=0, partition_stride=1)
    return parameter


def sharded_mixer_state(
    module: nn.Module, prefix: str, offsets: tuple, metadata: dict | None, tp_group, splits: dict[str, dict[str, int]]
) -> dict:
    """Sharded state dict of a mixer whose fused tensors hold several tensor-parallel parts.

    Args:
        module: the mixer; its own parameters are tensor-parallel along dimension 0.
        prefix, offsets, metadata: as in Megatron-Core's `sharded_state_dict`.
        tp_group: tensor-parallel group.
        splits: for each fused tensor of this rank, e.g. "in_proj.weight": {"query": rows, "key": rows, ...}.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    own: dict = {}
    module._save_to_state_dict(own, "", keep_vars=True)
    state = make_sharded_tensors_for_checkpoint(
        own, prefix, {name: 0 for name in own}, offsets, tp_group=tp_group, dp_cp_group=metadata["dp_cp_group"]
    )
    for name, child in module.named_children():
        state.update(sharded_state_dict_default(child, f"{prefix}{name}.", offsets, metadata, tp_group=tp_group))
    for name, sections in splits.items():
        key = f"{prefix}{name}"
        state[key] = _split_tensor_factory(state[key], list(sections.values()), list(sections), 0)
    return state


class ChannelParallelModule(MegatronModule):
    """Base class of a mixer's part whose parameters are all split over the tensor-parallel ranks, by their first dimension."""

    def __init__(self, config: TransformerConfig, tp_group: Any) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Channels are split over the tensor-parallel ranks."""
        return sharded_mixer_state(self, prefix, sharded_offsets, metadata, self.tp_group, {})
