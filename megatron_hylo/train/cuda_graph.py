"""CUDA graphs of a step: its forward and backward passes as one, its update as another, so that no GPU waits for Python.

The first steps run eagerly; then one is captured, and from there on replayed with the next batches copied into its input
tensors. Captured are both models, the losses and gradients; then the gradient norm, clipping, AdamW's or Muon's update and the
copy to the model's weights, all on one GPU: collectives of several ranks were never captured (`TrainConfig.check_graphs`). An
update reads learning rates, counts of steps and the norm from tensors; the schedule writes the rates between replays. The NaN
guard, between the two graphs, stays outside: Python decides whether there is an update at all.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.train.objectives import Batches, Objective
from megatron_hylo.train.optimizer import TrainingState

WARM_UP = 3  # steps before the captured one: kernels are compiled, libraries make their workspaces

logger = logging.getLogger("megatron_hylo.train")


@contextlib.contextmanager
def capturing(enabled: bool, device: torch.device) -> Iterator[None]:
    """Run all of training on a stream that can be captured: autograd returns to the stream that a parameter was first used on.

    Args:
        enabled: whether anything is changed.
        device: device of this rank.

    Raises:
        ConfigError: no GPU.
    """
    if not enabled:
        yield
        return
    if device.type != "cuda":
        raise ConfigError("cuda_graphs needs a GPU; set cuda_graphs false")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


class Captured:
    """A function without arguments: its first calls run eagerly, one is captured, and from there on it is replayed.

    From the captured call on, all return the same tensors, with new values.
    """

    def __init__(self, function: Callable[[], Any], name: str) -> None:
        self.function, self.name, self.calls = function, name, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None

    def __call__(self) -> Any:
        """Run, capture or replay the function; returns its result."""
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # other threads (NCCL's watchdog, a checkpoint being written) may go on using CUDA
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self.result = self.function()
            logger.info("%s: call %d captured as a CUDA graph", self.name, self.calls)
        self.graph.replay()
        return self.result


class CapturedObjective:
    """An objective whose passes are captured once and replayed; the same `forward_backward` as `Objective`.

    Every step must have as many micro-batches of the same shape, of tensors alone.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.batches: list[dict[str, Tensor]] = []  # what the graph reads
        self.passes: Captured | None = None

    def forward_backward(self, states: Sequence[TrainingState], batches: Batches, micro_batches: int) -> dict[str, Tensor]:
        """As `Objective.forward_backward`."""
        taken = list(itertools.islice(batches, micro_batches))
        if self.passes is None:
            self.batches = [{name: torch.empty_like(tensor) for name, tensor in batch.items()} for batch in taken]
            self.passes = Captured(
                lambda: self.objective.forward_backward(states, iter(self.batches), micro_batches),
                "forward and backward passes",
            )
        for mine, batch in zip(self.batches, taken, strict=True):
            for name, tensor in batch.items():
                mine[name].copy_(tensor)
        return {name: value.clone() for name, value in self.passes().items()}
