"""Open a Hugging Face folder (`safetensors_reader`) or a GGUF file (`gguf_reader`), and load the same through transformers."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.convert.gguf_reader import GgufSource
from megatron_hylo.convert.safetensors_reader import SafetensorsSource
from megatron_hylo.convert.source_path import check_source, read_hf_config
from megatron_hylo.io import verify_manifest_if_any
from megatron_hylo.io.foreign import load_foreign_model, load_transformers
from megatron_hylo.io.gguf_file import gguf_file, parsed_once


class TensorSource(Protocol):
    """Source of the tensors to convert."""

    config: ModelConfig

    def read(self, name: str) -> Tensor:
        """Read the whole tensor of a Hugging Face name, on the CPU, unrounded, in bfloat16 or float32."""
        ...

    def dtype(self) -> torch.dtype:
        """Return bfloat16 where every weight is stored in it, else float32."""
        ...

    def require_unchanged(self) -> None:
        """Refuse a source that was changed since it was opened, by a ConfigError."""
        ...

    def state(self) -> list[Any]:
        """Describe the files that are read, as JSON: names, sizes and times of change."""
        ...


def load_transformers_model(path: str | Path, **settings: Any) -> Any:
    """Load `path` (Hugging Face folder or GGUF) through transformers, fp32, eval mode: the oracle.

    Args:
        path: folder or file.
        settings: further ones of `from_pretrained`, whose result is returned as it is where they are given; not for GGUF.
    """
    path = Path(path)
    if (gguf := gguf_file(path)) is not None:
        return _gguf_model(GgufSource(gguf))
    if read_hf_config(path).get("model_type") == "hylo":
        from megatron_hylo.hf import HyloForCausalLM

        model_class: Any = HyloForCausalLM
    else:
        model_class = load_transformers().AutoModelForCausalLM
    loaded = load_foreign_model(model_class, path, dtype=torch.float32, **settings)
    return loaded if settings else loaded.eval()


def _gguf_model(source: GgufSource) -> Any:
    """Load a GGUF file through transformers and compare its RoPE with the file's own data.

    transformers makes plain RoPE of every file, so it is given the configuration.

    Raises:
        ConfigError: the frequencies are others than the file's.
    """
    transformers = load_transformers()
    values = {key: value for key, value in source.hf_config.items() if key not in ("rope_theta", "rope_scaling")}
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    folder, name = source.file.parent, source.file.name
    with parsed_once():
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, gguf_file=name, config=config, dtype=torch.float32).eval()
    found, wanted = model.model.rotary_emb.inv_freq, source.frequencies()
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-5, atol=0):
        raise ConfigError(
            f"transformers turns channels with frequencies {found.tolist()}, {source.file} says {wanted.tolist()}"
        )
    return model


def open_source(path: str | Path) -> TensorSource:
    """Open a Hugging Face folder or a GGUF file (dequantised to float32).

    Raises:
        ConfigError: nothing readable is there, a shard is missing or corrupt, the architecture is unknown.
        DamagedError: a folder that was exported here is not what its manifest says.
    """
    path = Path(path)
    check_source(path)
    verify_manifest_if_any(path)
    gguf = gguf_file(path)
    return SafetensorsSource(path) if gguf is None else GgufSource(gguf)
