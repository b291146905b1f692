"""Recall exercises in windows: the text stays, answers are where the marks say, and nothing but the number decides."""

import re
from itertools import islice

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_hylo.config import ConfigError
from megatron_hylo.config.recall import RECALL_TASKS, RecallSettings
from megatron_hylo.data import recall_wording
from megatron_hylo.data.encode import plain_encoder
from megatron_hylo.data.packed import IGNORED, PackedDataset, batches
from megatron_hylo.data.recall import RecallWindows
from megatron_hylo.data.whole_documents import BestFitWindows
from tests.data.recall_facts import answers_of, parse_fact
from tests.data.test_packed import write

TEXT, LENGTH = 1000, 2048  # ids of the text are from TEXT on, none of the tokenizer's
DOCUMENTS = [3000, 700, 20, 1, 5000, 64, 2, 9000]


@pytest.fixture
def source(tmp_path):
    """(tokens a window) -> windows of a dataset whose every token has an id of its own, in order."""
    prefix = write(tmp_path / "train", DOCUMENTS)

    class Shifted(PackedDataset):
        def window(self, index):
            window = super().window(index)
            return type(window)(window.tokens + TEXT, window.document_starts)

    return lambda length: Shifted(prefix, length, seed=5)


def make(source, tokenizer, length=LENGTH, share=0.5, tasks=RECALL_TASKS, within=False, **settings):
    return RecallWindows(source, length, RecallSettings(share, list(tasks), **settings), plain_encoder(tokenizer), 7, within)


@pytest.mark.parametrize("within", [False, True])
def test_a_window_is_the_sources_with_texts_between(source, tokenizer, within):
    """Without the inserted tokens it is the source's window; document starts stay at their tokens."""
    windows = make(source, tokenizer, within=within)
    for index in (0, 3, 40):
        base, mine = windows.source.window(index), windows.window(index)
        kept = np.flatnonzero(mine.tokens >= TEXT)
        assert len(mine.tokens) == LENGTH + 1
        assert mine.tokens[kept].tolist() == base.tokens.tolist()
        assert np.flatnonzero(mine.source_places >= 0).tolist() == kept.tolist()
        assert mine.source_places[kept].tolist() == list(range(len(base.tokens)))
        if within:
            assert mine.document_starts.tolist() == [0, *kept[base.document_starts[1:]]]  # a fact may be before all text


@pytest.mark.parametrize("task", RECALL_TASKS)
def test_marks_are_on_the_answers_and_facts_come_before(source, tokenizer, task):
    """The text of each marked run is the answer of a question whose facts are above it, at the distance that is given."""
    windows = make(source, tokenizer, 4096, tasks=[task])
    seen = several = 0
    for index in range(3):
        window = windows.window(index)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], (window.answers > 0).astype(int), [0]])))
        for start, stop in zip(edges[::2], edges[1::2]):
            answer = tokenizer.decode(window.tokens[start:stop]).strip(" .,\"'|)}<\n")
            ends = [tokenizer.decode(window.tokens[[place]]).strip(" .,\"'|)}<\n") for place in (start, stop - 1)]
            assert all(ends)  # a mark on a token next to the answer
            values = answers_of(answer)
            first = start - int(window.answers[start])  # the fact's first token
            assert (window.answers[start:stop] == np.arange(start, stop) - first).all()
            between = window.tokens[first:start]
            text = tokenizer.decode(between[between < TEXT])
            seen += 1
            if task == "counting":
                event = re.search(r"At the (.*), (.*)\.", text.splitlines()[1])
                assert text.count(event[0]) == recall_wording.NUMBERS.index(answer)
            elif task == "several_values":
                values, lines = [value.lower() for value in values], text.lower().split("\n")
                like = [line for line in lines if line in [lines[1].replace(values[0], value) for value in values]]
                assert like == [lines[1].replace(values[0], value) for value in values]
            else:
                assert any(value in text.strip().splitlines()[0] for value in values)
                assert all(value in text for value in values)
                several += len(values) > 1
    assert seen > 5
    assert (several > 0) == (task in ("several_keys", "variable_chain"))


