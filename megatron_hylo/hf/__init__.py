"""Hugging Face classes of HyLo models, registered with transformers' Auto classes when this package is imported."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from megatron_hylo.config.mixers import MIXERS as DESCRIPTIONS
from megatron_hylo.config.mixers import complete
from megatron_hylo.hf.cache_hylo import CACHED, HyloCache
from megatron_hylo.hf.code_files import copy_modelling_code
from megatron_hylo.hf.configuration_hylo import HyloConfig
from megatron_hylo.hf.layers_hylo import MIXERS
from megatron_hylo.hf.modeling_hylo import (
    HyloForCausalLM,
    HyloForQuestionAnswering,
    HyloForSequenceClassification,
    HyloForTokenClassification,
    HyloModel,
)
from megatron_hylo.hf.pretrained_hylo import FP32_PARAMETERS, HyloPreTrainedModel

complete(MIXERS, "hf/layers_hylo.py: MIXERS")
complete(CACHED, "hf/cache_hylo.py: CACHED")
complete(FP32_PARAMETERS, "hf/pretrained_hylo.py: FP32_PARAMETERS")
if wrong := [symbol for symbol, names in FP32_PARAMETERS.items() if set(names) != set(DESCRIPTIONS[symbol].fp32_parameters)]:
    raise RuntimeError(f"hf/pretrained_hylo.py: FP32_PARAMETERS of mixer {wrong[0]!r} are not those of its description")
AutoConfig.register(HyloConfig.model_type, HyloConfig, exist_ok=True)
AutoModel.register(HyloConfig, HyloModel, exist_ok=True)
AutoModelForCausalLM.register(HyloConfig, HyloForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HyloConfig, HyloForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HyloConfig, HyloForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(HyloConfig, HyloForQuestionAnswering, exist_ok=True)
HyloPreTrainedModel.write_code = staticmethod(copy_modelling_code)

__all__ = [
    "HyloCache",
    "HyloConfig",
    "HyloForCausalLM",
    "HyloForQuestionAnswering",
    "HyloForSequenceClassification",
    "HyloForTokenClassification",
    "HyloModel",
    "HyloPreTrainedModel",
]
