"""Windows of several sources in fixed proportions."""

from collections.abc import Sequence

import numpy as np

from megatron_hylo.config import ConfigError
from megatron_hylo.data.windows import Window, WindowSource, divide

BLOCK = 4096  # windows in which each source has its share, to the nearest window


class BlendedWindows(WindowSource):
    """Windows of several sources; each source's own windows come in its own order, none twice in its epoch.

    Each block of 4,096 windows has the same number of a source's windows, spread evenly. Window i is a pure function of i.

    Args:
        sources: of one sequence length, with their names.
        weights: one each, positive; only their ratios count.

    Raises:
        ConfigError: a weight that gives a source no window in a block.
    """

    def __init__(self, sources: Sequence[tuple[str, WindowSource]], weights: Sequence[float]) -> None:
        self.names, self.sources = [name for name, _ in sources], [source for _, source in sources]
        self.sequence_length = self.sources[0].sequence_length
        self.masked = any(source.masked for source in self.sources)
        shares = np.array(weights) / sum(weights)
        self.counts = np.floor(shares * BLOCK).astype(np.int64)
        most_cut = np.argsort(-(shares * BLOCK - self.counts), kind="stable")
        self.counts[most_cut[: BLOCK - self.counts.sum()]] += 1
        for name, count, weight in zip(self.names, self.counts, weights):
            if not count:
                raise ConfigError(
                    f"text.blend: {name} has weight {weight} of {sum(weights):g}, less than one window in {BLOCK:,}: give "
                    f"more, or leave the part out"
                )
        # source k's windows lie at the middles of count[k] equal parts of the block
        at = np.concatenate([(np.arange(n) + 0.5) / n for n in self.counts])
        self._source = np.repeat(np.arange(len(self.counts)), self.counts)[np.argsort(at, kind="stable")]
        self._before = np.stack([np.cumsum(self._source == k) - (self._source == k) for k in range(len(self.counts))])
        # until every source has been read once
        self.windows_per_epoch = max(
            -(-source.windows_per_epoch * BLOCK // int(n)) for source, n in zip(self.sources, self.counts)
        )

    def place(self, index: int) -> tuple[int, int]:
        """(source, window of it) of window `index`."""
        block, at = divide(index, BLOCK)
        source = int(self._source[at])
        return source, block * int(self.counts[source]) + int(self._before[source, at])

    def window(self, index: int) -> Window:
        """Window `index`."""
        source, number = self.place(index)
        return self.sources[source].window(number)

    @property
    def long_share(self) -> float:
        """Part of the tokens that is of documents at least as long as a window."""
        return float(sum(n * source.long_share for n, source in zip(self.counts, self.sources)) / BLOCK)

    def describe(self, windows: int) -> str:
        """A sentence for each part."""
        block, rest = divmod(windows, BLOCK)
        counts = block * self.counts + np.bincount(self._source[:rest], minlength=len(self.counts))
        return "; ".join(
            f"{name} ({n / BLOCK:.1%} of the windows): {source.describe(int(read))}"
            for name, source, n, read in zip(self.names, self.sources, self.counts, counts)
        )
