"""All of an optimizer's tensors at once, where Transformer Engine and Apex are not installed: norm, clipping, copies, AdamW."""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
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


def scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], factor: float | Tensor) -> None:
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
