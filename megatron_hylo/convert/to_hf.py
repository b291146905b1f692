"""Conversion of a Megatron model folder to a Hugging Face folder (the base family's, or a hybrid with modelling code)."""

import shutil
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.hf_config import HYLO_MODEL_TYPE, hf_config_from_model
from megatron_hylo.convert.hf_reader import open_source
from megatron_hylo.convert.mapping import model_entries
from megatron_hylo.convert.model_card import model_card
from megatron_hylo.convert.safetensors_reader import INDEX, SINGLE
from megatron_hylo.convert.token_ids import stored_token_ids
from megatron_hylo.convert.verify import require_equal
from megatron_hylo.io import atomic_directory, write_json
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.io.provenance import EXPORTED, made_by
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.gather import GatheredModel
from megatron_hylo.models.hylo_model import HyloModel

MAX_SHARD_BYTES = 5 * 10**9


def hf_tensors(model: HyloModel | GatheredModel, track: Track = no_progress) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) of a whole Megatron model, on the CPU.

    Raises:
        ConfigError: a tensor holds NaN or infinite values.
    """
    parameters = dict(model.named_parameters())
    for entry in track(model_entries(model.config.hylo), "write tensors"):
        for name, tensor in zip(entry.hugging_face, entry.split(parameters[entry.megatron].detach())):
            if not torch.isfinite(tensor).all():
                raise ConfigError(
                    f"tensor {name} ({entry.megatron}) holds NaN or infinite values, as after a training that diverged; take "
                    "an earlier checkpoint, or make the model again"
                )
            yield name, tensor.cpu().contiguous()


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write tensors as safetensors, at most `max_shard_bytes` held and written at a time, with the usual index."""
    names: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = held_bytes = 0

    def flush() -> None:
        save_file(held, folder / f"shard-{len(names):05d}.partial", metadata={"format": "pt"})
        names.append(list(held))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > max_shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor
        held_bytes += size
        total += size
    flush()
    if len(names) == 1:
        (folder / "shard-00000.partial").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(names):
        file = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"shard-{i:05d}.partial").rename(folder / file)
        weight_map |= {name: file for name in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_hf_folder(model: HyloModel, folder: Path, tokenizer: Path | None, track: Track = no_progress) -> None:
    """Write config.json, safetensors, tokenizer and, for a hybrid, its modelling code into an existing folder."""
    from megatron_hylo.convert.portable_tokenizer import make_tokenizer_portable
    from megatron_hylo.hf.code_files import copy_modelling_code

    config = model.config.hylo
    dtype = "bfloat16" if model.config.params_dtype == torch.bfloat16 else "float32"
    values = hf_config_from_model(config, dtype, stored_token_ids(tokenizer))
    write_json(folder / "config.json", values)
    write_shards(hf_tensors(model, track), folder)
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
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
) -> None:
    """Convert a model folder or training checkpoint to a Hugging Face folder; `platform.initialize` must have run.

    Args:
        source: a model folder.
        output: the Hugging Face folder to make; it appears when it is complete.
        overwrite: replace what is there.
        track: progress display over an iterable.
        verify: compare tensors and logits with transformers' loading of the folder, before it appears.
        results: results.json of evaluations of the model, for its card (README.md).
        license: of the model, as the Hub spells it, for the card.

    Raises:
        ConfigError: the source cannot be read, or transformers reads another model in what was written.
    """
    with atomic_directory(output, overwrite, [source]) as folder:
        model = load_model(source, backend="local")
        write_hf_folder(model, folder, Path(source) / "tokenizer", track)
        provenance = made_by("export", {"model": source})
        write_json(folder / EXPORTED, provenance)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        card = model_card(Path(output).name, model.config.hylo, parameters, provenance, results, license)
        (folder / "README.md").write_text(card)
        if verify:
            require_equal(model, open_source(folder), folder, track)