def test_within_documents_no_fact_is_in_another_document(source, tokenizer):
    """Between a fact and its answer no document begins; without the setting some do."""
    crossing = {}
    for within in (False, True):
        windows = make(source, tokenizer, 4096, within=within)
        found = [windows.window(i) for i in range(16)]
        crossing[within] = sum(
            int(((w.document_starts > at - w.answers[at]) & (w.document_starts <= at)).any())
            for w in found for at in np.flatnonzero(w.answers)
        )  # fmt: skip
        if within:  # nor behind a document's end token
            assert all((w.tokens[w.document_starts[1:] - 1] >= TEXT).all() for w in found)
    assert crossing[True] == 0 < crossing[False]


def test_distances_reach_from_a_line_to_the_whole_window(source, tokenizer):
    """Every octave from 128 tokens up to the window holds answers."""
    windows = make(source, tokenizer, 8192, share=0.3)
    found = np.concatenate([w.answers[w.answers > 0] for w in (windows.window(i) for i in range(12))])
    assert found.max() > 0.8 * 8192
    assert all(((found >= low) & (found < 2 * low)).sum() > 30 for low in (128, 256, 512, 1024, 2048, 4096))


def test_some_facts_begin_the_window_and_are_asked_at_its_end(source, tokenizer):
    """Answers over nearly the whole window occur, and a window often begins with a fact, which its distances count from."""
    windows = make(source, tokenizer, 4096, share=0.2, tasks=["key_value"])
    found = [windows.window(i) for i in range(30)]
    begins = [window for window in found if window.tokens[0] < TEXT]
    whole = sum(int((window.answers > 0.9 * 4096).any()) for window in found)
    assert 10 < len(begins) < 30  # not all of them
    assert whole > 10
    assert all((window.answers == np.arange(len(window.answers)))[window.answers > 0].any() for window in begins[:5])


def test_the_fact_that_begins_a_window_is_often_one_that_nothing_asks_about(source, tokenizer):
    """Its place says nothing about what is asked: any of several facts may be the one at the start."""
    windows = make(source, tokenizer, 4096, share=0.2, tasks=["several_keys"])
    found = [window for window in (windows.window(i) for i in range(80)) if window.tokens[0] < TEXT]
    asked = [bool((window.answers == np.arange(len(window.answers)))[window.answers > 0].any()) for window in found]
    assert len(found) > 20 and 0.1 < np.mean(asked) < 0.8


def test_a_token_that_begins_the_text_stays_the_first(source, tokenizer):
    """A fact at the start stands behind a special token, which models saw at the start alone."""
    windows = make(source, tokenizer, 4096, share=0.2, tasks=["key_value"])
    base = windows.source.window(0).tokens[0]
    windows._special = {int(base)}
    found = [window for window in (windows.window(i) for i in range(30)) if (window.answers > 0.9 * 4096).any()]
    assert int(windows.window(0).tokens[0]) == int(base)
    assert found


def test_the_latest_of_several_facts_is_seldom_the_right_one(source, tokenizer):
    """Facts of one exercise stand in any order, so training does not reward an answer by the latest."""
    windows = make(source, tokenizer, 8192, share=0.8, tasks=["several_keys"])
    latest = []
    for window in (windows.window(i) for i in range(6)):
        for start in np.flatnonzero((window.answers > 0) & (np.roll(window.answers, 1) == 0)):
            between = window.tokens[start - window.answers[start] : start]
            text = tokenizer.decode(between[between < TEXT])
            wording, _ = parse_fact(text.split("\n")[1])
            others = [parse_fact(line) for line in text.split("\n")[2:]]
            latest.append(wording not in [other[0] for other in others if other is not None])
    assert len(latest) > 100
    assert np.mean(latest) < 0.25


def test_windows_are_functions_of_seed_and_number(source, tokenizer):
    """The order of reading, another object and another division over ranks give the same; another number or seed does not."""
    one, other = make(source, tokenizer), make(source, tokenizer)
    forward = [one.window(i) for i in range(6)]
    for i in reversed(range(6)):
        assert other.window(i).tokens.tolist() == forward[i].tokens.tolist()
    for ranks, size in ((1, 3), (2, 1)):
        feeds = [batches(make(source, tokenizer), 0, size, rank, ranks) for rank in range(ranks)]
        for _ in range(0, 6, size * ranks):
            for feed in feeds:
                batch = next(feed)
                for row, number in enumerate(batch["windows"].tolist()):
                    assert batch["input_ids"][row].tolist() == forward[number].tokens[:-1].tolist()
                    assert batch["answers"][row].tolist() == forward[number].answers[1:].tolist()
    again = make(source, tokenizer).window(one.windows_per_epoch)  # an epoch later the exercises are others
    one.seed = 8  # of another run
    fresh = [w.tokens[w.tokens < TEXT].tolist() for w in (forward[0], again, one.window(0))]
    assert fresh[0] != fresh[1] and fresh[0] != fresh[2]


