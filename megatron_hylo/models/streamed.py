"""Forward pass of a model without memory: each part has its weights only while it computes."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.platform.distributed import device


@contextlib.contextmanager
def loaded(model: HyloModel, part: str, read: Callable[[str], Tensor], dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """Context in which one part of a model without memory has its weights, on this rank's device.

    Args:
        model: whole, made by `skeleton`.
        part: name of a submodule: a layer, the embedding, the final norm.
        read: name of a parameter -> its value.
        dtype: to compute in, of all but those parameters that are kept in float32; as read by default.
    """
    module = model.get_submodule(part)
    _put(module, part, read, dtype)
    try:
        yield module
    finally:
        _take(module)


def _put(module: nn.Module, part: str, read: Callable[[str], Tensor], dtype: torch.dtype | None, *_: object) -> None:
    for name, parameter in list(module.named_parameters()):
        owner, last = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        value = read(f"{part}.{name}").to(device())
        kept = parameter.dtype == torch.float32
        owner._parameters[last] = nn.Parameter(value if dtype is None or kept else value.to(dtype), requires_grad=False)
    module.eval()


def _take(module: nn.Module, *_: object) -> None:
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def part_names(model: HyloModel) -> list[str]:
    """List the parts that compute one after another: the embedding, each mixer and MLP, the final norm."""
    return ["embedding", *(f"decoder.layers.{i}" for i in range(len(model.decoder.layers))), "decoder.final_norm"]


@contextlib.contextmanager
def streamed(model: HyloModel, read: Callable[[str], Tensor], dtype: torch.dtype | None = None) -> Iterator[HyloModel]:
    """Context in which a model without memory computes hidden states, with the weights of one part in memory at a time.

    Args:
        model, read, dtype: as of `loaded`; the output head is not loaded.
    """
    handles = []
    for part in part_names(model):
        module = model.get_submodule(part)
        handles.append(module.register_forward_pre_hook(partial(_put, module, part, read, dtype)))
        handles.append(module.register_forward_hook(partial(_take, module), always_call=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
