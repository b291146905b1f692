"""A step's forward and backward passes as one CUDA graph: the GPU no longer waits for Python between small kernels.

The first steps run as ever; then one is recorded, and from there on replayed with the next batches copied into the places
of the recorded one's. All that a graph can hold is recorded: both models, the losses, gradients and their reduction over the
ranks. The optimizer, whose learning rates change, and the search for NaN stay outside.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.train.optimizer import TrainingState
from megatron_hylo.train.stages import Batches, Stage

WARM_UP = 3  # steps before the recorded one: kernels are compiled, libraries make their workspaces

logger = logging.getLogger("megatron_hylo.train")


@contextlib.contextmanager
def recordable(enabled: bool, device: torch.device) -> Iterator[None]:
    """All of training on a stream that can be recorded: autograd returns to the stream that a parameter was first used on.

    Args:
        enabled: else nothing is changed.
        device: of this rank.

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


class RecordedStage:
    """A stage whose passes are recorded once and replayed; the same `forward_backward` as `Stage`.

    Every step must have as many micro-batches of the same shape, of tensors alone.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage, self.steps = stage, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batches: list[dict[str, Tensor]] = []  # what the graph reads
        self.metrics: dict[str, Tensor] = {}  # what it writes, beside gradients

    def forward_backward(self, states: Sequence[TrainingState], batches: Batches, micro_batches: int) -> dict[str, Tensor]:
        """As `Stage.forward_backward`."""
        taken = list(itertools.islice(batches, micro_batches))
        self.steps += 1
        if self.steps <= WARM_UP:
            return self.stage.forward_backward(states, iter(taken), micro_batches)
        if self.graph is None:
            self._record(states, taken)
        for mine, batch in zip(self.batches, taken, strict=True):
            for name, tensor in batch.items():
                mine[name].copy_(tensor)
        self.graph.replay()
        return {name: value.clone() for name, value in self.metrics.items()}

    def _record(self, states: Sequence[TrainingState], taken: list[dict[str, Tensor]]) -> None:
        self.batches = [{name: tensor.clone() for name, tensor in batch.items()} for batch in taken]
        self.graph = torch.cuda.CUDAGraph()
        # other threads (NCCL's watchdog, a checkpoint being written) may go on using CUDA
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self.metrics = self.stage.forward_backward(states, iter(self.batches), len(taken))
        logger.info("step %d recorded as a CUDA graph", self.steps)
