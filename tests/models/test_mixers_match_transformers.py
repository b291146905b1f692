"""The four mixers against transformers' modules with the same weights: outputs, and gradients of input and weights.

The oracle's weights are differentiable functions of leaves in our layout (reordered, or repeated where our KV heads
are shared), so autograd brings its gradients back to that layout: those of repeated weights arrive summed.
"""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DeepseekV3Config, NemotronHConfig, Qwen3NextConfig
from transformers.models import nemotron_h, qwen3_next
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from megatron_hylo.config import ModelConfig, RopeScaling
from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.convert.mapping import model_entries
from megatron_hylo.models.hylo_model import build_model
from tests.conftest import fill_model, folder_tensors, tiny_config, tiny_hf_model
from tests.kernels.compare import relative_error
from tests.models.mixers import TOKENS, TOLERANCE, Oracle, Weights, errors, random_mixer


@pytest.fixture
def torch_paths(monkeypatch):
    """Transformers' own torch functions, also where fla or mamba_ssm is installed: it would call their GPU kernels."""
    for module in (nemotron_h.modeling_nemotron_h, qwen3_next.modeling_qwen3_next):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            monkeypatch.setattr(module, name, inspect.unwrap(function))


def repeat_heads(weight: Tensor, heads: int, repeats: int) -> Tensor:
    """[heads * n, ...] -> [heads * repeats * n, ...], copies of one head beside each other."""
    return weight.unflatten(0, (heads, -1)).repeat_interleave(repeats, 0).flatten(0, 1)


