"""HyloConfig with the fields that vLLM reads, and vLLM's hook that runs before the layers are made."""

from typing import Any

import torch
from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.mixers import ATTENTION_SYMBOL, LINEAR_SYMBOLS, MLA_SYMBOL, WINDOW_SYMBOL, check_tensor_parallel
from megatron_hylo.config.mixers.mamba2 import Mamba2
from megatron_hylo.config.mlps import EXPERTS_SYMBOL
from megatron_hylo.hf.configuration_hylo import HyloConfig
from megatron_hylo.io import listed_files, verify_manifest
from megatron_hylo.serve.vllm import ARCHITECTURE
from megatron_hylo.serve.vllm.versions import CACHES_UNLIKE_STATES

logger = init_logger("vllm.hylo")
REFERENCE = "hylo_kernels"  # in additional_config: "reference" for this project's torch kernels


def latent_row(c: Any) -> int:
    """Numbers that an MLA layer caches a token: latent, rotated key, and with q/k-norm each KV head's scale in two parts."""
    return c.kv_lora_rank + c.qk_pos_emb_head_dim + (2 * c.num_query_groups if c.qk_layernorm else 0)


class HyloVllmConfig(HyloConfig):
    """HyloConfig whose num_key_value_heads and head_dim tell vLLM a token's page: K and V of one head are a row of latents."""

    def __init__(self, hylo: dict | None = None, **kwargs: Any) -> None:
        super().__init__(hylo, **kwargs)
        if hylo is None:
            return
        c = self.architecture()
        row = latent_row(c) if MLA_SYMBOL in self.mixers else 0
        if row > (ATTENTION_SYMBOL in self.mixers) * 2 * c.num_query_groups * c.kv_channels:  # the larger page counts
            self.num_key_value_heads, self.head_dim = 1, row // 2
        self.mamba_chunk_size = 256  # tokens; vLLM would take 2,048, whose products grow with its square
        self.layer_types = ["linear_attention" if m in LINEAR_SYMBOLS else "full_attention" for m in self.mixers]


def asks_for_reference(vllm_config: Any) -> bool:
    """Whether additional_config asks for this project's torch kernels; raises ConfigError where it asks for others."""
    asked = (vllm_config.additional_config or {}).get(REFERENCE)
    if asked not in (None, "reference"):
        raise ConfigError(f"additional_config {REFERENCE} is 'reference', got {asked!r}; leave it out for the fastest kernels")
    return asked is not None


def uses_reference(vllm_config: Any) -> bool:
    """Whether linear layers run this project's torch kernels: if asked for, on CPUs, and in fp32, which vLLM's do not take."""
    return asks_for_reference(vllm_config) or current_platform.is_cpu() or vllm_config.model_config.dtype == torch.float32


def check_options(vllm_config: Any) -> None:
    """Refuse options that HyLo models are not served with, and that vLLM would not refuse by itself or only later.

    Raises:
        ConfigError: names all such options, or the size that tensor parallelism does not divide.
        DamagedError: a file of weights is missing or cut; names it.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    check_tensor_parallel(model.hf_config.architecture(), parallel.tensor_parallel_size, "tensor_parallel_size")
    refused = {
        f"--quantization, or `hylo export --quantize` ({model.quantization}),": model.quantization,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
        "a mixture of experts": EXPERTS_SYMBOL in model.hf_config.mlps,
        "windowed attention `W`": WINDOW_SYMBOL in model.hf_config.mixers,
        f"--runner {model.runner_type}": model.runner_type != "generate",
        "--enable-lora": vllm_config.lora_config,
        "--speculative-config": vllm_config.speculative_config,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--kv-transfer-config or --kv-offloading-size": vllm_config.kv_transfer_config or cache.kv_offloading_size,
        "--cpu-offload-gb": vllm_config.offload_config.uva.cpu_offload_gb,
        "--offload-group-size": vllm_config.offload_config.prefetch.offload_group_size,
        "--disable-hybrid-kv-cache-manager": vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
        "--hf-overrides of the rotation, which is `hylo`'s in config.json,": "rope" in str(model.hf_overrides),
    }
    if found := [what for what, given in refused.items() if given]:
        raise ConfigError(f"{' and '.join(found)} is not supported for HyLo models; docs/serving.md lists what works")
    if files := [name for name in listed_files(model.model) if name.endswith(".safetensors")]:
        verify_manifest(model.model, files, hashes=False)


class HyloVllmUpdate(VerifyAndUpdateConfig):
    """Settings that HyLo models need: states in fp32, kernels by name, CUDA graphs of decode steps."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Change `vllm_config` in place, and say which kernels run."""
        check_options(vllm_config)
        config, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
        if cache.mamba_ssm_cache_dtype == "auto":
            cache.mamba_ssm_cache_dtype = "float32"  # as HyloCache keeps states
        linear = set(config.mixers) & set(LINEAR_SYMBOLS)
        if (not linear or (Mamba2.symbol in linear and len(linear) > 1)) and not CACHES_UNLIKE_STATES:
            cache.enable_prefix_caching, cache.mamba_cache_mode = False, "none"
        reference = uses_reference(vllm_config)
        logger.info("HyLo %s: kernels of linear layers: %s", config.mixers, "reference (torch)" if reference else "vLLM's")
        if isinstance(vllm_config.additional_config, dict):  # FlashInfer, the default on Hopper, looks at no head size
            vllm_config.additional_config.setdefault("gdn_prefill_backend", "triton")
        compilation = vllm_config.compilation_config
        compilation.mode = CompilationMode.NONE  # vLLM's own kernels of norms and activations, where inductor would make some
        if reference or current_platform.is_cpu():
            compilation.cudagraph_mode = CUDAGraphMode.NONE
        elif compilation.cudagraph_mode is None or compilation.cudagraph_mode.has_piecewise_cudagraphs():
            compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY  # what is not compiled has no pieces


def register_config() -> None:
    """Register configuration, model class (imported when one is served) and hook; may be called again."""
    AutoConfig.register(HyloConfig.model_type, HyloVllmConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"megatron_hylo.serve.vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = HyloVllmUpdate
