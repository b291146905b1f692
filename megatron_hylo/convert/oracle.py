"""A model as transformers reads it from the same folder or file: what conversions are compared with.

The weights come through transformers' own loading, not through `hf_reader`, wherever transformers can load the format on a
CPU and reads it rightly; where not, `Oracle.description` says what was done instead.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.hf_reader import (
    SafetensorsSource,
    StateDictSource,
    TensorSource,
    load_transformers,
    load_transformers_model,
)
from megatron_hylo.tensor_names import tensor_names

LAYERWISE_PARAMETERS = 1_000_000_000  # above this many, weights are read from the disk layer by layer: 4 GB in fp32
ON_DISK = {
    "model.embed_tokens": "disk",
    "model.layers": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@dataclass
class Oracle:
    """A transformers model in float32, and how it was loaded."""

    model: Any
    description: str

    def tensor(self, name: str) -> Tensor:
        """The weight of that name, brought from the disk where it rests there."""
        from accelerate.utils import align_module_device

        module, _, attribute = name.rpartition(".")
        owner = self.model.get_submodule(module)
        with align_module_device(owner):
            return getattr(owner, attribute).detach()

    def names(self) -> set[str]:
        """All weights, tied ones under every name."""
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)}


@contextmanager
def open_oracle(source: TensorSource, path: str | Path) -> Iterator[Oracle]:
    """Load what `path` holds through transformers; models above LAYERWISE_PARAMETERS rest on the disk.

    Args:
        source: the same, opened by `hf_reader`: its configuration, and dequantised weights where transformers cannot make them.
        path: Hugging Face folder or GGUF file.

    Raises:
        ConfigError: transformers does not find a weight of its model.
    """
    if isinstance(source, StateDictSource):
        yield Oracle(source.model, "transformers' reading of the GGUF file")
        return
    large = sum(torch.Size(shape).numel() for shape in tensor_names(source.config).values()) > LAYERWISE_PARAMETERS
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"device_map": ON_DISK, "offload_folder": scratch} if large else {}
        where = ", layer by layer from the disk" if large else ""
        if why := _unreadable(source):
            settings["state_dict"] = {name: source.read(name) for name in tensor_names(source.config)}
            yield Oracle(_load(path, settings), f"transformers' model, weights dequantised by this program: {why}")
            return
        if source.quantisation is not None:
            settings["quantization_config"] = load_transformers().FineGrainedFP8Config(dequantize=True)
            where = f", dequantised by it{where}"
        yield Oracle(_load(path, settings), f"transformers' own loading{where}")


def _unreadable(source: SafetensorsSource) -> str:
    """Why transformers alone cannot load a quantised folder on a CPU, or would load another model; else nothing."""
    if source.quantisation is None:
        return ""
    if source.quantisation.method != "fp8" or any(not part.scale.endswith("_inv") for part in source.scaled.values()):
        return f"transformers does not dequantise this format ({source.quantisation.method}) on a CPU"
    if any(part.is_cut_off(source.stored[name][1]) for name, part in source.scaled.items()):
        return "transformers takes the cut-off blocks at the edges of a matrix for smaller ones"
    return ""


def _load(path: str | Path, settings: dict[str, Any]) -> Any:
    if "state_dict" in settings:
        transformers = load_transformers()
        config = transformers.AutoConfig.from_pretrained(path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, found = model_class.from_pretrained(
            None, config=config, dtype=torch.float32, output_loading_info=True, **settings
        )
    else:
        model, found = load_transformers_model(path, output_loading_info=True, **settings)
    if found["missing_keys"]:
        raise ConfigError(f"transformers finds no {sorted(found['missing_keys'])[0]} in {path}; it would start at random")
    return model.eval()
