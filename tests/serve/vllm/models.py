"""Tiny random hybrids of every mixer and variant, as exported folders, and greedy tokens of transformers."""

from pathlib import Path

import torch

PLAIN = {
    "rope_type": "none", "factor": 1.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None,
}  # fmt: skip
YARN = PLAIN | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BASE = {
    "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 64,
    "vocab_size": 256, "model_family": "llama", "max_position_embeddings": 512, "layernorm_epsilon": 1e-5,
    "untie_embeddings_and_output_weights": True, "add_qkv_bias": False, "qk_layernorm": False, "rotary_base": 10000.0,
    "rope_scaling": PLAIN, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_head_dim": 32, "qk_pos_emb_head_dim": 32,
    "v_head_dim": 64, "mla_rope_scaling": PLAIN, "mla_bias": False, "mla_rotary_pairs": [], "mamba_num_heads": 4,
    "mamba_head_dim": 64, "mamba_state_dim": 64, "linear_num_heads": 2, "linear_key_head_dim": 64,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "kda_decay_rank": 32,
}  # fmt: skip
# rotary pairs that differ by layer and repeat, as the calibrated initialisation chooses them; heads as wide as the base model's
CALIBRATED = {"mla_bias": True, "qk_head_dim": 64, "kv_lora_rank": 112, "qk_pos_emb_head_dim": 48}
FIRST, LATER = list(range(24)), [0, 0, 1, 1, *range(11, 31)]
PAIRS = [FIRST, [], LATER, []]
# heads as in SmolLM2-135M, for three ranks; they do not divide the vocabulary of 256
NINE = {"num_attention_heads": 9, "num_query_groups": 3, "linear_num_heads": 3, "mamba_num_heads": 9, "ffn_hidden_size": 288}
MODELS: dict[str, dict] = {
    "mla_gdn": {"hybrid_layer_pattern": "G-+-G-G-"},
    "gdn_wide_heads": {"hybrid_layer_pattern": "G-G-+-G-", "linear_num_heads": 1, "linear_key_head_dim": 256,
                       "linear_value_head_dim": 512},
    "mla_mamba2": {"hybrid_layer_pattern": "M-+-M-M-", "untie_embeddings_and_output_weights": False},
    "mla_kda": {"hybrid_layer_pattern": "K-+-K-K-"},
    "norm_gdn": {"hybrid_layer_pattern": "G-+-G-+-", "qk_layernorm": True},
    "aligned_bias_gdn": {"hybrid_layer_pattern": "+-G-+-G-", "qk_layernorm": True, "mla_rotary_pairs": PAIRS, **CALIBRATED},
    "bias_gdn_yarn": {"hybrid_layer_pattern": "+-G-+-G-", "mla_rotary_pairs": PAIRS, "mla_rope_scaling": YARN, **CALIBRATED},
    "attention_mla_gdn": {"hybrid_layer_pattern": "*-+-G-+-", "add_qkv_bias": True, "rope_scaling": YARN},
    "attention_norm_gdn": {"hybrid_layer_pattern": "G-*-G-G-", "qk_layernorm": True},
    "mla_only": {"hybrid_layer_pattern": "+-+-", "qk_layernorm": True},
    "mla_gdn_mamba2": {"hybrid_layer_pattern": "+-G-+-M-", "mla_rotary_pairs": PAIRS, **CALIBRATED},
    "mla_all_linear": {"hybrid_layer_pattern": "+-G-M-K-"},
    "nine_heads": {"hybrid_layer_pattern": "+-G-M-K-", **NINE},
    # in three ranks `*` has one KV head each and caches less a token than `+`
    "attention_nine_heads": {"hybrid_layer_pattern": "*-+-G-M-K-", **NINE},
}  # fmt: skip


def make_model(name: str, folder: Path) -> Path:
    """Save a model of MODELS, with weights so large that its tokens depend on the whole prompt, and that bf16 holds."""
    from megatron_hylo.hf import HyloConfig, HyloForCausalLM

    torch.manual_seed(0)
    model = HyloForCausalLM(HyloConfig(hylo=BASE | MODELS[name], bos_token_id=1, eos_token_id=2)).float()
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if value.ndim >= 2 and "rotary_mix" not in parameter:
                value.normal_(0, 0.4 if "conv1d" in parameter else 0.08)
            elif parameter.endswith("bias") and "dt_bias" not in parameter:
                value.normal_(0, 0.1)
            elif parameter.endswith("A_log"):
                value.uniform_(0, 1.5)
            elif parameter.endswith("dt_bias"):
                value.uniform_(-3, 0)
            else:
                value.uniform_(0.5, 1.5)
            value.copy_(value.bfloat16())
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def greedy_tokens(folder: Path, prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
    """Greedy continuations by transformers in fp32, and the smallest gap between the best two logits of each."""
    from megatron_hylo.hf import HyloForCausalLM

    model = HyloForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, gaps = [], []
    for prompt in prompts:
        cache, ids, out, gap = None, torch.tensor([prompt]), [], float("inf")
        for _ in range(new):
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            best = output.logits[0, -1].topk(2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            cache, ids = output.past_key_values, best.indices[:1][None]
            out.append(int(ids))
        tokens.append(out)
        gaps.append(gap)
    return tokens, gaps


@torch.no_grad()
def log_probabilities(
    folder: Path, dtype: torch.dtype, device: str, prompts: list[list[int]], answers: list[list[int]]
) -> list[torch.Tensor]:
    """Log-probabilities of all tokens [answer's length, vocabulary] at each token of the answers, by transformers; fp32."""
    from megatron_hylo.hf import HyloForCausalLM

    model = HyloForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    found = []
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt + answer[:-1]], device=device)
        found.append(model(ids, logits_to_keep=len(answer)).logits[0].float().log_softmax(-1).cpu())
    return found


def of_tokens(log_probabilities: list[torch.Tensor], answers: list[list[int]]) -> torch.Tensor:
    """Log-probabilities [all answers' tokens] of the tokens themselves, out of those of all tokens."""
    return torch.cat(log_probabilities).gather(1, torch.tensor(sum(answers, []))[:, None])[:, 0]
