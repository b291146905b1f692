"""The codec of hidden states: the KL it promises on tokens it has not seen, in fewer bits than plain rounding takes."""

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.teachers.hidden_codec import HiddenCodec, fit_codec, token_kl

WIDTH, VOCABULARY = 32, 200


@pytest.fixture(scope="module")
def made() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [6000, 32] with a mean and a falling spectrum, and a head that hardly sees some directions."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    hidden = torch.randn(6000, WIDTH, generator=generator) * torch.logspace(0.7, -1.5, WIDTH) @ rotation + rotation[0]
    head = torch.randn(VOCABULARY, WIDTH, generator=generator) * torch.logspace(0, -2, WIDTH) @ rotation.flip(0) * 0.7
    return hidden, head


@pytest.mark.parametrize("kl", [1e-4, 1e-3, 1e-2])
def test_costs_the_kl_that_was_asked_for_on_new_tokens(made, kl):
    hidden, head = made
    codec, found = fit_codec(hidden[:4000], head, kl)
    new = hidden[4000:]
    again = token_kl(new, codec.decode(codec.encode(new, head)), head)
    assert again.mean().item() == pytest.approx(kl, rel=0.15)
    assert found.mean().item() == pytest.approx(kl, rel=0.1)
    assert again.max() < 30 * kl


def bits(codes: torch.Tensor) -> float:
    """Order-0 entropy of all axes together, bits a token."""
    total = 0.0
    for axis in codes.T:
        p = axis.unique(return_counts=True)[1].double() / len(axis)
        total -= float((p * p.log2()).sum())
    return total


def test_takes_fewer_bits_than_rounding_the_channels(made):
    hidden, head = made
    codec, found = fit_codec(hidden[:4000], head, 1e-3)
    new, step = hidden[4000:], 0.05
    for _ in range(6):
        plain = (new / step).round()
        step *= (1e-3 / token_kl(new, plain * step, head).mean().item()) ** 0.5
    assert bits(codec.encode(new, head)) < bits(plain) - 20


def test_certain_tokens_have_long_steps_and_cost_few_bytes(made):
    """A head and hidden states so large that predictions are certain: coarser, at no more KL than the others."""
    hidden, head = made[0], 16 * made[1]
    certain = torch.arange(len(hidden)) % 2 == 0
    hidden = torch.where(certain[:, None], 4 * hidden, hidden)
    codec, _ = fit_codec(hidden[:4000], head, 1e-3)
    new, certain = hidden[4000:], certain[4000:]
    codes = codec.encode(new, head)
    assert codes[certain, 1].float().mean() > codes[~certain, 1].float().mean() + 2
    found = token_kl(new, codec.decode(codes), head)
    assert found.mean().item() == pytest.approx(1e-3, rel=0.2)
    assert found[certain].mean() < 1.5 * found[~certain].mean()


def test_tokens_kl_is_torchs(made):
    hidden, head = made
    other = hidden + 0.1
    log_p, log_q = (torch.log_softmax(x @ head.T, -1) for x in (hidden[:50], other[:50]))
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(token_kl(hidden[:50], other[:50], head, chunk=7), expected, rtol=1e-3, atol=1e-6)


def test_comes_back_out_of_a_file_the_same(made):
    hidden, head = made
    codec, _ = fit_codec(hidden[:500], head, 1e-3)
    again = HiddenCodec.from_tensors(codec.tensors())
    codes = codec.encode(hidden[:9], head)
    assert codes.dtype == torch.int16 and codes.shape == (9, 3 + WIDTH)
    assert torch.equal(again.encode(hidden[:9], head), codes)
    assert torch.equal(again.decode(codes, torch.bfloat16), codec.decode(codes, torch.bfloat16))


def test_refusals(made):
    hidden, head = made
    with pytest.raises(ConfigError, match="100 tokens are too few to fit a codec of 32 channels; give at least 128"):
        fit_codec(hidden[:100], head, 1e-3)
    with pytest.raises(ConfigError, match="kl must be positive, got 0"):
        fit_codec(hidden, head, 0)
    with pytest.raises(ConfigError, match="kl 1e-13 is finer than codes of 16 bits; the finest here is"):
        fit_codec(hidden, head, 1e-13)
