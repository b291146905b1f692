"""Upcycling and assembling at the level of model folders: read a teacher, make every student tensor, write a folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.convert.to_hf import hf_tensors
from megatron_hylo.convert.to_megatron import Track, fill_model, no_progress
from megatron_hylo.layouts import expand_pattern, get_layout, hybrid_config
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.hylo_model import HyloModel, build_model
from megatron_hylo.sealed import check_free
from megatron_hylo.upcycle.assemble import Source, assemble_state, upcycle_state


def student_config(teacher: ModelConfig, layout: str | None, pattern: str | None, overrides: dict[str, Any]) -> ModelConfig:
    """The hybrid's configuration out of a layout name or a pattern.

    Raises:
        ConfigError: both or neither given, a pattern that does not fit, a layout of another base.
    """
    if (layout is None) == (pattern is None):
        raise ConfigError("give either a layout name or a pattern")
    if pattern is not None:
        return hybrid_config(teacher, pattern, **overrides)
    config = get_layout(layout).config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size"):
        if getattr(config, name) != getattr(teacher, name):
            raise ConfigError(f"layout {layout} has {name} {getattr(config, name)}, the teacher {getattr(teacher, name)}")
    return hybrid_config(teacher, config.mixers, base_name=get_layout(layout).base, **overrides)


def upcycle_folder(
    teacher: str | Path,
    output: str | Path,
    layout: str | None,
    pattern: str | None,
    init: str = "paper",
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    overwrite: bool = False,
    track: Track = no_progress,
) -> ModelConfig:
    """Make a hybrid's model folder from a teacher's; `platform.initialize` must have run.

    Args:
        teacher: model folder, all layers attention.
        output: model folder to make.
        layout, pattern: which layers become what; one of the two.
        init: name of a registered initialiser.
        seed: of random tensors.
        overrides: fields of the student's configuration.
        overwrite: replace what is there.
        track: progress display over an iterable.

    Returns:
        The hybrid's configuration.
    """
    check_free(output, overwrite)
    model = load_model(teacher, backend="local")
    teacher_config = model.config.hylo
    config = student_config(teacher_config, layout, pattern, overrides or {})
    source = dict(hf_tensors(model))
    state = dict(upcycle_state(source.__getitem__, teacher_config, config, initialiser=init, seed=seed, track=track))
    student = build_model(config, params_dtype=model.config.params_dtype, backend="local")
    _write(student, state, output, Path(teacher), {"teacher": str(teacher), "init": init, "seed": seed}, overwrite)
    return config


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
    """
    check_free(output, overwrite)
    mla_model, linear_model, base_model = (load_model(p, backend="local") for p in (mla, linear, base))
    mla_config, linear_config = mla_model.config.hylo, linear_model.config.hylo
    if set(mla_config.mixers) != {"+"} or len(set(linear_config.mixers)) != 1 or linear_config.mixers[0] not in "MG":
        raise ConfigError(
            f"assemble needs a pure-MLA and a pure-linear model, got {mla_config.mixers} and {linear_config.mixers}"
        )
    mixers = expand_pattern(pattern, mla_config.num_hidden_layers)
    if not set(mixers) <= {"+", linear_config.mixers[0]}:
        raise ConfigError(
            f"pattern {pattern} asks for mixers that neither model has: {mla_config.mixers[0]}, {linear_config.mixers[0]}"
        )
    pairs = [entry if m == "+" else () for m, entry in zip(mixers, mla_config.mla_rotary_pairs)]
    config = mla_config.replace(hybrid_layer_pattern="".join(m + "-" for m in mixers), mla_rotary_pairs=pairs)
    sources = [Source(m.config.hylo, dict(hf_tensors(m)).__getitem__) for m in (mla_model, linear_model, base_model)]
    state = dict(assemble_state(*sources, config, track))
    student = build_model(config, params_dtype=mla_model.config.params_dtype, backend="local")
    _write(student, state, output, Path(base), {"mla": str(mla), "linear": str(linear), "base": str(base)}, overwrite)
    return config


def _write(
    student: HyloModel, state: dict[str, Tensor], output: str | Path, base: Path, provenance: dict[str, Any], overwrite: bool
) -> None:
    with torch.no_grad():
        fill_model(student, student.config.hylo, state.__getitem__)
    tokenizer = base / "tokenizer"
    save_model(student, output, tokenizer if tokenizer.is_dir() else None, provenance, overwrite)
