"""`hylo evaluate`: quality of a model folder on a dataset folder's held-out documents."""

from pathlib import Path

from megatron_hylo.config import ConfigError, TeacherWindow
from megatron_hylo.config.teacher_window import OWN_WINDOW
from megatron_hylo.data.heldout import heldout_windows
from megatron_hylo.data.tokenizer import check_dataset, check_ids
from megatron_hylo.eval.perplexity import Quality, evaluate
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.checks import require_finite, warn_beyond_context
from megatron_hylo.models.description import read_description
from megatron_hylo.models.frozen import freeze


def evaluate_folder(
    model: str | Path,
    data: str | Path,
    teacher: str | Path | None = None,
    sequence_length: int = 2048,
    windows: int = 32,
    track: Track = no_progress,
    teacher_window: TeacherWindow = OWN_WINDOW,
) -> Quality:
    """Evaluate a model folder on held-out windows; `platform.initialize` must have run.

    Args:
        model: model folder or training checkpoint.
        data: dataset folder made by `hylo preprocess`.
        teacher: model folder to compare with.
        sequence_length: tokens a window; a warning where the model has fewer positions.
        windows: windows at most.
        track: progress display over the forward passes.
        teacher_window: how the teacher reads more tokens than its window has.

    Raises:
        ConfigError: not a model folder, NaN or infinite weights, another tokenizer, sizes below 1, no document as long as a
            window, windows longer than the teacher's.
        DamagedError: files are not what their manifest says.
    """
    if sequence_length < 1 or windows < 1:
        raise ConfigError(f"--sequence_length and --windows must be at least 1, got {sequence_length} and {windows}")
    folders = [folder for folder in (model, teacher) if folder is not None]
    configs = [read_description(folder)[0] for folder in folders]
    batch = heldout_windows(f"{data}/heldout", sequence_length, windows)
    for folder, config in zip(folders, configs):
        check_ids(batch, config.vocab_size, data, folder)
        check_dataset(data, folder)
    warn_beyond_context(configs[0], sequence_length, model)
    compared = None
    if teacher is not None:
        teacher_window.check(configs[1], sequence_length, f"teacher {teacher}")
        reading = teacher_window.resolve(configs[1], sequence_length)
        loaded = load_model(teacher, **reading.changes())
        require_finite(loaded, teacher)
        compared = freeze([loaded], window=reading.window(configs[1], sequence_length))
    student = load_model(model)
    require_finite(student, model)
    against = f" against {Path(teacher).name}" if teacher is not None else ""
    description = f"evaluate {Path(model).name}{against} on {len(batch)} windows of {sequence_length} tokens"
    return evaluate(student, batch, compared, track=track, description=description)
