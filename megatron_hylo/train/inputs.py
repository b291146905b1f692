"""Inputs of a run, looked at before PyTorch is imported, so that one that is not there is refused at once."""

from pathlib import Path

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layouts import BASES, LAYOUTS
from megatron_hylo.config.paths import hugging_face_folder
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.convert.source_path import check_hf_folder
from megatron_hylo.data.dataset_path import check_indexed_dataset
from megatron_hylo.models.description import read_description


def check_inputs(config: TrainConfig) -> None:
    """Refuse models and a dataset that are not there; of their weights and text nothing is read.

    Raises:
        ConfigError: names the first one.
        DamagedError: a hylo.json is not what its folder's manifest says.
    """
    for path in filter(None, (config.model, config.second_model, config.teacher)):
        if (folder := hugging_face_folder(path)) is not None:
            check_hf_folder(folder)
        else:
            read_description(path)
    if config.scratch is not None and config.model is None:
        scratch_config(config.scratch)
    check_indexed_dataset(Path(config.data) / "train")


def scratch_config(name: str) -> ModelConfig:
    """Configuration of a run's `scratch`: a layout, a base model or a model folder.

    Raises:
        ConfigError: none of them.
    """
    if name in LAYOUTS:
        return LAYOUTS[name].config
    if name in BASES:
        return BASES[name]
    if Path(name).is_dir():
        return read_description(name)[0]
    raise ConfigError(f"scratch {name!r} is no layout ({', '.join(LAYOUTS)}), no base ({', '.join(BASES)}) and no model folder")
