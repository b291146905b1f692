"""The Hugging Face models: the cache against the full forward, generation, transformers' own models as oracles."""

import pytest
import torch
import transformers

from megatron_hylo.config import RopeScaling
from megatron_hylo.config.layouts import kv_bytes_per_token
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.hf import HyloCache, HyloConfig, HyloForCausalLM
from tests.conftest import EXPERTS, folder_tensors, tiny_hf_model
from tests.hf.conftest import ALIGNED, LLAMA3, YARN, random_model, serve_config

CASES = {
    "*": serve_config("**"),
    "* llama3 rope": serve_config("**", rope_scaling=RopeScaling(**LLAMA3)),
    "* bias and q/k-norm": serve_config("**", add_qkv_bias=True, qk_layernorm=True),
    "+": serve_config("++"),
    "+ q/k-norm": serve_config("++", qk_layernorm=True),
    "+ yarn": serve_config("++", mla_rope_scaling=RopeScaling(**YARN)),
    "+ aligned q/k-norm": serve_config("++", qk_layernorm=True, qk_head_dim=16, qk_pos_emb_head_dim=16),
    **{name: serve_config("G+*+", **settings) for name, settings in ALIGNED.items()},
    "M": serve_config("MM"),
    "W+*W bias and q/k-norm": serve_config("W+*W", add_qkv_bias=True, qk_layernorm=True),
    "W of a block and more": serve_config("WW", attention_window=70),
    "G": serve_config("GG"),
    "G+M*": serve_config("G+M*"),
    "K+*K": serve_config("K+*K"),
    "G+M* q/k-norm, yarn": serve_config("G+M*", qk_layernorm=True, mla_rope_scaling=RopeScaling(**YARN)),
    "G+M* tied": serve_config("G+M*", untie_embeddings_and_output_weights=False),
    "G+M* experts": serve_config("G+M*", hybrid_layer_pattern="GE+EM-*E", **EXPERTS),
}
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


@cases
def test_tensors_are_the_canonical_ones(config):
    model = HyloForCausalLM(HyloConfig(hylo=config.to_dict()))
    found = folder_tensors(dict(model.named_parameters()))
    assert {name: tuple(p.shape) for name, p in found.items()} == tensor_names(config)


@cases
@torch.no_grad()
def test_any_cut_of_the_prompt_gives_the_logits_of_the_full_forward(config, ids):
    model = random_model(config)
    whole = model(ids, use_cache=False)
    assert whole.past_key_values is None
    assert whole.logits.std() > 0.3
    for pieces in ([40] + [1] * 35, [1] * 75, [70, 5], [7, 1, 2, 64, 1], [75]):
        cache, logits = HyloCache(), []
        for piece in ids.split(pieces, dim=1):
            logits.append(model(piece, past_key_values=cache).logits)
        assert cache.get_seq_length() == 75
        torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mixers", ["*", "+", "M", "G", "K", "W", "G+M*W"])
@torch.no_grad()
def test_every_token_changes_later_logits_only(mixers, ids):
    model = random_model(serve_config(mixers))
    before = model(ids).logits
    ids[:, 30] = (ids[:, 30] + 1) % 160
    changed = (model(ids).logits - before).abs().amax((0, 2)) > 1e-9
    assert not changed[:30].any() and changed[30:32].all()


@cases
@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_full_forwards(config, ids):
    model = random_model(config)
    expected = prompt = ids[:, :9]
    for _ in range(12):
        logits = model(expected, use_cache=False).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    settings = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(prompt, **settings), expected)
    assert torch.equal(model.generate(prompt, prefill_chunk_size=4, **settings), expected)
    assert torch.equal(model.generate(prompt, use_cache=False, **settings), expected)


@torch.no_grad()
def test_generation_goes_on_from_a_returned_cache(ids):
    model = random_model(serve_config("G+M*"))
    whole = model.generate(ids[:, :9], max_new_tokens=12, do_sample=False)
    first = model.generate(ids[:, :9], max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 13  # the last token was not fed yet
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=7, do_sample=False)
    assert torch.equal(rest, whole)


