"""HyloForCausalLM for vLLM: layers with any mixers, their states as vLLM asks for them, and the loading of exported weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaMLP
from vllm.v1.kv_cache_interface import MambaSpec

from megatron_hylo.config.mixers import ATTENTION_SYMBOL, MLA_SYMBOL, WINDOW_SYMBOL, complete
from megatron_hylo.kernels.rope import rope_cos_sin, rope_frequencies
from megatron_hylo.serve.vllm.attention import HyloAttention
from megatron_hylo.serve.vllm.gdn import HyloGatedDeltaNet
from megatron_hylo.serve.vllm.kda import HyloKimiDeltaAttention
from megatron_hylo.serve.vllm.latent import HyloLatentAttention
from megatron_hylo.serve.vllm.mamba2 import HyloMamba2
from megatron_hylo.serve.vllm.weights import load_tensors

MIXERS: dict[str, tuple[str, type[nn.Module]]] = {
    "*": ("self_attn", HyloAttention),
    "+": ("self_attn", HyloLatentAttention),
    "M": ("mamba", HyloMamba2),
    "G": ("linear_attn", HyloGatedDeltaNet),
    "K": ("linear_attn", HyloKimiDeltaAttention),
}
complete(MIXERS, "serve/vllm/model.py: MIXERS", besides=WINDOW_SYMBOL)


class HyloLayer(nn.Module):
    """A token mixer and an MLP, each behind a norm and with a residual."""

    def __init__(self, config: Any, layer: int, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        c = config.architecture()
        self.symbol = config.mixers[layer]
        self.mixer_name, mixer = MIXERS[self.symbol]
        self.input_layernorm = RMSNorm(config.hidden_size, eps=c.layernorm_epsilon)
        self.add_module(self.mixer_name, mixer(config, layer, vllm_config, f"{prefix}.{self.mixer_name}"))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=c.layernorm_epsilon)
        self.mlp = LlamaMLP(config.hidden_size, c.ffn_hidden_size, "silu", prefix=f"{prefix}.mlp")

    def forward(self, x: Tensor, residual: Tensor | None, ropes: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Add x to the residual and apply mixer and MLP: [tokens, hidden] each -> what to add next, and the residual."""
        mixer, rope = getattr(self, self.mixer_name), ropes.get(self.symbol)
        x, residual = (self.input_layernorm(x), x) if residual is None else self.input_layernorm(x, residual)
        x = mixer(x) if rope is None else mixer(x, rope)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class HyloModel(nn.Module):
    """Backbone: embedding, layers, final norm."""

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        c = config.architecture()
        padding = 64 * vllm_config.parallel_config.tensor_parallel_size  # vLLM's 64 is no multiple of three ranks
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, padding_size=padding)
        layers = (HyloLayer(config, i, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, eps=c.layernorm_epsilon)
        latent = c.kv_channels if c.mla_rotary_pairs else c.qk_pos_emb_head_dim  # layers choose out of the base model's table
        rotations = {ATTENTION_SYMBOL: (c.kv_channels, c.rope_scaling), MLA_SYMBOL: (latent, c.mla_rope_scaling)}
        self.multipliers: dict[str, float] = {}
        for symbol, (width, scaling) in rotations.items():
            if symbol in config.mixers:
                frequencies = rope_frequencies(width, c.rotary_base, scaling, torch.get_default_device())
                self.register_buffer(f"frequencies_{symbol}", frequencies, persistent=False)  # else lost in sleep mode
                self.multipliers[symbol] = scaling.cos_sin_multiplier

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Compute hidden states [tokens, hidden] of all requests' tokens from their embeddings x [tokens, hidden]."""
        residual, scales = None, self.multipliers.items()
        ropes = {symbol: rope_cos_sin(positions, self.get_buffer(f"frequencies_{symbol}"), scale) for symbol, scale in scales}
        for layer in self.layers:
            x, residual = layer(x, residual, ropes)
        return self.norm(x, residual)[0]


class HyloForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """A HyLo model with its output head."""

    @classmethod
    def get_mamba_specs_from_config(cls, vllm_config: Any) -> list[MambaSpec]:
        """Descriptions of the states of all linear layers, which exist when vLLM asks, the largest first."""
        layers = [x for x in vllm_config.compilation_config.static_forward_context.values() if isinstance(x, MambaBase)]
        states = {(layer.get_state_shape(), layer.get_state_dtype()) for layer in layers}
        specs = [MambaSpec(shapes=shapes, dtypes=dtypes, block_size=-1) for shapes, dtypes in states or {((), ())}]
        return sorted(specs, key=lambda spec: -spec.page_size_bytes)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of the largest states."""
        return cls.get_mamba_specs_from_config(vllm_config)[0].shapes

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """Dtypes of the largest states."""
        return cls.get_mamba_specs_from_config(vllm_config)[0].dtypes

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How states are copied to where a prefix is cached, of every kind of linear layer."""
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = HyloModel(vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, padding_size=self.model.embed_tokens.padding_size)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [tokens, hidden] of ids [tokens]; those outside, which vLLM lets clients send, are read as the nearest."""
        return self.model.embed_tokens(input_ids.clamp(0, self.config.vocab_size - 1))

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Compute hidden states [tokens, hidden] of all requests' tokens, from their pages and into them."""
        return self.model(self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [tokens, vocabulary] of hidden states."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the tensors of an exported folder, all of them, as `load_tensors` does; returns the parameters' names."""
        return load_tensors(self.config, dict(self.named_parameters()), weights, default_weight_loader)
