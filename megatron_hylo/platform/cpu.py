"""Patches that let Megatron-Core, which assumes a CUDA device in several places, run on the CPU.

`install_cpu_patches` applies them where CUDA is absent; on a GPU nothing is patched. Each `Patch` has a name and the reason why
it is needed; `tests/platform/test_cpu_patches.py` runs training with each one left out.
"""

import contextlib
import importlib
import logging
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Callable

import torch

_MEGATRON = "megatron.core"


@dataclass(frozen=True)
class Patch:
    """One change to Megatron-Core or torch on a machine without CUDA."""

    name: str
    changes: str  # attributes that are replaced
    reason: str
    apply: Callable[[], None]


class _CpuTorch(ModuleType):
    """Module that replaces `torch` inside one Megatron-Core module and creates "cuda" tensors on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        """Make zeros as torch does, on the CPU where a CUDA device is asked for."""
        return torch.zeros(*args, **_on_cpu(kwargs))

    @staticmethod
    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        """Make a tensor as torch does, on the CPU where a CUDA device is asked for."""
        return torch.tensor(*args, **_on_cpu(kwargs))


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": "cpu"} if str(kwargs.get("device", "")).startswith("cuda") else kwargs


def _current_device() -> None:
    cuda: Any = torch.cuda  # Any, here and below: the replacements have other types than the originals
    cuda.current_device = lambda: torch.device("cpu")


def _random_state() -> None:
    from megatron.core.tensor_parallel import random

    cuda: Any = torch.cuda
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    # It warns that the CPU generator moved, but here that is the only generator and it is meant to move.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _synchronize() -> None:
    torch.cuda.synchronize = lambda device=None: None


def _current_stream() -> None:
    cuda: Any = torch.cuda
    cuda.current_stream = lambda device=None: None


class _NoStream:
    """Stream and event of a machine without CUDA, where all work is done when the call returns."""

    def wait_stream(self, stream: Any) -> None:
        """Return at once, as everything else here: nothing is under way."""

    def synchronize(self) -> None:
        """Return at once."""

    def record_event(self) -> "_NoStream":
        """Return this object, which is an event too."""
        return self


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _token_dispatch() -> None:
    module: Any = importlib.import_module(f"{_MEGATRON}.transformer.moe.token_dispatcher")
    torch_on_cpu: Any = _CpuTorch()
    torch_on_cpu.cuda = SimpleNamespace(
        Stream=_NoStream, stream=lambda stream: contextlib.nullcontext(), current_stream=lambda: None
    )
    module.torch = torch_on_cpu
    module.maybe_move_tensor_to_cpu = _to_host  # its own makes numbers of a GPU's tensors only


def _factories() -> None:
    for name in ("pipeline_parallel.schedules", "optimizer.clip_grads", "optimizer.optimizer", "utils"):
        module: Any = importlib.import_module(f"{_MEGATRON}.{name}")
        module.torch = _CpuTorch()


def _tensor_type() -> None:
    tensor: Any = torch.Tensor
    original = tensor.type

    def type_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Answer `Tensor.type()` inside Megatron-Core's optimizer with the CUDA name of the type, which it compares with."""
        result = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith(f"{_MEGATRON}.optimizer"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    tensor.type = type_as_cuda


def _tensor_cuda() -> None:
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self


PATCHES: tuple[Patch, ...] = (
    Patch(
        "current_device",
        "torch.cuda.current_device",
        "modules allocate with device=torch.cuda.current_device(), which raises without CUDA",
        _current_device,
    ),
    Patch(
        "random_state",
        "torch.cuda.manual_seed, get_rng_state and set_rng_state; megatron.core.tensor_parallel.random's readers and log level",
        "the tensor-parallel RNG tracker saves and restores the CUDA generator",
        _random_state,
    ),
    Patch(
        "synchronize",
        "torch.cuda.synchronize",
        "pipeline transfers and checkpoint writing end with torch.cuda.synchronize()",
        _synchronize,
    ),
    Patch(
        "current_stream",
        "torch.cuda.current_stream",
        "gradient buffers ask for the current CUDA stream when they reduce",
        _current_stream,
    ),
    Patch(
        "token_dispatch",
        "`torch.cuda` and `maybe_move_tensor_to_cpu` in megatron.core.transformer.moe.token_dispatcher",
        "the dispatcher of tokens to experts copies their counts to the host on a stream of its own",
        _token_dispatch,
    ),
    Patch(
        "factories",
        "`torch` in megatron.core.pipeline_parallel.schedules, optimizer.clip_grads, optimizer.optimizer and utils",
        'schedules and optimizer create scalars on device="cuda"',
        _factories,
    ),
    Patch(
        "tensor_type",
        "torch.Tensor.type, for callers in megatron.core.optimizer",
        'the optimizer sorts parameters by type() == "torch.cuda.FloatTensor"',
        _tensor_type,
    ),
    Patch(
        "tensor_cuda",
        "torch.Tensor.cuda",
        "a tied head on the last pipeline stage is copied with .cuda()",
        _tensor_cuda,
    ),
)

_installed: set[str] = set()


def is_installed(name: str) -> bool:
    """Whether the patch of that name is in force in this process."""
    return name in _installed


def install_cpu_patches(skip: tuple[str, ...] = ()) -> list[str]:
    """Make Megatron-Core run on the CPU; does nothing where CUDA is available.

    Args:
        skip: names of patches to leave out (used by the test that each is needed).

    Returns:
        Names of the patches in force.
    """
    if torch.cuda.is_available():
        return []
    for patch in PATCHES:
        if patch.name not in _installed and patch.name not in skip:
            patch.apply()
            _installed.add(patch.name)
    return sorted(_installed)
