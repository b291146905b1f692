"""Blocks of codes: every code comes back, in hardly more bytes than the entropy of each width says."""

import numpy as np
import pytest

from megatron_hylo.teachers.entropy_coding import compress_block, decompress_block

LEVELS = np.stack([np.arange(24, -8, -1), np.arange(8, -24, -1)]).astype(np.int16)  # two classes of 32 axes


def made(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [tokens, 3 + 32] of random class, step and spread, and the standard deviation that they say [tokens, 32]."""
    generator = np.random.default_rng(0)
    side = np.stack([generator.integers(*ends, tokens) for ends in ((0, 2), (-9, 9), (-5, 5))], 1)
    deviation = 2.0 ** ((LEVELS[side[:, 0]] + (side[:, 2] - side[:, 1])[:, None]) / 4)
    codes = np.round(generator.standard_normal((tokens, 32)) * deviation)
    return np.concatenate([side, codes], 1).astype(np.int16), deviation


@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_every_code_comes_back(tokens):
    codes, _ = made(tokens)
    codes[0, 3:6] = -32767, 32767, -128
    assert np.array_equal(decompress_block(compress_block(codes, LEVELS), LEVELS), codes)


def test_takes_what_gaussians_of_these_widths_take():
    codes, deviation = made(4096)
    wide = np.log2(deviation * np.sqrt(2 * np.pi * np.e))  # bits of a code, where it is several steps wide
    expected = np.where(deviation > 1, wide, np.log2(np.sqrt(2 * np.pi * np.e))).sum() / 8  # at most, elsewhere
    assert len(compress_block(codes, LEVELS)) < 1.05 * expected + 2 * codes[:, :3].size


@pytest.mark.parametrize("step", [-20, 20])
def test_codes_do_not_depend_on_widths_that_are_right(step):
    """Widths of a wrong size cost bytes and nothing else."""
    codes, _ = made(50)
    codes[::2, 1] = 30 * step
    assert np.array_equal(decompress_block(compress_block(codes, LEVELS), LEVELS), codes)
