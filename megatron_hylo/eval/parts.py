"""Finished parts of an evaluation, kept beside its output, so that one that was killed goes on where it was."""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_hylo.eval.results import Found, Sample, Score
from megatron_hylo.io import on_main, rank, read_json, staging_directory, staging_path, write_json

logger = logging.getLogger("megatron_hylo.eval")
PARTS, ABOUT = "measured", "evaluation"  # names of the folder beside the output and of the file with what is measured
Part = Callable[[str, Callable[[], Found]], Found]  # gives the results of a named part, which it may have to run


def run_part(name: str, run: Callable[[], Found]) -> Found:
    """Run a part, and keep nothing."""
    return run()


class KeptParts:
    """Runs parts of an evaluation that were not finished before; all ranks make and call it.

    Args:
        output: results folder that will be made; parts are in `.NAME.measured` beside it.
        description: what is measured, of what, with what: JSON. Parts of another description are removed.

    Raises:
        ConfigError: not all ranks see the folder.
    """

    def __init__(self, output: Path, description: Mapping[str, Any]) -> None:
        self.folder = staging_directory(output, PARTS, ABOUT, dict(description))
        self.done: set[str] = on_main(lambda: {file.stem for file in self.folder.glob("*.json")} - {ABOUT})
        if self.done:
            logger.info("going on with %s: %d parts were measured before", output, len(self.done))

    def __call__(self, name: str, run: Callable[[], Found]) -> Found:
        """Return the results of a part, measured now or before; on other ranks than the first those of `run`, or none."""
        file = self.folder / f"{name}.json"
        if name in self.done:
            if rank() != 0:
                return [], []
            kept = read_json(file)
            return [Score(**values) for values in kept["scores"]], [Sample(**values) for values in kept["samples"]]
        scores, samples = run()
        if rank() == 0:
            try:
                write_json(file, {"scores": [asdict(s) for s in scores], "samples": [asdict(s) for s in samples]})
            except OSError as error:  # the evaluation itself can go on
                logger.warning("%s is not kept for a later start: %s", name, error)
        return scores, samples


def remove_parts(output: Path) -> None:
    """Remove what is kept beside a results folder that is complete."""
    shutil.rmtree(staging_path(output, PARTS), ignore_errors=True)
