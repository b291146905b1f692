"""Losses of hybrids of two aligned pure models: KL to their teacher and, on text with recall exercises, that at the answers."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.data.encode import plain_encoder
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.data.recall import RecallWindows
from megatron_hylo.data.windows import WindowSource
from megatron_hylo.distill.alignment import mixer_output, mlp_layer
from megatron_hylo.distill.head_loss import linear_head_loss
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.platform.distributed import device

By = Literal["kl", "recall", "both"]
RECALL = RecallSettings(share=0.3, tasks=["key_value", "several_keys"])
RECALL_SEED = 1


@dataclass(frozen=True)
class SwapLoss:
    """Losses of one hybrid.

    Args:
        kl: KL(teacher || hybrid) in nats a token, of all tokens.
        answers: cross-entropy in nats a token, of the tokens of recall answers; None where the text has none.
    """

    kl: float
    answers: float | None = None

    def by(self, by: By, reference: "SwapLoss") -> float:
        """Return the number that layers are chosen by; `both` is the sum of the two, each as a part of the reference's."""
        if by == "kl":
            return self.kl
        assert self.answers is not None and reference.answers is not None, "recall is measured on text with exercises"
        return self.answers if by == "recall" else self.kl / reference.kl + self.answers / reference.answers


class SwapEvaluation:
    """Losses of the hybrids that two pure models can make, over fixed text.

    Args:
        teacher: gives embedding, final norm and head; runs once, its final hidden states are kept.
        mla, linear: layers to choose from; the same dtype as the teacher.
        windows: int64 [n, sequence + 1].
        answers: bool [n, sequence + 1], which tokens are recall answers; None: none are.
        track: progress display over an iterable.
    """

    @torch.no_grad()
    def __init__(
        self,
        teacher: HyloModel,
        mla: HyloModel,
        linear: HyloModel,
        windows: Tensor,
        answers: Tensor | None = None,
        track: Track = no_progress,
    ) -> None:
        self.teacher, self.track = teacher, track
        self.mla, self.linear = mla.mixer_layers(), linear.mixer_layers()
        self.depth = len(self.linear)
        self.windows = [window[:-1].unsqueeze(0).to(device()) for window in windows]
        self.asked = [row[1:].nonzero()[:, 0].to(device()) for row in answers] if answers is not None else None
        self.labels = [window[1:].to(device()) for window in windows]
        self.targets = [teacher(window) for window in track(self.windows, "teacher")]
        self.layers_run = self.depth * len(self.windows)

    @property
    def layer_evaluations(self) -> float:
        """Layers run so far, each over all tokens."""
        return self.layers_run / len(self.windows)

    @property
    def answer_tokens(self) -> int:
        """Tokens of recall answers in all windows."""
        return sum(map(len, self.asked or []))

    @torch.no_grad()
    def loss(self, chosen: Collection[int], description: str) -> SwapLoss:
        """Loss with the layers of `chosen` MLA and all others linear."""
        sums = [0.0, 0.0]
        for number in self.track(range(len(self.windows)), description):
            self._add(sums, self._run(self._embed(number), chosen, 0, self.depth), number)
        return self._mean(sums)

    @torch.no_grad()
    def teacher_loss(self) -> SwapLoss:
        """The teacher's own loss; its KL is 0."""
        sums = [0.0, 0.0]
        for number, target in enumerate(self.targets):
            sums[1] += self._answers_loss(target, number)
        return SwapLoss(0.0, self._mean(sums).answers)

    @torch.no_grad()
    def losses_with_change(self, chosen: Collection[int], candidates: Sequence[int], description: str) -> dict[int, SwapLoss]:
        """Loss with each candidate changed, to MLA or, where it is in `chosen`, to linear; layers before it run once for all.

        Args:
            chosen: layers that are MLA.
            candidates: layer indices, ascending.
            description: of the progress display.
        """
        sums, place, hidden = {candidate: [0.0, 0.0] for candidate in candidates}, 0, torch.empty(0)
        work = [(number, candidate) for number in range(len(self.windows)) for candidate in candidates]
        for number, candidate in self.track(work, description):
            if candidate == candidates[0]:
                place, hidden = 0, self._embed(number)
            hidden, place = self._run(hidden, chosen, place, candidate), candidate
            self._add(sums[candidate], self._run(hidden, {*chosen} ^ {candidate}, candidate, self.depth), number)
        return {candidate: self._mean(found) for candidate, found in sums.items()}

    def _embed(self, number: int) -> Tensor:
        return self.teacher.embedding(input_ids=self.windows[number], position_ids=None)

    def _run(self, hidden: Tensor, chosen: Collection[int], start: int, stop: int) -> Tensor:
        """Layers start..stop - 1: [sequence, 1, hidden] -> the same."""
        for index in range(start, stop):
            mixer, mlp = (self.mla if index in chosen else self.linear)[index]
            hidden = mlp_layer(mlp, hidden + mixer_output(mixer, hidden))
        self.layers_run += stop - start
        return hidden

    def _add(self, sums: list[float], hidden: Tensor, number: int) -> None:
        """Add a window's KL, and the sum of its answers' losses, of hidden states before the final norm."""
        weight = self.teacher.head_weight()
        final = self.teacher.decoder.final_norm(hidden)
        kl = linear_head_loss(
            final.flatten(0, 1), weight, teacher_hidden=self.targets[number].flatten(0, 1), teacher_weight=weight
        ).kl
        assert kl is not None, "there is a teacher"
        if not math.isfinite(kl.item()):
            raise ConfigError("KL to the teacher is not finite: weights are broken, align the models again")
        sums[0] += kl.item()
        sums[1] += self._answers_loss(final, number)

    def _answers_loss(self, final: Tensor, number: int) -> float:
        """Sum of the losses of a window's answers, of normed hidden states [sequence, 1, hidden]."""
        if self.asked is None or not len(self.asked[number]):
            return 0.0
        asked = self.asked[number]
        found = linear_head_loss(final[asked, 0], self.teacher.head_weight(), self.labels[number][asked]).cross_entropy
        assert found is not None, "there are labels"
        return found.item() * len(asked)

    def _mean(self, sums: Sequence[float]) -> SwapLoss:
        answers = None if self.asked is None else sums[1] / self.answer_tokens
        return SwapLoss(sums[0] / len(self.windows), answers)


