"""Quotations: the text's own tokens again, found by decoding windows and searching the text by hand."""

import random

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from megatron_hylo.config.recall import DEFAULT_TASKS, RECALL_TASKS, RecallSettings
from megatron_hylo.data import recall_quotes
from megatron_hylo.data.encode import plain_encoder
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.data.recall import RecallWindows
from megatron_hylo.data.recall_wording import QUOTATION_FRAMES
from megatron_hylo.data.windows import Window
from tests.data.conftest import WORDS

END = 0  # <|endoftext|>


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory):
    """(tokens a window) -> windows of tokenised text; a third of the sentences occur again and again."""
    generator = random.Random(1)
    again = [" ".join(generator.choices(WORDS, k=12)).capitalize() + "." for _ in range(5)]
    prefix = tmp_path_factory.mktemp("text") / "train"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in (300, 5, 40, 1, 120, 2, 500, 12, 60) * 2:
        sentences = [
            generator.choice(again) if generator.random() < 0.3 else " ".join(generator.choices(WORDS, k=9)).capitalize() + "."
            for _ in range(length)
        ]
        text = "".join(sentence + generator.choice((" ", "\n")) for sentence in sentences)
        builder.add_document(np.array([*tokenizer.encode(text), END], dtype=np.int32), [len(tokenizer.encode(text)) + 1])
    builder.finalize(f"{prefix}.idx")
    return lambda length: PackedDataset(str(prefix), length, seed=5)


class Stub:
    """(tokens a window) -> windows that `made` makes of that number."""

    windows_per_epoch, masked, long_share = 100, False, 0.0

    def __init__(self, made):
        self.made = made

    def __call__(self, length):
        self.length = length
        return self

    def window(self, index):
        return self.made(self.length)


NUMBERED = Stub(lambda length: Window(1000 + np.arange(length + 1), np.array([0])))  # each token has an id of its own


def make(source, tokenizer, length=4096, share=0.4, tasks=("quotation",), within=False):
    return RecallWindows(source, length, RecallSettings(share, list(tasks)), plain_encoder(tokenizer), 7, within)


