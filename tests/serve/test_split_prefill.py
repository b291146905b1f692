"""A prompt that two ranks read together."""

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.serve import split_prefill
from megatron_hylo.serve.generate import generate_text
from megatron_hylo.serve.split_prefill import Ring
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


def test_too_few_queues_of_a_gpu_are_refused(monkeypatch):
    """One queue has messages to a rank waiting in front of what that rank waits for."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(ConfigError, match="CUDA_DEVICE_MAX_CONNECTIONS is 1: .* need 3 queues; unset it, or give 8"):
        Ring(torch.device("cuda"))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_closing_waits_for_no_rank_that_waits(monkeypatch, size):
    """NCCL destroys a group when both of its ranks ask for it; each rank asks for one after the other."""
    left = {}
    for rank in range(size):
        ring = object.__new__(Ring)
        ring.rank, ring.size, ring.pending, ring.groups = rank, size, [], list(range(size))
        left[rank] = []
        monkeypatch.setattr(split_prefill.dist, "destroy_process_group", left[rank].append)
        ring.close()
    assert all(len(groups) == 2 for groups in left.values())
    while any(left.values()):
        asked = [groups[0] for groups in left.values() if groups]
        ready = {group for group in asked if asked.count(group) == 2}
        assert ready, f"every rank waits: {left}"
        left = {rank: groups[1:] if groups[:1] and groups[0] in ready else groups for rank, groups in left.items()}
