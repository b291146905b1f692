"""Padding, positions and masks: every sequence of a batch against the same sequence alone, and against transformers."""

import logging

import pytest
import torch
import transformers

from megatron_hylo.config import RopeScaling
from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.hf import HyloCache, HyloConfig, HyloForCausalLM, pretrained_hylo
from megatron_hylo.hf.cache_hylo import cache_nbytes
from tests.conftest import tiny_hf_model
from tests.hf.conftest import ALIGNED, YARN, random_model, serve_config

CASES = {
    "M": serve_config("MM"),
    "G": serve_config("GG"),
    "G+M* q/k-norm, yarn": serve_config("G+M*", qk_layernorm=True, mla_rope_scaling=RopeScaling(**YARN)),
    "K+*K": serve_config("K+*K"),
    "W*": serve_config("WW*"),
    "aligned": serve_config("G+*+", **ALIGNED["G+*+ pairs, bias, aligned q/k-norm"]),
}
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)
LENGTHS, WIDTH, PAD = (75, 40, 3), 75, 7


def padded(ids, where: str):
    """(ids, attention_mask) [3, 75] of sequences of 75, 40 and 3 tokens, padding on one side or scattered."""
    tokens, mask = torch.full((len(LENGTHS), WIDTH), PAD), torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        places = {
            "left": torch.arange(WIDTH - length, WIDTH),
            "right": torch.arange(length),
            "between": torch.cat([torch.randperm(WIDTH - 1)[: length - 1].sort().values, torch.tensor([WIDTH - 1])]),
        }[where]
        tokens[row, places], mask[row, places] = ids[row, :length], 1
    return tokens, mask


@pytest.fixture
def three():
    """Random tokens [3, 75]."""
    return torch.randint(160, (3, WIDTH))


