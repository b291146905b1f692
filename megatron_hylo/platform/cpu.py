"""Megatron-Core on the CPU: every assumption of a CUDA device in it, and the smallest way round each.

Applied by `install_cpu_patches` only where CUDA is absent; on a GPU nothing is patched. Each `Patch` has a
name and the reason it is needed; `tests/platform/test_cpu_patches.py` runs training with each one left out.
"""

import importlib
import logging
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Callable

import torch

_MEGATRON = "megatron.core"


@dataclass(frozen=True)
class Patch:
    """One change to Megatron-Core or torch.cuda: what it is called, why it is needed, and how it is made."""

    name: str
    reason: str
    apply: Callable[[], None]


class _CpuTorch(ModuleType):
    """torch, except that tensors asked for on "cuda" are made on the CPU. Stands for `torch` in one module."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **_on_cpu(kwargs))

    @staticmethod
    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **_on_cpu(kwargs))


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": "cpu"} if str(kwargs.get("device", "")).startswith("cuda") else kwargs


def _current_device() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")


def _random_state() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    # It warns that the CPU's generator moved, which is the only one here and is meant to.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _synchronize() -> None:
    torch.cuda.synchronize = lambda device=None: None


def _current_stream() -> None:
    torch.cuda.current_stream = lambda device=None: None


def _factories() -> None:
    for module in ("pipeline_parallel.schedules", "optimizer.clip_grads", "optimizer.optimizer", "utils"):
        importlib.import_module(f"{_MEGATRON}.{module}").torch = _CpuTorch()


def _tensor_type() -> None:
    original = torch.Tensor.type

    def type_as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith(f"{_MEGATRON}.optimizer"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_as_cuda


def _tensor_cuda() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


PATCHES: tuple[Patch, ...] = (
    Patch(
        "current_device", "modules allocate with device=torch.cuda.current_device(), which raises without CUDA", _current_device
    ),
    Patch("random_state", "the tensor-parallel RNG tracker saves and restores the CUDA generator", _random_state),
    Patch("synchronize", "pipeline transfers and checkpoint writing end with torch.cuda.synchronize()", _synchronize),
    Patch("current_stream", "gradient buffers ask for the current CUDA stream when they reduce", _current_stream),
    Patch("factories", 'schedules and optimizer make scalars on device="cuda"', _factories),
    Patch("tensor_type", 'the optimizer sorts parameters by type() == "torch.cuda.FloatTensor"', _tensor_type),
    Patch("tensor_cuda", "a tied head on the last pipeline stage is copied with .cuda()", _tensor_cuda),
)

_installed: set[str] = set()


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
