"""Hugging Face classes of HyLo models, registered with transformers' Auto classes when this package is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_hylo.config.mixers import complete
from megatron_hylo.hf.cache_hylo import HyloCache
from megatron_hylo.hf.configuration_hylo import HyloConfig
from megatron_hylo.hf.layers_hylo import MIXERS
from megatron_hylo.hf.modeling_hylo import HyloForCausalLM, HyloModel, HyloPreTrainedModel

complete(MIXERS, "hf/layers_hylo.py: MIXERS")
AutoConfig.register(HyloConfig.model_type, HyloConfig, exist_ok=True)
AutoModel.register(HyloConfig, HyloModel, exist_ok=True)
AutoModelForCausalLM.register(HyloConfig, HyloForCausalLM, exist_ok=True)

__all__ = ["HyloCache", "HyloConfig", "HyloForCausalLM", "HyloModel", "HyloPreTrainedModel"]
