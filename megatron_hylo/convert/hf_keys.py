"""Keys of a config.json: used, known not to change what a model computes, or bound to the value with which they do not.

A key that transformers' own class of the family does not know either is named in a warning.
"""

import logging
from collections.abc import Mapping
from typing import Any

from megatron_hylo.config import ConfigError

logger = logging.getLogger("megatron_hylo.convert")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
USED = {
    *SIZES, "model_type", "architectures", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings",
    "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor",
    "original_max_position_embeddings", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
    "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
}  # fmt: skip
# Keys that do not change the logits: names and versions, training, what is returned, generation, other heads, and dtype
# and quantisation, which are those of the stored tensors.
HARMLESS = {
    "_name_or_path", "name_or_path", "transformers_version", "tokenizer_class", "prefix", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "dtype", "torch_dtype", "use_bfloat16",
    "quantization_config", "compression_config",
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "use_cache", "pretraining_tp",
    "gradient_checkpointing", "router_aux_loss_coef", "output_router_logits",
    "return_dict", "output_hidden_states", "output_attentions", "torchscript", "is_decoder", "tie_encoder_decoder",
    "cross_attention_hidden_size", "tf_legacy_loss", "chunk_size_feed_forward",
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    *TOKEN_IDS, "sep_token_id", "unk_token_id", "decoder_start_token_id", "bad_words_ids", "begin_suppress_tokens",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
# Keys that say that the weights were trained with another formula, and the value (beside null) that says that they were
# not. Most are unknown to transformers' classes too, which would load such weights and compute something else.
NEUTRAL: dict[str, Any] = {
    "mlp_bias": False, "attention_bias": False, "is_encoder_decoder": False, "add_cross_attention": False,
    "pruned_heads": {}, "per_layer_config": {}, "adapters": {},
    "logits_scaling": 1, "logit_scale": 1, "embedding_multiplier": 1, "residual_multiplier": 1, "attention_multiplier": None,
    "scale_emb": 1, "scale_depth": None, "dim_model_base": None, "query_pre_attn_scalar": None,
    "final_logit_softcapping": None, "attn_logit_softcapping": None, "use_logn_attn": False, "use_dynamic_ntk": False,
    "attn_temperature_tuning": False, "no_rope_layers": [], "use_qk_norm": False, "num_nextn_predict_layers": 0,
    "num_experts": 0, "num_local_experts": 0, "n_routed_experts": 0,
}  # fmt: skip


def check_keys(values: Mapping[str, Any], ignored: tuple[str, ...]) -> None:
    """Refuse keys that ask for unsupported features; warn about unknown ones.

    Args:
        values: config.json.
        ignored: keys of `NEUTRAL` that this family's class in transformers does not read.

    Raises:
        ConfigError: such a feature, or an architecture that is no language model.
    """
    for key, neutral in NEUTRAL.items():
        value = values.get(key)
        if key not in ignored and value is not None and value != neutral:
            allowed = "leave it out" if neutral is None else f"only {neutral!r} is"
            raise ConfigError(f"config.json: {key} {value!r} is not supported ({allowed})")
    if unknown := sorted(set(values) - USED - HARMLESS - set(NEUTRAL)):
        model_type = values["model_type"]
        logger.warning("config.json: ignored, as transformers' %s does: %s", model_type, ", ".join(unknown))
    for name in values.get("architectures") or []:
        if not name.endswith("ForCausalLM"):
            raise ConfigError(f"config.json: architectures names {name}; only language models (...ForCausalLM) are converted")
