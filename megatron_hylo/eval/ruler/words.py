"""Key words of RULER's needles: all pairs ADJECTIVE-NOUN of wonderwords, in order, without a list of them.

lm-eval's prepare_niah builds and sorts the 6.2 million pairs when it is imported: 11 s of CPU and 0.7 GB in each process.
"""

import bisect
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace


class Pairs(Sequence[str]):
    """The same items as sorted({f"{adjective}-{noun}" ...}), each made when it is asked for.

    Args:
        adjectives, nouns: words; repeated ones count once.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self.nouns = sorted(set(nouns))
        self.parts: list[str | list[str]] = []  # an adjective with "-", or sorted pairs where one adjective begins another
        starts = sorted({f"{adjective}-" for adjective in adjectives})
        while starts:
            group = [start for start in starts if start.startswith(starts[0])]  # they follow each other
            pairs = sorted({start + noun for start in group for noun in self.nouns}) if len(group) > 1 else group[0]
            self.parts.append(pairs)
            starts = starts[len(group) :]
        sizes = [len(part) if isinstance(part, list) else len(self.nouns) for part in self.parts]
        self.ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index):
        if isinstance(index, slice) or not 0 <= index < len(self):
            raise IndexError(f"pairs are numbered from 0 to {len(self) - 1}, not {index}")
        number = bisect.bisect_right(self.ends, index)
        part, offset = self.parts[number], index - (self.ends[number - 1] if number else 0)
        return part[offset] if isinstance(part, list) else part + self.nouns[offset]


@contextlib.contextmanager
def without_pairs() -> Iterator[None]:
    """Let a module that builds the pairs when it is imported find no words."""
    import wonderwords

    original = wonderwords.RandomWord
    wonderwords.RandomWord = lambda: SimpleNamespace(_categories={"nouns": [], "adjectives": [], "verbs": []})
    try:
        yield
    finally:
        wonderwords.RandomWord = original
