"""A model that only computes: a teacher, and how it reads sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_hylo.models.fp8 import keep_fp8_weights
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.models.offload import OffloadedLayers
from megatron_hylo.models.windows import Stitching, stitch_windows
from megatron_hylo.parallel.documents import PackedDocuments
from megatron_hylo.parallel.pipeline import rank_shape, through_stages


@dataclass(frozen=True)
class Reading:
    """Input of a frozen model for one micro-batch.

    Args:
        ids: int64 [rows, tokens] of this rank.
        documents: of a packed sequence.
        stitching: where the micro-batch's tokens are among the rows' windows; None: the rows are the micro-batch.
    """

    ids: Tensor
    documents: PackedDocuments | None
    stitching: Stitching | None = None


class FrozenModel(Sequence[HyloModel]):
    """This rank's chunks of a frozen model, which reads sequences whole or in overlapping windows of its own length.

    Read in windows, every context-parallel rank runs those that its own tokens come from, each of them whole: such a model is
    built with `context_parallel_size` 1, and its ranks exchange token ids alone.

    Args:
        chunks: this rank's part, a chunk a virtual pipeline stage.
        window: tokens of the windows; None: it reads sequences whole.
    """

    def __init__(self, chunks: Sequence[HyloModel], window: int | None = None) -> None:
        self.chunks, self.window = list(chunks), window
        own = self.chunks[0].config
        # hidden states of windows are stitched on every tensor-parallel rank, so that each has all tokens
        self.config: Any = own if window is None else SimpleNamespace(hylo=own.hylo, sequence_parallel=False)

    def __getitem__(self, index: Any) -> Any:
        return self.chunks[index]

    def __len__(self) -> int:
        return len(self.chunks)

    def head_weight(self) -> Tensor:
        """This rank's rows of the output head, [vocab / TP rounded up, hidden]; on the last pipeline stage."""
        return self.chunks[-1].head_weight()

    def read(self, ids: Tensor, documents: PackedDocuments | None = None) -> Reading:
        """Return the input of the first chunk for a micro-batch; all context-parallel ranks call it.

        Args:
            ids: int64 [batch, sequence / context-parallel ranks].
            documents: of a packed sequence, batch 1.
        """
        if self.window is None:
            return Reading(ids, documents)
        config = self.chunks[0].config
        multiple = parallel_state.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1
        return Reading(*stitch_windows(ids, documents, self.window, multiple * (8 if config.fp8 else 1)))

    def run(self, index: int, reading: Reading, received: Tensor | None = None) -> Tensor:
        """One chunk's hidden states of a reading, without gradient.

        Args:
            index: of the chunk.
            reading: made by `read`.
            received: what the chunk before made; None for the first one of the model.

        Returns:
            What the next chunk receives, [tokens (/ TP), rows, hidden]. Of the last chunk, for the head loss, hidden states of
            the micro-batch's tokens: [sequence / context-parallel ranks (/ TP), batch, hidden], in windows not divided by TP.
        """
        chunk, stitching = self.chunks[index], reading.stitching
        rows = stitching.rows_at_a_time if stitching is not None else len(reading.ids)
        outs = []
        with torch.no_grad():
            for start in range(0, len(reading.ids), rows):
                if received is not None:
                    chunk.set_input_tensor(received[:, start : start + rows].contiguous())
                outs.append(chunk(reading.ids[start : start + rows], reading.documents))
            out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
            return stitching.stitch(out, chunk.config) if stitching is not None and chunk.post_process else out

    def __call__(self, ids: Tensor, documents: PackedDocuments | None = None) -> Tensor:
        """Last hidden states of a micro-batch, for a model without pipeline stages; see `read` and `run`."""
        return self.run(0, self.read(ids, documents))

    def hidden_states(self, ids: Tensor, documents: PackedDocuments | None = None) -> Tensor | None:
        """Last hidden states through all pipeline stages, see `run`; None on other stages than the last.

        Args:
            ids: int64 [batch, sequence / context-parallel ranks], on every stage.
            documents: of a packed sequence, batch 1.
        """
        config, reading = self.chunks[0].config, self.read(ids, documents)
        shape = rank_shape(reading.ids.shape[1], len(reading.ids), config.hidden_size, config.sequence_parallel)
        run = lambda index, received: self.run(index, reading, received)  # noqa: E731
        return through_stages(run, len(self.chunks), shape, config.pipeline_dtype, ids.device)


def freeze(chunks: Sequence[HyloModel], offload: bool = False, window: int | None = None) -> FrozenModel:
    """Freeze model chunks; those built for FP8 keep their weights in FP8 alone, so they cannot be saved.

    Args:
        chunks: this rank's part, filled with its weights.
        offload: keep the weights in CPU memory and prefetch them layer by layer.
        window: see `FrozenModel`.
    """
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
        if chunk.config.fp8:
            keep_fp8_weights(chunk)
        if offload:
            OffloadedLayers(chunk)
    return FrozenModel(chunks, window)


def as_frozen(chunks: Sequence[HyloModel] | HyloModel) -> FrozenModel:
    """The same as `FrozenModel`, of a model's chunks or of its only one; no flag of theirs is changed."""
    if isinstance(chunks, FrozenModel):
        return chunks
    return FrozenModel([chunks] if isinstance(chunks, HyloModel) else chunks)