@torch.no_grad()
def test_sampling_and_beams(ids):
    model = random_model(serve_config("G+M*"))
    sampled = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sampled.append(model.generate(ids[:, :9], max_new_tokens=12, do_sample=True, temperature=1.0, top_k=0))
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    beams = dict(max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(model.generate(ids[:, :9], **beams), model.generate(ids[:, :9], use_cache=False, **beams))


@torch.no_grad()
def test_generation_makes_logits_of_the_last_position_only(ids):
    model = random_model(serve_config("G+"))
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert rows == [1, 1, 1]


@pytest.mark.parametrize("rope", [None, LLAMA3, YARN], ids=["plain", "llama3", "yarn"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_attention_only_models_equal_transformers(family, rope, ids):
    defaults = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope is LLAMA3 else {}
    changes = {"rope_parameters": {**rope, **defaults, "rope_theta": 10000.0}} if rope else {}
    for tied in (True, False):
        oracle = tiny_hf_model(family, tied=tied, **changes)
        config = model_config_from_hf(oracle.config.to_dict())
        model = HyloForCausalLM(HyloConfig(hylo=config.to_dict())).eval()
        model.load_state_dict(oracle.state_dict())
        torch.testing.assert_close(model(ids).logits, oracle(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mla_rotary_pairs=[[0, 1, 2]]), r"needs \[0, 3\] numbers from 0 to 7 in its layers, got \[3\]"),
        (dict(mla_rotary_pairs=[[], [0, 1]]), r"got \[0, 2\]"),
        (dict(mla_rotary_pairs=[[], [0, 1, 8]]), r"got \[0, 3\] with 8"),
        (dict(qk_layernorm=True, qk_head_dim=16), r"qk_head_dim 16 \+ qk_pos_emb_head_dim 6 must equal kv_channels 16"),
        (dict(qk_layernorm=True, qk_head_dim=12, mla_rotary_pairs=[[], [0, 1, 2]]), "qk_head_dim 12"),
    ],
)
def test_settings_of_latent_attention_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HyloConfig(hylo=serve_config("G+").to_dict() | settings)


@torch.no_grad()
def test_configurations_older_than_pairs_and_biases_load(ids):
    model = random_model(serve_config("+"))
    older = {name: value for name, value in model.config.hylo.items() if name not in ("mla_rotary_pairs", "mla_bias")}
    again = HyloForCausalLM(HyloConfig(hylo=older)).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_loss_is_that_of_transformers(ids):
    oracle = tiny_hf_model("llama")
    model = HyloForCausalLM(HyloConfig(hylo=model_config_from_hf(oracle.config.to_dict()).to_dict()))
    model.load_state_dict(oracle.state_dict())
    torch.testing.assert_close(model(ids, labels=ids).loss, oracle(ids, labels=ids).loss)


@pytest.mark.parametrize("mixers", ["*", "+", "M", "G", "GG+M*+"])
@torch.no_grad()
def test_cache_bytes(mixers, ids):
    config = serve_config(mixers)
    model = random_model(config, torch.bfloat16)
    short, long = (model(ids[:1, :n]).past_key_values for n in (10, 75))
    assert long.token_nbytes() == 75 * kv_bytes_per_token(config)
    assert long.nbytes() - short.nbytes() == 65 * kv_bytes_per_token(config)
    assert model(ids).past_key_values.nbytes() == 2 * long.nbytes()


def test_states_of_linear_layers_have_their_exact_size(ids):
    states = random_model(serve_config("MG"), torch.bfloat16)(ids).past_key_values.states
    channels = {0: 2 * 20 + (2 + 4) * 12, 1: 2 * (2 * 18 + 36)}  # x, B and C; q, k and v
    for layer, shape in {0: (2, 4, 20, 12), 1: (2, 2, 18, 36)}.items():
        conv, state = states[layer]
        assert (conv.shape, conv.dtype) == ((2, channels[layer], 3), torch.bfloat16)
        assert (state.shape, state.dtype) == (shape, torch.float32)


def test_saved_folder_loads_in_bfloat16_with_fp32_decay_parameters(tmp_path, ids):
    model = random_model(serve_config("G+M*"), torch.float32)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is HyloForCausalLM and torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.to_dict() == transformers.AutoConfig.from_pretrained(tmp_path).to_dict() | {"dtype": "float32"}
    half = HyloForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert exact == {"model.layers.0.linear_attn.A_log", "model.layers.0.linear_attn.dt_bias",
                     "model.layers.2.mamba.A_log", "model.layers.2.mamba.dt_bias", "model.layers.2.mamba.D"}  # fmt: skip
    assert all(torch.equal(dict(model.named_parameters())[name], dict(half.named_parameters())[name]) for name in exact)
    assert half(ids).logits.dtype == torch.bfloat16
