"""A prompt that two ranks read together."""

import pytest

from megatron_hylo.serve.generate import generate_text
from tests.forked import run_ranks
from tests.hf.conftest import serve_config


@pytest.mark.multirank
def test_two_ranks_fill_the_cache_that_one_rank_fills(save_hybrid, tmp_path):
    """Bit for bit, on every rank, with the decode steps after it; each of them generates one rank's text."""
    save_hybrid(tmp_path, serve_config("G+M*"))
    alone = generate_text(tmp_path / "hf", "the quick brown fox", 20).text
    said = run_ranks("tests.serve.split_prefill_ranks", [tmp_path / "hf"], 2, tmp_path)
    assert said.count("equal on 2") == 2
    assert [line for line in said.splitlines() if line.startswith("TEXT")] == [f"TEXT {alone}"] * 2
