"""A prompt that two ranks read together."""

import pytest

from tests.forked import run_ranks


@pytest.mark.multirank
def test_two_ranks_fill_the_cache_that_one_rank_fills(tmp_path):
    """Bit for bit, on every rank, with the decode steps after it."""
    assert run_ranks("tests.serve.split_prefill_ranks", [], 2, tmp_path).count("equal on 2") == 2
