"""The three stages: what one step's forward and backward passes are. The loop around them is the same.

`pretrain` and `distil` run under Megatron-Core's schedules (pipeline stages, gradient accumulation). With a teacher its
hidden states travel beside the student's from stage to stage, so that no rank needs all of it. `align` has no backward
pass across stages, its gradients are made layer by layer (distill/alignment.py).
"""

import contextlib
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_hylo.config.train import PREFIXES, TrainConfig
from megatron_hylo.distill.alignment import AlignmentLoss, align_layers, check_alignable
from megatron_hylo.distill.head_loss import check_vocabularies, mean_counts, model_head_loss
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.parallel.pipeline import rank_shape, through_stages
from megatron_hylo.teachers.signal import TeacherSignal
from megatron_hylo.train.optimizer import TrainingState

Batches = Iterator[dict[str, Any]]


class Stage:
    """One step's losses and gradients."""

    def __init__(
        self, config: TrainConfig, teacher: Sequence[HyloModel] | None, teacher_signal: TeacherSignal | None = None
    ) -> None:
        self.config, self.teacher_signal = config, teacher_signal
        self.teacher = teacher if teacher_signal is None else None

    def check(self, student: HyloModel) -> None:
        """Refuse a student (one of its chunks will do) and teacher that do not fit, before training starts."""
        if (teacher := self.teacher_signal or (self.teacher and self.teacher[0])) is not None:
            check_vocabularies(student, teacher)

    def forward_backward(self, states: Sequence[TrainingState], batches: Batches, micro_batches: int) -> dict[str, Tensor]:
        """Gradients of `micro_batches` batches, reduced over all ranks; returns this rank's share of the metrics.

        Args:
            states: the students; one, but for `align`.
            batches: this rank's micro-batches.
            micro_batches: how many of them a step has.

        Returns:
            By name; the mean over the data- and context-parallel ranks is what the optimizer minimises.
        """
        (state,) = states
        run, packed = get_forward_backward_func(), self.config.packed_documents
        # the teacher's hidden states make what stages hand on wider than Megatron-Core expects; so it asks for shapes
        state.config.variable_seq_lengths = self.teacher is not None and self.config.parallel.pipeline_stages > 1
        taken = list(itertools.islice(batches, micro_batches))
        ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
        counts = mean_counts([batch["labels"] for batch in taken], ranks)
        results = run(
            forward_step_func=partial(self._forward_step, counts),
            data_iterator=[iter(taken) for _ in state.wrapped],
            model=state.wrapped,
            num_microbatches=micro_batches,
            seq_length=self.config.sequence_length * (self.config.micro_batch_size if packed else 1),
            micro_batch_size=1 if packed else self.config.micro_batch_size,
            forward_only=False,
        )
        return {k: torch.stack([r[k] for r in results]).mean() for k in results[0]} if results else {}

    def _forward_step(self, counts: Tensor, batches: Batches, model: Any) -> tuple[Tensor, Any]:
        batch, student = next(batches), model.module
        ids, documents = batch["input_ids"], batch.get("documents")
        teacher = self.teacher[student.vp_stage or 0] if self.teacher is not None else None
        if teacher is None:
            taught = batch.get("teacher_hidden")
            return model(ids, documents), partial(self._loss, student, self.teacher_signal, batch["labels"], taught, counts)
        if not student.pre_process:
            widths = [student.config.hidden_size, teacher.config.hidden_size]
            own, theirs = student.decoder.input_tensor.split(widths, dim=-1)
            student.set_input_tensor(own.contiguous())
            teacher.set_input_tensor(theirs.detach().contiguous())
        with torch.no_grad():
            teacher_hidden = teacher(ids, documents)
        hidden = model(ids, documents)
        if not student.post_process:
            hidden = torch.cat([hidden, teacher_hidden], dim=-1)
        return hidden, partial(self._loss, student, teacher, batch["labels"], teacher_hidden, counts)

    def _loss(
        self,
        student: HyloModel,
        teacher: HyloModel | TeacherSignal | None,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        counts: Tensor,
        hidden: Tensor,
    ) -> tuple[Tensor, dict]:
        c = self.config
        head = model_head_loss(
            student,
            hidden,
            labels,
            teacher,
            teacher_hidden,
            kl_weight=1.0,
            ce_weight=c.ce_weight,
            chunk_tokens=c.loss_chunk_tokens,
            kl_direction=c.kl_direction,
            kl_temperature=c.kl_temperature,
            kl_top_k=c.kl_top_k,
            counts=counts,
        )
        metrics = {"loss": head.loss, "kl": head.kl, "cross_entropy": head.cross_entropy}
        # Megatron-Core multiplies the loss by the context-parallel ranks, in place (hence the clone), and averages gradients
        # over them too, as over data-parallel ranks and micro-batches; `counts` is made for that
        return head.loss / parallel_state.get_context_parallel_world_size(), {
            k: v.detach().clone() for k, v in metrics.items() if v is not None
        }


