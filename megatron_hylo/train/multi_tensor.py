"""All of an optimizer's tensors at once: copies to weights, and without Transformer Engine and Apex norm, clipping, AdamW."""

from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

FUSED_ON = ("cuda",)  # devices; on others torch's AdamW goes on tensor by tensor, whose last bits differ


def fuse_adamw(optimizers: Iterable[Any]) -> None:
    """Have torch's AdamW update all tensors of a GPU by one kernel, with the counts of steps on the GPU too.

    By default it has one count a tensor on the CPU and computes each one's bias corrections in Python, 3 ms an update of 208
    tensors. Moments, counts and checkpoints are as before; updates differ by rounding.

    Args:
        optimizers: before their first step; others than torch's AdamW stay, as do groups with a tensor elsewhere.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.AdamW):
            for group in optimizer.param_groups:
                if all(p.device.type in FUSED_ON for p in group["params"]):
                    group["fused"] = True


def copy_weights_together(parts: Iterable[Any]) -> None:
    """Have Megatron-Core's optimizers copy all fp32 parameters to bf16 weights at once after an update, not one by one.

    Of an update's 320 operators of a 135M hybrid that was 251 with Muon and 295 with AdamW. What is copied stays the same; fp32
    weights are updated themselves.

    Args:
        parts: Megatron-Core's optimizers.
    """
    for part in (part for part in parts if not part.is_stub_optimizer):  # which has no parameter on this rank
        if isinstance(part, DistributedOptimizer):
            weights, copies = part.shard_float16_groups, part.shard_fp32_from_float16_groups
        elif isinstance(part, megatron_optimizer.Float16OptimizerWithFloat16Params):
            weights, copies = part.float16_groups, part.fp32_from_float16_groups
        else:
            continue
        both = [list(chain.from_iterable(copies)), [p.data for p in chain.from_iterable(weights)]]
        part._copy_main_params_to_model_params = partial(scale, 0, None, both, 1.0)


def use_foreach_functions() -> None:
    """Replace Megatron-Core's own functions on lists of tensors by torch's.

    Its norm waits for the GPU once a tensor, and its scaling starts two kernels a tensor: of a small model's update that is
    most of the time. With a function that scales by a tensor it also leaves the norm on the GPU, so that nothing waits for it
    and an update can be captured. Those of Transformer Engine and Apex stay.
    """
    if clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm:  # a library's, or ours already
        return
    clip_grads.l2_norm_impl = l2_norm
    clip_grads.multi_tensor_scale_impl = clip_grads.multi_tensor_scale_tensor_impl = scale
    megatron_optimizer.multi_tensor_scale_impl = scale


def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *args: Any) -> Any:
    """Norm of all tensors of the first list together, with the arguments of Apex's function of this name.

    Args:
        chunk_size, noop_flag, per_tensor, args: ignored.
        tensor_lists: one list, of at least one tensor.

    Returns:
        The norm [1], in the tensors' dtype and on their device, and None: no norm of each.
    """
    return torch.nn.utils.get_total_norm(tensor_lists[0]).reshape(1), None


def scale(chunk_size: int, noop_flag: Any, tensor_lists: list[list[Tensor]], factor: float | Tensor) -> None:
    """Write tensors times a factor into others, with the arguments of Apex's multi_tensor_scale.

    Args:
        chunk_size, noop_flag: ignored.
        tensor_lists: sources and targets, of the same shapes; they may be the same list, and their dtypes may differ.
        factor: a number, or a tensor [1] on the targets' device; rounded products are in the targets' dtype; Megatron-Core has
            1.0 where the dtypes differ.
    """
    sources, targets = tensor_lists
    if not targets:
        return
    if targets is not sources:
        torch._foreach_copy_(targets, sources)
    if isinstance(factor, Tensor):
        torch._foreach_mul_(targets, factor.reshape(()))
    elif factor != 1.0:
        torch._foreach_mul_(targets, factor)
