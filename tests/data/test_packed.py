"""Packing: every token once an epoch, windows addressed by number, the same order for every number of ranks.

Token ids are 0, 1, 2, ... through the dataset, so that a window shows by itself where each token came from.
"""

import itertools
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_hylo.config import ConfigError
from megatron_hylo.data.heldout import heldout_documents, heldout_windows
from megatron_hylo.data.packed import IGNORED, PackedDataset, batches
from megatron_hylo.io import DamagedError

LENGTHS = np.random.default_rng(0).integers(1, 60, size=40).tolist() + [300]
TOKENS = sum(LENGTHS)
STARTS = set(np.cumsum([0, *LENGTHS])[:-1].tolist())  # the first token of each document
LENGTH = 16


def write(prefix, lengths, sequences=1):
    """Documents of consecutive ids; each cut into up to `sequences` sequences."""
    builder, next_id = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32), 0
    for length in lengths:
        parts = [len(part) for part in np.array_split(np.arange(length), sequences)]
        builder.add_document(np.arange(next_id, next_id + length), parts)
        next_id += length
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "train", LENGTHS)


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("length", [1, LENGTH, 100, TOKENS - 1])
def test_every_token_is_predicted_once_an_epoch(prefix, length, epoch):
    dataset = PackedDataset(prefix, length, seed=5)
    count = dataset.windows_per_epoch
    windows = torch.stack([dataset[i] for i in range(epoch * count, (epoch + 1) * count)])
    assert windows.shape == (count, length + 1) and windows.dtype == torch.int64
    labels = windows[:, 1:].flatten().tolist()
    assert len(set(labels)) == len(labels)
    left = TOKENS - len(labels)  # the first token of the stream, and a tail shorter than a window
    assert 1 <= left <= length
    # The stream is whole documents laid end to end: after t comes t + 1, or t ends a document and another begins.
    for before, after in zip(windows[:, :-1].flatten().tolist(), labels, strict=True):
        assert after == before + 1 or (after in STARTS and before + 1 in STARTS | {TOKENS})
    # Windows overlap by one token: but for the stream's first, each starts with another's last.
    assert len(set(windows[:, 0].tolist()) - set(windows[:, -1].tolist())) == 1


