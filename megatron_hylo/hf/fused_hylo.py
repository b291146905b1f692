"""Fewer and larger kernels for decoding on a GPU: all projections of one tensor in one product, with what follows it.

A decode step at batch 1 reads every weight once; what small kernels between the products take comes on top of that.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hylo.kernels.elementwise import on_request
from megatron_hylo.kernels.matvec import matvec
from megatron_hylo.kernels.norm import rms_norm


@on_request
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up."""
    return F.silu(gate) * up


@on_request
def add_and_normalise(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute x + added and its RMSNorm."""
    x = x + added
    return x, rms_norm(x, weight, eps)


def one_vector(x: Tensor) -> bool:
    """Whether x [batch, tokens, channels] is one token of one sequence, on a GPU and without gradients."""
    return x.is_cuda and x.numel() == x.shape[-1] and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Apply a linear map to x [batch, tokens, channels] and add the residual; one kernel for one vector on a GPU."""
    if one_vector(x) and (weights := plain_weights([module])) is not None:
        return matvec(x, weights[0].detach(), residual)
    out = module(x)
    return out if residual is None else residual + out


def gated_linear(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """Compute silu(gate(x)) * up(x); one kernel for one vector on a GPU where the weights lie behind each other."""
    if one_vector(x) and (weights := plain_weights([gate, up])) and (weight := side_by_side(weights)) is not None:
        return matvec(x, weight, swiglu=True)
    return swiglu(*project(x, [[gate], [up]]))


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """Return tensors that lie behind each other in memory as one, joined in their first dimension; None where they do not."""
    first = parts[0]
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or len({(p.dtype, p.device, p.shape[1:]) for p in parts}) > 1:
        return None
    at, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.storage_offset() != at or part.untyped_storage().data_ptr() != storage:
            return None
        at += part.numel()
    return first.detach().as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


@torch.no_grad()
def put_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters behind each other in memory, where they are alike; their values and names stay."""
    if len({(p.dtype, p.device, p.shape[1:]) for p in parameters}) > 1 or side_by_side(parameters) is not None:
        return
    whole = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, whole.split([len(p) for p in parameters])):
        parameter.data = part


def project(x: Tensor, groups: Sequence[Sequence[nn.Module]]) -> list[Tensor]:
    """Apply linear maps without biases to x; the outputs of each group are put side by side.

    Args:
        x: [batch, tokens, channels].
        groups: modules, nn.Linear or what has taken its place.

    Returns:
        A tensor [batch, tokens, channels of the group] for each group; parts of one product for one token where the weights
        lie behind each other.
    """
    modules = [module for group in groups for module in group]
    if x.shape[1] == 1 and (plain := plain_weights(modules)) and (weight := side_by_side(plain)) is not None:
        widths = [sum(len(module.get_parameter("weight")) for module in group) for group in groups]
        out = matvec(x, weight) if one_vector(x) else F.linear(x, weight)
        return list(out.split(widths, -1))
    return [torch.cat([m(x) for m in group], -1) if len(group) > 1 else group[0](x) for group in groups]


def plain_weights(modules: Sequence[nn.Module]) -> list[nn.Parameter] | None:
    """Return the weights of maps that are no more than those: no adapter, quantisation, bias or hook; None otherwise."""
    found = []
    for module in modules:
        plain = type(module) is nn.Linear and module.bias is None and type(module.weight) is nn.Parameter
        if not plain or "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
        found.append(module.weight)
    return found  # type: ignore[return-value]
