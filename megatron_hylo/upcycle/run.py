"""Upcycling and assembling at the level of model folders: read a teacher, make every student tensor, write a folder."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hylo.calibrate.gather import micro_batch
from megatron_hylo.calibrate.shares import check_ranks
from megatron_hylo.calibrate.solve import LayerError, solve_outputs
from megatron_hylo.calibrate.statistics import CalibrationFolder
from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layouts import expand_pattern
from megatron_hylo.config.mixers import LINEAR_SYMBOLS, MLA_SYMBOL
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.convert.folder_source import FolderSource
from megatron_hylo.convert.mapping import parameter_reader
from megatron_hylo.convert.write_folders import write_model_folder
from megatron_hylo.data.tokenizer import check_dataset, check_same_vocabulary
from megatron_hylo.eval.perplexity import Quality, evaluate
from megatron_hylo.initialise.calibrated_mla import choose_rotary_pairs
from megatron_hylo.io import check_free, on_all, output_lock, rank, world_size
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.io.provenance import made_by
from megatron_hylo.kernels.registry import untuned
from megatron_hylo.models.description import read_description
from megatron_hylo.models.streamed import ModelParts
from megatron_hylo.models.weights_files import skeleton
from megatron_hylo.platform.distributed import device, is_main
from megatron_hylo.upcycle.assemble import Read, Source, assembled, attention_tensors, upcycled
from megatron_hylo.upcycle.solved import SolvedLayers


@dataclass
class UpcycleReport:
    """Configuration and quality of an upcycled model before any training."""

    config: ModelConfig
    errors: list[LayerError] | None  # by layer; with a calibration folder
    quality: Quality | None  # on the calibration folder's held-out windows
    teacher_quality: Quality | None

    def to_dict(self) -> dict[str, Any]:
        """Pattern, quality before training and errors by layer, for JSON."""
        qualities = {name: value and value.to_dict() for name, value in vars(self).items() if name.endswith("quality")}
        return {"pattern": self.config.mixers, **qualities, "layers": self.errors and [asdict(error) for error in self.errors]}


def upcycle_folder(settings: UpcycleConfig, track: Track = no_progress) -> UpcycleReport:
    """Make a hybrid's model folder from a teacher's; `platform.initialize` must have run.

    Args:
        settings: teacher, output, what becomes of each layer, and how; kept as the provenance of the folder.
        track: progress display over an iterable.

    Returns:
        The hybrid's configuration and, with a calibration folder, its quality before training.

    Raises:
        ConfigError: teacher, calibration and settings do not fit one another.
    """
    teacher, calibration = settings.teacher, settings.calibration
    check_free(settings.output, settings.overwrite, [teacher, calibration])
    teacher_config, _ = read_description(teacher)
    calibrated = settings.reads_statistics
    config = settings.hybrid(teacher_config)
    if calibrated:
        check_ranks()
    statistics = CalibrationFolder(calibration, teacher, device()) if calibration is not None else None
    if calibration is not None:
        check_dataset(calibration, teacher)
    source = FolderSource(teacher)
    if calibrated:
        assert statistics is not None
        config = _with_rotary_pairs(config, teacher_config, source, statistics, settings.rotary, track)
    read = upcycled(source.read, teacher_config, config, settings.init, settings.seed, statistics if calibrated else None)
    report = UpcycleReport(config, None, None, None)
    provenance = made_by("upcycle", {"teacher": teacher, "calibration": calibration}, **asdict(settings))
    with output_lock(settings.output):
        if statistics is None and world_size() == 1:
            _write(settings.output, config, read, [source], provenance, settings.overwrite, track)
            return report
        if calibrated:
            assert statistics is not None
            provenance["calibration_tokens"] = statistics.description["tokens"]
        identity = {"teacher": source.state(), "made": provenance, "model": config.to_dict()}
        solved = SolvedLayers(Path(settings.output).absolute(), config, identity, read)
        solved.initialise(track)
        if statistics is not None:
            _solve_and_measure(report, settings, solved, source, statistics, track)
        _write(settings.output, config, solved.read, [source], provenance, settings.overwrite, track)
        if is_main():
            shutil.rmtree(solved.work)
    return report


def _with_rotary_pairs(
    config: ModelConfig,
    teacher_config: ModelConfig,
    source: FolderSource,
    statistics: CalibrationFolder,
    choice: str,
    track: Track,
) -> ModelConfig:
    """Set the rotary pairs of all MLA layers; ranks share the layers."""
    layers = [i for i, symbol in enumerate(config.mixers) if symbol == MLA_SYMBOL]
    if choice == "table" or not layers:
        return config
    span = statistics.description["sequence_length"]

    def choose(layer: int) -> tuple[int, ...]:
        """Choose the rotary pairs of a layer from its attention and statistics."""
        attention = attention_tensors(source.read, teacher_config, layer)
        return choose_rotary_pairs(attention, config, teacher_config, statistics[layer], choice, span)

    own = on_all(lambda: {i: choose(i) for i in track(layers[rank() :: world_size()], "choose rotary pairs")})  # one in memory
    pairs = {layer: chosen for part in own for layer, chosen in part.items()}
    return config.replace(mla_rotary_pairs=[pairs.get(layer, ()) for layer in range(config.num_hidden_layers)])


def _solve_and_measure(
    report: UpcycleReport,
    settings: UpcycleConfig,
    solved: SolvedLayers,
    source: FolderSource,
    statistics: CalibrationFolder,
    track: Track,
) -> None:
    """Solve the student's output projections where they are calibrated, then measure it and its teacher; layer by layer."""
    dtype, windows = source.dtype(), statistics.windows()
    teacher = ModelParts(source.model, source.parameter)
    student = ModelParts(skeleton(report.config, dtype), parameter_reader(report.config, solved.read))
    with untuned():
        if settings.init == "calibrated":
            report.errors = solve_outputs(student, teacher, windows[0], settings.sequential, settings.mlps, track, solved)
        size = micro_batch(windows[1].shape[1] - 1)
        with student.streaming() as of_student, teacher.streaming() as of_teacher:
            report.quality, report.teacher_quality = (
                evaluate(model, windows[1], of_teacher, size, track=track, description=f"evaluate the {name}")
                for model, name in ((of_student, "hybrid"), (of_teacher, "teacher"))
            )


