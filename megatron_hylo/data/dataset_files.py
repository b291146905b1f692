"""Files of a dataset that grow while it is made, and go on where they were after a kill.

FOLDER/settings.json     of what it is made; parts of other settings are made anew
FOLDER/state.json        sizes of the files below, and how far the input has been read; written after them
FOLDER/SPLIT.bin         token ids
FOLDER/SPLIT.lengths     int64, tokens of each document
FOLDER/SPLIT.answers     int64 pairs, (first, last + 1) tokens of the answers, where answers alone are learnt
FOLDER/heldout.names     a JSON string a line, "source/name" of each document held out
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import _IndexWriter

from megatron_hylo.io import DamagedError, read_json, write_json

STATE = "state.json"
ANSWERS = ".answers.npy"  # of a finished dataset, [2, answers] int64: first tokens, and those behind the last ones
COPY = 2**24  # numbers copied together


class DatasetFiles:
    """Appends documents to the files of a folder.

    Args:
        folder: exists.
        splits: names of the sets.
        dtype: of token ids.
        answers: keep the answers' places.

    Attributes:
        state: what the last `save` was given, after which the files go on; None: from the beginning.
        counts: [documents, tokens] of each split.
    """

    def __init__(self, folder: Path, splits: tuple[str, ...], dtype: np.dtype, answers: bool) -> None:
        self.folder, self.splits, self.dtype, self.answers = folder, splits, dtype, answers
        kinds = ("bin", "lengths", "answers") if answers else ("bin", "lengths")
        names = [f"{split}.{kind}" for split in splits for kind in kinds] + ["heldout.names"]
        sizes, self.state = self._former(names)
        self.counts = {split: [0, 0] for split in splits}
        self._files = {}
        with contextlib.ExitStack() as stack:
            for name in names:
                self._files[name] = stack.enter_context(open(folder / name, "ab"))
                self._files[name].truncate(sizes[name])
                self._files[name].seek(sizes[name])
            self._stack = stack.pop_all()
        for split in splits:
            lengths = np.fromfile(folder / f"{split}.lengths", np.int64)
            self.counts[split] = [len(lengths), int(lengths.sum())]

    def add(self, split: str, name: str, ids: memoryview | bytes, answers: list[tuple[int, int]] | None) -> None:
        """Append a document.

        Args:
            split: "train" or "heldout".
            name: kept of held-out documents.
            ids: in the dataset's dtype, as bytes, with the end token.
            answers: [first, end) of the tokens that are learnt, where the dataset tells; None: all of them.
        """
        count, length = self.counts[split], len(ids) // self.dtype.itemsize
        self._files[f"{split}.bin"].write(ids)
        self._files[f"{split}.lengths"].write(np.int64(length).tobytes())
        if self.answers:
            spans = [(0, length)] if answers is None else answers
            self._files[f"{split}.answers"].write((np.array(spans, np.int64).reshape(-1, 2) + count[1]).tobytes())
        if split == "heldout":
            self._files["heldout.names"].write(json.dumps(name).encode() + b"\n")
        count[0] += 1
        count[1] += length

    def save(self, state: dict[str, Any]) -> None:
        """Make all that was added last, and with it `state`: JSON-serialisable, what the next start goes on from."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.folder / STATE, {"sizes": {name: file.tell() for name, file in self._files.items()}, "state": state})
        self.state = state

    def close(self) -> None:
        """Close the files; what was added after the last `save` may be lost."""
        self._stack.close()

    def lengths(self, split: str) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.fromfile(self.folder / f"{split}.lengths", np.int64)

    def heldout_names(self) -> list[str]:
        """Names of the documents held out, in order."""
        return [json.loads(line) for line in (self.folder / "heldout.names").read_bytes().splitlines()]

    def finish(self, folder: Path) -> None:
        """Put the dataset into another folder of the file system; the parts stay as they are."""
        for split in self.splits:
            _link(self.folder / f"{split}.bin", folder / f"{split}.bin")
            lengths = self.lengths(split)
            with _IndexWriter(str(folder / f"{split}.idx"), self.dtype.type) as index:
                index.write(lengths.tolist(), None, list(range(len(lengths) + 1)))
            if self.answers:
                self._write_answers(self.folder / f"{split}.answers", folder / f"{split}{ANSWERS}")

    def token_chunks(self) -> Iterator[np.ndarray]:
        """All tokens, some at a time."""
        for split in self.splits:
            file = self.folder / f"{split}.bin"
            tokens = np.memmap(file, self.dtype, "r") if file.stat().st_size else np.zeros(0, self.dtype)
            for start in range(0, len(tokens), COPY):
                yield tokens[start : start + COPY]

    def _former(self, names: list[str]) -> tuple[dict[str, int], dict[str, Any] | None]:
        """Sizes of the files and the state of the last `save`; zeros where there was none, or a file is shorter than then."""
        with contextlib.suppress(DamagedError, OSError):
            if (self.folder / STATE).is_file():
                found = read_json(self.folder / STATE, ("sizes", "state"))
                sizes = found["sizes"]
                if sizes.keys() == set(names) and all((self.folder / n).stat().st_size >= sizes[n] for n in names):
                    return sizes, found["state"]
        (self.folder / STATE).unlink(missing_ok=True)
        return dict.fromkeys(names, 0), None

    @staticmethod
    def _write_answers(source: Path, target: Path) -> None:
        count = source.stat().st_size // 16
        made = np.lib.format.open_memmap(target, "w+", np.int64, (2, count))
        with open(source, "rb") as file:
            for start in range(0, count, COPY):
                some = np.fromfile(file, np.int64, 2 * min(COPY, count - start)).reshape(-1, 2)
                made[:, start : start + len(some)] = some.T
        made.flush()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
