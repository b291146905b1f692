"""CPU offload of optimizer state: it is on the GPU for the update alone, not during the forward and backward passes.

fp32 copies and moments, 12 bytes a trained parameter, so take the memory that activations had before. They are copied twice a
step (a second of a 1B model's step over PCIe); the update is the same to the last bit.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn


class OffloadedState:
    """Keeps an optimizer's state in CPU memory, except inside `resident`.

    Args:
        optimizer: a Megatron-Core optimizer.
        models: models it trains; optimizer parameters that share their memory stay.
    """

    def __init__(self, optimizer: MegatronOptimizer, models: Iterable[nn.Module]) -> None:
        self.optimizers = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
        weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        parameters = [p for one in self.optimizers for group in one.param_groups for p in group["params"]]
        self.device = parameters[0].device
        self.copies = [p for p in parameters if p.untyped_storage().data_ptr() not in weights]
        self.cpu_buffers: dict[tuple[int, str], Tensor] = {}  # of parameter and name
        self._offload()

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """Context in which the state is on the device, for the optimizer or a checkpoint."""
        for p in self.copies:
            p.data = p.data.to(self.device, non_blocking=True)
        for values in (values for one in self.optimizers for values in one.state.values()):
            values |= {name: x.to(self.device, non_blocking=True) for name, x in values.items() if _travels(x)}
        try:
            yield
        finally:
            self._offload()

    def _offload(self) -> None:
        for p in self.copies:
            p.grad = None  # a view of a buffer that stays; made anew at each step
            p.data = self._on_cpu(p.data, id(p), "copy")
        for p, values in (item for one in self.optimizers for item in one.state.items()):
            values |= {name: self._on_cpu(x, id(p), name) for name, x in values.items() if _travels(x)}

    def _on_cpu(self, x: Tensor, parameter: int, name: str) -> Tensor:
        buffer = self.cpu_buffers.get((parameter, name))
        if buffer is None:
            buffer = self.cpu_buffers[parameter, name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return buffer.copy_(x, non_blocking=True)  # whoever takes x's memory next is behind this copy on the stream


def _travels(x: object) -> bool:
    return isinstance(x, Tensor) and x.numel() > 1  # counters of steps stay where the optimizer wants them
