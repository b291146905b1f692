"""Upcycling and assembling at the level of model folders: read a teacher, make every student tensor, write a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.calibrate.gather import micro_batch
from megatron_hylo.calibrate.solve import LayerError, solve_outputs
from megatron_hylo.calibrate.statistics import CalibrationFolder
from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layouts import Shapes, expand_pattern, get_layout, hybrid_config
from megatron_hylo.config.mixers import LINEAR_SYMBOLS, MLA_SYMBOL
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
    """What an upcycled model is before any training."""

    config: ModelConfig
    errors: list[LayerError] | None  # by layer; with a calibration folder
    quality: Quality | None  # on the calibration folder's held-out windows
    teacher_quality: Quality | None


def student_config(
    teacher: ModelConfig, layout: str | None, pattern: str | None, shapes: Shapes, overrides: dict[str, Any]
) -> ModelConfig:
    """The hybrid's configuration out of a layout name or a pattern.

    Raises:
        ConfigError: both or neither given, a pattern that does not fit, a layout of another base.
    """
    if (layout is None) == (pattern is None):
        raise ConfigError("give either a layout name or a pattern")
    if pattern is not None:
        return hybrid_config(teacher, pattern, shapes=shapes, **overrides)
    named = get_layout(layout)
    config = named.config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size"):
        if getattr(config, name) != getattr(teacher, name):
            raise ConfigError(f"layout {layout} has {name} {getattr(config, name)}, the teacher {getattr(teacher, name)}")
    return hybrid_config(teacher, config.mixers, base_name=named.base, shapes=named.shapes, **overrides)


def upcycle_folder(
    teacher: str | Path,
    output: str | Path,
    layout: str | None = None,
    pattern: str | None = None,
    init: str = "calibrated",
    calibration: str | Path | None = None,
    shapes: Shapes | None = None,
    rotary: str = "energy",
    sequential: bool = False,
    mlps: bool = True,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
    track: Track = no_progress,
) -> UpcycleReport:
    """Make a hybrid's model folder from a teacher's; `platform.initialize` must have run.

    Args:
        teacher: model folder, all layers attention.
        output: model folder to make.
        layout, pattern: which layers become what; one of the two.
        init: name of a registered initialiser.
        calibration: folder made by `hylo calibrate` with this teacher; `calibrated` needs it, others are measured with it.
        shapes: of a pattern's mixers; by default teacher for `calibrated`, the paper's for others. A layout has its own.
        rotary: which of the teacher's rotary components MLA keeps (`choose_rotary_pairs`); "table": the standard table's.
        sequential, mlps: how output projections are solved (`solve_outputs`).
        seed: of random tensors.
        overrides: fields of the student's configuration.
        overwrite: replace what is there.
        track: progress display over an iterable.

    Returns:
        The hybrid's configuration and, with a calibration folder, its quality before training.

    Raises:
        ConfigError: teacher, calibration and settings do not fit one another.
    """
    check_free(output, overwrite, [teacher, calibration])
    teacher_config, _ = read_description(teacher)
    calibrated = init == "calibrated"
    config = student_config(teacher_config, layout, pattern, shapes or ("teacher" if calibrated else "paper"), overrides or {})
    if calibrated and calibration is None:
        raise ConfigError("init `calibrated` needs --calibration, a folder made by `hylo calibrate`; or use --init paper")
    statistics = CalibrationFolder(calibration, teacher, device()) if calibration is not None else None
    if calibration is not None:
        check_dataset(calibration, teacher)
    model = load_model(teacher, backend="local")
    source = dict(hf_tensors(model))
    if calibrated and rotary != "table" and MLA_SYMBOL in config.mixers:
        span = statistics.description["sequence_length"]
        pairs: list[tuple[int, ...]] = [()] * config.num_hidden_layers
        for layer in (i for i, symbol in enumerate(config.mixers) if symbol == MLA_SYMBOL):
            attention = attention_tensors(source.__getitem__, teacher_config, layer)
            pairs[layer] = choose_rotary_pairs(attention, config, teacher_config, statistics[layer], rotary, span)
        config = config.replace(mla_rotary_pairs=pairs)
    used = statistics if calibrated else None
    state = dict(upcycle_state(source.__getitem__, teacher_config, config, init, seed, used, track))
    student = build_model(config, params_dtype=model.config.params_dtype, backend="local")
    _fill(student, state)
    report = UpcycleReport(config, None, None, None)
    if statistics is not None:
        windows, heldout = statistics.windows()
        size = micro_batch(heldout.shape[1] - 1)
        with untuned():
            if calibrated:
                report.errors = solve_outputs(student, model, windows, sequential, mlps, track)
            report.quality, report.teacher_quality = (evaluate(m, heldout, model, size, track=track) for m in (student, model))
    settings: dict[str, Any] = {"layout": layout, "pattern": pattern, "init": init, "seed": seed}
    if calibrated:
        tokens = statistics.description["tokens"]
        settings |= {"rotary": rotary, "sequential": sequential, "mlps": sequential and mlps, "calibration_tokens": tokens}
    provenance = made_by("upcycle", {"teacher": teacher, "calibration": calibration}, **settings)
    _save(student, output, Path(teacher), provenance, overwrite)
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
        linear: model folder with only `M` or only `G` layers.
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
    pure = set(mla_config.mixers) == {MLA_SYMBOL} and len(set(linear_config.mixers)) == 1
    if not pure or linear_config.mixers[0] not in LINEAR_SYMBOLS:
        raise ConfigError(
            f"assemble needs a pure-MLA and a pure-linear model, got {mla_config.mixers} and {linear_config.mixers}"
        )
    mixers = expand_pattern(pattern, mla_config.num_hidden_layers)
    if not set(mixers) <= {MLA_SYMBOL, linear_config.mixers[0]}:
        raise ConfigError(
            f"pattern {pattern} asks for mixers that neither model has: {mla_config.mixers[0]}, {linear_config.mixers[0]}"
        )
    config = mla_config.with_mixers(mixers)
    sources = [Source(m.config.hylo, dict(hf_tensors(m)).__getitem__) for m in (mla_model, linear_model, base_model)]
    state = dict(assemble_state(*sources, config, track))
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
