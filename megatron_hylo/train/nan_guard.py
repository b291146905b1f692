"""NaN guard: finds NaN and infinity before they reach the weights, skips and counts the steps, and names the layer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hylo.config import ConfigError
from megatron_hylo.train.optimizer import TrainingState


class SkippedSteps:
    """Counts steps whose loss or gradients are not finite on some rank; all ranks skip their update.

    After the first one, hooks watch the layers, so that the message names the first whose output is not finite.

    Args:
        allowed: number of such steps in a row; one more ends the run.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed, self.in_a_row, self.total = allowed, 0, 0
        self.watches: list[Any] = []
        self.first_layer: str | None = None

    def must_skip(self, states: Sequence[TrainingState], metrics: Mapping[str, Tensor], step: int) -> bool:
        """Return whether this step must be skipped, the same on all ranks.

        Args:
            states: the students, with this step's reduced gradients.
            metrics: metrics of this rank, its loss among them; numbers [].
            step: counted from 1.

        Raises:
            ConfigError: too many in a row; says on which ranks and in which layer.
        """
        sums = [buffer.grad_data.sum().float() for state in states for wrapper in state.wrapped for buffer in wrapper.buffers]
        sums += [value.float() for value in metrics.values()]
        broken = ~torch.stack(sums).isfinite().all()
        everywhere = broken.float()
        torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MAX)
        if not everywhere.item():
            self._forget()
            return False
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        if self.in_a_row > self.allowed:
            where = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(where, self._describe(states, metrics) if broken else None)
            found = "; ".join(f"rank {rank}: {what}" for rank, what in enumerate(where) if what)
            raise ConfigError(
                f"step {step}: NaN or infinity, {self.in_a_row} steps in a row ({found}); lower the learning rate, or look at "
                f"the text of these steps"
            )
        if not self.watches:
            chunks = [chunk for state in states for chunk in state.chunks]
            layers = [(f"layer {i}", layer) for chunk in chunks for i, layer in enumerate(chunk.decoder.layers)]
            self.watches = [layer.register_forward_hook(self._watcher(name)) for name, layer in layers]
        return True

    def _watcher(self, name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            """Forward hook: note the first layer whose output is not finite."""
            out = output[0] if isinstance(output, tuple) else output
            if self.first_layer is None and not out.isfinite().all():
                self.first_layer = name

        return look

    def _forget(self) -> None:
        self.in_a_row, self.first_layer = 0, None
        while self.watches:
            self.watches.pop().remove()

    def _describe(self, states: Sequence[TrainingState], metrics: Mapping[str, Tensor]) -> str:
        losses = [name for name, value in metrics.items() if not math.isfinite(float(value))]
        names = [
            name
            for state in states
            for chunk in state.chunks
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad and not parameter.main_grad.isfinite().all()
        ]
        facts = [", ".join(losses)] if losses else []
        facts += [f"output of {self.first_layer} of this stage first"] if self.first_layer else []
        facts += [f"{len(names)} gradients, first {names[0]}"] if names else []
        return ", ".join(facts)
