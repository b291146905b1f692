"""Device of a model's weights while it is built: this rank's, or none at all."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from megatron_hylo.platform.distributed import device

_without_memory: ContextVar[bool] = ContextVar("without_memory", default=False)


def weights_device() -> torch.device:
    """Return the device that parameters are made on: this rank's, or `meta` inside `without_memory`."""
    return torch.device("meta") if _without_memory.get() else device()


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Build models on the meta device in this context: parameters with shapes and dtypes, but without values."""
    token = _without_memory.set(True)
    try:
        with torch.device("meta"):
            yield
    finally:
        _without_memory.reset(token)
