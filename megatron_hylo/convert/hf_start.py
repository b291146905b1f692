"""Models of a run that are read straight from a Hugging Face folder, `hf:PATH`, without a model folder in between.

A rank reads the tensors of its own layers, and of those that tensor parallelism divides its own rows. Rows of a Megatron
parameter are found in the source by sending row numbers, instead of rows, through the conversion table.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megatron_hylo.config import ConfigError, Fp8, ModelConfig, ParallelConfig
from megatron_hylo.config.paths import hugging_face_folder
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.mapping import Entry, model_entries
from megatron_hylo.convert.safetensors_reader import SafetensorsSource
from megatron_hylo.convert.source_path import check_hf_folder
from megatron_hylo.io import DamagedError, gather, listed_files, verify_manifest_if_any
from megatron_hylo.io.identity import content_identity, json_identity
from megatron_hylo.io.provenance import file_hash
from megatron_hylo.models.checkpoint import load_chunks
from megatron_hylo.models.description import read_description
from megatron_hylo.models.hylo_model import HyloModel, build_chunks
from megatron_hylo.models.specs import BackendName
from megatron_hylo.models.weights_files import StoredLayout

BLOCK_BYTES = 64 * 2**20  # of rows that are read at once where a rank needs a part of each
ANNOUNCED_BYTES = 2 * 10**9  # hashing more than this is logged
logger = logging.getLogger("megatron_hylo.convert")


def open_hf_folder(folder: Path) -> SafetensorsSource:
    """Open the Hugging Face folder of `hf:PATH`; headers are read and checked, weights are not read.

    Raises:
        ConfigError: a name on the Hub, a GGUF file, or a folder that `hylo convert` refuses as well.
    """
    check_hf_folder(folder)
    return SafetensorsSource(folder)


def read_model_config(path: str) -> ModelConfig:
    """Read the configuration of a model folder, training checkpoint or `hf:PATH`.

    Raises:
        ConfigError: see `read_description` and `open_hf_folder`.
    """
    folder = hugging_face_folder(path)
    if folder is None:
        return read_description(path)[0]
    source = open_hf_folder(folder)
    source.close()
    return source.config


def model_identity(path: str) -> str:
    """Return the identity of a model's content: of a Hugging Face folder the sha256 over its weight files and architecture.

    Raises:
        ConfigError: see `read_description` and `open_hf_folder`.
    """
    folder = hugging_face_folder(path)
    if folder is None:
        read_description(path)  # says what else the folder may be
        return content_identity(path)
    source = open_hf_folder(folder)
    source.close()
    listed = listed_files(folder)
    unlisted = [folder / name for name in source.files() if name not in listed]
    if (size := sum(file.stat().st_size for file in unlisted)) > ANNOUNCED_BYTES:
        logger.info("%s: reading %.1f GB for the hash by which the run knows this model", path, size / 1e9)
    files = {name: listed[name]["sha256"] if name in listed else file_hash(folder / name) for name in source.files()}
    return json_identity({"files": files, "model": source.config.to_dict(), "quantisation": repr(source.quantisation)})


def load_model_chunks(
    path: str,
    parallel: ParallelConfig | None,
    params_dtype: torch.dtype,
    backend: BackendName = "auto",
    recompute: bool | str = False,
    fp8: Fp8 | None = None,
    **changes: Any,
) -> list[HyloModel]:
    """Build and fill this rank's part of a model folder, training checkpoint or `hf:PATH`; all ranks call it.

    Args:
        path: see above.
        parallel, params_dtype, backend, recompute, fp8: as in `build_chunks`.
        changes: fields of the configuration to replace.

    Raises:
        ConfigError: what cannot be read or built; a folder that changes meanwhile.
        DamagedError: a folder that was made here is not what its manifest says.
        OSError: the disk fails. An error of one rank is raised on all.
    """
    folder = hugging_face_folder(path)
    if folder is None:
        return load_chunks(path, parallel, params_dtype, backend, recompute, fp8, **changes)
    verify_manifest_if_any(folder)
    source = open_hf_folder(folder)
    chunks = build_chunks(source.config.replace(**changes), parallel, params_dtype, backend, recompute, fp8, initialize=False)
    error: Exception | None = None
    try:
        fill_chunks(chunks, source)
        source.require_unchanged()
    except (ConfigError, DamagedError, OSError) as caught:  # the other ranks wait
        error = caught
    source.close()
    if raised := next((e for e in gather(error) if e is not None), None):
        raise error or raised
    return chunks


@torch.no_grad()
def fill_chunks(chunks: Sequence[HyloModel], source: SafetensorsSource) -> None:
    """Copy a source's weights into a rank's chunks, reading what these hold alone, a parameter at a time.

    Args:
        chunks: under any parallelism.
        source: of the same architecture.

    Raises:
        ConfigError: a tensor has values that are no numbers, or a file changed.
    """
    entries = {entry.megatron: entry for entry in model_entries(source.config)}
    shapes = tensor_names(source.config)
    for chunk in chunks:
        layout = StoredLayout(chunk)
        assert layout.sharded.keys() == layout.parameters.keys(), "a parameter that no checkpoint has"
        for name in layout.sharded:
            reader = _EntryReader(source, entries[layout.undivided_name(name)], shapes, _section_starts(layout, name))
            layout.parameters[name].copy_(layout.merge(name, reader))


def _section_starts(layout: StoredLayout, name: str) -> dict[str, int]:
    """Map the keys that a parameter is stored under to the row of the whole parameter at which each begins."""
    described = layout.sharded[name]
    if not isinstance(described, ShardedTensorFactory):
        return {described.key: 0}
    starts, rows = {}, 0
    for part in nested_values(described.build_fn(described.key, layout.parameters[name].data, described.replica_id, None)):
        if part.key not in starts:
            starts[part.key] = rows
            rows += part.global_shape[part.prepend_axis_num]
    return starts


class _EntryReader:
    """Reader of parts of a Megatron parameter.

    Args:
        source: of its tensors.
        entry: how it is made of them.
        shapes: of all tensors of the source.
        starts: key of a section -> its first row in the parameter.
    """

    def __init__(
        self, source: SafetensorsSource, entry: Entry, shapes: dict[str, tuple[int, ...]], starts: dict[str, int]
    ) -> None:
        self.source, self.entry, self.starts = source, entry, starts
        self.heights = [shapes[name][0] for name in entry.hugging_face]
        self.rest = tuple(shapes[entry.hugging_face[0]][1:])

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Read a part of the section `key`; an expert's has the experts' axis before its own."""
        axes = 1 + len(self.rest)
        own = self._read(key, offsets[-axes:], sizes[-axes:])
        return own.reshape(sizes)

    def _read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        first, names = self.starts[key] + offsets[0], self.entry.hugging_face
        columns = tuple(slice(start, start + size) for start, size in zip(offsets[1:], sizes[1:], strict=True))
        if any(map(self.source.is_quantised, names)):
            whole = self.entry.merge([self.source.read(name) for name in names])
            return whole[first : first + sizes[0]][(slice(None), *columns)]
        out: Tensor | None = None
        for row, tensor, begin, end in self._runs(first, sizes[0], tuple(sizes[1:]) != self.rest):
            value = self.source.read(names[tensor], (begin, end))[(slice(None), *columns)]
            if out is None:
                out = torch.empty(tuple(sizes), dtype=value.dtype)
            elif out.dtype != value.dtype:  # of tensors of several dtypes
                out = out.float()
            out[row : row + end - begin] = value
        assert out is not None, f"{self.entry.megatron} has no rows here"
        return out

    def _runs(self, first: int, rows: int, in_blocks: bool) -> Iterator[tuple[int, int, int, int]]:
        """Yield (row of the part, number of the source's tensor, first row of that, row after the last) of consecutive rows."""
        starts = [sum(self.heights[:i]) for i in range(len(self.heights))]
        numbers = self.entry.merge([torch.arange(start, start + n) for start, n in zip(starts, self.heights)])
        wanted = numbers[first : first + rows]
        breaks = (wanted[1:] != wanted[:-1] + 1) | torch.isin(wanted[1:], torch.tensor(starts))
        ends = [*(torch.nonzero(breaks).flatten() + 1).tolist(), rows]
        longest = max(1, BLOCK_BYTES // (4 * torch.Size(self.rest).numel())) if in_blocks else rows
        begin = 0
        for end in ends:
            for row in range(begin, end, longest):
                number = int(wanted[row])
                tensor = max(i for i, start in enumerate(starts) if start <= number)
                at = number - starts[tensor]
                yield row, tensor, at, at + min(longest, end - row)
            begin = end
