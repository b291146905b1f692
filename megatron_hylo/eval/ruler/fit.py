"""Examples whose prompts fill a context: the size of each is found with few tokenisations, and kept in the cache.

Each example has random numbers of its own, seeded by seed, task, length and its number: neither the other tasks nor how many
examples are made change it. The cache holds sizes and hashes, from which texts are made again in milliseconds.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.eval.ruler.sources import seeded
from megatron_hylo.eval.ruler.texts import Example, Texts
from megatron_hylo.io import DamagedError
from megatron_hylo.io.cache import cached_folder, logger
from megatron_hylo.io.identity import json_identity
from megatron_hylo.io.progress import Track, no_progress

EXAMPLES = "examples.jsonl"
FULL, AIM = 0.97, 0.985  # shares of the context: less is extended, this is aimed at
BLOCK_TOKENS = 2**21  # tokenised together

Count = Callable[[Sequence[Example]], list[int]]  # tokens of each whole prompt, and of the answer's room


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
    example: Example | None = None

    def update(self, example: Example, tokens: int, length: int) -> bool:
        """Take a measurement; True when the search is over."""
        if self.fits >= 0 and self.size > self.fits and tokens > self.tokens:
            self.slope = (tokens - self.tokens) / (self.size - self.fits)
        if tokens <= length:
            self.fits, self.tokens, self.example = self.size, tokens, example
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
    """Make one example of a given size from its own random numbers."""
    with seeded(seed, task, length, index):
        return texts.make(index, size) | {"index": index, "size": size}


def make_examples(
    texts: Texts, task: str, length: int, number: int, seed: int, count: Count, track: Track = no_progress
) -> list[Example]:
    """Make examples whose prompts have at most `length` tokens with the answer's room, and at least 95 % where units are small.

    Args:
        texts: the task's generator.
        task, length, seed: what the random numbers are seeded with.
        number: of examples; fewer are returned where too few questions fit.
        count: tokens of examples, as the model would read them.
        track: shows progress.

    Returns:
        Examples with "index", "size" and "length" (tokens as counted) added.

    Raises:
        ConfigError: the sources are too short for the length, or the length is too short for the task.
    """

    def measure(searches: list[_Search]) -> None:
        while searches:
            made = [make_example(texts, task, length, seed, search.index, search.size) for search in searches]
            searches = [s for s, example, n in zip(searches, made, count(made)) if not s.update(example, n, length)]

    def start(index: int, size: int, slope: float) -> _Search:
        least = texts.least(index)
        return _Search(index, min(max(size, least), texts.most), slope, least, texts.most)

    first = start(0, 2 * texts.least(0), 1.0)
    first.slope = (
        count([make_example(texts, task, length, seed, 0, first.size)])[0] / first.size
    )  # too large, so that steps are careful
    measure([first])
    _check_full(first, texts, task, length)
    size, slope = max(first.fits, first.least), first.slope
    indices = iter(range(texts.examples))
    done: list[Example] = []
    per_block = max(1, BLOCK_TOKENS // length)
    for _ in track(range(-(-number // per_block)), f"{task}, {number:,} examples of {length:,} tokens"):
        wanted = min(number, len(done) + per_block)
        while len(done) < wanted and (block := list(itertools.islice(indices, wanted - len(done)))):
            searches = [start(index, size, slope) for index in block]
            measure(list(searches))
            for search in searches:
                _check_full(search, texts, task, length)
                if search.example is not None:
                    done.append(search.example | {"length": search.tokens})
    if not done:
        raise ConfigError(
            f"{task} does not fit {length:,} tokens: its shortest prompt is longer; take it out of the tasks there"
        )
    if len(done) < number:
        logger.warning("%s at %d tokens: %d examples fit, not %d", task, length, len(done), number)
    return done


def cached_examples(
    texts: Texts, task: str, length: int, number: int, seed: int, count: Count, made_with: object, track: Track = no_progress
) -> list[Example]:
    """Make examples, or make their texts again from the sizes that the cache holds.

    Args:
        texts, task, length, number, seed, count, track: as `make_examples`.
        made_with: what else the examples depend on (tokenizer, template, sources, versions); part of the cache's key.
    """

    def build(folder: Path) -> None:
        with open(folder / EXAMPLES, "w") as file:
            for example in make_examples(texts, task, length, number, seed, count, track):
                kept = {name: example[name] for name in ("index", "size", "length")} | {"sha256": _hash(example)}
                file.write(json.dumps(kept) + "\n")

    key = json_identity([task, length, number, seed, made_with])[:20]
    folder = cached_folder(f"ruler-{task}-{length}-{key}", build)
    examples = []
    for line in (folder / EXAMPLES).read_text().splitlines():
        kept = json.loads(line)
        example = make_example(texts, task, length, seed, kept["index"], kept["size"])
        if _hash(example) != kept["sha256"]:
            raise DamagedError(f"{folder} was made by another version of {task}'s generator; remove that folder")
        examples.append(example | {"length": kept["length"]})
    return examples


def _check_full(search: _Search, texts: Texts, task: str, length: int) -> None:
    if search.fits == texts.most and search.tokens < FULL * length:
        raise ConfigError(
            f"{task} at {length:,} tokens: {texts.source} fill only {search.tokens:,}; "
            f"choose shorter lengths, take the task out, or give longer text"
        )


def _hash(example: Example) -> str:
    text = "\0".join([example["input"], example["gen_prefix"], *example["outputs"]])
    return hashlib.sha256(text.encode()).hexdigest()
