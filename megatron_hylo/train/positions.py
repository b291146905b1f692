"""Losses of training tokens by their position in the sequence, measured on a sample of a logged step's tokens."""

from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config.train import TrainConfig
from megatron_hylo.distill.head_loss import model_token_losses
from megatron_hylo.eval.buckets import FIRST_POSITION, Buckets
from megatron_hylo.eval.perplexity import sum_over_ranks
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.parallel.context import token_positions

SAMPLE = 2048  # tokens of a rank's step: so few cost less than a thousandth of it at the usual log_interval


class PositionLosses:
    """Sums of cross-entropy and KL by position, of one step.

    Args:
        config: settings of the run.
        micro_batches: forward passes of this rank in the step.
        device: device of this rank.
        first_bucket: positions in the first bucket.
        sample: tokens that this rank measures, about.
    """

    def __init__(
        self,
        config: TrainConfig,
        micro_batches: int,
        device: torch.device,
        first_bucket: int = FIRST_POSITION,
        sample: int = SAMPLE,
    ) -> None:
        self.config, self.micro_batches, self.sample = config, micro_batches, sample
        self.buckets = Buckets(config.sequence_length, first_bucket, 4, device)

    @torch.no_grad()
    def add(
        self, student: HyloModel, hidden: Tensor, batch: dict[str, Any], teacher: Any, teacher_hidden: Tensor | None
    ) -> None:
        """Measure every n-th token of a micro-batch; the tensor-parallel ranks of the last pipeline stage call it together.

        Args:
            student, teacher, teacher_hidden: see `model_head_loss`.
            hidden: [sequence (/ TP with sequence parallelism), batch, hidden]; no gradient flows into it.
            batch: with "labels", and "documents" where these are packed.
        """
        labels, documents = batch["labels"], batch.get("documents")
        stride = max(1, min(len(hidden), labels.numel() * self.micro_batches // self.sample))
        while len(hidden) % stride:  # so that the shards of sequence parallelism have every n-th token too
            stride -= 1
        positions = token_positions(self.config.sequence_length, len(labels), documents, labels.device)
        positions, labels = positions[:, ::stride].flatten(), labels[:, ::stride].contiguous()
        taught = teacher_hidden[::stride].contiguous() if teacher_hidden is not None else None
        losses = model_token_losses(
            student, hidden.detach()[::stride].contiguous(), labels, teacher, taught, self.config.loss_chunk_tokens
        )
        cross_entropy, _, kl, _ = losses.flatten(1)
        compared = torch.full_like(kl, float(teacher is not None))
        if (taught := batch.get("taught")) is not None:
            compared = taught[:, ::stride].flatten().to(kl.dtype)
            kl = kl * compared
        self.buckets.add(positions, [cross_entropy, labels.flatten() >= 0, kl, compared])

    def means(self) -> dict[str, float]:
        """Return {"by_position/cross_entropy_1K-2K": ..., "by_position/kl_1K-2K": ...} of all ranks' tokens; collective."""
        sums = self.buckets.sums
        sum_over_ranks(sums)
        found = {}
        for name, (cross_entropy, labels, kl, tokens) in zip(self.buckets.names, sums.t().tolist()):
            if labels:
                found[f"by_position/cross_entropy_{name}"] = cross_entropy / labels
            if tokens:
                found[f"by_position/kl_{name}"] = kl / tokens
        return found
