"""Conversion of a Megatron model folder to a Hugging Face folder (the base family's, or a hybrid with modelling code)."""

import shutil
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layouts import parameter_count
from megatron_hylo.convert.folder_source import FolderSource
from megatron_hylo.convert.hf_config import HYLO_MODEL_TYPE, hf_config_from_model
from megatron_hylo.convert.hf_reader import open_source
from megatron_hylo.convert.mapping import model_entries
from megatron_hylo.convert.model_card import NO_FACTS, CardFacts, has_chat_template, model_card
from megatron_hylo.convert.safetensors_reader import is_finite
from megatron_hylo.convert.streaming import SHARD_BYTES, Safetensors, model_groups, shards_of
from megatron_hylo.convert.token_ids import stored_token_ids
from megatron_hylo.convert.verify import require_equal
from megatron_hylo.convert.write_folders import place_safetensors
from megatron_hylo.io import atomic_directory, barrier, check_free, rank, write_json
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.io.provenance import EXPORTED, made_by
from megatron_hylo.models.gather import GatheredModel
from megatron_hylo.models.hylo_model import HyloModel


def hf_tensors(model: HyloModel | GatheredModel) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) of a whole Megatron model, contiguous, on the CPU, in the parameters' dtypes.

    Args:
        model: not divided over ranks.

    Raises:
        ConfigError: a tensor holds NaN or infinite values.
    """
    parameters = dict(model.named_parameters())
    for entry in model_entries(model.config.hylo):
        for name, tensor in zip(entry.hugging_face, entry.split(parameters[entry.megatron].detach())):
            if not is_finite(tensor):
                raise ConfigError(
                    f"tensor {name} ({entry.megatron}) holds NaN or infinite values, as after a training that diverged; take "
                    "an earlier checkpoint, or make the model again"
                )
            yield name, tensor.cpu().contiguous()


def add_files(config: ModelConfig, dtype: torch.dtype, folder: Path, tokenizer: Path | None) -> None:
    """Write config.json, the tokenizer and, for a hybrid, its modelling code into a folder.

    Args:
        config: of the model.
        dtype: of the weights, as config.json names it.
        folder: existing.
        tokenizer: folder that is copied; None, or one that does not exist: no tokenizer.
    """
    from megatron_hylo.convert.portable_tokenizer import make_tokenizer_portable
    from megatron_hylo.hf.code_files import copy_modelling_code

    values = hf_config_from_model(config, str(dtype).split(".")[1], stored_token_ids(tokenizer))
    write_json(folder / "config.json", values)
    if values["model_type"] == HYLO_MODEL_TYPE:
        copy_modelling_code(folder)
    if tokenizer is not None and tokenizer.is_dir():
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
        make_tokenizer_portable(folder)


def convert_megatron_to_hf(
    source: str | Path,
    output: str | Path,
    overwrite: bool = False,
    track: Track = no_progress,
    verify: bool = True,
    facts: CardFacts = NO_FACTS,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Convert a model folder or training checkpoint to a Hugging Face folder; `platform.initialize` must have run.

    One parameter is in memory at a time; a killed conversion goes on at the shard where it was.

    Args:
        source: a model folder.
        output: the Hugging Face folder to make; it appears when it is complete.
        overwrite: replace what is there.
        track: progress display over an iterable.
        verify: compare tensors and logits with transformers' loading of the folder, before it appears.
        facts: for its card (README.md).
        shard_bytes: largest size of a file of weights.

    Raises:
        ConfigError: the source cannot be read, or transformers reads another model in what was written.
    """
    check_free(output, overwrite, [source])
    opened = FolderSource(source)
    config, groups = opened.config, model_groups(opened.config, opened.layout)
    with (
        atomic_directory(output, overwrite, [source]) as folder,
        shards_of(Path(output).absolute(), groups, opened.read, Safetensors(), opened.state(), shard_bytes, track) as shards,
    ):
        if rank() == 0:
            place_safetensors(folder, shards)
            add_files(config, opened.dtype(), folder, Path(source) / "tokenizer")
            provenance = made_by("export", {"model": source})
            write_json(folder / EXPORTED, provenance)
            card = model_card(
                Path(output).name, config, parameter_count(config), provenance, facts, has_chat=has_chat_template(folder)
            )
            (folder / "README.md").write_text(card)
        barrier()
        opened.require_unchanged()
        if verify:
            require_equal(opened, open_source(folder), folder, track)
