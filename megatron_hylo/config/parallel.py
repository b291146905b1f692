"""Sizes of the parallel groups that ranks are divided into."""

from dataclasses import dataclass
from typing import Literal

from megatron_hylo.config.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of tensor, pipeline, context and expert parallelism; the remaining ranks are data parallel.

    Args:
        tensor_model_parallel_size: ranks that share each layer, by heads and columns.
        pipeline_model_parallel_size: ranks that have different layers.
        virtual_pipeline_model_parallel_size: parts of the model on each pipeline rank, interleaved: smaller bubbles.
        pipeline_layers: layers of every pipeline stage in order; by default they have about as many weights.
        context_parallel_size: ranks that share a sequence.
        cp_comm_type: what context-parallel ranks exchange: what is small, sequence for heads, or the faster that fits
            (docs/parallelism.md).
        expert_model_parallel_size: ranks that have different experts, whole ones, out of those with the same layers.
        sequence_parallel: with tensor parallelism: norms and residuals split over the sequence.
        distributed_timeout_minutes: a rank that hangs longer ends the job.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    pipeline_layers: list[int] | None = None
    context_parallel_size: int = 1
    cp_comm_type: Literal["auto", "all_gather", "a2a"] = "auto"
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    distributed_timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
                     "context_parallel_size", "expert_model_parallel_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"virtual_pipeline_model_parallel_size {self.virtual_pipeline_model_parallel_size} needs "
                f"pipeline_model_parallel_size > 1"
            )
        if self.pipeline_layers is not None and (
            len(self.pipeline_layers) != self.pipeline_stages or min(self.pipeline_layers) < 1
        ):
            raise ConfigError(
                f"pipeline_layers {self.pipeline_layers} must be {self.pipeline_stages} numbers of at least 1, one for each of "
                f"pipeline_model_parallel_size {self.pipeline_model_parallel_size} x virtual_pipeline_model_parallel_size "
                f"{self.virtual_pipeline_model_parallel_size} pipeline stages"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError("sequence_parallel needs tensor_model_parallel_size > 1; set one of them otherwise")

    @property
    def pipeline_stages(self) -> int:
        """Number of pipeline stages, virtual ones included; stage i is on pipeline rank i modulo the ranks."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    def check_tensor_parallel_alone(self, verb: str) -> None:
        """Refuse ways to divide a model or a sequence other than tensor parallelism.

        Args:
            verb: what runs with tensor and data parallelism alone, for the message.

        Raises:
            ConfigError: names the settings.
        """
        others = ("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size",
                  "sequence_parallel")  # fmt: skip
        given = [name for name in others if getattr(self, name) != getattr(ParallelConfig, name)]
        if given:
            said = " and ".join(f"{name} {getattr(self, name)}" for name in given)
            raise ConfigError(f"{verb} works with tensor and data parallelism alone, got {said}; leave that out")

    def check_experts(self, ranks: int) -> None:
        """Refuse an expert-parallel size that does not divide the ranks of a pipeline stage.

        Args:
            ranks: processes of the run, a multiple of `model_parallel_size`.

        Raises:
            ConfigError: with the number that it must divide.
        """
        stage = ranks // self.pipeline_model_parallel_size
        if stage % self.expert_model_parallel_size:
            raise ConfigError(
                f"expert_model_parallel_size {self.expert_model_parallel_size} does not divide the {stage} ranks of a pipeline "
                f"stage ({ranks} ranks, pipeline_model_parallel_size {self.pipeline_model_parallel_size}); start more ranks or "
                "make it smaller"
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