def runs(window):
    """(begin, end) of each answer."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (window.answers > 0).astype(int), [0]]))).tolist()
    return list(zip(edges[::2], edges[1::2]))


def occurrences(tokens, lead) -> int:
    """How often `lead` is in `tokens`, one place after another."""
    tokens, lead = tokens.tolist(), lead.tolist()
    return sum(tokens[i : i + len(lead)] == lead for i in range(len(tokens) - len(lead) + 1))


def check_quotations(windows, index, tokenizer) -> int:
    """Check each quotation of a window against its text; how many there are."""
    base, mine = windows.source.window(index), windows.window(index)
    assert len(mine.tokens) == windows.sequence_length + 1
    kept = mine.source_places >= 0
    assert mine.tokens[kept].tolist() == base.tokens.tolist()
    assert mine.source_places[kept].tolist() == list(range(len(base.tokens)))
    borders = [*base.document_starts.tolist(), *([] if base.cuts is None else base.cuts.tolist())]
    spans, count = [], 0
    for start, stop in runs(mine):
        source = start - int(mine.answers[start])
        assert (mine.answers[start:stop] == np.arange(start, stop) - source).all()
        if mine.source_places[source] < 0:
            continue  # answers of a fact
        count += 1
        size = stop - start
        assert 4 <= size <= 16
        (lead,) = [
            n for n in range(6, 17)
            if mine.tokens[start - n : start].tolist() == mine.tokens[source : source + n].tolist()
            and mine.tokens[start:stop].tolist() == mine.tokens[source + n : source + n + size].tolist()
        ]  # fmt: skip
        end = source + lead + size
        assert not kept[start - lead : stop].any() and end <= start - lead  # a later, inserted copy
        place = int(mine.source_places[source])
        assert mine.source_places[source:end].tolist() == list(range(place, place + lead + size))  # nothing inserted inside
        span = base.tokens[place : place + lead + size]
        assert not windows._special & set(span.tolist())
        assert not any(place < border < place + lead + size for border in borders)
        following = mine.source_places[stop:]
        asked = int(following[following >= 0][0])
        assert occurrences(base.tokens[:asked], span[:lead]) == 1
        if windows.within_documents:
            of = [int(np.searchsorted(mine.document_starts, at, side="right")) for at in (source, start)]
            assert of[0] == of[1]
        begin = start - lead
        while not kept[begin - 1] and not mine.answers[begin - 1]:
            begin -= 1
        before, after = tokenizer.decode(mine.tokens[begin : start - lead]), mine.tokens[stop : stop + 20]
        assert any(
            before.endswith(f"\n{frame[0]}") and tokenizer.decode(after).startswith(frame[1]) for frame in QUOTATION_FRAMES
        )
        spans.append((place, place + lead + size))
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))
    return count


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("tasks", [("quotation",), RECALL_TASKS])
@pytest.mark.parametrize("length", [512, 4096])
def test_quotations_go_on_as_the_text_does_by_searching_it(source, tokenizer, within, tasks, length):
    """All that is promised of a quotation, in windows of a real tokenizer with many short documents and repeated sentences."""
    windows = make(source, tokenizer, length, 0.4, tasks, within)
    found = [check_quotations(windows, index, tokenizer) for index in range(12)]
    expected = 12 * windows.room / 60 if tasks == ("quotation",) else 12 * windows.room / 60 / 40
    assert sum(found) > expected, found


def test_what_can_be_quoted_is_what_a_search_finds():
    """Text of three tokens, where leads occur often: every first token and length, against the conditions by brute force."""
    generator = np.random.default_rng(0)
    tokens, places, special = generator.integers(5, 8, size=220), [30, 90, 91, 150], {9}
    tokens[[60, 130]] = 9
    base = Window(tokens, np.array([0, 110]), cuts=np.array([50]))
    found = []
    for first in range(200):
        for lead, answer, room in ((6, 4, 0), (7, 9, 3), (10, 5, 60), (16, 4, 1)):
            end = first + lead + answer
            if (asked := end + room) > 219:
                continue
            span = tokens[first:end]
            inside = any(first < place < end for place in (*places, 0, 50, 110))
            can = not inside and 9 not in span and occurrences(tokens[:asked], span[:lead]) == 1
            taken = recall_quotes.Sources(base, special, places).take(
                first, recall_quotes.Quotation("", "", lead, answer), asked
            )
            assert (taken is not None) == can and (not can or taken.tolist() == span.tolist())
            found.append(can)
    assert 100 < sum(found) < len(found) - 100


def test_repeated_text_is_not_quoted(tokenizer, source):
    """A window of few words over and over has no quotation; it is filled with facts, and ends."""

    same = Stub(lambda length: Window(np.resize(np.array([70, 71, 72]), length + 1), np.array([0])))
    window = make(same, tokenizer, 1024).window(0)
    assert len(window.tokens) == 1025 and not window.answers.any()
    mixed = make(same, tokenizer, 1024, tasks=RECALL_TASKS).window(0)
    assert mixed.answers.any()


def test_short_documents_get_fewer(tokenizer):
    """In documents of 20 tokens almost none can be quoted, in longer ones what lies between cuts."""

    def cut_in(length):  # documents of so many tokens, cut in their middle
        return Stub(
            lambda count: Window(
                1000 + np.arange(count + 1), np.arange(0, count, length), cuts=np.arange(length // 2, count, length)
            )
        )

    assert sum(len(runs(make(cut_in(20), tokenizer, 1024, within=True).window(i))) for i in range(5)) == 0
    for within in (False, True):
        windows = make(cut_in(100), tokenizer, 2048, within=within)
        assert sum(check_quotations(windows, index, tokenizer) for index in range(5)) > 20


def test_distances_reach_from_a_line_to_the_whole_window(tokenizer):
    """Every octave above the longest quotation up to the window holds answers; half of the distances are log-uniform."""

    windows = make(NUMBERED, tokenizer, 8192, share=0.1)
    found = np.concatenate([[w.answers[start] for start, _ in runs(w)] for w in (windows.window(i) for i in range(40))])
    assert found.max() > 0.8 * 8192
    assert all(((found >= low) & (found < 2 * low)).sum() > 12 for low in (64, 128, 256, 512, 1024, 2048, 4096))
    assert 0.35 < (found < 1024).mean() < 0.6  # uniform alone: .12


def test_quotations_are_functions_of_seed_and_number(source, tokenizer):
    one, other = (make(source, tokenizer, tasks=RECALL_TASKS) for _ in range(2))
    forward = [one.window(i) for i in range(4)]
    for i in reversed(range(4)):
        again = other.window(i)
        assert again.tokens.tolist() == forward[i].tokens.tolist() and again.answers.tolist() == forward[i].answers.tolist()


def test_special_tokens_are_not_quoted(source, tokenizer):
    """A token that is told to be special is in no quotation, though it is in the text."""
    windows = make(source, tokenizer)
    windows._special = windows._special | {int(np.bincount(windows.source.window(0).tokens).argmax())}
    assert sum(check_quotations(windows, index, tokenizer) for index in range(6)) > 0


def test_no_space_is_put_where_a_quotation_ends():
    """A SentencePiece tokenizer begins each text with a mark; closings have none."""
    vocabulary = {"<unk>": 0, "▁": 1} | {chr(c): c for c in (10, *range(33, 127))}
    encoder = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    encoder.pre_tokenizer = pre_tokenizers.Split("", "isolated")

    window = RecallWindows(NUMBERED, 2048, RecallSettings(0.5, ["quotation"]), encoder, 7).window(0)
    found = runs(window)
    assert len(found) > 10
    assert {int(window.tokens[stop]) for _, stop in found} == {ord(after[0]) for _, after in QUOTATION_FRAMES}


def test_tries_are_bounded(source, tokenizer, monkeypatch):
    """A quotation that finds no text is left out after a few draws."""
    calls = []
    monkeypatch.setattr(recall_quotes.Sources, "take", lambda *_: calls.append(1))
    window = make(source, tokenizer, 1024).window(0)
    assert not window.answers.any() and len(window.tokens) == 1025
    assert len(calls) <= recall_quotes.TRIES * 1024 * 0.4 / 12


def test_quotation_is_no_default():
    assert RecallSettings().tasks == list(DEFAULT_TASKS) and "quotation" not in DEFAULT_TASKS and len(DEFAULT_TASKS) == 6
    RecallSettings(0.1, ["quotation"])
