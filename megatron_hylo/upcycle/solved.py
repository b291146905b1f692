"""Layers of a student that are solved, kept on the disk until the whole student is written."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_hylo.calibrate.solve import LayerError
from megatron_hylo.config import ModelConfig
from megatron_hylo.convert.mapping import layer_entries
from megatron_hylo.io import barrier, read_json, staging_directory, write_json
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.upcycle.assemble import LAYER, Read


class SolvedLayers:
    """Solved layers beside an output, with their errors; started again with the same settings, those there are kept.

    Args:
        output: folder that is made of them.
        config: of the student.
        description: JSON that is another one where a layer would be.
        initial: reader of the student's tensors before they are solved.
    """

    def __init__(self, output: Path, config: ModelConfig, description: dict[str, Any], initial: Read) -> None:
        self.config, self.initial = config, initial
        self.work = staging_directory(output, "layers", "solved", description)
        self.done = {layer for layer in range(config.num_hidden_layers) if self._error(layer).is_file()}

    def _error(self, layer: int) -> Path:
        return self.work / f"layer_{layer:05d}.json"

    def _file(self, layer: int) -> Path:
        return self.work / f"layer_{layer:05d}.safetensors"

    def error(self, layer: int) -> LayerError | None:
        """Return the errors of a layer that is there."""
        return LayerError(**read_json(self._error(layer))) if layer in self.done else None

    def keep(self, error: LayerError, mixer: nn.Module, mlp: nn.Module) -> None:
        """Write a solved layer: its weights under their Hugging Face names, then its errors."""
        layer = error.layer
        places = {f"decoder.layers.{2 * layer}.": mixer, f"decoder.layers.{2 * layer + 1}.": mlp}
        values = {prefix + name: p.detach() for prefix, part in places.items() for name, p in part.named_parameters()}
        tensors = {
            name: tensor.cpu().contiguous()
            for entry in layer_entries(self.config, layer)
            for name, tensor in zip(entry.hugging_face, entry.split(values[entry.megatron]))
        }
        if is_main():
            save_file(tensors, self._file(layer))
            write_json(self._error(layer), asdict(error))
        barrier()  # before any rank reads it
        self.done.add(layer)

    def read(self, name: str) -> Tensor:
        """Read a tensor of the student by its Hugging Face name: solved where its layer is."""
        found = LAYER.match(name)
        if found is None or int(found[1]) not in self.done:
            return self.initial(name)
        with safe_open(self._file(int(found[1])), framework="pt") as file:
            return file.get_tensor(name).clone()  # the file is not mapped any longer than that
