"""The oracle of conversions: a model as transformers loads it from the same folder or file.

The weights come through transformers' own loading, not through `hf_reader`, wherever transformers can load the format on a
CPU and reads it rightly; where not, `Oracle.description` says what was done instead.
"""

import functools
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.hf_config import is_own
from megatron_hylo.convert.hf_reader import TensorSource, load_transformers_model
from megatron_hylo.convert.safetensors_reader import SafetensorsSource
from megatron_hylo.io.foreign import load_transformers

LAYERWISE_PARAMETERS = 1_000_000_000  # above this many, weights are read from the disk layer by layer: 4 GB in fp32
ON_DISK = {
    "model.embed_tokens": "disk",
    "model.layers": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")  # of all experts: how transformers 5 has them in memory


@dataclass
class Oracle:
    """A transformers model in float32, and how it was loaded."""

    model: Any
    description: str
    on_disk: Mapping[str, Tensor] | None = None  # weights by name, where they are read when they are needed

    def tensor(self, name: str) -> Tensor:
        """Return the weight of that Hugging Face name; an expert's is a part of a stacked one in transformers 5."""
        if (found := _EXPERT.fullmatch(name)) and name not in self._parameters:
            experts, number, part = found[1], int(found[2]), found[3]
            if part == "down":
                return self._stored(f"{experts}.down_proj")[number]
            return self._stored(f"{experts}.gate_up_proj")[number].chunk(2)[("gate", "up").index(part)]
        return self._stored(name)

    def _stored(self, name: str) -> Tensor:
        return self._parameters[name].detach() if self.on_disk is None else self.on_disk[name]

    @functools.cached_property
    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def names(self) -> set[str]:
        """Return the names of all weights as a folder has them, tied ones under every name."""
        names: set[str] = set()
        for name, parameter in self._parameters.items():
            if (found := _STACKED.fullmatch(name)) is None:
                names.add(name)
                continue
            parts = ("down",) if found[2] == "down_proj" else ("gate", "up")
            names |= {f"{found[1]}.{number}.{part}_proj.weight" for number in range(len(parameter)) for part in parts}
        return names


@contextmanager
def open_oracle(source: TensorSource, path: str | Path) -> Iterator[Oracle]:
    """Load `path` through transformers; models above LAYERWISE_PARAMETERS are offloaded to disk, unless dequantised here.

    Args:
        source: the same, opened by `hf_reader`: its configuration, and dequantised weights where transformers cannot make them.
        path: Hugging Face folder or GGUF file.

    Raises:
        ConfigError: transformers does not find a weight of its model.
    """
    if not isinstance(source, SafetensorsSource):
        yield Oracle(load_transformers_model(path), "transformers' reading of the GGUF file, its RoPE checked against the file")
        return
    large = sum(torch.Size(shape).numel() for shape in tensor_names(source.config).values()) > LAYERWISE_PARAMETERS
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"device_map": ON_DISK, "offload_folder": scratch} if large else {}
        where = ", layer by layer from the disk" if large else ""
        if why := _unreadable(source):
            settings = {"state_dict": {name: source.read(name) for name in tensor_names(source.config)}}
            yield Oracle(_load(path, settings), f"transformers' model, weights dequantised by this program: {why}")
            return
        if source.quantisation is not None:
            settings["quantization_config"] = load_transformers().FineGrainedFP8Config(dequantize=True)
            where = f", dequantised by it{where}"
        how = "the exported modelling code" if is_own(source.config) else "transformers' own loading"
        model = _load(path, settings)
        yield Oracle(model, how + where, _load_whole_layers(model) if large else None)


def _unreadable(source: SafetensorsSource) -> str:
    """Say why transformers alone cannot load a quantised folder rightly on a CPU; empty where it can."""
    if source.quantisation is None:
        return ""
    if source.quantisation.method != "fp8" or any(not part.scale.endswith("_inv") for part in source.scaled.values()):
        return f"transformers does not dequantise this format ({source.quantisation.method}) on a CPU"
    if any(part.is_cut_off(source.stored[name][1]) for name, part in source.scaled.items()):
        return "transformers takes the cut-off blocks at the edges of a matrix for smaller ones"
    return ""


def _load_whole_layers(model: Any) -> Mapping[str, Tensor]:
    """Make an offloaded model read whole decoder layers from disk; accelerate alone reads one `nn.Module` at a time.

    Mixers use weights of their submodules without calling these, which accelerate's own hooks do not see.

    Returns:
        The weights on the disk by name.
    """
    from accelerate.hooks import attach_align_device_hook, remove_hook_from_module

    weights = model.model.embed_tokens._hf_hook.weights_map.dataset
    for number, layer in enumerate(model.model.layers):
        remove_hook_from_module(layer, recurse=True)
        attach_align_device_hook(
            layer,
            execution_device=torch.device("cpu"),
            offload=True,
            weights_map=weights,
            module_name=f"model.layers.{number}",
            preload_module_classes=[type(layer).__name__],
        )
    return weights


def _load(path: str | Path, settings: dict[str, Any]) -> Any:
    try:
        model, found = _from_pretrained(path, settings)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {path}, so that nothing can be compared with it: {error}") from error
    if found["missing_keys"]:
        raise ConfigError(f"transformers finds no {sorted(found['missing_keys'])[0]} in {path}; it would start at random")
    return model.eval()


def _from_pretrained(path: str | Path, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if "state_dict" not in settings:
        return load_transformers_model(path, output_loading_info=True, **settings)
    transformers = load_transformers()
    config = transformers.AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class.from_pretrained(None, config=config, dtype=torch.float32, output_loading_info=True, **settings)
