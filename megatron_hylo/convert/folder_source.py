"""A model folder as a source of tensors under their Hugging Face names, one parameter in memory at a time."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.convert.mapping import Entry, model_entries
from megatron_hylo.convert.safetensors_files import file_state, require_unchanged
from megatron_hylo.convert.safetensors_reader import is_finite
from megatron_hylo.io import verify_manifest
from megatron_hylo.models.checkpoint import DTYPES
from megatron_hylo.models.description import read_description
from megatron_hylo.models.weights_files import StoredLayout, WeightsReader, skeleton


class FolderSource:
    """A model folder or training checkpoint.

    Args:
        path: the folder.
        verify_hashes: compare all files with the manifest first; False for a folder that has none yet.

    Attributes:
        config: its model.
        model: the same without memory.

    Raises:
        ConfigError: not a model folder.
        DamagedError: its files are not what its manifest says.
    """

    def __init__(self, path: str | Path, verify_hashes: bool = True) -> None:
        self.path = Path(path)
        self.config: ModelConfig
        self.config, description = read_description(path)
        if verify_hashes:
            verify_manifest(path)
        self.model = skeleton(self.config, DTYPES[description["params_dtype"]])
        self.layout = StoredLayout(self.model)
        self.reader = WeightsReader(self.path / "weights")
        self._entries = {name: entry for entry in model_entries(self.config) for name in entry.hugging_face}
        self._states = {f: file_state(f) for f in (self.path / "hylo.json", *sorted((self.path / "weights").iterdir()))}
        self._last: tuple[Entry, list[Tensor]] | None = None

    def read(self, name: str) -> Tensor:
        """Read the tensor of a Hugging Face name, in Hugging Face's shape and the dtype that is stored, on the CPU.

        Raises:
            ConfigError: it holds NaN or infinite values, or the folder has no such tensor.
            DamagedError: it cannot be read.
        """
        entry = self._entries[name]
        if self._last is None or self._last[0] is not entry:
            self._last = None
            tensors = entry.split(self.parameter(entry.megatron))
            if len(tensors) == 1:
                return _finite(tensors[0], name, entry)
            self._last = entry, tensors
        tensors, place = self._last[1], entry.hugging_face.index(name)
        if place == len(tensors) - 1:
            self._last = None
        return _finite(tensors[place].contiguous(), name, entry)

    def parameter(self, name: str) -> Tensor:
        """Read a whole parameter of the Megatron model by its name there, on the CPU, in the dtype that is stored.

        Raises:
            ConfigError: the folder has no such tensor.
            DamagedError: it cannot be read.
        """
        return self.layout.merge(name, self.reader)

    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights but those that the model keeps in float32."""
        return self.model.config.params_dtype

    def require_unchanged(self) -> None:
        """Refuse a folder of which a file was changed since it was opened.

        Raises:
            ConfigError: it names the file.
        """
        for file, state in self._states.items():
            require_unchanged(file, state)

    def state(self) -> list[Any]:
        """Describe the files that are read, as JSON: names, sizes and times of change."""
        return [str(self.path.resolve()), {file.name: list(state) for file, state in self._states.items()}]


def _finite(tensor: Tensor, name: str, entry: Entry) -> Tensor:
    if not is_finite(tensor):
        raise ConfigError(
            f"tensor {name} ({entry.megatron}) holds NaN or infinite values, as after a training that diverged; take "
            "an earlier checkpoint, or make the model again"
        )
    return tensor
