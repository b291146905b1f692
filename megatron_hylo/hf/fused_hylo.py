"""Fewer and larger kernels for decoding on a GPU: all projections of one tensor in one product, with what follows it.

A decode step at batch 1 reads every weight once; what small kernels between the products take comes on top of that.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hylo.kernels.elementwise import on_request
from megatron_hylo.kernels.matvec import matvec
from megatron_hylo.kernels.norm import rms_norm

from .quantised_hylo import HyloScaledLinear

Weight = tuple[Tensor, Tensor | None]  # of a map, and the scales of its rows where it is in FP8


@on_request
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up, elementwise; all three [..., channels]."""
    return F.silu(gate) * up


@on_request
def add_and_normalise(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + added [..., channels], and its RMSNorm with `weight` [channels]."""
    x = x + added
    return x, rms_norm(x, weight, eps)


def one_vector(x: Tensor) -> bool:
    """Whether x [batch, tokens, channels] is one token of one sequence, on a GPU and without gradients."""
    return x.is_cuda and x.numel() == x.shape[-1] and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Apply a linear map to x [batch, tokens, channels] and add the residual; one kernel for one vector on a GPU."""
    if one_vector(x) and (found := joined_weight([module])) is not None:
        return matvec(x, found[0], residual, scale=found[1])
    out = module(x)
    return out if residual is None else residual + out


def gated_linear(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """Compute silu(gate(x)) * up(x) of x [batch, tokens, channels]: [batch, tokens, rows of each map].

    One kernel does it for one vector on a GPU where the weights lie behind each other.
    """
    if one_vector(x) and (found := joined_weight([gate, up])) is not None:
        return matvec(x, found[0], swiglu=True, scale=found[1])
    return swiglu(*project(x, [[gate], [up]]))


def joined_weight(modules: Sequence[nn.Module]) -> Weight | None:
    """Return the weight of maps that lie behind each other in memory, as one; None where they do not, or are more than maps."""
    weights = plain_weights(modules)
    weight = None if weights is None else side_by_side(weights)
    if weight is None:
        return None
    scales = [module.weight_scale for module in modules if isinstance(module, HyloScaledLinear)]
    if not scales:
        return weight, None
    scale = side_by_side(scales)
    return None if scale is None else (weight, scale)


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """Return tensors that lie behind each other in memory as one view, joined in their first dimension.

    Args:
        parts: [rows, ...] each.

    Returns:
        [all rows, ...]; None where they do not lie so, differ in more than their rows, a gradient is recorded or torch
        compiles.
    """
    first = parts[0]
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or len({(p.dtype, p.device, p.shape[1:]) for p in parts}) > 1:
        return None
    at, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.storage_offset() != at or part.untyped_storage().data_ptr() != storage:
            return None
        at += part.numel()
    return first.detach().as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


@torch.inference_mode(False)  # a weight made in that mode could not be trained any more
@torch.no_grad()
def put_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters behind each other in memory, where they are alike; their values and names stay."""
    alike = len({(p.dtype, p.device, p.shape[1:]) for p in parameters}) == 1
    if not alike or side_by_side(parameters) is not None:
        return
    numbers = [p.detach() for p in parameters]
    if numbers[0].element_size() == 1:  # not every device joins float8
        whole = torch.cat([part.view(torch.uint8) for part in numbers]).view(numbers[0].dtype)
    else:
        whole = torch.cat(numbers)
    for parameter, part in zip(parameters, whole.split([len(p) for p in parameters])):
        parameter.data = part


def join(modules: Sequence[nn.Module]) -> None:
    """Put the weights of maps of the same input behind each other in memory: those of bf16 together, and those of FP8."""
    for run in _runs(modules, type):
        if (weights := plain_weights(run)) is not None:
            put_side_by_side(weights)
            put_side_by_side([module.weight_scale for module in run if isinstance(module, HyloScaledLinear)])


def _runs(items: Iterable[Any], kind: Callable[[Any], type]) -> list[list[Any]]:
    """Divide items into neighbours of the same kind."""
    return [list(run) for _, run in itertools.groupby(items, kind)]


def project(x: Tensor, groups: Sequence[Sequence[nn.Module]]) -> list[Tensor]:
    """Apply linear maps without biases to x; the outputs of each group are put side by side.

    Args:
        x: [batch, tokens, channels].
        groups: modules, nn.Linear or what has taken its place.

    Returns:
        A tensor [batch, tokens, channels of the group] for each group; parts of one product for one token where the weights
        lie behind each other.
    """
    if x.shape[1] == 1 and (found := _project_token(x, groups)) is not None:
        return found
    return [torch.cat([m(x) for m in group], -1) if len(group) > 1 else group[0](x) for group in groups]


def _project_token(x: Tensor, groups: Sequence[Sequence[nn.Module]]) -> list[Tensor] | None:
    """`project` of one token by one product for each kind of weights; None where weights do not lie behind each other."""
    outputs: list[Tensor] = []
    for run in _runs(groups, lambda group: type(group[0])):
        if (found := joined_weight([module for group in run for module in group])) is None:
            return None
        weight, scale = found
        out = matvec(x, weight, scale=scale) if one_vector(x) or scale is not None else F.linear(x, weight)
        outputs += out.split([sum(len(module.get_parameter("weight")) for module in group) for group in run], -1)
    return outputs


def plain_weights(modules: Sequence[nn.Module]) -> list[nn.Parameter] | None:
    """Return the weights of maps that are no more than those: no adapter, other quantisation, bias or hook; None otherwise."""
    found = []
    for module in modules:
        kind = type(module) in (nn.Linear, HyloScaledLinear)
        plain = kind and module.bias is None and type(module.weight) is nn.Parameter
        if not plain or "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
        found.append(module.weight)
    return found  # type: ignore[return-value]
