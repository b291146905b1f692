"""Held-out perplexity of whole documents, and KL and top-1 agreement with a teacher."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_hylo.distill.head_loss import model_head_loss
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.frozen import as_frozen
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.parallel.context import sequence_shard
from megatron_hylo.parallel.pipeline import share_last_stages


@dataclass
class Quality:
    """Quality of a model: means over held-out tokens."""

    cross_entropy: float  # nats a token
    perplexity: float
    kl: float | None  # nats a token, KL(teacher || model)
    agreement: float | None  # part of the tokens with the teacher's most likely continuation
    tokens: int  # that have a label

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: HyloModel | Sequence[HyloModel],
    windows: Tensor,
    teacher: HyloModel | Sequence[HyloModel] | None = None,
    batch_size: int = 1,
    chunk_tokens: int = 1024,
    track: Track = no_progress,
) -> Quality:
    """Evaluate on held-out windows, shared out over the data- and context-parallel ranks; some may have none.

    Args:
        model: this rank's part, or its chunks; in any precision.
        windows: int64 [n, sequence + 1].
        teacher: compare with it as well; the same kind of part, or a `FrozenModel`.
        batch_size: windows a forward pass.
        chunk_tokens: tokens whose logits exist at a time.
        track: progress display over the forward passes.

    Returns:
        The same on every rank.
    """
    chunks = [model] if isinstance(model, HyloModel) else model
    compared = as_frozen(teacher) if teacher is not None else None
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    where = next(chunks[0].parameters()).device
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    sums = torch.zeros(5, dtype=torch.float64, device=where)  # cross-entropy, kl, agreement; labels, tokens
    own, undivided = windows[rank::ranks], torch.ones(2, dtype=torch.float64, device=where)
    for start in track(range(0, len(own), batch_size), "evaluate"):
        batch = own[start : start + batch_size]
        inputs, labels = sequence_shard(batch[:, :-1]).to(where), sequence_shard(batch[:, 1:]).to(where)
        hidden = as_frozen(chunks).hidden_states(inputs)
        teacher_hidden = compared.hidden_states(inputs) if compared is not None else None
        if hidden is None:
            continue
        loss = model_head_loss(
            chunks[-1], hidden, labels, compared, teacher_hidden, chunk_tokens=chunk_tokens,
            measure_agreement=compared is not None, counts=undivided,
        )  # fmt: skip
        parts = [loss.cross_entropy, loss.kl, loss.agreement, (labels >= 0).sum(), labels.numel()]
        sums += torch.stack([torch.as_tensor(0.0 if p is None else p, device=where).double() for p in parts])
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    share_last_stages(sums)
    for chunk in chunks:
        chunk.train(was_training)
    cross_entropy, kl, agreement = (sums[:3] / torch.stack([sums[3], sums[4], sums[4]])).tolist()
    return Quality(
        cross_entropy,
        math.exp(min(cross_entropy, 700.0)),
        kl if compared is not None else None,
        agreement if compared is not None else None,
        int(sums[3].item()),
    )
