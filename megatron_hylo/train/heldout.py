"""Text that a run is measured on between its steps: held-out texts, and recall windows where it trains on recall."""

import logging
from dataclasses import dataclass

import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.paths import short_names
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.data.heldout import heldout_windows
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.data.tokenizer import check_dataset
from megatron_hylo.data.training_windows import recall_windows
from megatron_hylo.data.windows import WindowSource
from megatron_hylo.eval.perplexity import HeldoutText

logger = logging.getLogger("megatron_hylo.train")
RECALL_SEED = -1  # no run's own, so that all runs are measured on the same exercises


@dataclass(frozen=True)
class Heldout:
    """Held-out windows of a run.

    Args:
        texts: the run's own first, then those of `eval_data`.
        recall: windows with recall exercises; None where the run trains on none.
    """

    texts: list[HeldoutText]
    recall: HeldoutText | None = None


def open_heldout(config: TrainConfig) -> Heldout:
    """Read all that a run is measured on.

    Raises:
        ConfigError: no held-out text, one of another tokenizer, or one shorter than a window.
        DamagedError: a dataset's files contradict each other.
    """
    for folder in config.eval_data:
        check_dataset(folder, config.data)
    names = ["", *short_names(config.eval_data)]
    texts = [_text(config, folder, name) for folder, name in zip([config.data, *config.eval_data], names)]
    return Heldout(texts, _recall(config) if config.recall.share else None)


def _text(config: TrainConfig, folder: str, name: str) -> HeldoutText:
    """Windows inside held-out documents; across them, with a warning, where none is as long as the sequence."""
    where = f"{folder}/heldout"
    try:
        return HeldoutText(heldout_windows(where, config.sequence_length, config.eval_windows), name=name)
    except ConfigError as error:
        logger.warning("%s; evaluating on windows that cross documents", error)
    if config.packed_documents:  # kept apart, as in training
        source = PackedDataset(where, config.sequence_length, seed=0, shuffle=False)
        return _first_windows(source, config.eval_windows, True, name)
    return HeldoutText(heldout_windows(where, config.sequence_length, config.eval_windows, allow_crossing=True), name=name)


def _recall(config: TrainConfig) -> HeldoutText:
    """Windows with exercises in held-out text, the same for every run with these settings, in documents that may be short."""

    def source(length: int) -> PackedDataset:
        """Held-out windows of so many tokens, in the order of the text."""
        return PackedDataset(f"{config.data}/heldout", length, seed=0, shuffle=False)

    return _first_windows(recall_windows(config, source, RECALL_SEED), config.eval_windows, config.packed_documents, "")


def _first_windows(source: WindowSource, most: int, packed: bool, name: str) -> HeldoutText:
    """At most `most` windows of an epoch, evenly spaced, with their documents where these do not see each other."""
    count = min(most, source.windows_per_epoch)
    windows = [source.window(i * source.windows_per_epoch // count) for i in range(count)]
    answers = [torch.from_numpy(window.answers) for window in windows if window.answers is not None]
    return HeldoutText(
        torch.stack([torch.from_numpy(window.tokens) for window in windows]),
        [torch.from_numpy(window.document_starts) for window in windows] if packed else None,
        torch.stack(answers) if answers else None,
        name,
    )