@cases
@pytest.mark.parametrize("where", ["left", "right", "between"])
@torch.no_grad()
def test_padding_gives_logits_and_states_of_each_sequence_alone(config, where, three):
    model = random_model(config)
    alone = [model(three[row : row + 1, :length]) for row, length in enumerate(LENGTHS)]
    tokens, mask = padded(three, where)
    whole, cache, pieces, seen = model(tokens, attention_mask=mask), HyloCache(), [], 0
    for piece in tokens.split([30, 1, 1, 43], dim=1):
        seen += piece.shape[1]
        pieces.append(model(piece, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    assert torch.isfinite(whole.logits).all()  # at padding too: a gradient through it would spread
    for logits in (whole.logits, torch.cat(pieces, dim=1)):
        for row, single in enumerate(alone):
            torch.testing.assert_close(logits[row, mask[row].bool()], single.logits[0], rtol=0, atol=1e-10)
    for held in (whole.past_key_values, cache):
        for row, single in enumerate(alone):
            for layer, states in single.past_key_values.states.items():
                for state, expected in zip(held.states[layer], states):
                    torch.testing.assert_close(state[row], expected[0], rtol=0, atol=1e-10)


@cases
@torch.no_grad()
def test_tokens_after_a_padded_batch_give_the_logits_of_each_sequence_alone(config, three):
    model = random_model(config)
    more = torch.randint(160, (3, 5))
    tokens, mask = padded(three, "right")
    cache = model(tokens, attention_mask=mask).past_key_values
    remembered = model(more[:, :2], past_key_values=cache).logits  # the cache knows what was padding
    given = model(more[:, 2:], attention_mask=torch.nn.functional.pad(mask, (0, 5), value=1), past_key_values=cache).logits
    for row, length in enumerate(LENGTHS):
        alone = model(torch.cat([three[row, :length], more[row]])[None]).logits[:, -5:]
        torch.testing.assert_close(torch.cat([remembered, given], 1)[row], alone[0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_batch_of_unequal_prompts_generates_what_each_does_alone(three):
    model = random_model(CASES["G+M* q/k-norm, yarn"])
    tokens, mask = padded(three.clamp(min=1), "left")  # 0 is the padding token, and would be taken for padding
    for settings in (dict(), dict(num_beams=3), dict(prefill_chunk_size=20), dict(use_cache=False)):
        settings |= dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
        batch = model.generate(tokens, attention_mask=mask, **settings)[:, WIDTH:]
        for row, length in enumerate(LENGTHS):
            alone = model.generate(tokens[row : row + 1, WIDTH - length :], **settings)
            assert torch.equal(batch[row], alone[0, length:]), settings


@torch.no_grad()
def test_positions_and_padding_match_transformers(three):
    oracle = tiny_hf_model("qwen3")
    model = HyloForCausalLM(HyloConfig(hylo=model_config_from_hf(oracle.config.to_dict()).to_dict())).eval()
    model.load_state_dict(oracle.state_dict())
    positions = torch.randperm(100)[:WIDTH].sort().values.expand(3, -1) + torch.tensor([[0], [3], [9]])
    for settings in (dict(position_ids=positions), dict(position_ids=positions[:1])):
        torch.testing.assert_close(model(three, **settings).logits, oracle(three, **settings).logits, rtol=0, atol=2e-5)
    tokens, mask = padded(three, "left")
    for settings in (dict(), dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0))):
        logits, expected = (m(tokens, attention_mask=mask, **settings).logits[mask.bool()] for m in (model, oracle))
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_a_mask_of_any_dtype_is_read(dtype, three):
    model = random_model(serve_config("G+"))
    tokens, mask = padded(three, "left")
    assert torch.equal(model(tokens, attention_mask=mask.to(dtype)).logits, model(tokens, attention_mask=mask).logits)


@torch.no_grad()
def test_positions_count_on_from_those_given_before(three):
    model = random_model(serve_config("*+"))
    positions = torch.arange(WIDTH)[None] * 2
    whole = model(three, position_ids=torch.cat([positions[:, :70], positions[:, 69:70] + torch.arange(1, 6)], 1)).logits
    cache = model(three[:, :70], position_ids=positions[:, :70]).past_key_values
    torch.testing.assert_close(model(three[:, 70:], past_key_values=cache).logits, whole[:, 70:], rtol=0, atol=1e-10)


REFUSED = {
    "4-d mask": (dict(attention_mask=torch.ones(3, 1, WIDTH, WIDTH)), "only padding can be masked: give .batch, tokens."),
    "additive mask": (
        dict(attention_mask=torch.zeros(3, WIDTH) - 1.5),
        "must hold 1 at tokens and 0 at padding, got -1.5; neither additive masks nor numbers of documents are read",
    ),
    "numbers of documents": (
        dict(attention_mask=1 + torch.arange(WIDTH).expand(3, -1) // 40),
        "must hold 1 at tokens and 0 at padding, got 2; neither additive",
    ),
    "mask of another length": (dict(attention_mask=torch.ones(3, 4)), r"must be \[3, 75\] for 0 cached and 75 new tokens"),
    "positions of another length": (dict(position_ids=torch.arange(4)[None]), r"must be \[3 or 1, 75\]"),
    "packed documents": (dict(position_ids=(torch.arange(WIDTH) % 40)[None]), r"0 follows 39 .*give each document a row"),
    "positions that are no integers": (
        dict(position_ids=torch.arange(WIDTH)[None] + 0.5),
        "position_ids must be integers, got torch.float32",
    ),
    "no batch": (dict(input_ids=torch.tensor([3, 4])), r"give input_ids \[batch, tokens\] .* embeddings are \[2, 48\]"),
    "no tokens": (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), r"of a token at least; the embeddings are \[1, 0, 48\]"),
    "another model's cache": (dict(past_key_values=transformers.DynamicCache()), "is a DynamicCache, .* leave it out"),
    "two inputs": (dict(inputs_embeds=torch.zeros(3, WIDTH, 48)), "either input_ids or inputs_embeds, not both"),
    "no input": (dict(input_ids=None), "either input_ids or inputs_embeds, not neither"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused(settings, message, three):
    model = random_model(serve_config("G+"))
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": three} | settings))
    with pytest.raises(TypeError, match="not use the argument cu_seq_lens_q; documents packed into one .* a row of its own"):
        model(three, cu_seq_lens_q=torch.tensor([0, WIDTH]), alpha=1)
    with pytest.raises(TypeError, match="does not use the argument num_logits_to_keep; leave it out"):
        model(three, num_logits_to_keep=1)


def test_a_cache_is_continued_only_as_it_was_begun(three):
    model = random_model(serve_config("G+"))
    tokens, mask = padded(three, "left")
    cache = model(tokens, attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="holds 3 sequences, but 2 are given"):
        model(tokens[:2, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="other tokens as padding than when the 75 cached ones were read"):
        model(tokens[:, :1], attention_mask=torch.ones(3, WIDTH + 1), past_key_values=cache)
    with pytest.raises(ValueError, match="must rise"):
        model(tokens[:, :1], position_ids=torch.tensor([[10]]), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("size", [None, 90], ids=["the output's", "of fixed size"])
def test_the_cache_of_another_hybrid_is_refused(size, three):
    model, other = random_model(serve_config("G+")), random_model(serve_config("+G"))
    model.decodes_with_fixed_shapes = True
    cache = other(three, past_key_values=None if size is None else other.new_cache(3, size)).past_key_values
    message = (
        r"filled by another model, whose hybrid_layer_pattern is '\+-G-', not 'G-\+-'; give this model the cache of its own"
    )
    with pytest.raises(ValueError, match=message):
        model(three[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model.generate(torch.cat([three, three[:, :1]], 1), past_key_values=cache, max_new_tokens=2)
    expected = other(torch.cat([three, three[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(other(three[:, :1], past_key_values=cache).logits, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_batch_too_large_for_the_memory_is_refused_before_it_is_read(three, monkeypatch):
    model = random_model(serve_config("G+"))
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    row, state = (cache_nbytes(model.config, n, 8) for n in (1, 0))
    monkeypatch.setattr(pretrained_hylo, "free_bytes", lambda device: 3 * (state + WIDTH * (row - state)))
    expected, warnings = model.generate(three, **settings), []
    monkeypatch.setattr(pretrained_hylo.logger, "warning", lambda *words: warnings.append(words[0] % words[1:]))
    assert torch.equal(model.generate(three, **settings), expected)
    (warning,) = warnings
    assert "will fill the memory: a cache of 79 tokens for 3 sequences takes" in warning
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: pytest.fail("something was read"))
    with pytest.raises(ValueError, match=r"a cache of 75 tokens for 6 sequences takes .* GiB, but .*; use fewer sequences or"):
        model.generate(three, num_beams=2, **settings)


@torch.no_grad()
@pytest.mark.parametrize(("given", "settings", "said"), [
    ((1, 40), {}, "the text's 40"),  # the prompt
    ((1, 40), {"prefill_chunk_size": 16}, "the text's 40"),  # not the piece that goes past
    ((1, 30), {}, "the text's 33"),  # what it is continued with
    ((2, 30), {"cache_implementation": "static"}, "the text's 33"),
    ((1, 20), {}, None),
])  # fmt: skip
def test_a_text_past_the_trained_length_is_said_once_and_in_one_sentence(given, settings, said, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # its own reminder would be seen
    model = random_model(serve_config("G+", max_position_embeddings=32))
    model.decodes_with_fixed_shapes = True
    ids = torch.randint(160, given)
    for _ in range(2):
        model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **settings)
    found = [text for text in caplog.messages if "32" in text or "maximum length" in text]
    expected = (
        "this model was trained for 32 tokens; {} go past it: nothing is cut off, positions count on, but what the model "
        "says there may be poor"
    )
    assert found == ([] if said is None else [expected.format(said)])


@torch.no_grad()
def test_forward_passes_past_the_trained_length_are_said_once(caplog):
    """The backbone alone, and the model around it after it."""
    model = random_model(serve_config("G+", max_position_embeddings=32))
    past = model.model(torch.randint(160, (1, 32))).past_key_values
    assert not caplog.messages
    model.model(torch.randint(160, (1, 3)), past_key_values=past)
    model(torch.randint(160, (1, 40)))
    other = random_model(serve_config("G+", max_position_embeddings=32))
    other.config.max_position_embeddings = None  # not known: nothing is said
    other(torch.randint(160, (1, 40)))
    assert ["the text's 35 go past it" in text for text in caplog.messages] == [True]


def test_generation_refuses_what_it_would_do_wrongly(three):
    model = random_model(serve_config("G+"))
    tokens, mask = padded(three, "right")
    for settings, message in (
        (dict(attention_mask=mask), "pad on the left"),
        (dict(cache_implementation="quantized"), "cache_implementation 'quantized' is not supported; use 'static'"),
        (dict(past_key_values=transformers.DynamicCache()), "leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(tokens, max_new_tokens=2, **settings)
    with pytest.raises(ValueError, match=r"takes prompts \[batch, tokens\] of a token at least, .* is \[3, 0\]"):
        model.generate(tokens[:, :0], max_new_tokens=2)
    with pytest.raises(ValueError, match="generate_batch and continuous batching page keys and values, .* use generate"):
        model.generate_batch(tokens.tolist(), transformers.GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize(
    ("hylo", "sentence"),
    [
        (None, "config.json has no hylo, the architecture of the model; export the model again"),
        ([1], r"config.json: hylo must be a dictionary of the architecture, got \[1\]; export the model again"),
        (
            {k: v for k, v in serve_config("G+").to_dict().items() if k != "kv_lora_rank"},
            "config.json: hylo has no kv_lora_rank;",
        ),
    ],
)
def test_a_damaged_description_says_what_it_lacks(hylo, sentence):
    with pytest.raises((ValueError, AttributeError), match=sentence):
        HyloForCausalLM(HyloConfig(hylo=hylo))


def test_every_name_that_is_read_of_a_description_is_named_where_it_is_missing():
    whole = serve_config("G+").to_dict()
    for name in whole:
        try:
            HyloForCausalLM(HyloConfig(hylo={key: value for key, value in whole.items() if key != name}))
        except (ValueError, AttributeError) as error:
            assert f" {name}" in str(error) and "export the model again" in str(error), name
    for name in ("vocab_size", "num_query_groups", "untie_embeddings_and_output_weights"):
        with pytest.raises(AttributeError, match=f"hylo has no {name}"):
            HyloConfig(hylo={key: value for key, value in whole.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(hybrid_layer_pattern="G-Q-"), r"hybrid_layer_pattern 'G-Q-' must have a mixer, one of \*\+MGKW, and then an MLP"),
        (dict(hybrid_layer_pattern="G-+"), "hybrid_layer_pattern 'G-\\+' must have"),
        (dict(hybrid_layer_pattern="G-+x"), "hybrid_layer_pattern 'G-\\+x' must have"),
        (dict(hybrid_layer_pattern=5), "hybrid_layer_pattern of hylo must be text, got 5"),
        (dict(rope_scaling=None), "rope_scaling of hylo must be a mapping, got None"),
        (dict(mla_rope_scaling={}), "hylo has no rope_type"),
    ],
)
def test_a_damaged_value_of_a_description_is_named(changes, sentence):
    with pytest.raises((ValueError, AttributeError), match=f"config.json: {sentence}.*export the model again"):
        HyloForCausalLM(HyloConfig(hylo=serve_config("G+").to_dict() | changes))


def test_more_layers_than_the_pattern_has_are_refused():
    hylo = serve_config("G+").to_dict()
    assert len(HyloForCausalLM(HyloConfig(hylo=hylo, num_hidden_layers=1)).model.layers) == 1
    with pytest.raises(ValueError, match="for each of num_hidden_layers 3"):
        HyloForCausalLM(HyloConfig(hylo=hylo, num_hidden_layers=3))
