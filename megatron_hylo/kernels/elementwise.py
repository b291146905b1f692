"""What layers do element by element, as one GPU kernel each way: torch.compile writes it. On a CPU the function as it is.

Eagerly, a rotation or a gated norm of bf16 tensors takes a dozen kernels, each of which reads and writes all of them, in fp32.
For training, where shapes stay: a new shape is compiled anew, which takes seconds.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_hylo.kernels.registry import library_obstacle, select

RECOMPILATIONS = 64  # of a function, for other shapes and dtypes; torch's own limit, 8, is less than the models of a run need


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled where its first argument, a tensor, is on a GPU: operation `elementwise` of the registry."""

    @functools.wraps(function)
    def run(x: torch.Tensor, *args: Any, **settings: Any) -> Any:
        obstacle = library_obstacle("torch.compile", "triton", x, "pip install triton")
        if select("elementwise", "inductor", obstacle) == "torch":
            return function(x, *args, **settings)
        return _compiled(function)(x, *args, **settings)

    return run


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """When first needed: torch's compiler takes a second to import."""
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, RECOMPILATIONS)
    return torch.compile(function, dynamic=False)  # else the second shape, and all after, get a slower kernel for any
