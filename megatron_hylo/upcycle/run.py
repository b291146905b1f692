"""Upcycling and assembling at the level of model folders: read a teacher, make every student tensor, write a folder."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.calibrate.gather import micro_batch
from megatron_hylo.calibrate.solve import LayerError, solve_outputs
from megatron_hylo.calibrate.statistics import CalibrationFolder
from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layouts import expand_pattern, get_layout, hybrid_config
from megatron_hylo.config.mixers import LINEAR_SYMBOLS, MLA_SYMBOL
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.convert.to_hf import hf_tensors
from megatron_hylo.convert.to_megatron import fill_model
from megatron_hylo.data.tokenizer import check_dataset, check_same_vocabulary
from megatron_hylo.eval.perplexity import Quality, evaluate
from megatron_hylo.initialise.calibrated_mla import choose_rotary_pairs
from megatron_hylo.io import check_free
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.io.provenance import made_by
from megatron_hylo.kernels.registry import untuned
from megatron_hylo.models.checkpoint import load_model, read_description, save_model
from megatron_hylo.models.hylo_model import HyloModel, build_model
from megatron_hylo.platform.distributed import device
from megatron_hylo.upcycle.assemble import Source, assemble_state, attention_tensors, upcycle_state


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


def student_config(teacher: ModelConfig, settings: UpcycleConfig) -> ModelConfig:
    """Configuration of the hybrid, from a layout's name or a pattern.

    Raises:
        ConfigError: both or neither given, a pattern that does not fit, a layout of another base.
    """
    layout, pattern = settings.layout, settings.pattern
    overrides: dict[str, Any] = {**(settings.overrides or {})}
    if pattern is not None and layout is None:
        return hybrid_config(teacher, pattern, shapes=settings.mixer_shapes, **overrides)
    if layout is None or pattern is not None:
        raise ConfigError("give either a layout name or a pattern")
    named = get_layout(layout)
    config = named.config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size"):
        if getattr(config, name) != getattr(teacher, name):
            raise ConfigError(f"layout {layout} has {name} {getattr(config, name)}, the teacher {getattr(teacher, name)}")
    return hybrid_config(teacher, config.mixers, base_name=named.base, shapes=named.shapes, **overrides)


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
    calibrated = settings.init == "calibrated"
    config = student_config(teacher_config, settings)
    if calibrated and calibration is None:
        raise ConfigError("init `calibrated` needs --calibration, a folder made by `hylo calibrate`; or use --init paper")
    statistics = CalibrationFolder(calibration, teacher, device()) if calibration is not None else None
    if calibration is not None:
        check_dataset(calibration, teacher)
    model = load_model(teacher, backend="local")
    source = dict(hf_tensors(model))
    if calibrated and settings.rotary != "table" and MLA_SYMBOL in config.mixers:
        assert statistics is not None
        span = statistics.description["sequence_length"]
        pairs: list[tuple[int, ...]] = [()] * config.num_hidden_layers
        for layer in (i for i, symbol in enumerate(config.mixers) if symbol == MLA_SYMBOL):
            attention = attention_tensors(source.__getitem__, teacher_config, layer)
            pairs[layer] = choose_rotary_pairs(attention, config, teacher_config, statistics[layer], settings.rotary, span)
        config = config.replace(mla_rotary_pairs=pairs)
    used = statistics if calibrated else None
    state = dict(upcycle_state(source.__getitem__, teacher_config, config, settings.init, settings.seed, used, track))
    student = build_model(config, params_dtype=model.config.params_dtype, backend="local")
    _fill(student, state)
    report = UpcycleReport(config, None, None, None)
    if statistics is not None:
        windows, heldout = statistics.windows()
        size = micro_batch(heldout.shape[1] - 1)
        with untuned():
            if calibrated:
                report.errors = solve_outputs(student, model, windows, settings.sequential, settings.mlps, track)
            report.quality, report.teacher_quality = (
                evaluate(m, heldout, model, size, track=track, description=f"evaluate the {name}")
                for m, name in ((student, "hybrid"), (model, "teacher"))
            )
    provenance = made_by("upcycle", {"teacher": teacher, "calibration": calibration}, **asdict(settings))
    if calibrated:
        assert statistics is not None
        provenance["calibration_tokens"] = statistics.description["tokens"]
    _save(student, settings.output, Path(teacher), provenance, settings.overwrite)
    return report


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
    mla_model, linear_model, base_model = (load_model(p, backend="local") for p in (mla, linear, base))
    mla_config, linear_config = mla_model.config.hylo, linear_model.config.hylo
    if set(mla_config.mixers) != {MLA_SYMBOL} or set(linear_config.mixers) not in map(set, LINEAR_SYMBOLS):
        raise ConfigError(
            f"assemble needs a pure-MLA and a pure-linear model, got {mla_config.mixers} and {linear_config.mixers}"
        )
    mixers = expand_pattern(pattern, mla_config.num_hidden_layers)
    if not set(mixers) <= {MLA_SYMBOL, linear_config.mixers[0]}:
        raise ConfigError(
            f"pattern {pattern} asks for mixers that neither model has: {mla_config.mixers[0]}, {linear_config.mixers[0]}"
        )
    config = mla_config.with_mixers(mixers)
    of_mla, of_linear, of_base = (
        Source(m.config.hylo, dict(hf_tensors(m)).__getitem__) for m in (mla_model, linear_model, base_model)
    )
    state = dict(assemble_state(of_mla, of_linear, of_base, config, track))
    student = build_model(config, params_dtype=mla_model.config.params_dtype, backend="local")
    _fill(student, state)
    provenance = made_by("assemble", {"mla": mla, "linear": linear, "base": base}, pattern=pattern)
    _save(student, output, Path(base), provenance, overwrite)
    return config


def _fill(student: HyloModel, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        fill_model(student, student.config.hylo, state.__getitem__)


def _save(student: HyloModel, output: str | Path, base: Path, provenance: dict[str, Any], overwrite: bool) -> None:
    tokenizer = base / "tokenizer"
    save_model(student, output, tokenizer if tokenizer.is_dir() else None, provenance, overwrite)
