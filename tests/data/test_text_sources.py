"""Blends, best-fit windows and lengths: every token once an epoch, in the asked proportions, the same from any start."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.config.text import TextPart, TextSettings
from megatron_hylo.data.blend import BLOCK, BlendedWindows
from megatron_hylo.data.packed import IGNORED, PackedDataset, batches
from megatron_hylo.data.prefetch import ahead
from megatron_hylo.data.training_windows import training_windows
from megatron_hylo.data.whole_documents import BestFitWindows
from tests.data.test_packed import LENGTH, LENGTHS, STARTS, write

EMPTY = [0, 5, 0, 0, 5, 33, 0, 1, 1, 17, 64, 0]  # zero-length documents are duplicated boundaries


@pytest.fixture
def prefix(tmp_path):
    (tmp_path / "a").mkdir()
    return write(tmp_path / "a" / "train", LENGTHS)


def config(*parts, length=LENGTH, **text):
    return SimpleNamespace(
        data=str(parts[0].data), sequence_length=length, seed=5, recall=RecallSettings(), packed_documents=False,
        cuda_graphs=False, teacher_store=None,
        text=TextSettings(blend=list(parts), **text),
    )  # fmt: skip


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("lengths", [LENGTHS, EMPTY])
def test_best_fit_predicts_every_token_once_an_epoch(tmp_path, lengths, epoch):
    """All but those of the last window that is not full; documents of another epoch go together otherwise."""
    dataset = BestFitWindows(write(tmp_path / "train", lengths), LENGTH, seed=5)
    windows = [dataset.window(epoch * dataset.windows_per_epoch + i) for i in range(dataset.windows_per_epoch)]
    starts = set(np.cumsum([0, *lengths])[:-1].tolist())
    predicted = []
    for window in windows:
        assert len(window.tokens) == LENGTH + 1
        inside = np.ones(LENGTH + 1, bool)
        inside[window.document_starts] = False
        assert (np.diff(window.tokens)[inside[1:]] == 1).all()  # within a piece tokens follow each other
        predicted += window.tokens[inside].tolist()
    assert len(predicted) == len(set(predicted))
    missing = set(range(sum(lengths))) - starts - set(predicted)
    assert len(missing) <= dataset.packing.left_out <= LENGTH + 1
    other = BestFitWindows(tmp_path / "train", LENGTH, seed=5)
    again = [other.window(epoch * dataset.windows_per_epoch + i).tokens.tolist() for i in range(len(windows))]
    assert again == [window.tokens.tolist() for window in windows]
    if lengths is LENGTHS:
        assert again != [other.window((epoch + 1) * len(again) + i).tokens.tolist() for i in range(len(again))]


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_packed_documents_with_empty_and_duplicated_boundaries(tmp_path, packing):
    """No place is a start twice, none lies outside, and no label is of another document."""
    prefix = write(tmp_path / "train", EMPTY)
    dataset = (BestFitWindows if packing == "best_fit" else PackedDataset)(prefix, LENGTH, seed=5)
    ends = set(np.cumsum(EMPTY).tolist())
    for batch in itertools.islice(batches(dataset, 0, 2, packed_documents=True), 3 * dataset.windows_per_epoch):
        starts = batch["document_starts"].tolist()
        assert starts == sorted(set(starts)) and starts[0] == 0 and starts[-1] < 2 * LENGTH
        for place, (token, label) in enumerate(zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist())):
            if label != IGNORED:
                assert label == token + 1 and label not in ends
            else:
                assert place + 1 in starts or place + 1 in (LENGTH, 2 * LENGTH)


def test_a_blend_reads_each_source_once_an_epoch_in_the_asked_proportions(tmp_path, prefix):
    """Also where one is read several times; numbers of windows follow from the index alone."""
    (tmp_path / "b").mkdir()
    other = write(tmp_path / "b" / "train", [400] * 3)
    sources = [PackedDataset(path, LENGTH, seed=5) for path in (prefix, other)]
    blend = BlendedWindows([("a", sources[0]), ("b", sources[1])], [3.0, 1.0])
    places = [blend.place(i) for i in range(2 * BLOCK + 100)]
    for source, share in ((0, 0.75), (1, 0.25)):
        numbers = [number for which, number in places if which == source]
        assert numbers == list(range(len(numbers)))  # none left out, none twice
        counts = np.cumsum([which == source for which, _ in places])
        assert np.abs(counts - share * np.arange(1, len(places) + 1)).max() < 2
        assert f"reads {len(numbers):,} windows" in blend.describe(len(places)).split("; b (")[source]
    read = np.bincount([which for which, _ in places[: blend.windows_per_epoch]])
    more = read - [source.windows_per_epoch for source in sources]
    assert more.min() in (-1, 0, 1) and more.max() > 100  # until the slower one has been read once
    assert [which for which, _ in places[:8]] == [0, 0, 1, 0, 0, 0, 1, 0]  # at the middles of 3,072 parts and of 1,024
    source, number = blend.place(BLOCK + 17)
    assert blend[BLOCK + 17].tolist() == sources[source][number].tolist()


def test_resuming_a_blend_under_other_divisions_gives_the_same_windows(tmp_path, prefix):
    """From 12 consumed samples, with 1, 2 and 3 ranks and other micro-batches."""
    parts = (TextPart(str(tmp_path / "a"), 2.0), TextPart(str(tmp_path / "a"), 1.0, min_length=50))
    settings = config(*parts, packing="best_fit")
    wanted = [training_windows(settings)[i][:-1].tolist() for i in range(12, 24)]
    for ranks, size in ((1, 4), (2, 3), (3, 2), (4, 1)):
        feeds = [batches(training_windows(settings), 12, size, rank, ranks) for rank in range(ranks)]
        found = [row for _ in range(12 // (ranks * size)) for feed in feeds for row in next(feed)["input_ids"].tolist()]
        assert found == wanted


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_long_share_takes_windows_from_long_documents_and_none_twice(prefix, tmp_path, packing):
    """Half of the windows; the short documents are only in the other half."""
    settings = config(TextPart(str(tmp_path / "a")), length=32, packing=packing, long_share=0.5)
    blend = training_windows(settings)
    edges = np.cumsum([0, *LENGTHS])
    for i in range(64):
        tokens = blend[i].numpy()
        lengths = {LENGTHS[int(np.searchsorted(edges, token, side="right")) - 1] for token in tokens}
        assert (min(lengths) >= 32) == (blend.place(i)[0] == 0)
    assert [blend.place(i)[0] for i in range(64)].count(0) == 32
    assert blend.long_share == pytest.approx(0.5)
    documents = [source.documents.tolist() for source in blend.sources]
    assert sorted(documents[0] + documents[1]) == list(range(len(LENGTHS)))
    assert "50.0% of the windows" in blend.describe(10)


def test_what_a_blend_cannot_be_is_said(prefix, tmp_path):
    folder = str(tmp_path / "a")
    with pytest.raises(ConfigError, match=f"text.blend: {folder} has weight 0; give a positive one, or leave the part out"):
        TextPart(folder, 0)
    with pytest.raises(ConfigError, match="no document of .* has min_length 1,000 tokens; the longest has 300"):
        training_windows(config(TextPart(folder, min_length=1000)))
    with pytest.raises(ConfigError, match="less than one window in 4,096"):
        training_windows(config(TextPart(folder), TextPart(folder, 1e-6)))
    with pytest.raises(ConfigError, match="long_share must be at least 0 and below 1, got 1"):
        TextSettings(long_share=1.0)
    with pytest.raises(ConfigError, match="most_documents 4 with packing stream"):
        TextSettings(most_documents=4)


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_no_label_is_the_beginning_of_another_piece_where_a_document_was_cut(tmp_path, packed, most):
    """Tokens of this dataset are their places in it; with a cap, what is not full ends in padding without a label."""
    lengths = LENGTHS * 4
    dataset = BestFitWindows(write(tmp_path / "train", lengths), LENGTH, seed=5, most_documents=most)
    ends = set(np.cumsum(lengths).tolist())
    cut, labels = 0, []
    for batch in itertools.islice(batches(dataset, 0, 1, packed_documents=packed), dataset.windows_per_epoch):
        for token, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()):
            if label == IGNORED:
                cut += token + 1 not in ends
                continue
            labels += [label] * (label not in ends)  # a document's first token may begin two pieces
            assert label == token + 1 or (token + 1 in ends and label in ends | {0} and not packed)
    assert cut > 0 and len(labels) == len(set(labels))
    missing = set(range(sum(lengths))) - {0} - ends - set(labels)
    assert len(missing) <= dataset.packing.left_out and "of padding" in dataset.describe(1)
    assert (dataset.packing.padding > 0) == (most is not None)
    pieces = [len(dataset.pieces(i)) for i in range(dataset.windows_per_epoch)]
    assert max(pieces) <= (most or len(lengths))
    for window in map(dataset.window, range(dataset.windows_per_epoch)):  # padding is a document of its own
        assert (len(window.tokens) - window.padding in window.document_starts) == (window.padding > 0)
    settings = config(TextPart(str(tmp_path)), packing="best_fit", most_documents=most)
    assert training_windows(settings).describe(1) == dataset.describe(1)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_an_epoch_has_every_document_once_whatever_divides_it(tmp_path, prefix, packing):
    """Ranks, micro-batches and threads that read ahead; the tokens of an epoch are the same set, none twice, none dropped."""
    settings = config(TextPart(str(tmp_path / "a")), packing=packing)
    epoch = training_windows(settings).windows_per_epoch
    wanted = None
    for ranks, size, threads in ((1, 1, False), (2, 3, True), (3, 2, False), (4, 1, True), (5, 4, True)):
        found = {}
        for rank in range(ranks):
            feed = batches(training_windows(settings), 0, size, rank, ranks)
            feed = ahead(feed, 2) if threads else feed
            for batch in itertools.islice(feed, -(-epoch // (ranks * size))):
                found |= dict(zip(batch["windows"].tolist(), batch["labels"].tolist()))
            feed.close()
        labels = [label for i in range(epoch) for label in found[i] if label != IGNORED]
        labels = sorted(label for label in labels if label not in STARTS)  # a document's first token may begin two pieces
        assert len(labels) == len(set(labels))
        assert wanted is None or labels == wanted
        wanted = labels
        documents = np.bincount(np.searchsorted(np.cumsum(LENGTHS), labels, side="right"), minlength=len(LENGTHS))
        missing = np.array(LENGTHS) - documents
        assert missing.min() >= 1 and missing.sum() <= LENGTH + 1 + len(LENGTHS)


def test_windows_of_64k_are_mostly_of_documents_as_long_and_say_so(tmp_path):
    """A text with too few long documents gives more of them; 0 leaves the text's own share."""
    (tmp_path / "long").mkdir()
    write(tmp_path / "long" / "train", [150_000] + [5_000] * 100)
    part, folder = TextPart(str(tmp_path / "long")), str(tmp_path / "long")
    windows = training_windows(config(part, length=65536))
    assert windows.long_share == pytest.approx(0.6, abs=1e-3)
    assert f"{folder}, documents of 65,536 tokens and more (60.0% of the windows)" in windows.describe(10)
    assert "100.0% of them in documents as long as a window" in windows.describe(10)
    stored = config(part, length=65536)
    stored.teacher_store = "store"  # of the windows as the text has them
    for settings in (config(part, length=65536, long_share=0.0), config(part, length=16384), stored):
        assert training_windows(settings).long_share == pytest.approx(150 / 650)
    assert training_windows(config(TextPart(folder, min_length=6000), length=65536)).long_share == 1  # no short one is used
