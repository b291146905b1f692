"""Training objectives: the forward and backward passes of one step, by training stage. The loop around them is the same.

`pretrain` and `distil` run under Megatron-Core's schedules (pipeline stages, gradient accumulation). A teacher's hidden states
travel beside the student's from pipeline stage to pipeline stage, so that no rank needs all of it. `align` has no backward
pass across pipeline stages: its gradients are made layer by layer (distill/alignment.py).
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
from megatron_hylo.data.packed import IGNORED
from megatron_hylo.data.recall import exercise_tokens
from megatron_hylo.distill.alignment import AlignmentLoss, align_layers, check_alignable
from megatron_hylo.distill.head_loss import mean_counts, model_head_loss
from megatron_hylo.distill.head_rows import check_vocabularies
from megatron_hylo.models.frozen import FrozenModel, as_frozen
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.parallel.pipeline import apart, rank_shape, through_stages, together
from megatron_hylo.teachers.signal import TeacherSignal
from megatron_hylo.train.optimizer import TrainingState
from megatron_hylo.train.pass_timer import PassTimer
from megatron_hylo.train.positions import PositionLosses

Batches = Iterator[dict[str, Any]]


class Objective:
    """Losses and gradients of one step of `pretrain` or `distil`."""

    def __init__(
        self, config: TrainConfig, teacher: Sequence[HyloModel] | None, teacher_signal: TeacherSignal | None = None
    ) -> None:
        self.config, self.teacher_signal = config, teacher_signal
        self.teacher = as_frozen(teacher) if teacher and teacher_signal is None else None
        self.positions: PositionLosses | None = None  # what measures the present step's losses by position
        self.timer: PassTimer | None = None  # of this rank's own part of a step

    def check(self, student: HyloModel) -> None:
        """Refuse a student (one of its chunks will do) and teacher that do not fit, before training starts."""
        if (teacher := self.teacher_signal or self.teacher) is not None:
            check_vocabularies(student, teacher)

    def forward_backward(self, states: Sequence[TrainingState], batches: Batches, micro_batches: int) -> dict[str, Tensor]:
        """Make the gradients of `micro_batches` batches, reduced over all ranks; returns this rank's share of the metrics.

        Args:
            states: the students; one, but for `align`.
            batches: this rank's micro-batches.
            micro_batches: how many of them a step has.

        Returns:
            Numbers [] by name; the mean over the data- and context-parallel ranks is what the optimizer minimises. Empty on
            ranks before the last pipeline stage.
        """
        (state,) = states
        run, packed = get_forward_backward_func(), self.config.packed_documents
        # with the teacher's hidden states, pipeline stages send wider tensors than Megatron-Core expects; so it asks for shapes
        state.config.variable_seq_lengths = self.teacher is not None and self.config.parallel.pipeline_stages > 1
        state.config.finalize_model_grads_func = self._reduce
        taken = list(itertools.islice(batches, micro_batches))
        ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for batch in taken:
            batch["counted"] = self._counted(batch)
        counts = mean_counts([batch["labels"] for batch in taken], ranks, [batch["counted"] for batch in taken])
        if all("answers" in batch for batch in taken):
            answers = [batch["labels"].masked_fill(batch["answers"] == 0, IGNORED) for batch in taken]
            for batch, labels in zip(taken, answers):
                batch["answer_labels"] = labels
            counts = torch.cat([counts, mean_counts(answers, ranks)[1:]])
        if self.timer is not None:
            self.timer.begin()  # until gradients are reduced
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

    def _reduce(self, *arguments: Any, **named: Any) -> None:
        """Reduce the gradients over all ranks: the end of what a rank does alone."""
        if self.timer is not None:
            self.timer.end()
        finalize_model_grads(*arguments, **named)

    def _counted(self, batch: dict[str, Any]) -> Tensor | None:
        """Tokens that the loss of the heads counts: not those without a loss, nor answers that the teacher does not teach.

        Returns:
            bool [batch, sequence], False at tokens outside `loss_mask`, at those of exercises that a stored teacher did not
            read and, with a teacher, at recall's answers further from their fact than `recall.kl_within`; None: all tokens.
        """
        mask, within = batch.get("loss_mask"), self.config.recall.kl_within
        if (taught := batch.get("taught")) is not None:
            mask = taught if mask is None else mask & taught
        if "answers" in batch and within is not None and (self.teacher is not None or self.teacher_signal is not None):
            near = batch["answers"] <= within
            mask = near if mask is None else mask & near
        return mask

    def _forward_step(self, counts: Tensor, batches: Batches, model: Any) -> tuple[Tensor, Any]:
        batch, student = next(batches), model.module
        ids, documents = batch["input_ids"], batch.get("documents")
        if self.teacher is None:
            taught = batch.get("teacher_hidden")
            return model(ids, documents), partial(self._loss, student, self.teacher_signal, batch, taught, counts)
        reading, received = self.teacher.read(ids, documents), None
        if not student.pre_process:
            c = student.config
            shape = rank_shape(ids.shape[1], len(ids), c.hidden_size, c.sequence_parallel)
            width = self.teacher[0].config.hidden_size
            own, theirs = apart(student.decoder.input_tensor, shape, width, len(reading.ids))
            student.set_input_tensor(own)
            received = theirs.detach()
        teacher_hidden = self.teacher.run(student.vp_stage or 0, reading, received)
        hidden = model(ids, documents)
        if not student.post_process:
            hidden = together(hidden, teacher_hidden)
        return hidden, partial(self._loss, student, self.teacher, batch, teacher_hidden, counts)

    def _loss(
        self,
        student: HyloModel,
        teacher: FrozenModel | TeacherSignal | None,
        batch: dict[str, Any],
        teacher_hidden: Tensor | None,
        counts: Tensor,
        hidden: Tensor,
    ) -> tuple[Tensor, dict]:
        c = self.config
        head = model_head_loss(
            student,
            hidden,
            batch["labels"],
            teacher,
            teacher_hidden,
            c.distil,
            chunk_tokens=c.loss_chunk_tokens,
            token_mask=batch["counted"],
            counts=counts[:2],
            capacity=batch["labels"].numel() if c.cuda_graphs else None,
        )
        if self.positions is not None:
            self.positions.add(student, hidden, batch, teacher, teacher_hidden)
        loss, answers = head.loss, None
        if len(counts) > 2:  # tokens, labels, labels that are part of an answer
            mask, room = batch["answer_labels"] >= 0, exercise_tokens(c.recall, c.sequence_length) * c.micro_batch_size
            answers = model_head_loss(
                student,
                hidden,
                batch["answer_labels"],
                chunk_tokens=c.loss_chunk_tokens,
                token_mask=mask,
                counts=counts[2:].expand(2),
                capacity=min(room, mask.numel()) if c.cuda_graphs else None,
            ).loss  # the mean over answers; `answer_weight` is of a token
            loss = (
                loss + (c.recall.answer_weight * counts[2] / counts[0 if head.kl is not None else 1]).to(loss.dtype) * answers
            )
        metrics = {"loss": loss, "kl": head.kl, "cross_entropy": head.cross_entropy, "answer_cross_entropy": answers}
        # Megatron-Core multiplies the loss by the context-parallel ranks, in place (hence the clone), and averages gradients
        # over them too, as over data-parallel ranks and micro-batches; `counts` is made for that
        return loss / parallel_state.get_context_parallel_world_size(), {
            k: v.detach().clone() for k, v in metrics.items() if v is not None
        }


class AlignObjective(Objective):
    """Losses and gradients of one step of `align`: one or two students, layer by layer, against one pass of the teacher."""

    @property
    def _teacher(self) -> Sequence[HyloModel]:
        assert self.teacher is not None, "align has its teacher on the student's ranks: TrainConfig refuses any other"
        return self.teacher

    def check(self, student: HyloModel) -> None:
        """Refuse a student whose layers do not pair with the teacher's."""
        super().check(student)
        check_alignable(student, self._teacher[0])

    def forward_backward(self, states: Sequence[TrainingState], batches: Batches, micro_batches: int) -> dict[str, Tensor]:
        """As `Objective.forward_backward`; gradients are reduced once, after the last micro-batch."""
        losses = []
        for i in range(micro_batches):
            with contextlib.ExitStack() as not_yet:
                for wrapper in [w for state in states for w in state.wrapped] if i < micro_batches - 1 else ():
                    not_yet.enter_context(wrapper.no_sync())
                batch = next(batches)
                with self.timer.timed() if self.timer else contextlib.nullcontext():
                    losses.append(self._align(states, batch, 1.0 / micro_batches))
        for state in states:
            finalize_model_grads(state.wrapped, None)
        metrics: dict[str, Tensor] = {}
        for prefix, mine in zip(PREFIXES, zip(*losses)):
            metrics |= {f"{prefix}{name}": value for name, value in self._metrics(mine).items()}
        return metrics

    def _align(
        self, states: Sequence[TrainingState], batch: dict[str, Any], gradient_scale: float
    ) -> list[list[AlignmentLoss]]:
        """Run one micro-batch through all pipeline stages; returns, for each student, the losses of this rank's chunks."""
        c, ids, found = self.config, batch["input_ids"], []

        def run(index: int, received: Tensor | None) -> Tensor:
            """Run this rank's chunk `index` of teacher and students; returns what the next pipeline stage receives."""
            losses, handed_on = align_layers(
                [state.chunks[index] for state in states], self._teacher[index], ids, c.align.loss, c.align.hidden_weight,
                c.align.mixer_weight, gradient_scale, batch.get("documents"), received, c.micro_batch_size,
            )  # fmt: skip
            found.append(losses)
            return handed_on

        config, streams = self._teacher[0].config, 1 + len(states) if c.align.loss == "sequential" else 1
        shape = rank_shape(ids.shape[1], len(ids), streams * config.hidden_size, config.sequence_parallel)
        through_stages(run, len(self._teacher), shape, config.pipeline_dtype, ids.device)
        return [list(losses) for losses in zip(*found)]

    def _metrics(self, losses: Sequence[Sequence[AlignmentLoss]]) -> dict[str, Tensor]:
        """Sum over the layers of all pipeline stages and average over micro-batches, whose chunks' losses are given."""
        terms: Any = sum(loss.layers.sum(dim=0) for chunks in losses for loss in chunks) / len(losses)
        total: Any = sum(loss.loss for chunks in losses for loss in chunks) / len(losses)
        groups = [parallel_state.get_pipeline_model_parallel_group()] if self.config.parallel.pipeline_stages > 1 else []
        if self.config.parallel.sequence_parallel:  # each tensor-parallel rank summed its own tokens
            groups.append(parallel_state.get_tensor_model_parallel_group())
        for group in groups:
            for tensor in (terms, total):
                torch.distributed.all_reduce(tensor, group=group)
        if self.config.align.loss != "ild":
            return {"loss": total, "loss_per_layer": total / self._teacher[0].config.hylo.num_hidden_layers}
        return {"loss": total, "hidden_term": terms[0], "mixer_term": terms[1]}


def get_objective(
    config: TrainConfig, teacher: Sequence[HyloModel] | None, teacher_signal: TeacherSignal | None = None
) -> Objective:
    """Return the objective of a configuration's training stage.

    Args:
        config: the run.
        teacher: this rank's chunks of a teacher on the student's ranks.
        teacher_signal: a teacher on disk or on other ranks.
    """
    return (AlignObjective if config.stage == "align" else Objective)(config, teacher, teacher_signal)
