"""From a `ModelConfig` to the TransformerConfig that Megatron-Core's modules read."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron_hylo.config import Fp8, ModelConfig, ParallelConfig
from megatron_hylo.config.mixers import check_tensor_parallel
from megatron_hylo.config.mlps import check_expert_parallel
from megatron_hylo.models.placement import weights_device


@dataclass
class HyloTransformerConfig(TransformerConfig):
    """Megatron-Core's configuration with ours attached: mixers read their sizes from `hylo`."""

    hylo: ModelConfig = field(kw_only=True)
    recompute: str = ""  # symbols of layers, see recompute.py


def build_transformer_config(
    config: ModelConfig,
    parallel: ParallelConfig | None = None,
    params_dtype: torch.dtype = torch.float32,
    recompute: str = "",
    fp8: Fp8 | None = None,
    activation_module: bool = False,
    initialize: bool = True,
) -> HyloTransformerConfig:
    """Megatron-Core configuration of a model.

    Args:
        config: the architecture.
        parallel: sizes of the parallel groups.
        params_dtype: torch.float32 or torch.bfloat16.
        recompute: symbols of the layers whose activations are recomputed in the backward pass.
        fp8: formats that linear maps compute in, see models/fp8.py.
        activation_module: the MLP is given its SwiGLU (else Megatron-Core's, compiled on a GPU).
        initialize: weights are drawn at random; False where all are loaded, which spares the drawing.
    """
    parallel = parallel or ParallelConfig()
    check_tensor_parallel(config, parallel.tensor_model_parallel_size)
    check_expert_parallel(config, parallel, trained=False)
    cuda, interleaved = torch.cuda.is_available(), parallel.virtual_pipeline_model_parallel_size > 1
    return HyloTransformerConfig(
        hylo=config,
        num_layers=2 * config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        layernorm_epsilon=config.layernorm_epsilon,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=config.add_qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size if interleaved else None,
        overlap_p2p_comm=interleaved,  # else messages both ways between two ranks are mixed up
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        sequence_parallel=parallel.sequence_parallel,
        use_cpu_initialization=not cuda or weights_device().type == "meta",
        perform_initialization=initialize,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=cuda and not activation_module,
        use_te_activation_func=activation_module,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        recompute=recompute,
        fp8=fp8,
        fp8_recipe="tensorwise",
        **_experts(config, parallel),
    )


def _experts(config: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Fields of a mixture of experts, routed as transformers does: softmax, no token dropped, no auxiliary loss."""
    if not config.has_experts:
        return {}
    return dict(
        num_moe_experts=config.num_moe_experts,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size,
        moe_router_topk=config.moe_router_topk,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_router_score_function="softmax",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
    )