class Align(Stage):
    """Stage 1: one student or two, layer by layer against one pass of the teacher."""

    def check(self, student: HyloModel) -> None:
        """Layers must pair."""
        super().check(student)
        check_alignable(student, self.teacher[0])

    def forward_backward(self, states: Sequence[TrainingState], batches: Batches, micro_batches: int) -> dict[str, Tensor]:
        """Gradients layer by layer; reduced once, after the last micro-batch."""
        losses = []
        for i in range(micro_batches):
            with contextlib.ExitStack() as not_yet:
                for wrapper in [w for state in states for w in state.wrapped] if i < micro_batches - 1 else ():
                    not_yet.enter_context(wrapper.no_sync())
                losses.append(self._align(states, next(batches), 1.0 / micro_batches))
        for state in states:
            finalize_model_grads(state.wrapped, None)
        metrics = {}
        for prefix, mine in zip(PREFIXES, zip(*losses)):
            metrics |= {f"{prefix}{name}": value for name, value in self._metrics(mine).items()}
        return metrics

    def _align(
        self, states: Sequence[TrainingState], batch: dict[str, Any], gradient_scale: float
    ) -> list[list[AlignmentLoss]]:
        """One micro-batch through all stages: for each student the losses of this rank's chunks."""
        c, ids, found = self.config, batch["input_ids"], []

        def run(index: int, received: Tensor | None) -> Tensor:
            losses, handed_on = align_layers(
                [state.chunks[index] for state in states], self.teacher[index], ids, c.align_loss, c.hidden_weight,
                c.mixer_weight, gradient_scale, batch.get("documents"), received, c.micro_batch_size,
            )  # fmt: skip
            found.append(losses)
            return handed_on

        config, streams = self.teacher[0].config, 1 + len(states) if c.align_loss == "sequential" else 1
        shape = rank_shape(ids.shape[1], len(ids), streams * config.hidden_size, config.sequence_parallel)
        through_stages(run, len(self.teacher), shape, config.pipeline_dtype, ids.device)
        return list(zip(*found))

    def _metrics(self, losses: Sequence[Sequence[AlignmentLoss]]) -> dict[str, Tensor]:
        """Sums over layers, of all stages; means over micro-batches, whose chunks' losses are given."""
        terms = sum(loss.layers.sum(dim=0) for chunks in losses for loss in chunks) / len(losses)
        total = sum(loss.loss for chunks in losses for loss in chunks) / len(losses)
        groups = [parallel_state.get_pipeline_model_parallel_group()] if self.config.parallel.pipeline_stages > 1 else []
        if self.config.parallel.sequence_parallel:  # each tensor-parallel rank summed its own tokens
            groups.append(parallel_state.get_tensor_model_parallel_group())
        for group in groups:
            for tensor in (terms, total):
                torch.distributed.all_reduce(tensor, group=group)
        if self.config.align_loss != "ild":
            return {"loss": total, "loss_per_layer": total / self.teacher[0].config.hylo.num_hidden_layers}
        return {"loss": total, "hidden_term": terms[0], "mixer_term": terms[1]}


def get_stage(config: TrainConfig, teacher: Sequence[HyloModel] | None, teacher_signal: TeacherSignal | None = None) -> Stage:
    """The stage that a configuration names.

    Args:
        config: the run.
        teacher: this rank's chunks of a teacher on the student's ranks.
        teacher_signal: a teacher on disk or on other ranks.
    """
    return (Align if config.stage == "align" else Stage)(config, teacher, teacher_signal)
