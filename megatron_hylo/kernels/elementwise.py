"""Elementwise functions compiled by torch.compile into one kernel for each pass on a GPU; unchanged on a CPU.

Eagerly, a rotation or a gated norm of bf16 tensors takes a dozen kernels, each of which reads and writes all of them, in fp32.
For training, where shapes stay: a new shape is compiled anew, which takes seconds. Where there are many (texts of all lengths,
whose teacher's outputs are stored) those after the first ones share a kernel for any shape, which takes up to twice as long.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_hylo.kernels.registry import library_unsupported, select

OWN_SHAPES = 16  # of a function
RECOMPILATIONS = 64  # of a function, for other shapes and dtypes; torch's own limit, 8, is less than the models of a run need


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled where its first argument, a tensor, is on a GPU: operation `elementwise` of the registry."""
    own: set[torch.Size] = set()  # shapes of the first argument that have a kernel of their own

    @functools.wraps(function)
    def run(x: torch.Tensor, *args: Any, **settings: Any) -> Any:
        """Call the function, or on a GPU a kernel: for the shape of x, or for any shape after the first OWN_SHAPES ones."""
        unsupported = library_unsupported("torch.compile", "triton", x, "pip install triton")
        if select("elementwise", "inductor", unsupported) == "torch":
            return function(x, *args, **settings)
        if len(own) < OWN_SHAPES:
            own.add(x.shape)
        return _compiled(function, x.shape not in own)(x, *args, **settings)

    return run


_requested = False


@contextlib.contextmanager
def compile_on_request() -> Iterator[None]:
    """Compile the functions of `on_request` in this block: worth its seconds where the same shapes come hundreds of times."""
    global _requested
    before, _requested = _requested, True
    try:
        yield
    finally:
        _requested = before


def on_request(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, compiled on a GPU inside `compile_on_request` where no gradients are asked for."""
    compiled = elementwise(function)

    @functools.wraps(function)
    def run(x: torch.Tensor, *args: Any, **settings: Any) -> Any:
        """Call the function, or its kernel where all that `on_request` asks for holds."""
        if not _requested or not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return function(x, *args, **settings)
        return compiled(x, *args, **settings)

    return run


@functools.cache
def _compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """Compile the function when first needed: torch's compiler takes a second to import."""
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, RECOMPILATIONS)
    return torch.compile(function, dynamic=dynamic)
