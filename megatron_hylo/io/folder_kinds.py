"""Kinds of folders by the files that they have, for errors about a folder of another kind; PyTorch is not imported."""

from dataclasses import dataclass
from pathlib import Path

from megatron_hylo.io._manifests import has_manifest


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Args:
        words: what it is called.
        marks: files of which each folder of the kind has one.
        places: where inside a folder of another kind one may be, the likeliest first.
        is_finished: whether a folder counts only with its manifest.
    """

    words: str
    marks: tuple[str, ...]
    places: tuple[str, ...] = ("*",)
    is_finished: bool = True


KINDS = {  # the first that fits is said
    "model": Kind("a model folder", ("hylo.json",), ("model", "checkpoints/step_*", "*/model", "*/checkpoints/step_*")),
    "run": Kind("the folder of a training run", ("history.json", "starts.jsonl"), (), is_finished=False),
    "dataset": Kind("a dataset folder", ("train.bin", "heldout.bin"), is_finished=False),
    "calibration": Kind("a calibration folder", ("calibration.json",)),
    "store": Kind("a teacher store", ("store.json",)),
    "results": Kind("a results folder", ("results.json",)),
    "Hugging Face": Kind("a Hugging Face folder", ("config.json",), ("exports/step_*", "export"), is_finished=False),
}


def is_a(folder: Path, kind: str) -> bool:
    """Whether a folder has a file that tells its kind, a key of `KINDS`."""
    return any((folder / mark).is_file() for mark in KINDS[kind].marks)


def kind_of(folder: Path) -> str | None:
    """Kind of a folder, a key of `KINDS`; None of another one, and of what is no folder."""
    return next((kind for kind in KINDS if is_a(folder, kind)), None)


def hint(path: str | Path, wanted: str) -> str:
    """End of a sentence about a path that is not of the wanted kind: what was probably meant, or what it is; perhaps empty.

    Args:
        path: as it was given.
        wanted: a key of `KINDS`.
    """
    path, kind = Path(path), KINDS[wanted]
    around = [list(path.parents[:2])] if wanted == "run" else [] if path.is_dir() else [[path.parent]]
    for places in (*(path.glob(place) for place in kind.places), *around):
        if found := [p for p in places if is_a(p, wanted) and (has_manifest(p) or not kind.is_finished)]:
            newest = max(found, key=lambda folder: (max(_times(folder, kind)), folder.name))
            return f"; did you mean {newest}?"
    if not path.is_dir():
        return "; it is a file" if path.exists() else "; there is no such folder"
    other = kind_of(path)
    return f"; it is {KINDS[other].words}" if other not in (None, wanted) else ""


def _times(folder: Path, kind: Kind) -> list[float]:
    return [(folder / mark).stat().st_mtime for mark in kind.marks if (folder / mark).is_file()]
