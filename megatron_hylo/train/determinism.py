"""Deterministic runs: bit-identical on the same kind and number of GPUs.

On a CPU runs are so anyway. On GPUs four things are not: cuDNN's attention; the backward passes of flash and memory-efficient
attention, unless torch's switch is strict (kernels/attention.py makes it so for them alone); cuBLAS on more than one stream
without a workspace of its own; and kernels whose configuration is found by timing them. fla's kernels and ours add nothing
atomically; mamba_ssm's have a deterministic form, which follows torch's switch unless MAMBA_DETERMINISTIC says otherwise.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import deterministic as _deterministic

from megatron_hylo.config import ConfigError
from megatron_hylo.kernels.tuned import ENVIRONMENT_VARIABLE

deterministic: Any = _deterministic  # a module that is replaced by an object with properties
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1", ENVIRONMENT_VARIABLE: "never"}
MAMBA = "MAMBA_DETERMINISTIC"  # goes before torch's switch in mamba_ssm; empty: unset


@contextlib.contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    """Make the `with` block deterministic; to be entered before anything runs on a GPU.

    Environment variables that it sets stay, since libraries read them once.

    Args:
        enabled: whether anything is changed.

    Raises:
        ConfigError: an environment variable asks for something else, such as timing kernels anew.
    """
    if not enabled:
        yield
        return
    for name, value in ENVIRONMENT.items():
        if os.environ.setdefault(name, value) != value:
            raise ConfigError(f"deterministic needs {name}={value} in the environment, not {os.environ[name]}; unset it")
    if not (os.environ.get(MAMBA) or "1").startswith("1"):
        raise ConfigError(f"deterministic needs {MAMBA}=1 in the environment, not {os.environ[MAMBA]}; unset it")
    before, fills = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    # a warning, not an error: sums along one row, say, have no other form but are the same each time
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = fills
