"""Held-out perplexity, KL and agreement with a teacher, also by position; recall by distance between fact and question."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_hylo.data.packed import IGNORED
from megatron_hylo.distill.head_loss import model_token_losses
from megatron_hylo.eval.buckets import FIRST_DISTANCE, FIRST_POSITION, Buckets
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.frozen import FrozenModel, as_frozen
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.parallel.context import sequence_shard, sequence_slice, token_positions
from megatron_hylo.parallel.documents import PackedDocuments
from megatron_hylo.parallel.pipeline import share_last_stages

BY_POSITION = "by_position/"  # of the names in `Quality.to_dict`


@dataclass
class Quality:
    """Quality of a model: means over held-out tokens."""

    cross_entropy: float  # nats a token
    perplexity: float
    kl: float | None  # nats a token, KL(teacher || model)
    agreement: float | None  # part of the tokens with the teacher's most likely continuation
    tokens: int  # that have a label
    by_position: dict[str, float] = field(default_factory=dict)  # {"cross_entropy_1K-2K": ..., "kl_1K-2K": ...}

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields for JSON, those by position as "by_position/cross_entropy_1K-2K"."""
        values = asdict(self)
        return values | {f"{BY_POSITION}{name}": value for name, value in values.pop("by_position").items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Quality":
        """Undo `to_dict`."""
        places = {name: value for name, value in values.items() if name.startswith(BY_POSITION)}
        rest = {name: value for name, value in values.items() if name not in places}
        return cls(**rest, by_position={name.removeprefix(BY_POSITION): value for name, value in places.items()})


@dataclass(frozen=True)
class HeldoutText:
    """Windows to evaluate on, the same on every rank.

    Args:
        windows: int64 [n, sequence + 1].
        document_starts: int64 of each window, where documents begin that do not see each other; None: a window is one text.
        answers: int32 [n, sequence + 1], at a token of a recall answer its distance from the fact, 0 elsewhere.
        name: of the text in metrics; empty: the run's own.
    """

    windows: Tensor
    document_starts: Sequence[Tensor] | None = None
    answers: Tensor | None = None
    name: str = ""


@torch.no_grad()
def evaluate(
    model: HyloModel | Sequence[HyloModel],
    windows: Tensor | HeldoutText,
    teacher: HyloModel | Sequence[HyloModel] | None = None,
    batch_size: int = 1,
    chunk_tokens: int = 1024,
    track: Track = no_progress,
    first_bucket: int = FIRST_POSITION,
    description: str = "evaluate",
) -> Quality:
    """Evaluate on held-out windows, shared out over the data- and context-parallel ranks; some may have none.

    Args:
        model: this rank's part, or its chunks; in any precision.
        windows: int64 [n, sequence + 1], or with documents that do not see each other.
        teacher: compare with it as well; the same kind of part, or a `FrozenModel`.
        batch_size: windows a forward pass.
        chunk_tokens: tokens whose logits exist at a time.
        track: progress display over the forward passes.
        first_bucket: positions in the first bucket of the losses by position; a position is a token's in its document, or in
            the window where documents are not kept apart.
        description: of the progress display; says which model.

    Returns:
        The same on every rank.
    """
    chunks = [model] if isinstance(model, HyloModel) else list(model)
    compared = as_frozen(teacher) if teacher is not None else None
    text = windows if isinstance(windows, HeldoutText) else HeldoutText(windows)
    device = next(chunks[0].parameters()).device
    buckets = Buckets(text.windows.shape[1] - 1, first_bucket, 5, device)
    for found in _passes(chunks, text, compared, batch_size, chunk_tokens, track, description):
        cross_entropy, _, kl, agreement = found.losses
        buckets.add(found.positions, [cross_entropy, found.labels >= 0, kl, agreement, torch.ones_like(kl)])
    sum_over_ranks(buckets.sums)
    by_position: dict[str, float] = {}
    for name, (cross_entropy, labels, kl, _, tokens) in zip(buckets.names, buckets.sums.t().tolist()):
        if labels:
            by_position[f"cross_entropy_{name}"] = cross_entropy / labels
        if tokens and compared is not None:
            by_position[f"kl_{name}"] = kl / tokens
    cross_entropy, labels, kl, agreement, tokens = buckets.sums.sum(1).tolist()
    mean = cross_entropy / labels if labels else math.nan
    return Quality(
        mean,
        math.exp(min(mean, 700.0)),
        kl / tokens if compared is not None else None,
        agreement / tokens if compared is not None else None,
        int(labels),
        by_position,
    )


@torch.no_grad()
def evaluate_recall(
    model: HyloModel | Sequence[HyloModel],
    text: HeldoutText,
    batch_size: int = 1,
    chunk_tokens: int = 1024,
    first_bucket: int = FIRST_DISTANCE,
    track: Track = no_progress,
) -> dict[str, float]:
    """Cross-entropy and accuracy at the tokens of recall answers, each predicted from the right tokens before it.

    Args:
        model, batch_size, chunk_tokens: see `evaluate`.
        text: windows with answers.
        first_bucket: distances in the first bucket.
        track: progress display over the forward passes.

    Returns:
        "cross_entropy" and "accuracy" of all answers' tokens and, by distance from the first fact that the answer needs,
        "by_distance/cross_entropy_1K-2K", "by_distance/accuracy_1K-2K", "by_distance/tokens_1K-2K"; empty buckets are left
        out. The same on every rank.
    """
    assert text.answers is not None, "recall is measured on windows with answers"
    chunks = [model] if isinstance(model, HyloModel) else list(model)
    device = next(chunks[0].parameters()).device
    buckets = Buckets(text.windows.shape[1], first_bucket, 3, device)
    for found in _passes(chunks, text, None, batch_size, chunk_tokens, track, "ask for what was said before"):
        asked = ((found.answers > 0) & (found.labels >= 0)).double()
        cross_entropy, correct = found.losses[:2].double()
        # where nothing is asked the distance is 0, and so are the values added there
        buckets.add(found.answers, [cross_entropy * asked, correct * asked, asked])
    sum_over_ranks(buckets.sums)
    values: dict[str, float] = {}
    for name, (cross_entropy, correct, tokens) in zip(
        ("", *buckets.names), [buckets.sums.sum(1).tolist(), *buckets.sums.t().tolist()]
    ):
        before, after = ("by_distance/", f"_{name}") if name else ("", "")
        if tokens:
            values[f"{before}cross_entropy{after}"] = cross_entropy / tokens
            values[f"{before}accuracy{after}"] = correct / tokens
            values[f"{before}tokens{after}"] = tokens
    return values


@dataclass
class _Pass:
    """One forward pass's tokens of this rank, in one order; on the last pipeline stage."""

    losses: Tensor  # [4, n]: cross-entropy, correct, KL, agreement
    labels: Tensor  # [n]
    positions: Tensor  # [n]
    answers: Tensor  # [n], 0 where there are none


def _passes(
    chunks: Sequence[HyloModel],
    text: HeldoutText,
    compared: FrozenModel | None,
    batch_size: int,
    chunk_tokens: int,
    track: Track = no_progress,
    description: str = "evaluate",
) -> Iterator[_Pass]:
    """Run this data-parallel rank's windows; in other pipeline stages than the last nothing is yielded."""
    model, training, device = as_frozen(chunks), chunks[0].training, next(chunks[0].parameters()).device
    for chunk in chunks:
        chunk.eval()
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    own = range(rank, len(text.windows), ranks)
    # Expert-parallel ranks make every pass together: one that has no windows left reads the first again, for the others.
    together = parallel_state.get_expert_model_parallel_world_size() > 1
    most = len(range(0, len(text.windows), ranks)) if together else len(own)
    length = text.windows.shape[1] - 1
    for start in track(range(0, most, batch_size), description):
        counted = list(own[start : start + batch_size])
        taken = counted or [0]
        windows = text.windows[taken]
        answers = text.answers[taken][:, 1:] if text.answers is not None else torch.zeros_like(windows[:, 1:])
        tensors, documents = [windows[:, :-1], windows[:, 1:].clone(), answers], None
        if text.document_starts is not None:
            starts = [text.document_starts[i] for i in taken]
            for row, places in enumerate(starts):
                tensors[1][row, places[1:] - 1] = IGNORED  # the next document's first token
            tensors, total = [x.reshape(1, -1) for x in tensors], len(taken) * length
            places = torch.cat([row * length + s[s < length] for row, s in enumerate(starts)])
            documents = PackedDocuments(places.to(device), total, sequence_slice(total))
        inputs, labels, distances = (sequence_shard(x).to(device) for x in tensors)
        positions = token_positions(length, len(taken), documents, device).flatten()
        hidden = model.hidden_states(inputs, documents)
        teacher_hidden = compared.hidden_states(inputs, documents) if compared is not None else None
        if hidden is None or not counted:
            continue
        losses = model_token_losses(chunks[-1], hidden, labels, compared, teacher_hidden, chunk_tokens)
        yield _Pass(losses.flatten(1), labels.flatten(), positions, distances.flatten())
    for chunk in chunks:
        chunk.train(training)


def sum_over_ranks(sums: Tensor) -> None:
    """Sum over the data- and context-parallel ranks of the last pipeline stage, and give all stages the result, in place.

    All ranks call it with tensors of one shape and dtype; those of other stages are only written to.
    """
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    share_last_stages(sums)
