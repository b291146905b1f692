"""The three stages: what one step's forward and backward passes are. The loop around them is the same.

`pretrain` and `distil` run under Megatron-Core's schedules (pipeline stages, gradient accumulation); `align` has no
student pipeline, its gradients are made layer by layer (distill/alignment.py).
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.distill.alignment import AlignmentLoss, align_layers, check_alignable
from megatron_hylo.distill.head_loss import model_head_loss
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.train.config import PREFIXES, TrainConfig
from megatron_hylo.train.optimizer import TrainingState

Batches = Iterator[dict[str, Any]]


class Stage:
    """One step's losses and gradients."""

    def __init__(self, config: TrainConfig, teacher: HyloModel | None) -> None:
        self.config, self.teacher = config, teacher

    def check(self, student: HyloModel) -> None:
        """Refuse a student and teacher that do not fit, before training starts."""
        if self.teacher is not None:
            ours, theirs = student.config.hylo.vocab_size, self.teacher.config.hylo.vocab_size
            if ours != theirs:
                raise ConfigError(f"vocabulary differs: student {ours}, teacher {theirs}; use a teacher of the same tokenizer")

    def forward_backward(self, states: Sequence[TrainingState], batches: Batches, micro_batches: int) -> dict[str, Tensor]:
        """Gradients of `micro_batches` batches, reduced over all ranks; returns this rank's mean metrics.

        Args:
            states: the students; one, but for `align`.
            batches: this rank's micro-batches.
            micro_batches: how many of them a step has.
        """
        (state,) = states
        run, packed = get_forward_backward_func(), self.config.packed_documents
        results = run(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=[state.model],
            num_microbatches=micro_batches,
            seq_length=self.config.sequence_length * (self.config.micro_batch_size if packed else 1),
            micro_batch_size=1 if packed else self.config.micro_batch_size,
            forward_only=False,
        )
        return {k: torch.stack([r[k] for r in results]).mean() for k in results[0]} if results else {}

    def _forward_step(self, batches: Batches, model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        teacher_hidden = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_hidden = self.teacher(batch["input_ids"], batch.get("documents"))
        return model(batch["input_ids"], batch.get("documents")), partial(
            self._loss, model.module, batch["labels"], teacher_hidden
        )

    def _loss(self, student: HyloModel, labels: Tensor, teacher_hidden: Tensor | None, hidden: Tensor) -> tuple[Tensor, dict]:
        c = self.config
        head = model_head_loss(
            student,
            hidden,
            labels,
            self.teacher,
            teacher_hidden,
            kl_weight=1.0,
            ce_weight=c.ce_weight,
            chunk_tokens=c.loss_chunk_tokens,
        )
        metrics = {"loss": head.loss, "kl": head.kl, "cross_entropy": head.cross_entropy}
        # Megatron-Core multiplies the loss by the context-parallel ranks, in place (hence the clone), and averages gradients
        # over them too; the mean over a sequence's tokens is that of its parts' means
        return head.loss / parallel_state.get_context_parallel_world_size(), {
            k: v.detach().clone() for k, v in metrics.items() if v is not None
        }


class Align(Stage):
    """Stage 1: one student or two, layer by layer against one pass of the teacher."""

    def check(self, student: HyloModel) -> None:
        """Layers must pair."""
        super().check(student)
        check_alignable(student, self.teacher)

    def forward_backward(self, states: Sequence[TrainingState], batches: Batches, micro_batches: int) -> dict[str, Tensor]:
        """Gradients layer by layer; reduced once, after the last micro-batch."""
        c, students, losses = self.config, [state.bare_model for state in states], []
        for i in range(micro_batches):
            with contextlib.ExitStack() as not_yet:
                for state in states if i < micro_batches - 1 else ():
                    not_yet.enter_context(state.model.no_sync())
                batch = next(batches)
                losses.append(
                    align_layers(
                        students, self.teacher, batch["input_ids"], c.align_loss, c.hidden_weight, c.mixer_weight,
                        gradient_scale=1.0 / micro_batches, documents=batch.get("documents"),
                    )
                )  # fmt: skip
        for state in states:
            finalize_model_grads([state.model], None)
        metrics = {}
        for prefix, mine in zip(PREFIXES, zip(*losses)):
            metrics |= {f"{prefix}{name}": value for name, value in self._metrics(mine).items()}
        return metrics

    def _metrics(self, losses: Sequence[AlignmentLoss]) -> dict[str, Tensor]:
        terms = torch.stack([loss.layers.sum(dim=0) for loss in losses]).mean(dim=0)
        total = torch.stack([loss.loss for loss in losses]).mean()
        if self.config.parallel.sequence_parallel:  # each tensor-parallel rank summed its own tokens
            for tensor in (terms, total):
                torch.distributed.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
        if self.config.align_loss != "ild":
            return {"loss": total, "loss_per_layer": total / len(losses[0].layers)}
        return {"loss": total, "hidden_term": terms[0], "mixer_term": terms[1]}


def get_stage(config: TrainConfig, teacher: HyloModel | None) -> Stage:
    """The stage a configuration names."""
    return (Align if config.stage == "align" else Stage)(config, teacher)
