"""Context-parallel ranks have equal shares of causal attention, whole and packed."""

from types import SimpleNamespace

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.parallel.context import ContextGroup, context_group
from megatron_hylo.parallel.documents import PackedDocuments

TOKENS = 48


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_every_rank_scores_as_many_pairs(ranks, monkeypatch):
    """Ranks score equally many pairs of query and key, and all together as many as a rank alone."""
    monkeypatch.setattr(ContextGroup, "_trade", lambda self, x: x)  # what a rank gets is as large as what it gives
    pairs = [0] * ranks
    for rank in range(ranks):
        group = ContextGroup(SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank))

        def attention(query, key, value, rank=rank):
            queries, keys = query.shape[1], key.shape[1]
            pairs[rank] += queries * keys - queries * (queries - 1) // 2
            return query

        query, keys = torch.empty(1, TOKENS // ranks, 1, 1), torch.empty(1, group.parts_read * TOKENS // ranks, 1, 1)
        assert group.attend(attention, None, query, keys, keys).shape == query.shape
    assert len(set(pairs)) == 1 and sum(pairs) == TOKENS * (TOKENS + 1) // 2


def test_documents_keep_their_keys(monkeypatch):
    """The second of two ranks: its own first half, and the second half of the first rank's part."""
    monkeypatch.setattr(ContextGroup, "_trade", lambda self, x: x)
    group, seen = ContextGroup(SimpleNamespace(size=lambda: 2, rank=lambda: 1)), []

    def attention(query, key, value, documents):
        seen.extend((queries.stop - queries.start, key[0, keys, 0, 0].tolist()) for queries, keys in documents)
        return query

    documents = PackedDocuments(torch.tensor([0, 5, 9]), 12, slice(6, 12))
    keys = torch.arange(12.0).view(1, 12, 1, 1)
    group.attend(attention, documents, torch.empty(1, 6, 1, 1), keys, keys)
    assert seen == [(3, [5.0, 6.0, 7.0, 8.0]), (2, [0.0, 1.0, 2.0, 3.0, 4.0]), (1, [5.0])]


@pytest.mark.parametrize(
    ("method", "heads", "recurrent", "uses_all_to_all"),
    [
        ("auto", 4, False, True), ("auto", 3, False, False), ("auto", 4, True, False), ("a2a", 4, True, True),
        ("all_gather", 4, False, False), (None, 4, False, False),
    ],
)  # fmt: skip
def test_auto_trades_heads_of_attention_alone(method, heads, recurrent, uses_all_to_all):
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    assert context_group(method, group, recurrent, num_query_groups=heads).uses_all_to_all == uses_all_to_all


def test_heads_that_ranks_do_not_divide_are_refused_by_name():
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(ConfigError, match="a2a needs heads that context_parallel_size 2 divides.* linear_num_heads 9"):
        context_group("a2a", group, recurrent=True, linear_num_heads=9)