@pytest.mark.parametrize("heads", [2, 3])
def test_gated_deltanet_matches_qwen3_next(heads, one_rank, torch_paths, monkeypatch):
    # its token-by-token rule: the gradients of A_log, dt_bias of its chunked one err by 3e-5 against float64, ours by 3e-6
    module = qwen3_next.modeling_qwen3_next
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", module.torch_recurrent_gated_delta_rule)
    c = tiny_config("G-", linear_num_heads=heads)
    dk, dv = c.linear_key_head_dim, c.linear_value_head_dim
    qwen = Qwen3NextConfig(
        hidden_size=c.hidden_size, linear_num_value_heads=heads, linear_num_key_heads=heads, linear_key_head_dim=dk,
        linear_value_head_dim=dv, linear_conv_kernel_dim=4, rms_norm_eps=c.layernorm_epsilon, hidden_act="silu",
        num_hidden_layers=1,
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(qwen, 0).eval()

    def oracle(w: Weights, x: Tensor) -> Tensor:
        *qkvz, b, a = w["in_proj.weight"].split([heads * dk, heads * dk, heads * dv, heads * dv, heads, heads])
        by_head = [part.unflatten(0, (heads, -1)) for part in qkvz]
        weights = {
            "in_proj_qkvz.weight": torch.cat(by_head, 1).flatten(0, 1),  # for each head q, k, v, z
            "in_proj_ba.weight": torch.stack([b, a], 1).flatten(0, 1),
            "conv1d.weight": w["conv1d.weight"],
            "A_log": w["A_log"],
            "dt_bias": w["dt_bias"],
            "norm.weight": w["out_norm.weight"],
            "out_proj.weight": w["out_proj.weight"],
        }
        return functional_call(theirs, weights, (x,), strict=True)

    found = errors(random_mixer(c), oracle)
    assert max(found.values()) < TOLERANCE, found


def test_mamba2_matches_nemotron_h(one_rank, torch_paths):
    """NemotronH's mixer normalises in groups; with a group a head and x, B repeated it is ours."""
    c = tiny_config("M-", mamba_head_dim=12, mamba_state_dim=10)
    heads, groups, p, n = c.mamba_num_heads, c.num_query_groups, c.mamba_head_dim, c.mamba_state_dim
    nemotron = NemotronHConfig(
        hidden_size=c.hidden_size, mamba_num_heads=heads, mamba_head_dim=p, ssm_state_size=n, n_groups=heads, conv_kernel=4,
        use_conv_bias=True, use_bias=False, layer_norm_epsilon=c.layernorm_epsilon, mamba_hidden_act="silu", chunk_size=32,
        time_step_min=0.0, layers_block_type=["mamba"],
    )  # fmt: skip
    theirs = NemotronHMamba2Mixer(nemotron, 0).eval()

    def expand(sections: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [repeat_heads(section, groups, heads // groups) for section in sections]

    def oracle(w: Weights, x: Tensor) -> Tensor:
        z, *shared, state_out, dt = w["in_proj.weight"].split([heads * p, groups * p, groups * n, heads * n, heads])
        weights = {"in_proj.weight": torch.cat([z, *expand(shared), state_out, dt])}
        for name in ("conv1d.weight", "conv1d.bias"):
            *shared, state_out = w[name].split([groups * p, groups * n, heads * n])
            weights[name] = torch.cat([*expand(shared), state_out])
        weights |= {name: w[name] for name in ("A_log", "dt_bias", "D", "norm.weight", "out_proj.weight")}
        return functional_call(theirs, weights, (x,), strict=True)

    found = errors(random_mixer(c), oracle)
    assert max(found.values()) < TOLERANCE, found


SCALINGS = {
    "plain": ({}, {}),
    "theta": (dict(rotary_base=3e5), {}),
    # transformers scales cos and sin by 0.1 ln(factor) + 1; without mscale_all_dim the softmax scale stays
    "yarn": (
        dict(mla_rope_scaling=RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "nope": (dict(mla_rope_scaling=RopeScaling(rope_type="nope")), {}),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_mla_matches_deepseek_v3(scaling, one_rank):
    changes, theirs_scaling = SCALINGS[scaling]
    # 16 rotary channels, so that YaRN keeps some, divides some and blends some
    c = tiny_config("+-", qk_pos_emb_head_dim=16, v_head_dim=14, **changes)
    deepseek = DeepseekV3Config(
        hidden_size=c.hidden_size, num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_attention_heads,
        q_lora_rank=c.q_lora_rank, kv_lora_rank=c.kv_lora_rank, qk_nope_head_dim=c.qk_head_dim,
        qk_rope_head_dim=c.qk_pos_emb_head_dim, v_head_dim=c.v_head_dim, rope_interleave=True, attention_bias=False,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": c.rotary_base} | theirs_scaling,
    )  # fmt: skip
    deepseek._attn_implementation = "eager"
    theirs = DeepseekV3Attention(deepseek, 0).eval()
    theirs.q_a_layernorm = theirs.kv_a_layernorm = nn.Identity()
    rotary = DeepseekV3RotaryEmbedding(deepseek)
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(4) + 1 if scaling == "yarn" else 1)

    def oracle(w: Weights, x: Tensor) -> Tensor:
        names = {"linear_q_down_proj": "q_a_proj", "linear_q_up_proj": "q_b_proj", "linear_proj": "o_proj",
                 "linear_kv_down_proj": "kv_a_proj_with_mqa"}  # fmt: skip
        weights = {f"{theirs_name}.weight": w[f"{name}.weight"] for name, theirs_name in names.items()}
        groups = c.num_query_groups
        weights["kv_b_proj.weight"] = repeat_heads(w["linear_kv_up_proj.weight"], groups, c.num_attention_heads // groups)
        t = x.shape[1]
        mask = torch.full((t, t), float("-inf")).triu(1)[None, None]
        position = rotary(x, torch.arange(t)[None])
        if scaling == "nope":  # DeepSeek has no such setting: angles of zero turn nothing
            position = torch.ones_like(position[0]), torch.zeros_like(position[1])
        return functional_call(theirs, weights, (x, position, mask), strict=True)[0]

    found = errors(random_mixer(c), oracle)
    assert max(found.values()) < TOLERANCE, found


def reference_mla(c: ModelConfig) -> Oracle:
    """MLA with q/k-norm, head by head, in float64; rotations as complex products."""
    nope, rope, v_dim, groups = c.qk_head_dim, c.qk_pos_emb_head_dim, c.v_head_dim, c.num_query_groups

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.layernorm_epsilon).sqrt() * weight

    def rotated(x: Tensor) -> Tensor:
        frequency = c.rotary_base ** (-torch.arange(0, rope, 2, dtype=torch.float64) / rope)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(x.shape[1])[:, None] * frequency)
        pairs = torch.view_as_complex(x[..., nope:].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([x[..., :nope], torch.view_as_real(pairs * turn).flatten(-2)], -1)

    def oracle(w: Weights, x: Tensor) -> Tensor:
        queries = (x @ w["linear_q_down_proj.weight"].T @ w["linear_q_up_proj.weight"].T).split(nope + rope, -1)
        latent = x @ w["linear_kv_down_proj.weight"][: c.kv_lora_rank].T
        rotary_key = x @ w["linear_kv_down_proj.weight"][c.kv_lora_rank :].T
        pairs = (latent @ w["linear_kv_up_proj.weight"].T).split(nope + v_dim, -1)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        heads = []
        for head, query in enumerate(queries):
            pair = pairs[head // (c.num_attention_heads // groups)]
            key = rotated(normed(torch.cat([pair[..., :nope], rotary_key], -1), w["k_layernorm.weight"]))
            query = rotated(normed(query, w["q_layernorm.weight"]))
            scores = (query @ key.transpose(1, 2) / math.sqrt(nope + rope)).masked_fill(future, float("-inf"))
            heads.append(scores.softmax(-1) @ pair[..., nope:])
        return torch.cat(heads, -1) @ w["linear_proj.weight"].T

    return oracle


def test_mla_with_qk_norm_matches_float64_reference(one_rank):
    c = tiny_config("+-", qk_layernorm=True, v_head_dim=14)
    found = errors(random_mixer(c), reference_mla(c), dtype=torch.float64)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    ("family", "tied", "changes"),
    [
        ("llama", True, {}),
        ("mistral", False, {"sliding_window": 7}),
        ("qwen2", True, {}),
        ("qwen2", True, {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
        ("qwen3", False, {}),
        ("qwen3_moe", False, {}),
        ("qwen3_moe", True, {"norm_topk_prob": False, "decoder_sparse_step": 2, "num_experts_per_tok": 3}),
    ],
)
def test_attention_model_gradients_match_transformers(family, tied, changes, one_rank):
    """`*`, MLP or experts, norms, embedding and head: every gradient of the mean cross-entropy."""
    theirs = tiny_hf_model(family, tied, **changes)
    config = model_config_from_hf(theirs.config.to_dict())
    ours = build_model(config)
    fill_model(ours, folder_tensors(theirs.state_dict()).__getitem__)
    ids = torch.randint(config.vocab_size, (2, 41))
    inputs, labels = ids[:, :-1], ids[:, 1:]
    losses = [F.cross_entropy(x.flatten(0, 1), labels.flatten()) for x in (ours.logits(ours(inputs)), theirs(inputs).logits)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    gradients = folder_tensors({name: p.grad for name, p in theirs.named_parameters()})
    entries = {e.megatron: e for e in model_entries(config)}
    found = {
        name: relative_error(p.grad, entries[name].merge([gradients[n] for n in entries[name].hugging_face]))
        for name, p in ours.named_parameters()
    }
    assert {n for e in entries.values() for n in e.hugging_face} == set(gradients)
    print(f"{family}: worst {max(found.values()):.1e}")
    assert max(found.values()) < TOLERANCE, found


def test_bf16_build_keeps_decay_parameters_in_fp32(one_rank):
    model = build_model(tiny_config("G-+-M-*-", qk_layernorm=True, add_qkv_bias=True), params_dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    mixer = "decoder.layers.{}.self_attention.{}"
    assert kept == {mixer.format(0, n) for n in ("A_log", "dt_bias")} | {mixer.format(4, n) for n in ("A_log", "dt_bias", "D")}
    assert {dtype for name, dtype in dtypes.items() if name not in kept} == {torch.bfloat16}


@pytest.mark.parametrize("symbol", ["*", "+", "M", "G"])
def test_bf16_forward_is_near_fp32(symbol, one_rank):
    c = tiny_config(f"{symbol}-")
    narrow, wide = random_mixer(c, torch.bfloat16), random_mixer(c)
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items() if torch.is_tensor(value)})
    x = torch.randn(TOKENS, 2, c.hidden_size).bfloat16()
    out, oracle = narrow(x)[0], wide(x.float())[0]
    error = relative_error(out, oracle)
    print(f"{symbol}: {error:.1e}")
    assert out.dtype == torch.bfloat16 and error < 2e-2
