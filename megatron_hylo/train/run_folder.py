"""Check of a run folder before a run starts, so that it replaces and removes only files of its own."""

from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.config.train import PREFIXES, TrainConfig
from megatron_hylo.io import check_apart, check_free, has_manifest


def check_run_folder(config: TrainConfig, run: Path) -> None:
    """Refuse a run folder in which the run's results could not be written; all ranks call it.

    Args:
        config: of the run.
        run: its folder, which need not be there.

    Raises:
        ConfigError: what is in the way: a file, a place that cannot be written, a RUN/model that is not of ours, or something
            that the run reads where it removes old checkpoints.
    """
    sources = [config.data, config.model, config.scratch, config.second_model, config.teacher, config.teacher_store]
    if not has_manifest(run / "model"):  # else the run is finished and nothing is written
        for prefix in PREFIXES:
            check_free(run / f"{prefix}model", overwrite=True, sources=sources)
    checkpoints = run / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ConfigError(f"{checkpoints} is a file, and checkpoints are to be written there; choose another output")
    if checkpoints.is_dir():
        check_apart(checkpoints, sources)