def assemble_folder(
    mla: str | Path,
    linear: str | Path,
    base: str | Path,
    output: str | Path,
    pattern: str,
    overwrite: bool = False,
    track: Track = no_progress,
) -> ModelConfig:
    """Make a hybrid's model folder, each layer from the aligned pure model of its kind (HyLo, section 2d of the notes).

    Args:
        mla: model folder with only `+` layers.
        linear: model folder with one linear mixer in all layers: only `M`, only `G` or only `K`.
        base: model folder of the teacher: embedding, final norm, head.
        output: model folder to make.
        pattern: one mixer a layer.
        overwrite: replace what is there.
        track: progress display over an iterable.

    Raises:
        ConfigError: models that cannot be assembled, or of different tokenizers.
    """
    check_free(output, overwrite, [mla, linear, base])
    for folder in (mla, linear):
        check_same_vocabulary(folder, base)
    of_mla, of_linear, of_base = (FolderSource(folder) for folder in (mla, linear, base))
    mla_config, linear_config = of_mla.config, of_linear.config
    if set(mla_config.mixers) != {MLA_SYMBOL} or set(linear_config.mixers) not in map(set, LINEAR_SYMBOLS):
        raise ConfigError(
            f"assemble needs a pure-MLA and a pure-linear model, got {mla_config.mixers} and {linear_config.mixers}"
        )
    mixers = expand_pattern(pattern, mla_config.num_hidden_layers, mla_config.mlps)
    if not set(mixers) <= {MLA_SYMBOL, linear_config.mixers[0]}:
        raise ConfigError(
            f"pattern {pattern} asks for mixers that neither model has: {mla_config.mixers[0]}, {linear_config.mixers[0]}"
        )
    config = mla_config.with_mixers(mixers)
    parts = [Source(folder.config, folder.read) for folder in (of_mla, of_linear, of_base)]
    read = assembled(parts[0], parts[1], parts[2], config)
    provenance = made_by("assemble", {"mla": mla, "linear": linear, "base": base}, pattern=pattern)
    _write(output, config, read, [of_base, of_mla, of_linear], provenance, overwrite, track, of_mla.dtype())
    return config


def _write(
    output: str | Path,
    config: ModelConfig,
    read: Read,
    sources: Sequence[FolderSource],
    provenance: dict[str, Any],
    overwrite: bool,
    track: Track,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder with the dtype (by default) and the tokenizer of the first source, a layer in memory at a time."""
    tokenizer = sources[0].path / "tokenizer"

    def add_tokenizer(folder: Path) -> None:
        """Copy the first source's tokenizer, where it has one."""
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, folder / "tokenizer")

    def check(_: Path) -> None:
        """Refuse sources that have changed since they were opened."""
        for source in sources:
            source.require_unchanged()

    made_of = [[source.state() for source in sources], {name: v for name, v in provenance.items() if name != "inputs"}]
    write_model_folder(
        output, config, dtype or sources[0].dtype(), read, made_of, lambda: provenance, add_tokenizer, check, overwrite,
        tuple(source.path for source in sources), track=track,
    )  # fmt: skip
