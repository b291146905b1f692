"""Optimizer state that rests in the CPU's memory while a step's passes compute, and is on the GPU for the update alone.

Then the passes' activations are gone: fp32 copies and moments, 12 bytes a trained parameter, find the room that those had. They
travel twice a step (a second of a 1B model's step over PCIe), the update is the same to the last bit.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn


class OffloadedState:
    """Takes an optimizer's state to the CPU, from when it is made on but inside `resident`.

    Args:
        optimizer: one part of it alone, as all of ours.
        models: that it trains; parameters of the optimizer which are their very memory stay.
    """

    def __init__(self, optimizer: MegatronOptimizer, models: Iterable[nn.Module]) -> None:
        (part,) = optimizer.chained_optimizers
        self.optimizer = part.optimizer
        weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.device = parameters[0].device
        self.copies = [p for p in parameters if p.untyped_storage().data_ptr() not in weights]
        self.homes: dict[tuple[int, str], Tensor] = {}  # of parameter and name
        self._rest()

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """The state is where the optimizer, and a checkpoint, look for it."""
        for p in self.copies:
            p.data = p.data.to(self.device, non_blocking=True)
        for values in self.optimizer.state.values():
            values |= {name: x.to(self.device, non_blocking=True) for name, x in values.items() if _travels(x)}
        try:
            yield
        finally:
            self._rest()

    def _rest(self) -> None:
        for p in self.copies:
            p.grad = None  # a view of a buffer that stays; made anew at each step
            p.data = self._at_home(p.data, id(p), "copy")
        for p, values in self.optimizer.state.items():
            values |= {name: self._at_home(x, id(p), name) for name, x in values.items() if _travels(x)}

    def _at_home(self, x: Tensor, parameter: int, name: str) -> Tensor:
        home = self.homes.get((parameter, name))
        if home is None:
            home = self.homes[parameter, name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return home.copy_(x, non_blocking=True)  # whoever takes x's memory next is behind this copy on the stream


def _travels(x: object) -> bool:
    return isinstance(x, Tensor) and x.numel() > 1  # counters of steps stay where the optimizer wants them
