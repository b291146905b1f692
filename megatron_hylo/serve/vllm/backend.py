"""Frame of this project's attention backends: a name outside vLLM's own, and a builder that makes metadata once a step."""

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder


class Builder(AttentionMetadataBuilder[Any]):
    """Keeps what vLLM gives it: the description of the pages, the layers' names, the settings, the device."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)


class Backend(AttentionBackend):
    """Backend of layers that compute by themselves, from the metadata that `builder` makes."""

    builder: type[Builder]

    @staticmethod
    def get_name() -> str:
        """A name outside vLLM's own."""
        return "CUSTOM"

    @classmethod
    def get_builder_cls(cls) -> type[Builder]:
        """Class of the builder."""
        return cls.builder
