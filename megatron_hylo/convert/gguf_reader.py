"""Read a GGUF file (llama.cpp's format) of a Llama or Qwen: its configuration, and its tensors one at a time.

Every key of the file that describes the model is used, or must have a value that changes nothing, or is refused; every
tensor is used. transformers reads the same weights and drops much of the description (RoPE scaling, Qwen3's head_dim),
so it serves as the oracle for the weights only (`hf_reader.load_transformers_model`).
"""

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.gguf_rope import gguf_frequencies, rope_from_gguf
from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.convert.hf_rope import rope_to_hf
from megatron_hylo.convert.safetensors_files import file_state, require_unchanged
from megatron_hylo.convert.safetensors_reader import checked
from megatron_hylo.io.gguf_file import gguf_token_ids, open_gguf

ROPE_FACTORS = "rope_freqs.weight"
_REQUIRED = {  # key after the architecture's name -> config.json's
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size", "rope.dimension_count",
    "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier",
}  # fmt: skip
# What these say changes nothing for Llama and Qwen in llama.cpp; `Meta AI original pth` names the order of q and k rows that
# every Llama file has.
_HARMLESS = {"rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon"}
_NEUTRAL = {  # values of what is not supported that say that it is not there
    "expert_count": (0,), "expert_used_count": (0,), "expert_shared_count": (0,), "expert_feed_forward_length": (0,),
    "leading_dense_block_count": (0,), "nextn_predict_layers": (0,), "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,), "attention.causal": (True,), "attention.scale": (0,),
    "attention.shared_kv_layers": (0,), "use_parallel_residual": (False,), "pooling_type": (0,),
    "logit_scale": (0, 1), "residual_scale": (0, 1), "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,), "rope.scaling.alpha": (0,),
}  # fmt: skip


