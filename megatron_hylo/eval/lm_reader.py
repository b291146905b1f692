"""Batched reading with a carried cache: log-probabilities of given tokens, prompts of several lengths, copies of a cache."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.hf import HyloForCausalLM

PREFILL_TOKENS = 8192  # of a sequence in one pass; longer ones are read in pieces, to bound the memory of activations
IGNORED = -100  # a target whose logits are not needed


class Reader:
    """A batch of sequences that a model has read so far.

    Padding may stand between tokens: a hybrid's layers leave it out, and other models are told positions and mask.

    Args:
        model: causal LM of transformers.
        piece: tokens of a sequence in one pass.
        cache: empty, of the model's kind; None: its own, which grows.
    """

    def __init__(self, model: Any, piece: int = PREFILL_TOKENS, cache: Any = None) -> None:
        self.model, self.piece, self.cache = model, piece, cache
        self.mask: Tensor | None = None  # bool [batch, tokens read], False at padding; None: there was none
        self.columns = 0  # tokens read, padding included

    @torch.inference_mode()
    def read(self, ids: Tensor, real: Tensor | None = None, last: bool = False) -> Tensor | None:
        """Read tokens after those before.

        Args:
            ids: int64 [batch, n].
            real: bool [batch, n], False at padding; None: no padding.
            last: compute the logits after the last token.

        Returns:
            [batch, vocabulary] if asked for.
        """
        logits = None
        for start in range(0, ids.shape[1], self.piece):
            part = slice(start, start + self.piece)
            logits = self._pass(ids[:, part], None if real is None else real[:, part], 1)
        return logits[:, -1] if last and logits is not None else None

    @torch.inference_mode()
    def score(self, ids: Tensor, targets: Tensor, logits_at_once: int) -> tuple[Tensor, Tensor]:
        """Read last tokens, and look up the probabilities of the tokens that follow them.

        Args:
            ids: int64 [batch, n]; padding only on the right, where nothing is read afterwards.
            targets: int64 [batch, n], the token after each, IGNORED where it is not asked for.
            logits_at_once: elements of logits in memory at a time.

        Returns:
            log-probabilities, fp32, and whether the target is the most likely token; both [batch, n], 0 where not asked for.
        """
        log_probs = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        greedy = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        asked = (targets != IGNORED).any(0)
        columns = max(1, logits_at_once // (len(ids) * self.model.config.vocab_size))
        pieces = list(_pieces(asked.tolist(), self.piece, columns))
        for start, end in pieces:
            keep = asked[start:end].nonzero()[:, 0]
            logits = self._pass(ids[:, start:end], None, keep, use_cache=len(pieces) > 1)
            if len(keep):
                at, labels = start + keep, targets[:, start + keep]
                loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
                log_probs[:, at] = -loss.view(labels.shape)
                greedy[:, at] = (logits.argmax(-1) == labels) & (labels != IGNORED)
        return log_probs, greedy

    def select(self, rows: Tensor) -> None:
        """Go on with copies of sequences: row i becomes one of the old row rows[i]; int64 [new batch]."""
        with torch.inference_mode():
            self.cache.reorder_cache(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]

    def _pass(self, ids: Tensor, real: Tensor | None, keep: Tensor | int, use_cache: bool = True) -> Tensor:
        batch, new = ids.shape
        inputs: dict[str, Any] = {}
        if real is not None or self.mask is not None:
            real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
            before = ids.new_ones(batch, self.columns, dtype=torch.bool) if self.mask is None else self.mask
            self.mask = torch.cat([before, real], dim=1)
            inputs["attention_mask"] = self.mask.long()
            if not isinstance(self.model, HyloForCausalLM):  # it counts them itself
                inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        self.columns += new
        out = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=use_cache, logits_to_keep=keep, return_dict=True, **inputs
        )
        self.cache = out.past_key_values
        return out.logits


def _pieces(wanted: Sequence[bool], piece: int, columns: int) -> Iterator[tuple[int, int]]:
    """Cut a sequence into pieces (start, end) of at most `piece` tokens and `columns` wanted ones."""
    start = found = 0
    for place, needed in enumerate(wanted):
        if place - start == piece or (needed and found == columns):
            yield start, place
            start, found = place, 0
        found += needed
    yield start, len(wanted)


def read_prompts(
    model: Any, prompts: Sequence[Sequence[int]], device: torch.device, piece: int, cache: Any = None
) -> tuple[Reader, Tensor]:
    """Read prompts of nearly one length, and keep their cache.

    What all are long enough for is read without padding, by the fused attention; the rest is padded on its left, so that
    each prompt's last token is in the last column.

    Args:
        model: as of `Reader`.
        prompts: token ids, at least one each.
        device: of the model.
        piece: tokens that are read at a time.
        cache: as of `Reader`.

    Returns:
        The reader, and the logits after each prompt [batch, vocabulary].
    """
    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    reader = Reader(model, piece, cache)
    common = longest if longest == shortest else shortest - 1  # every row has a token in the rest
    start = torch.tensor([list(prompt[:common]) for prompt in prompts], dtype=torch.long, device=device)
    logits = reader.read(start, last=common == longest)
    if common < longest:
        rest = [list(prompt[common:]) for prompt in prompts]
        width = longest - common
        padded = torch.tensor([[0] * (width - len(row)) + row for row in rest], device=device)
        real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rest], device=device)
        logits = reader.read(padded, real, last=True)
    assert logits is not None, "asked for by last"
    return reader, logits


def pad_right(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """Stack rows of several lengths, at least one, filled up on the right with `fill`: int64 [rows, longest] on the device."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
