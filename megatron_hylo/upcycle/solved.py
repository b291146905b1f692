"""Layers of a student on their way: initialised, then solved, kept on the disk until the whole student is written."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from megatron_hylo.calibrate.solve import LayerError
from megatron_hylo.calibrate.statistics import save_whole
from megatron_hylo.config import ModelConfig
from megatron_hylo.config.mixers import COPIED_SYMBOLS, get_mixer
from megatron_hylo.convert.mapping import layer_entries
from megatron_hylo.io import on_all, on_main, rank, read_json, staging_directory, world_size, write_json
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.upcycle.assemble import LAYER, Read


class SolvedLayers:
    """Layers beside an output; started again with the same settings, on any number of ranks, those there are kept.

    Args:
        output: folder that is made of them.
        config: of the student.
        description: JSON that is another one where a layer would be.
        initial: reader of the student's tensors before they are solved.
    """

    def __init__(self, output: Path, config: ModelConfig, description: dict[str, Any], initial: Read) -> None:
        self.config, self.initial = config, initial
        self.work = staging_directory(output, "layers", "solved", description)
        layers = range(config.num_hidden_layers)
        self.done = set(on_main(lambda: [layer for layer in layers if self._error(layer).is_file()]))

    def _error(self, layer: int) -> Path:
        return self.work / f"layer_{layer:05d}.json"

    def _solved(self, layer: int) -> Path:
        return self.work / f"layer_{layer:05d}.safetensors"

    def _initialised(self, layer: int) -> Path:
        return self.work / f"mixer_{layer:05d}.safetensors"

    def initialise(self, track: Track = no_progress) -> None:
        """Make the mixers of all layers that are not there; each rank makes and writes some, all ranks call it.

        Raises:
            ConfigError: what the reader of initial tensors raises, on all ranks.
        """
        mixers = [layer for layer, symbol in enumerate(self.config.mixers) if symbol not in COPIED_SYMBOLS]
        wanted = on_main(lambda: [i for i in mixers if i not in self.done and not self._initialised(i).is_file()])

        def make() -> None:
            """Make and write this rank's share of the missing mixers."""
            for layer in track(wanted[rank() :: world_size()], "initialise"):
                names = [f"model.layers.{layer}.{n}" for n in get_mixer(self.config.mixers[layer]).tensors(self.config)]
                save_whole({name: self.initial(name) for name in names}, self._initialised(layer))

        on_all(make)

    def error(self, layer: int) -> LayerError | None:
        """Return the errors of a layer that is there."""
        return LayerError(**read_json(self._error(layer))) if layer in self.done else None

    def keep(self, error: LayerError, mixer: nn.Module, mlp: nn.Module | None) -> None:
        """Write a solved layer: what of its weights is solved, under their Hugging Face names, then its errors."""
        layer = error.layer
        places = {f"decoder.layers.{2 * layer}.": mixer} | (
            {f"decoder.layers.{2 * layer + 1}.": mlp} if mlp is not None else {}
        )

        def write() -> None:
            """Write the layer's tensors and then its errors, which say that it is done; its initialised mixer is removed."""
            values = {prefix + name: p.detach() for prefix, part in places.items() for name, p in part.named_parameters()}
            entries = [entry for entry in layer_entries(self.config, layer) if entry.megatron in values]
            parts = [(name, part) for e in entries for name, part in zip(e.hugging_face, e.split(values[e.megatron]))]
            save_whole({name: part.cpu() for name, part in parts}, self._solved(layer))
            write_json(self._error(layer), asdict(error))
            self._initialised(layer).unlink(missing_ok=True)

        on_main(write)  # before any rank reads it
        self.done.add(layer)

    def read(self, name: str) -> Tensor:
        """Read a tensor of the student by its Hugging Face name: solved, else initialised, else the teacher's."""
        if (found := LAYER.match(name)) is None:
            return self.initial(name)
        layer = int(found[1])
        file = self._solved(layer) if layer in self.done else self._initialised(layer)
        if file.is_file():
            with safe_open(file, framework="pt") as stored:
                if name in stored.keys():
                    return stored.get_tensor(name).clone()  # the file is not mapped any longer than that
        return self.initial(name)