class GgufSource:
    """A GGUF file; tensors are dequantised to float32 when they are read.

    Args:
        file: path of the file.

    Attributes:
        hf_config: the file's description as a config.json.
        config: the same as ModelConfig.

    Raises:
        ConfigError: not a GGUF file, another architecture, or a key or tensor that says what cannot be taken over.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise ConfigError(f"{self.file} does not exist; give a Hugging Face folder or a .gguf file")
        self._state = file_state(self.file)
        reader = open_gguf(self.file)
        self._mapped: Any = reader.data
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture, model = self._model_keys(reader.fields)
        self.hf_config = self._hf_config(model)
        self.config: ModelConfig = model_config_from_hf(self.hf_config)
        self._check_tensors()

    def _model_keys(self, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the architecture and the model's keys without its prefix; refuses unknown ones."""
        if "general.architecture" not in fields:
            raise ConfigError(f"{self.file} lacks the key general.architecture; it is not a model")
        architecture = fields["general.architecture"].contents()
        if architecture not in ("llama", "qwen2", "qwen3"):
            model_config_from_hf({"model_type": architecture, "architectures": [f"GGUF file {self.file.name}"]})
        contents = {key: field.contents() for key, field in fields.items() if not key.startswith(("tokenizer.", "GGUF."))}
        if contents.get("split.count", 1) > 1:
            raise ConfigError(
                f"{self.file} is one of {contents['split.count']} parts; merge them first (llama-gguf-split --merge)"
            )
        if contents.get("general.type", "model") != "model" or any(key.startswith("adapter.") for key in contents):
            raise ConfigError(f"{self.file} holds a {contents.get('general.type', 'adapter')}, not a model")
        model = {key.removeprefix(f"{architecture}."): v for key, v in contents.items() if key.startswith(f"{architecture}.")}
        for key, value in model.items():
            if key in _NEUTRAL and value not in _NEUTRAL[key] and not self._harmless(key, value, model):
                raise ConfigError(f"{self.file}: {architecture}.{key} {value!r} is not supported")
            if key not in _NEUTRAL and key not in _REQUIRED and key not in _OPTIONAL and key not in _HARMLESS:
                raise ConfigError(f"{self.file}: {architecture}.{key} {value!r} is not known here, so the model may be another")
        return architecture, model

    @staticmethod
    def _harmless(key: str, value: Any, model: dict[str, Any]) -> bool:
        """Check for the usual attention scale, and a window that holds the whole context."""
        if key == "attention.sliding_window":
            return value >= model.get("context_length", math.inf)
        return key == "attention.scale" and math.isclose(value, model.get("attention.key_length", 0) ** -0.5, rel_tol=1e-6)

    def _hf_config(self, model: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {"model_type": self.architecture, "hidden_act": "silu"}
        for key, name in _REQUIRED.items():
            if key not in model:
                raise ConfigError(f"{self.file} lacks the key {self.architecture}.{key}; convert the model to GGUF again")
            values[name] = self._same_in_all_layers(key, model[key])
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = self._same_in_all_layers(
            "attention.head_count_kv", model.get("attention.head_count_kv", heads)
        )
        head_dim = values["head_dim"] = int(model.get("attention.key_length", values["hidden_size"] // heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if model.get(key, head_dim) != head_dim:
                raise ConfigError(
                    f"{self.file}: {self.architecture}.{key} {model[key]} is not supported; heads have {head_dim} channels"
                )
        embedding = self._tensors.get("token_embd.weight")
        values["vocab_size"] = int(model.get("vocab_size", embedding.shape[-1] if embedding is not None else 0))
        values["tie_word_embeddings"] = "output.weight" not in self._tensors
        factors = self._read(ROPE_FACTORS) if ROPE_FACTORS in self._tensors else None
        self._factors = None if factors is None or torch.all(factors == 1) else factors
        base, scaling = rope_from_gguf(model, self._factors, head_dim, values["max_position_embeddings"])
        return values | rope_to_hf(base, scaling) | gguf_token_ids(self.file)

    def _same_in_all_layers(self, key: str, value: Any) -> Any:
        """Return a number, or the value that all layers of a list share."""
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise ConfigError(f"{self.file}: layers with different {self.architecture}.{key} {value} are not supported")
        return value[0]

    def _check_tensors(self) -> None:
        """Check that exactly the tensors of the configuration are there, with their shapes and known types."""
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, dequantize, get_tensor_name_map

        arch = next(
            arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.architecture and isinstance(arch, MODEL_ARCH)
        )
        names = get_tensor_name_map(arch, self.config.num_hidden_layers)
        self._stored: dict[str, str] = {}  # by Hugging Face name
        for name, shape in tensor_names(self.config).items():
            module, _, kind = name.rpartition(".")
            stored = self._stored[name] = f"{names.get_name(module)}.{kind}"
            if stored not in self._tensors:
                raise ConfigError(f"{self.file} has no tensor {stored}, which its description asks for")
            tensor = self._tensors[stored]
            found = tuple(int(n) for n in reversed(tensor.shape))
            if found != tuple(shape):
                raise ConfigError(
                    f"{self.file}: tensor {stored} has shape {list(found)}, its description asks for {list(shape)}"
                )
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError as error:
                raise ConfigError(f"{self.file}: tensor {stored} is {tensor.tensor_type.name}, which cannot be read") from error
        if left := sorted(set(self._tensors) - set(self._stored.values()) - {ROPE_FACTORS}):
            raise ConfigError(f"{self.file}: tensor {left[0]} is not part of a {self.architecture} as it is known here")

    def _read(self, stored: str) -> Tensor:
        from gguf import dequantize

        require_unchanged(self.file, self._state)  # a file that was cut short would end this process
        tensor = self._tensors[stored]
        made = dequantize(tensor.data, tensor.tensor_type)
        if made.dtype != np.float32 or np.may_share_memory(made, tensor.data):
            made = np.array(made, dtype=np.float32)
        if (mapped := getattr(self._mapped, "_mmap", None)) is not None:
            mapped.madvise(mmap.MADV_DONTNEED)  # what was read of the file counts as this process's memory
        return torch.from_numpy(made)

    def read(self, name: str) -> Tensor:
        """Read the tensor of a Hugging Face name, float32, in Hugging Face's shape.

        Rows of Llama's queries and keys lie in llama.cpp's order there, where channels 2i and 2i+1 of a head turn together, and
        come back in Hugging Face's, where i and i + d/2 do.

        Raises:
            ConfigError: it holds values that are no numbers, or the file was changed since it was opened.
        """
        tensor = self._read(self._stored[name])
        if self.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = tensor.unflatten(0, (-1, self.config.kv_channels // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        return checked(name, tensor, self.file)

    def dtype(self) -> torch.dtype:
        """Return float32: dequantised weights fit no narrower dtype."""
        return torch.float32

    def require_unchanged(self) -> None:
        """Refuse a file that was changed since it was opened, by a ConfigError."""
        require_unchanged(self.file, self._state)

    def state(self) -> list[Any]:
        """Describe the file, as JSON: its path, size and time of change."""
        return [str(self.file.resolve()), list(self._state)]

    def frequencies(self) -> Tensor:
        """Inverse RoPE frequencies from the file's own data, fp32 [head_dim / 2]."""
        return gguf_frequencies(self.config.rotary_base, self.config.rope_scaling, self._factors, self.config.kv_channels)