def selection_windows(data: str | Path, tokens: int, sequence_length: int, by: By) -> tuple[Tensor, Tensor | None]:
    """Read the first windows of the training set in a shuffled order, for recall with exercises in them.

    The exercises are those of training (key-value facts alone and among others like them), three tenths of the tokens, so that
    the evaluation's stay unseen.

    Returns:
        int64 [n, sequence_length + 1], and which tokens are answers, bool of that shape, or None.

    Raises:
        ConfigError: fewer tokens than a window, no dataset, and for recall no tokenizer, or windows too short for an exercise.
    """
    if tokens < sequence_length:
        raise ConfigError(f"tokens {tokens} is less than one window of sequence_length {sequence_length}; give more, or less")

    def plain(length: int) -> PackedDataset:
        """Training windows of so many tokens, without exercises."""
        return PackedDataset(f"{data}/train", length, seed=0)

    source: WindowSource = plain(sequence_length)
    if by != "kl":
        tokenizer = load_transformers_tokenizer(f"{data}/tokenizer")
        if tokenizer is None:
            raise ConfigError(f"{data}/tokenizer holds no tokenizer, which --by {by} needs; make it with `hylo preprocess`")
        source = RecallWindows(plain, sequence_length, RECALL, plain_encoder(tokenizer), RECALL_SEED)
    windows = [source.window(i) for i in range(min(tokens // sequence_length, source.windows_per_epoch))]
    ids = torch.stack([torch.from_numpy(window.tokens) for window in windows])
    if by == "kl":
        return ids, None
    answers = torch.stack([torch.from_numpy(window.answers > 0) for window in windows if window.answers is not None])
    if not answers[:, 1:].any():
        raise ConfigError(f"no question fits in windows of sequence_length {sequence_length}; give longer ones")
    return ids, answers