@pytest.mark.parametrize("epochs", [0.5, 1, 2.25])
@pytest.mark.parametrize("length", [LENGTH, 100])
def test_what_a_run_leaves_out_is_said_as_counted_by_hand(prefix, length, epochs):
    dataset = PackedDataset(prefix, length, seed=5)
    count = dataset.windows_per_epoch
    read = int(epochs * count)
    in_windows = {token for i in range(count) for token in dataset[i].tolist()}
    begun = {i // count for i in range(read)}
    unread = len({i for epoch in begun for i in range(epoch * count, (epoch + 1) * count)} - set(range(read)))
    said = dataset.describe(read)
    assert f"41 documents, {TOKENS:,} tokens" in said and f"an epoch has {count:,} windows of {length}" in said
    assert f"leaves out {TOKENS - len(in_windows)} tokens at its end that fill none" in said
    assert f"reads {read:,} windows" in said and f"leaves out {unread} windows of the last" in said


def test_without_shuffling_it_is_the_dataset_cut(prefix):
    dataset = PackedDataset(prefix, LENGTH, seed=5, shuffle=False)
    for i in range(3 * dataset.windows_per_epoch):
        start = i % dataset.windows_per_epoch * LENGTH
        assert dataset[i].tolist() == list(range(start, start + LENGTH + 1))


def test_a_window_depends_on_seed_length_and_number_alone(prefix):
    indices = range(5 * PackedDataset(prefix, LENGTH, 5).windows_per_epoch)
    forward = [PackedDataset(prefix, LENGTH, 5)[i].tolist() for i in indices]
    dataset = pickle.loads(pickle.dumps(PackedDataset(prefix, LENGTH, 5)))
    assert [dataset[i].tolist() for i in reversed(indices)] == forward[::-1]
    assert [PackedDataset(prefix, LENGTH, 6)[i].tolist() for i in indices] != forward
    epochs = [forward[i : i + dataset.windows_per_epoch] for i in range(0, len(forward), dataset.windows_per_epoch)]
    assert all(a != b for a, b in itertools.combinations(epochs, 2))


def test_the_order_of_a_seed_never_changes(tmp_path):
    """Resuming in another environment relies on it; numpy keeps RandomState's streams frozen (NEP 19)."""
    dataset = PackedDataset(write(tmp_path / "train", [7] * 30), 4, seed=1234)
    frozen = [[28, 29, 30, 31, 32], [86, 87, 88, 89, 90], [16, 17, 18, 19, 20]]
    assert [dataset[i].tolist() for i in (0, 1, dataset.windows_per_epoch)] == frozen


def test_resuming_gives_the_same_batches(prefix):
    dataset = PackedDataset(prefix, LENGTH, seed=5)
    steps = dataset.windows_per_epoch  # three epochs' worth
    whole = list(itertools.islice(batches(dataset, 0, 3), steps))
    for done in (0, 1, steps // 2, steps - 1):
        rest = itertools.islice(batches(PackedDataset(prefix, LENGTH, seed=5), 3 * done, 3), steps - done)
        for mine, theirs in zip(rest, whole[done:], strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in ("input_ids", "labels"))


@pytest.mark.parametrize(("micro", "ranks"), [(1, 4), (2, 2), (4, 1)])
def test_the_order_does_not_depend_on_data_parallel_size(prefix, micro, ranks):
    dataset = PackedDataset(prefix, LENGTH, seed=5)
    feeds = [batches(dataset, 8, micro, rank, ranks) for rank in range(ranks)]
    for step in range(dataset.windows_per_epoch):
        inputs = torch.cat([next(feed)["input_ids"] for feed in feeds])
        first = 8 + step * 4
        assert torch.equal(inputs, torch.stack([dataset[i][:-1] for i in range(first, first + 4)]))


def test_a_batch_is_inputs_and_the_next_tokens(prefix):
    dataset = PackedDataset(prefix, LENGTH, seed=5)
    batch = next(batches(dataset, 0, 2))
    assert torch.equal(torch.cat([batch["input_ids"], batch["labels"][:, -1:]], dim=1), torch.stack([dataset[0], dataset[1]]))
    assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch.values())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_packed_batch_says_where_documents_begin(prefix, shuffle, size):
    """Tokens of this dataset are their places in it, so documents can be told from them."""
    dataset = PackedDataset(prefix, LENGTH, seed=5, shuffle=shuffle)
    plain, packed = batches(dataset, 0, size), batches(dataset, 0, size, packed_documents=True)
    for _ in range(dataset.windows_per_epoch // size):
        bare, batch = next(plain), next(packed)
        ids, labels = bare["input_ids"].flatten().tolist(), bare["labels"].flatten().tolist()
        assert batch["input_ids"].tolist() == [ids]
        assert batch["labels"].tolist() == [[IGNORED if label in STARTS else label for label in labels]]
        begins = [i for i, token in enumerate(ids) if i % LENGTH == 0 or token in STARTS]
        assert batch["document_starts"].tolist() == begins


def test_documents_of_several_sequences_are_kept_together(prefix, tmp_path):
    cut = PackedDataset(write(tmp_path / "cut", LENGTHS, sequences=3), LENGTH, seed=5)
    whole = PackedDataset(prefix, LENGTH, seed=5)
    assert all(torch.equal(cut[i], whole[i]) for i in range(2 * whole.windows_per_epoch))


def test_too_little_text_and_bad_arguments_are_refused(prefix):
    with pytest.raises(ConfigError, match=f"has {TOKENS} tokens.* needs {TOKENS + 1}"):
        PackedDataset(prefix, TOKENS, seed=0)
    with pytest.raises(ConfigError, match="hylo preprocess"):
        PackedDataset(f"{prefix}_elsewhere", LENGTH, seed=0)
    with pytest.raises(ConfigError, match="sequence_length must be at least 1"):
        PackedDataset(prefix, 0, seed=0)
    dataset = PackedDataset(prefix, LENGTH, seed=0)
    with pytest.raises(IndexError):
        dataset[-1]
    with pytest.raises(ConfigError, match="data_parallel_rank 2"):
        batches(dataset, 0, 1, 2, 2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Megatron's half-made IndexedDataset
def test_damaged_files_are_detected(prefix):
    (prefix.parent / "data.json").write_text(json.dumps({"train_tokens": TOKENS + 1}))
    with pytest.raises(DamagedError, match="two datasets"):
        PackedDataset(prefix, LENGTH, seed=0)
    content = (prefix.parent / "train.bin").read_bytes()
    (prefix.parent / "train.bin").write_bytes(content[:-4])
    with pytest.raises(DamagedError, match=f"has {TOKENS - 1} tokens, its index says {TOKENS}"):
        PackedDataset(prefix, LENGTH, seed=0)
    index = (prefix.parent / "train.idx").read_bytes()
    for damaged in (index[: len(index) // 2], index[:12], b"", b"nonsense" * 9):
        (prefix.parent / "train.idx").write_bytes(damaged)
        with pytest.raises(DamagedError, match="not a readable index"):
            PackedDataset(prefix, LENGTH, seed=0)


def test_heldout_windows_lie_inside_documents(prefix):
    windows = heldout_windows(prefix, LENGTH, 10_000)
    expected, start = [], 0
    for length in LENGTHS:
        for first in range(start, start + length - LENGTH, LENGTH):
            expected.append(list(range(first, first + LENGTH + 1)))
        start += length
    assert windows.tolist() == expected and windows.dtype == torch.int64
    some = heldout_windows(prefix, LENGTH, 7)
    assert len(some) == 7
    places = [expected.index(window) for window in some.tolist()]
    assert set(np.diff(places)) <= {len(expected) // 7, len(expected) // 7 + 1}
    edges = np.cumsum(LENGTHS)  # tokens are numbered
    assert heldout_documents(prefix, LENGTH, 7) == [int(np.searchsorted(edges, w[0], side="right")) for w in some.tolist()]


def test_heldout_tokens_of_no_window_are_said_as_counted_by_hand(prefix, caplog):
    with caplog.at_level(logging.INFO, "megatron_hylo.data"):
        windows = heldout_windows(prefix, LENGTH, 10**6)
    predicted = len(set(windows[:, 1:].flatten().tolist()))
    assert f"{len(windows)} of {len(windows)} windows of {LENGTH} tokens inside a document" in caplog.text
    assert f"; {TOKENS - predicted:,} of {TOKENS:,} tokens are predicted in none" in caplog.text


def test_heldout_windows_longer_than_every_document(prefix):
    assert heldout_windows(prefix, 299, 9).shape == (1, 300)
    with pytest.raises(ConfigError, match="longest document of .* has 300 tokens.* needs 301"):
        heldout_windows(prefix, 300, 9)
    crossing = heldout_windows(prefix, 300, 2, allow_crossing=True)
    assert crossing.tolist()[0] == list(range(301)) and len(crossing) == 2
