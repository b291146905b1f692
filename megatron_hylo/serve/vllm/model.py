"""HyloForCausalLM for vLLM: layers with any mixers, their states as vLLM asks for them, and the loading of exported weights."""

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaMLP
from vllm.v1.kv_cache_interface import MambaSpec

from megatron_hylo.config.mixers import ATTENTION_SYMBOL, LINEAR_SYMBOLS, MLA_SYMBOL, complete
from megatron_hylo.config.mixers.mamba2 import Mamba2
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
complete(MIXERS, "serve/vllm/model.py: MIXERS")
States = tuple[tuple[tuple[int, ...], ...], tuple[torch.dtype, ...]]  # shapes and dtypes of a layer's states


class HyloLayer(nn.Module):
    """A token mixer and an MLP, each behind a norm and with a residual."""

    def __init__(self, config: Any, layer: int, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        c = config.architecture()
        self.symbol = config.mixers[layer]
        self.mixer_name, mixer = MIXERS[self.symbol]
        arguments = (config, vllm_config) if self.symbol in LINEAR_SYMBOLS else (config, layer, vllm_config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=c.layernorm_epsilon)
        self.add_module(self.mixer_name, mixer(*arguments, f"{prefix}.{self.mixer_name}"))
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

    frequencies: Tensor
    latent_frequencies: Tensor

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        c = config.architecture()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HyloLayer(config, i, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=c.layernorm_epsilon)
        latent = c.kv_channels if c.mla_rotary_pairs else c.qk_pos_emb_head_dim  # layers choose out of the base model's table
        self.rotations = {ATTENTION_SYMBOL: (c.kv_channels, c.rope_scaling), MLA_SYMBOL: (latent, c.mla_rope_scaling)}
        for symbol, name in ((ATTENTION_SYMBOL, "frequencies"), (MLA_SYMBOL, "latent_frequencies")):
            channels, scaling = self.rotations[symbol]
            table = rope_frequencies(channels, c.rotary_base, scaling, torch.get_default_device())
            self.register_buffer(name, table, persistent=False)
        self.attends = set(config.mixers) & set(self.rotations)

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Compute hidden states [tokens, hidden] of all requests' tokens."""
        x, residual = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds, None
        tables: dict[str, Any] = {ATTENTION_SYMBOL: self.frequencies, MLA_SYMBOL: self.latent_frequencies}
        ropes = {s: rope_cos_sin(positions, tables[s], self.rotations[s][1].cos_sin_multiplier) for s in self.attends}
        for layer in self.layers:
            x, residual = layer(x, residual, ropes)
        return self.norm(x, residual)[0]


class HyloForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """A HyLo model with its output head."""

    @classmethod
    def _states(cls, vllm_config: Any, symbol: str) -> States:
        c = vllm_config.model_config.hf_config.architecture()
        tp, cache = vllm_config.parallel_config.tensor_parallel_size, vllm_config.cache_config
        types = (vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype)
        if symbol == Mamba2.symbol:
            shapes = MambaStateShapeCalculator.mamba2_state_shape(
                tp_world_size=tp, intermediate_size=c.mamba_num_heads * c.mamba_head_dim, n_groups=c.mamba_num_heads,
                num_heads=c.mamba_num_heads, head_dim=c.mamba_head_dim, state_size=c.mamba_state_dim,
                conv_kernel=c.linear_conv_kernel_dim,
            )  # fmt: skip
            return shapes, MambaStateDtypeCalculator.mamba2_state_dtype(*types)
        heads, keys, values = c.linear_num_heads, c.linear_key_head_dim, c.linear_value_head_dim
        shapes = MambaStateShapeCalculator.gated_delta_net_state_shape(tp, heads, heads, keys, values, c.linear_conv_kernel_dim)
        return shapes, MambaStateDtypeCalculator.gated_delta_net_state_dtype(*types)

    @classmethod
    def _all_states(cls, vllm_config: Any) -> list[States]:
        """States of every kind of linear layer, the largest first."""
        symbols = sorted(set(vllm_config.model_config.hf_config.mixers) & set(LINEAR_SYMBOLS))
        states = [cls._states(vllm_config, symbol) for symbol in symbols]
        return sorted(states, key=lambda s: -sum(prod(shape) * dtype.itemsize for shape, dtype in zip(*s))) or [((), ())]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of the largest states."""
        return cls._all_states(vllm_config)[0][0]

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """Dtypes of the largest states."""
        return cls._all_states(vllm_config)[0][1]

    @classmethod
    def get_mamba_specs_from_config(cls, vllm_config: Any) -> list[MambaSpec]:
        """Descriptions of all kinds of states; asked by vLLM 0.30 and later."""
        return [MambaSpec(shapes=s, dtypes=d, block_size=-1) for s, d in cls._all_states(vllm_config)]

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How states are copied to where a prefix is cached, of every kind of linear layer."""
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: Iterable[Any]) -> dict[Any, tuple[Any, ...]]:
        """The same by kind; asked by vLLM 0.30 and later."""
        return dict.fromkeys(mamba_types, cls.get_mamba_state_copy_func())

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = HyloModel(vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [tokens, hidden] of token ids [tokens]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Compute hidden states [tokens, hidden] of all requests' tokens, from their pages and into them."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [tokens, vocabulary] of hidden states."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the tensors of an exported folder, all of them."""
        return load_tensors(self.config, dict(self.named_parameters()), weights, default_weight_loader)
