"""Model folders and the weights of Hugging Face folders, written by streaming (see `streaming`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_hylo.config import ModelConfig
from megatron_hylo.convert.safetensors_reader import INDEX, SINGLE
from megatron_hylo.convert.streaming import (
    SHARD_BYTES,
    TENSORS,
    Megatron,
    Read,
    Shard,
    model_groups,
    shards_of,
)
from megatron_hylo.io import atomic_directory, barrier, place_file, rank, record_for_manifest, write_json
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.checkpoint import describe
from megatron_hylo.models.weights_files import StoredLayout, finish_weights, skeleton


def write_model_folder(
    output: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    read: Read,
    source: Any,
    provenance: Callable[[], dict[str, Any]],
    add_files: Callable[[Path], None] = lambda _: None,
    check: Callable[[Path], None] = lambda _: None,
    overwrite: bool = False,
    sources: tuple[str | Path | None, ...] = (),
    shard_bytes: int = SHARD_BYTES,
    track: Track = no_progress,
) -> None:
    """Write a model folder tensor by tensor; a killed run goes on at the shard where it was. All ranks call it.

    Args:
        output: folder to make.
        config: of the model.
        dtype: of its weights but those that it keeps in float32.
        read: Hugging Face name -> tensor; may be asked by any rank and in any order, mostly that of the layers.
        source: JSON that is another one where the tensors would be.
        provenance: gives what is kept in hylo.json; called on rank 0 when all tensors are written.
        add_files: puts more files into the folder (a tokenizer); called on rank 0.
        check: looks at the complete folder before it appears, and raises where it is wrong; called on all ranks.
        overwrite: replace what is there.
        sources: see `atomic_directory`.
        shard_bytes: largest size of a file.
        track: progress display over an iterable.

    Raises:
        ConfigError: see `shards_of` and `atomic_directory`; nothing is at `output` then.
    """
    layout = StoredLayout(skeleton(config, dtype))
    groups, identity = model_groups(config, layout), {"made of": source, "model": config.to_dict(), "dtype": str(dtype)}
    with (
        atomic_directory(output, overwrite, sources) as folder,
        shards_of(Path(output).absolute(), groups, read, Megatron(layout), identity, shard_bytes, track) as shards,
    ):
        placed = finish_weights(folder / "weights", [(shard.file, shard.pieces) for shard in shards])
        if rank() == 0:
            _record(folder, placed, shards)
            write_json(folder / "hylo.json", describe(config, dtype, provenance()))
            add_files(folder)
        barrier()
        check(folder)


def place_safetensors(folder: Path, shards: list[Shard]) -> None:
    """Put finished shards into a Hugging Face folder under the usual names, with the usual index."""
    if len(shards) == 1:
        placed = [place_file(shards[0].file, folder / SINGLE)]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        placed = [place_file(shard.file, folder / name) for shard, name in zip(shards, names)]
        weight_map = {tensor: name for shard, name in zip(shards, names) for tensor in shard.tensors}
        write_json(
            folder / INDEX, {"metadata": {"total_size": sum(shard.tensor_bytes for shard in shards)}, "weight_map": weight_map}
        )
    _record(folder, placed, shards)


def _record(folder: Path, placed: list[Path], shards: list[Shard]) -> None:
    record_for_manifest(folder, {str(file.relative_to(folder)): s.manifest_entry for file, s in zip(placed, shards)})
    tensors = {name: entry for shard in shards for name, entry in shard.tensors.items()}
    write_json(folder / TENSORS, {"tensors": dict(sorted(tensors.items()))})
