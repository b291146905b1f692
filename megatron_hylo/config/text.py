"""Settings of how a run's text is chosen and cut into windows."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_hylo.config.errors import ConfigError

LONG_WINDOW, LONG_SHARE = 65536, 0.6  # most windows that long are to be of documents as long


@dataclass
class TextPart:
    """One dataset of a blend.

    Args:
        data: dataset folder made by `hylo preprocess`, with the tokenizer of the run's data.
        weight: windows of it, in proportion to the other parts' weights.
        min_length: tokens that a document has at least; shorter ones are left out.
    """

    data: str
    weight: float = 1.0
    min_length: int = 0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"text.blend: {self.data} has weight {self.weight}; give a positive one, or leave the part out")
        if self.min_length < 0:
            raise ConfigError(f"text.blend: {self.data} has min_length {self.min_length}; give at least 0")


@dataclass
class TextSettings:
    """Text of the training windows; by default all documents of `data`, laid end to end.

    Args:
        blend: datasets to train on in place of `data`, which then only evaluates.
        packing: stream: documents laid end to end and cut; best_fit: whole documents where they fit, few are cut.
        most_documents: best_fit: documents and parts of documents in one window; one that they do not fill ends in padding.
        long_share: part of the windows that is made of documents as long as a window, where there are any; the others are made
            of the shorter ones. 0 for the share that the text has; by default (null) 0.6 for windows of 64K and more, where the
            text has less.
    """

    blend: list[TextPart] = field(default_factory=list)
    packing: Literal["stream", "best_fit"] = "stream"
    most_documents: int | None = None
    long_share: float | None = None

    def __post_init__(self) -> None:
        if self.most_documents is not None and (self.most_documents < 1 or self.packing != "best_fit"):
            raise ConfigError(
                f"text.most_documents {self.most_documents} with packing {self.packing}: give at least 1 and packing best_fit, "
                f"or leave it out"
            )
        if self.long_share is not None and not 0 <= self.long_share < 1:
            raise ConfigError(f"text.long_share must be at least 0 and below 1, got {self.long_share}; 0 for the text's own")

    def long_part(self, sequence_length: int, own: float) -> float | None:
        """Part of the windows to make of documents as long as a window, of which the text has `own`; None: leave it so."""
        if self.long_share is not None:
            return self.long_share or None
        return LONG_SHARE if sequence_length >= LONG_WINDOW and own < LONG_SHARE else None
