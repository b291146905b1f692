"""Examples whose prompts fill a context: the size of each is found with few tokenisations, and kept in the cache.

Each example has random numbers of its own, seeded by seed, task, length and its number: neither the other tasks nor how many
examples are made change it. The cache holds sizes and hashes, from which texts are made again in milliseconds.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from megatron_hylo.config import ConfigError
from megatron_hylo.eval.ruler.sources import seeded
from megatron_hylo.eval.ruler.texts import UNLIMITED, Example, Texts
from megatron_hylo.io import DamagedError, cache_dir
from megatron_hylo.io.cache import logger
from megatron_hylo.io.identity import json_identity
from megatron_hylo.io.progress import Track, no_progress

FULL, AIM = 0.97, 0.985  # shares of the context: less is extended, this is aimed at
BLOCK_TOKENS = 2**21  # tokenised together

Count = Callable[[Sequence[Example]], list[int]]  # tokens of each whole prompt, and of the answer's room


@dataclass(frozen=True)
class Sized:
    """Size of one example, the tokens that its prompt and its answer's room have, and the hash of its text."""

    index: int
    size: int
    length: int
    sha256: str


@dataclass
class _Search:
    """Search for the largest size of one example: what is known to fit, and what not to."""

    index: int
    size: int
    slope: float  # tokens of one more unit
    least: int
    most: int
    fits: int = -1
    fails: int = -1
    tokens: int = 0
    digest: str = ""
    last: tuple[int, int] | None = None  # size and tokens of the last measurement

    def update(self, example: Example, tokens: int, length: int) -> bool:
        """Take a measurement; True when the search is over."""
        if self.last and (tokens - self.last[1]) * (self.size - self.last[0]) > 0:
            self.slope = (tokens - self.last[1]) / (self.size - self.last[0])
        self.last = self.size, tokens
        if tokens <= length:
            self.fits, self.tokens, self.digest = self.size, tokens, _hash(example)
            if tokens >= FULL * length or self.size == self.most:
                return True
        else:
            self.fails = self.size
            if self.size <= self.least:
                return True
        step = int((AIM * length - tokens) / self.slope)
        low = self.fits + 1 if self.fits >= 0 else self.least
        high = self.fails - 1 if self.fails >= 0 else self.most
        self.size = min(max(self.size + step, low), high)
        return low > high


def make_example(texts: Texts, task: str, length: int, seed: int, index: int, size: int) -> Example:
    """Make one example of a given size from its own random numbers.

    Args:
        texts: the task's generator.
        task, length, seed, index: what the random numbers are seeded with; `index` is the example's number.
        size: see `Texts`.
    """
    with seeded(seed, task, length, index):
        return texts.make(index, size) | {"index": index, "size": size}


def find_sizes(
    texts: Texts, task: str, length: int, number: int, seed: int, count: Count, track: Track = no_progress
) -> list[Sized]:
    """Find sizes whose prompts have at most `length` tokens with the answer's room, and at least 95 % where units are small.

    Args:
        texts: the task's generator.
        task, length, seed: what the random numbers are seeded with.
        number: of examples; fewer are returned where too few questions fit.
        count: tokens of examples, as the model would read them.
        track: shows progress.

    Raises:
        ConfigError: the sources are too short for the length, or the length is too short for the task.
    """

    def measure(searches: list[_Search]) -> None:
        """Search on until each has its size; every round makes and counts an example of each that has not."""
        while searches:
            made = [make_example(texts, task, length, seed, search.index, search.size) for search in searches]
            searches = [s for s, example, n in zip(searches, made, count(made)) if not s.update(example, n, length)]

    def start(index: int, size: int, slope: float) -> _Search:
        """Begin the search for an example at a size, moved between the least and the most that there is."""
        least = texts.least(index)
        return _Search(index, min(max(size, least), texts.most), slope, least, texts.most)

    first = start(0, 2 * texts.least(0), 1.0)
    tokens = count([make_example(texts, task, length, seed, 0, first.size)])[0]
    first.slope = tokens / first.size  # too large, so that the first step is careful
    measure([first])
    _check(first, texts, task, length)
    size, slope = max(first.fits, first.least), first.slope
    indices = iter(range(texts.examples))
    done: list[Sized] = []
    per_block = max(1, BLOCK_TOKENS // length)
    for _ in track(range(-(-number // per_block)), f"{task}, {number:,} examples of {length:,} tokens"):
        wanted = min(number, len(done) + per_block)
        while len(done) < wanted and (block := list(itertools.islice(indices, wanted - len(done)))):
            searches = [start(index, size, slope) for index in block]
            measure(list(searches))
            for search in searches:
                _check(search, texts, task, length)
                if search.digest:
                    done.append(Sized(search.index, search.fits, search.tokens, search.digest))
    if not done:
        raise ConfigError(f"{task} does not fit {length:,} tokens: its shortest prompt has more; choose longer lengths")
    if len(done) < number:
        logger.warning("%s at %d tokens: %d examples fit, not %d", task, length, len(done), number)
    return done


def cached_sizes(
    texts: Texts,
    task: str,
    length: int,
    number: int,
    seed: int,
    count: Count,
    made_with: object,
    cache: Path | None = None,
    track: Track = no_progress,
) -> list[Sized]:
    """Find sizes, or read them from the cache.

    Args:
        texts, task, length, number, seed, count, track: as `find_sizes`.
        made_with: what else the examples depend on (tokenizer, template, sources, versions); part of the file's name.
        cache: folder of JSON lines, a file for each set of examples; by default "ruler" in the cache directory.
    """
    key = json_identity([task, length, number, seed, made_with])[:20]
    folder = cache if cache is not None else cache_dir() / "ruler"
    file = folder / f"{task}-{length}-{key}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # ranks and runs that want the same examples wait for one of them
        if file.is_file():
            return [Sized(**json.loads(line)) for line in file.read_text().splitlines()]
        found = find_sizes(texts, task, length, number, seed, count, track)
        partial = file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(asdict(sized)) + "\n" for sized in found))
        os.replace(partial, file)
    return found


def sized_examples(texts: Texts, task: str, length: int, seed: int, sizes: Sequence[Sized]) -> list[Example]:
    """Make the examples of given sizes; "length" is added, the tokens as they were counted.

    Args:
        texts, task, length, seed: as of `make_example`.
        sizes: of `find_sizes`.

    Raises:
        DamagedError: they are not those whose sizes were found.
    """
    examples = []
    for sized in sizes:
        example = make_example(texts, task, length, seed, sized.index, sized.size)
        if _hash(example) != sized.sha256:
            raise DamagedError(
                f"{task} at {length:,} tokens: the generator makes another text than when the sizes in the cache were found; "
                f"remove {cache_dir() / 'ruler'}"
            )
        examples.append(example | {"length": sized.length})
    return examples


def _check(search: _Search, texts: Texts, task: str, length: int) -> None:
    """Refuse what a search found where its sources are too short, or the length is."""
    if search.fits == texts.most and search.tokens < FULL * length:
        raise ConfigError(
            f"{task} at {length:,} tokens: {texts.source} fill only {search.tokens:,}; "
            f"choose shorter lengths, or give longer text"
        )
    if not search.digest and texts.examples == UNLIMITED:  # questions differ in length: the next one may fit
        raise ConfigError(f"{task} does not fit {length:,} tokens: its shortest prompt has more; choose longer lengths")


def _hash(example: Example) -> str:
    text = "\0".join([example["input"], example["gen_prefix"], *example["outputs"]])
    return hashlib.sha256(text.encode()).hexdigest()
