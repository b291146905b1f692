"""Held-out perplexity of whole documents, and KL and top-1 agreement with a teacher."""

import math
from dataclasses import asdict, dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_hylo.distill.head_loss import model_head_loss
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.parallel.context import own_part


@dataclass
class Quality:
    """Means over held-out tokens."""

    cross_entropy: float  # nats a token
    perplexity: float
    kl: float | None  # nats a token, KL(teacher || model)
    agreement: float | None  # part of the tokens with the teacher's most likely continuation
    tokens: int

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: HyloModel, windows: Tensor, teacher: HyloModel | None = None, batch_size: int = 1, chunk_tokens: int = 1024
) -> Quality:
    """Evaluate on held-out windows, shared out over the data- and context-parallel ranks; no pipeline stages.

    Args:
        model: in any precision.
        windows: int64 [n, sequence + 1].
        teacher: compare with it as well.
        batch_size: windows a forward pass.
        chunk_tokens: tokens whose logits exist at a time.
    """
    was_training = model.training
    model.eval()
    where = next(model.parameters()).device
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    sums = torch.zeros(4, dtype=torch.float64, device=where)  # cross-entropy, kl, agreement, tokens
    for batch in windows[rank::ranks].split(batch_size):
        inputs, labels = own_part(batch[:, :-1]).to(where), own_part(batch[:, 1:]).to(where)
        hidden, teacher_hidden = model(inputs), teacher(inputs) if teacher is not None else None
        loss = model_head_loss(
            model, hidden, labels, teacher, teacher_hidden, chunk_tokens=chunk_tokens, measure_agreement=teacher is not None
        )
        n = labels.numel()
        parts = [loss.cross_entropy, loss.kl, loss.agreement]
        sums += torch.stack([torch.as_tensor(p if p is not None else 0.0, device=where).double() * n for p in parts]
                            + [torch.tensor(float(n), dtype=torch.float64, device=where)])  # fmt: skip
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    model.train(was_training)
    cross_entropy, kl, agreement = (sums[:3] / sums[3]).tolist()
    compared = teacher is not None
    return Quality(
        cross_entropy,
        math.exp(min(cross_entropy, 700.0)),
        kl if compared else None,
        agreement if compared else None,
        int(sums[3].item()),
    )
