"""Check that a run can begin with the optimizer's state of another run's checkpoint (`keep_optimizer_state`)."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.config.renamed import translate_settings
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.config.train_settings import flatten
from megatron_hylo.io import read_json
from megatron_hylo.train.checkpoint import POSITION
from megatron_hylo.train.resume_check import SETTINGS


def check_kept_state(config: TrainConfig) -> None:
    """Refuse a start with the state of an optimizer that trained something else, before models are read.

    Args:
        config: settings of the new run; nothing is checked unless `keep_optimizer_state`.

    Raises:
        ConfigError: `model` is no checkpoint of a run folder, or that run's optimizer has other parameters, groups of
            parameters or dtypes.
    """
    if not config.keep_optimizer_state or config.model is None:
        return
    checkpoint = Path(config.model)
    settings = checkpoint.resolve().parents[1] / SETTINGS
    if not (checkpoint / POSITION).is_file() or not settings.is_file():
        raise ConfigError(
            f"keep_optimizer_state needs a model that is RUN/checkpoints/step_N of a run folder, got {checkpoint}; give "
            f"that, or leave keep_optimizer_state out to start from the weights alone"
        )
    former = _state_of(flatten(translate_settings(read_json(settings))))
    for name, value in _state_of(flatten(asdict(config))).items():
        if former[name] != value:
            raise ConfigError(
                f"the optimizer's state of {checkpoint} is of a run with {name}: {former[name]}, this one has {value}; choose "
                f"the same, or leave keep_optimizer_state out to start from the weights alone"
            )


def _state_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that decide which parameters, groups and dtypes an optimizer's state has, out of a run's flattened ones."""
    return {
        "trained": _trained(settings["stage"], settings["align.loss"], settings["trainable"]),
        "precision": settings["precision"],
        "optimizer.name": settings.get("optimizer.name", "adamw"),  # earlier versions had no other
        "optimizer.use_distributed_optimizer": settings["optimizer.use_distributed_optimizer"],
        "a learning rate of the mixers' own": settings["optimizer.mixer_lr"] not in (None, settings["optimizer.lr"]),
    }


def _trained(stage: str, align_loss: str, trainable: str) -> str:
    """Parameters that a run trains, as `choose_trainable` chooses them."""
    if trainable == "mixers" or (stage == "align" and align_loss != "ild"):
        return "the mixers"
    return "all but embedding and head" if stage == "align" else "all"