@pytest.mark.parametrize("packed", [False, True])
def test_facts_and_questions_without_cross_entropy_are_no_labels_and_nothing_else_changes(source, tokenizer, packed):
    """Labels of the exercises' tokens but answers are ignored, those of the facts that fill a window too."""
    usual, other = (make(source, tokenizer, within=packed, cross_entropy=which) for which in ("all", "answers"))
    for whole, mine in zip(*(islice(batches(one, 0, 3, 0, 1, packed), 5) for one in (usual, other))):
        windows = [usual.window(i) for i in whole["windows"].tolist()]
        tokens, answers = (np.stack([getattr(w, name) for w in windows]) for name in ("tokens", "answers"))
        left_out = torch.from_numpy((tokens < TEXT) & (answers == 0))[:, 1:].reshape(whole["labels"].shape)
        assert mine["labels"].tolist() == whole["labels"].masked_fill(left_out, IGNORED).tolist()
        assert whole.keys() == mine.keys()
        assert all(whole[name].equal(mine[name]) for name in whole.keys() - {"labels"})


def test_places_where_documents_were_cut_stay_without_a_label(tokenizer, tmp_path):
    """A token that does not follow the one before is none that an exercise moves another one to."""
    prefix = write(tmp_path / "train", [4000, 900, 300, 450] * 6)
    windows = make(lambda length: BestFitWindows(prefix, length, seed=5), tokenizer)
    cuts = 0
    for index in range(windows.windows_per_epoch):
        base, mine = windows.source.window(index), windows.window(index)
        assert mine.source_places[mine.unlabelled].tolist() == base.unlabelled.tolist()
        cuts += len(base.unlabelled)
    assert cuts > 3


def test_a_tokenizer_that_begins_every_text_with_a_mark_puts_none_in_the_middle(source):
    """SentencePiece's dummy prefix belongs to a text's start, not before each fact."""
    from tokenizers import normalizers

    vocabulary = {"<unk>": 0, "▁": 1} | {chr(c): c for c in (10, *range(33, 127))}
    encoder = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    encoder.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    windows = RecallWindows(source, LENGTH, RecallSettings(0.5), encoder, 7)
    tokens = windows.window(0).tokens
    begins = np.flatnonzero((tokens[1:] < TEXT) & (tokens[:-1] >= TEXT)) + 1
    assert len(begins) > 3
    assert set(tokens[begins].tolist()) == {10}


def test_what_cannot_be_is_refused(source, tokenizer):
    with pytest.raises(ConfigError, match="is 26 tokens, a fact and its question need 64: give a share of at least 0.25"):
        make(source, tokenizer, 256, share=0.1)
    with pytest.raises(ConfigError, match="recall.tasks has \\['riddle'\\]"):
        RecallSettings(0.1, ["riddle"])
    with pytest.raises(ConfigError, match="recall.share must be"):
        RecallSettings(1.0)


def test_only_the_padding_of_windows_of_whole_documents_is_not_learnt(tokenizer, tmp_path):
    """Exercises in a window that does not fill are learnt as in any other, wherever they stand."""
    prefix = write(tmp_path / "train", [400, 350, 300, 450] * 6)
    windows = make(lambda length: BestFitWindows(prefix, length, seed=5, most_documents=2), tokenizer)
    batch = next(batches(windows, 0, 4))
    padded = 0
    for row in range(4):
        base, places = windows.source.window(row), windows.window(row).source_places[1:]
        padding = places >= len(base.tokens) - base.padding
        padded += int(padding.sum())
        assert batch["loss_mask"][row].tolist() == (~padding).tolist()
        assert ((batch["labels"][row].numpy() == IGNORED) == padding).all()
    assert padded > 100
