"""Windowed attention in the model's other lives: served, made from a teacher, calibrated, planned."""

import pytest
import torch

from megatron_hylo.calibrate.gather import LayerSums
from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import BASES, hybrid_config, kv_bytes_per_token, kv_elements, kv_percent
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.hf import HyloCache, HyloConfig, HyloForCausalLM
from megatron_hylo.hf.cache_hylo import cache_nbytes
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.plan.hardware import get_hardware
from megatron_hylo.plan.inference import longest_context, serving
from megatron_hylo.upcycle.assemble import upcycled
from tests.conftest import tiny_config, tiny_hf_model
from tests.models.mixers import random_mixer


@torch.no_grad()
def test_it_is_served_as_transformers_serves_mistral():
    """Logits of the whole, of pieces with a cache, and of a batch with padding on the left; the cache keeps a window."""
    window, ids = 11, torch.randint(160, (2, 60))
    mistral = tiny_hf_model("mistral", False, sliding_window=window)
    config = model_config_from_hf(mistral.config.to_dict())
    assert config.mixers == "WWW"
    model = HyloForCausalLM(HyloConfig(hylo=config.to_dict())).eval()
    model.load_state_dict(mistral.state_dict())
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    for seen in (None, mask):
        positions = None if seen is None else (seen.cumsum(1) - 1).clamp(min=0)
        expected = mistral(ids, attention_mask=seen, position_ids=positions).logits
        cache, found, count = HyloCache(), [], 0
        for piece in ids.split([30, 1, 1, 28], dim=1):
            count += piece.shape[1]
            given = None if seen is None else seen[:, :count]
            found.append(model(piece, attention_mask=given, past_key_values=cache).logits)
        real = mask.bool() if seen is not None else torch.ones_like(mask, dtype=torch.bool)
        for logits in (torch.cat(found, 1), model(ids, attention_mask=seen).logits):
            torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=2e-5)
    assert {rows.shape[1] for rows, _ in cache.states.values()} == {window} and not cache.rows
    assert cache.nbytes() == 2 * cache_nbytes(model.config, 60, 4)
    mistral.config.sliding_window = None
    assert not torch.allclose(mistral(ids).logits, logits, atol=0.1), "the window changes logits"


def test_a_student_copies_attention_and_a_window_of_the_whole_sequence_is_the_teacher(one_rank):
    teacher = tiny_config("*-*-*-", add_qkv_bias=True)
    model = build_model(teacher)
    state = {name: torch.randn(shape) for name, shape in tensor_names(teacher).items()}
    student = hybrid_config(teacher, "WGW", attention_window=5)
    assert student.add_qkv_bias and student.attention_window == 5
    read = upcycled(state.__getitem__, teacher, student)
    made = {name: read(name) for name in tensor_names(student)}
    copied = [name for name in made if ".self_attn." in name and ".layers.1." not in name]
    assert len(copied) == 2 * 7 and all(torch.equal(made[name], state[name]) for name in copied)
    windowed = build_model(teacher.with_mixers("W*W").replace(attention_window=70))
    windowed.load_state_dict(model.state_dict())
    ids = torch.randint(160, (2, 70))
    with torch.no_grad():
        assert torch.equal(model(ids), windowed(ids))
        shorter = build_model(teacher.with_mixers("W*W").replace(attention_window=9))
        shorter.load_state_dict(model.state_dict())
        out, whole = shorter(ids), model(ids)
        assert torch.allclose(out[:9], whole[:9], atol=1e-5) and not torch.allclose(out[9:], whole[9:], atol=1e-3)
    with pytest.raises(ConfigError, match="windowed attention layer `W` needs attention_window >= 1, got 0"):
        hybrid_config(teacher.replace(attention_window=0), "W+W")


def test_statistics_of_a_windowed_teacher_look_no_further_back(one_rank):
    """Mean distance of the attention and its mass at the first token, against probabilities made here."""
    mixer = random_mixer(tiny_config("W-", attention_window=4))
    x = torch.randn(20, 2, 48)
    query, key, value = mixer.query_key_value(x)
    with torch.no_grad():
        sums = LayerSums(mixer)._look_back(x.transpose(0, 1), query.flatten(2, 3), key, value)
        q, k = mixer.rotate(query.flatten(2, 3)), mixer.rotate(key).repeat_interleave(3, 2)
        back = torch.arange(20)[:, None] - torch.arange(20)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * 16**-0.5
        p = scores.masked_fill((back < 0) | (back > 3), -torch.inf).softmax(-1).double()
    torch.testing.assert_close(sums["sink_mass"], p[..., 0].sum((0, 2)), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums["looked_back"], (p * back.clamp(min=0))[..., 1:].sum((0, 2, 3)), rtol=1e-5, atol=0)


def test_its_cache_counts_a_window_of_the_whole_length():
    base = BASES["smollm2-135m"]  # 8,192 tokens, 2 x 3 x 64 numbers a token and layer
    windowed = hybrid_config(base, "W" * 30, attention_window=1024)
    assert kv_percent(windowed) == pytest.approx(12.5) and kv_bytes_per_token(windowed) == 2 * 30 * 384 // 8
    assert kv_percent(hybrid_config(base, "*" * 15 + "W" * 15, attention_window=1024)) == pytest.approx(50 + 6.25)
    assert [kv_elements(windowed, length) for length in (100, 1024, 10**6)] == [30 * 384 * n for n in (100, 1024, 1024)]
    gpu = get_hardware("h200-141gb")
    assert longest_context(windowed, gpu) is None
    some = hybrid_config(base, "*" + "W" * 29, attention_window=1024)
    dense = base.replace(untie_embeddings_and_output_weights=True)
    assert abs(kv_elements(some, longest_context(some, gpu)) - kv_elements(dense, longest_context(dense, gpu))) < 30 * 384
    short, long = serving(windowed, gpu, [8192, 2**20])
    assert short.batch == long.batch > 8 * serving(base, gpu, [8192])[0].batch * 0.9
