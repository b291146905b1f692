"""The node check names the rank that is slow, wrong, without GPUs or with another clock, and no other."""

from dataclasses import replace

import pytest

from megatron_hylo.cli.doctor import doctor
from megatron_hylo.platform import node_check
from megatron_hylo.platform.node_check import RankCheck, check_nodes, judge

GOOD = [RankCheck(r, "ab"[r // 4], "H200", 4, 4, 1e9, 0.002 + 1e-5 * r, 0.0, 0.010, 0.012) for r in range(8)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"product": 0.003}, "is slow: matrix product 3.0 ms, the median is 2.0"),
        ({"node_reduce": 0.1}, "is slow: all-reduce inside its node 100.0 ms, the median is 10.0"),
        ({"clock": 1e9 + 60}, "its clock differs by 60 s"),
        ({"product_error": 0.5}, "multiplies matrices wrongly"),
        ({"devices": 3}, "sees 3 GPUs, most hosts 4"),
    ],
)
def test_the_rank_is_named(changes, words):
    ranks = [replace(rank, **changes) if rank.rank == 5 else rank for rank in GOOD]
    (problem,) = judge(ranks, [36.0] * 8)
    assert problem.startswith("rank 5 on b") and words in problem


def test_a_wrong_sum_is_named_and_good_ranks_are_not():
    assert judge(GOOD, [36.0] * 8) == []
    (problem,) = judge(GOOD, [36.0] * 7 + [28.0])
    assert "rank 7 on b got 28 as the sum over all ranks, which is 36" in problem


def test_this_machine_passes_and_a_planted_fault_does_not(one_rank, monkeypatch, capsys):
    ranks, problems = check_nodes()
    assert problems == [] and len(ranks) == 1 and ranks[0].product > 0 and ranks[0].product_error < 1e-5
    monkeypatch.setattr(node_check, "_product", lambda device: (0.001, 0.9))
    assert doctor(node=True) == 1 and "multiplies matrices wrongly" in capsys.readouterr().out
