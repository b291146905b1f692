"""Tokens taken out of a cache again, and assisted generation, which needs that."""

import pytest
import torch

from megatron_hylo.hf import HyloCache, cache_hylo
from tests.conftest import tiny_hf_model
from tests.hf.conftest import random_model, serve_config

MIXERS = ["*+", "M", "G", "K", "WW", "G+M*"]


@pytest.mark.parametrize("mixers", MIXERS)
@torch.no_grad()
def test_a_cropped_cache_goes_on_as_one_that_never_read_the_tokens(mixers, monkeypatch):
    monkeypatch.setattr(cache_hylo, "KEPT_INPUTS", 6)
    model, ids = random_model(serve_config(mixers)), torch.randint(1, 160, (2, 34))
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, 28] = 0
    whole = model(ids, attention_mask=mask).logits
    for pieces, removed in (([30], 6), ([12] + [1] * 18, 5), ([22, 3, 5], 0)):
        cache, seen = HyloCache(), 0
        cache.activate_past_recording()
        for piece in ids[:, :30].split(pieces, dim=1):
            seen += piece.shape[1]
            model(piece, attention_mask=mask[:, :seen], past_key_values=cache)
        cache.crop(-removed)
        assert cache.get_seq_length() == 30 - removed
        rest = model(ids[:, 30 - removed :], attention_mask=mask, past_key_values=cache).logits
        real = mask[:, 30 - removed :].bool()
        torch.testing.assert_close(rest[real], whole[:, 30 - removed :][real], rtol=0, atol=1e-9, msg=f"{pieces} {removed}")


@torch.no_grad()
def test_a_cache_that_cannot_go_back_says_so(ids):
    model, cache = random_model(serve_config("G*")), HyloCache()
    model(ids, past_key_values=cache)
    cache.crop(200)  # transformers 4 names the tokens that stay
    with pytest.raises(ValueError, match=r"2 of 75 cached tokens .* can go back 0: call activate_past_recording\(\)"):
        cache.crop(-2)
    cache.activate_past_recording()
    model(ids[:, :5], past_key_values=cache)
    cache.crop(78)
    assert cache.get_seq_length() == 78
    with pytest.raises(ValueError, match="3 of 78 cached tokens .* can go back 0"):
        cache.crop(-3)
    attention_only = HyloCache()
    random_model(serve_config("*+"))(ids, past_key_values=attention_only)
    attention_only.crop(-70)
    assert attention_only.get_seq_length() == 5


def passes(model: torch.nn.Module) -> list[int]:
    """Numbers of tokens of the model's forward passes, as they happen."""
    found: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: found.append(output.shape[1]))
    return found


@torch.no_grad()
def test_assisted_generation_gives_the_greedy_text(ids):
    hybrid, teacher = random_model(serve_config("GM*"), torch.float32), tiny_hf_model("llama")
    draft = random_model(serve_config("G+"), torch.float32)
    greedy = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    same = random_model(serve_config("GM*"), torch.float32)
    same.load_state_dict(hybrid.state_dict())
    for assistant in (draft, same, hybrid):
        assistant.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
    with torch.no_grad():  # agrees often, not always
        for parameter in same.model.layers[0].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.005)
    for target, helps in (
        (hybrid, dict(assistant_model=draft)),
        (hybrid, dict(assistant_model=same)),
        (hybrid, dict(prompt_lookup_num_tokens=3)),
        (teacher, dict(assistant_model=hybrid)),
    ):
        prompt = ids[:1, :20]
        expected = target.generate(prompt, **greedy)
        found = passes(target)
        assert torch.equal(target.generate(prompt, **greedy, **helps), expected)
        if helps.get("assistant_model") is same:
            assert len(found) < 10  # passes of the target are what it saves


@torch.no_grad()
def test_the_first_layers_draft_for_the_whole(ids):
    model, prompt = random_model(serve_config("GM+*"), torch.float32), ids[:1, :20]
    greedy = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = model.generate(prompt, **greedy)
    read = {layer: [] for layer in range(4)}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, inputs, output, number=number: read[number].append(output.shape[1]))
    assert torch.equal(model.generate(prompt, **greedy, assistant_early_exit=2), expected)
    assert len(read[0]) == len(read[1]) > len(read[2]) == len(read[3])


@torch.no_grad()
def test_a_draft_that_is_interrupted_leaves_the_model_whole(ids):
    model, settings = random_model(serve_config("GM+*"), torch.float32), dict(max_new_tokens=4, pad_token_id=0)
    expected = model(ids).logits

    def interrupt(*_):
        if model.config.num_hidden_layers == 2:
            raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids[:1], **settings, assistant_early_exit=2)
    hook.remove()
    assert torch.equal(model(ids).logits, expected) and model.config.num_hidden_layers == 4
