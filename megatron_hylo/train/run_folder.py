"""Run folders: checked before a run starts, so that it replaces and removes only files of its own; their tokenizer."""

import shutil
from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.config.paths import hugging_face_folder, plain_path
from megatron_hylo.config.train import PREFIXES, TrainConfig
from megatron_hylo.convert.token_ids import save_tokenizer
from megatron_hylo.io import check_apart, check_free, has_manifest, on_main


def check_run_folder(config: TrainConfig, run: Path) -> None:
    """Refuse a run folder in which the run's results could not be written; all ranks call it.

    Args:
        config: of the run.
        run: its folder, which need not be there.

    Raises:
        ConfigError: what is in the way: a file, a place that cannot be written, a RUN/model that is not of ours, or something
            that the run reads where it removes old checkpoints.
    """
    given = (config.data, config.model, config.scratch, config.second_model, config.teacher, config.teacher_store)
    sources = [plain_path(path) for path in given if path]
    if not has_manifest(run / "model"):  # else the run is finished and nothing is written
        for prefix in PREFIXES:
            check_free(run / f"{prefix}model", overwrite=True, sources=sources)
    checkpoints = run / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ConfigError(f"{checkpoints} is a file, and checkpoints are to be written there; choose another output")
    if checkpoints.is_dir():
        check_apart(checkpoints, sources)


def tokenizer_place(source: str, run: Path) -> Path:
    """Return the folder of a source's tokenizer: SOURCE/tokenizer, of a Hugging Face folder (`hf:PATH`) RUN/tokenizer."""
    return (Path(source) if hugging_face_folder(source) is None else run) / "tokenizer"


def keep_tokenizer(config: TrainConfig, run: Path) -> None:
    """Write RUN/tokenizer, for the run's checkpoints, where its model or else its teacher is `hf:PATH`; all ranks call it."""

    def write() -> None:
        """Save the tokenizer, unless it is there, beside its place and rename it."""
        source = next(filter(None, (hugging_face_folder(path) for path in (config.model, config.teacher) if path)), None)
        place, made = run / "tokenizer", run / ".tokenizer.partial"
        if source is not None and not place.exists():
            run.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(made, ignore_errors=True)
            save_tokenizer(source, made)
            if made.is_dir():
                made.rename(place)

    on_main(write)
