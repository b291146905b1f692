"""Chat data of which the answers alone are learnt: which tokens count, from the template to the labels of a batch."""

import contextlib
import itertools
import json

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_hylo.config import ConfigError
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.data import dataset_files
from megatron_hylo.data.chat import chat_field
from megatron_hylo.data.dataset_files import DatasetFiles
from megatron_hylo.data.documents import Unreadable
from megatron_hylo.data.encode import plain_encoder
from megatron_hylo.data.packed import IGNORED, DocumentStore, PackedDataset, batches
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.data.recall import RecallWindows
from megatron_hylo.data.whole_documents import BestFitWindows
from megatron_hylo.io import DamagedError

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{{ '\\n' }}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
FORGETFUL = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else 'as before' }}")


def chats(count):
    """Conversations of one to three answers, each of another length; the second of every pair begins with a system message."""
    found = []
    for i in range(count):
        messages = [{"role": "system", "content": "be small"}] * (i % 2)
        for turn in range(1 + i % 3):
            messages += [
                {"role": "user", "content": f"{i} the state? " * (turn + 1)},
                {"role": "assistant", "content": f"état {turn} is {'small ' * (i % 5)}so {i}"},
            ]
        found.append(messages)
    return found


@pytest.fixture
def templated(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    made = type(tokenizer).from_pretrained(tmp_path / "tokenizer")
    made.chat_template = PLAIN
    return made


def write(tmp_path, templated, conversations, **options):
    templated.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in conversations))
    return preprocess(tmp_path / "a.jsonl", tmp_path / "data", tmp_path / "tokenizer", 0, chat=True, overwrite=True, **options)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_answers_with_their_end_and_nothing_else_are_learnt(tmp_path, templated, template):
    """The oracle writes the conversation out by hand, piece by piece."""
    templated.chat_template = template
    made = write(tmp_path, templated, chats(60), loss="answers")
    assert made.train_documents == 60 and made.loss == "answers"
    store, data = DocumentStore(tmp_path / "data" / "train"), IndexedDataset(str(tmp_path / "data" / "train"))
    for number, chat in enumerate(chats(60)):
        text, wanted = "", ""
        for message in chat:
            turn = f"{message['content']}<|im_end|>"
            text += f"<|im_start|>{message['role']}\n{turn}\n"
            wanted += turn if message["role"] == "assistant" else ""
        ids = data[number]
        assert templated.decode(ids[:-1]) == text
        mask = store.loss_mask(number, 0, len(ids))
        assert templated.decode(ids[mask]) == wanted
        for start in range(len(ids) - 9):  # an answer may begin before a piece, and end behind it
            assert store.loss_mask(number, start, 9).tolist() == mask[start : start + 9].tolist()


def test_what_cannot_be_masked_rightly_is_left_out_and_said(tmp_path, templated):
    question, answer = chats(1)[0]
    templated.chat_template = FORGETFUL
    render = chat_field(templated, "messages", True).text
    assert render([question, answer])[1] is not None
    rewritten = render([question, answer, question, answer])
    assert rewritten == Unreadable("", "answers cannot be told apart", "the template rewrites turns before message 2")
    templated.chat_template = PLAIN.replace("{{ m.content }}", "{{ m.content | upper }}")
    assert render([question, answer]).detail == "the template does not write message 2 as it is"
    templated.chat_template = PLAIN
    assert render([question]).reason == "no answer to learn"
    made = write(tmp_path, templated, [[question], [question, answer], [question, answer]], loss="answers")
    assert made.train_documents == 2 and made.skipped == {"no answer to learn": 1}
    assert write(tmp_path, templated, [[question], [question, answer]]).train_documents == 2
    assert not list((tmp_path / "data").glob("*.answers.npy"))


def test_white_space_that_a_message_ends_in_is_learnt_and_a_templates_is_not(templated):
    question, answer = {"role": "user", "content": "so?"}, {"role": "assistant", "content": "so it is \n"}
    render = chat_field(templated, "messages", True).text
    for template, learnt in (("{{ m.content }}", "so it is \n"), ("{{ m.content }}<|im_end|>\n", "so it is \n<|im_end|>")):
        templated.chat_template = f"{{% for m in messages %}}{template}{{% endfor %}}"
        text, spans = render([question, answer])
        assert [text[start:stop] for start, stop in spans] == [learnt]


def test_files_that_are_copied_in_chunks_are_whole(tmp_path, monkeypatch):
    """Tokens and places of answers of several chunks, the last of them short."""
    monkeypatch.setattr(dataset_files, "COPY", 7)
    (tmp_path / "made").mkdir()
    with contextlib.closing(DatasetFiles(tmp_path, ("train", "heldout"), np.dtype(np.uint16), True)) as files:
        for number in range(10):
            files.add("train", "", np.arange(number * 3, number * 3 + 3, dtype=np.uint16).tobytes(), [(0, 1), (2, 3)])
            files.add("heldout", "", np.array([99, 100 + number], np.uint16).tobytes(), None)
        files.save({})
        files.finish(tmp_path / "made")
        tokens = np.concatenate(list(files.token_chunks())).tolist()
    assert tokens == [*range(30), *(token for number in range(10) for token in (99, 100 + number))]
    for split, spans in (("train", [(3 * i + k, 3 * i + k + 1) for i in range(10) for k in (0, 2)]),
                         ("heldout", [(2 * i, 2 * i + 2) for i in range(10)])):  # fmt: skip
        assert np.load(tmp_path / "made" / f"{split}.answers.npy").T.tolist() == [list(span) for span in spans]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("source", [PackedDataset, BestFitWindows, "recall"])
def test_labels_of_a_batch_are_the_answers_alone(tmp_path, templated, source, packed):
    """In windows of every kind; with recall the exercises' answers too."""
    write(tmp_path, templated, chats(90), loss="answers")
    prefix, data = tmp_path / "data" / "train", IndexedDataset(str(tmp_path / "data" / "train"))
    wanted = np.zeros(3000, np.int64)
    store = DocumentStore(prefix)
    for number in range(90):
        ids = data[number]
        wanted += np.bincount(ids[1:][store.loss_mask(number, 1, len(ids) - 1)], minlength=3000)
    if source == "recall":
        settings = RecallSettings(0.4)
        dataset = RecallWindows(lambda n: PackedDataset(prefix, n, 5), 400, settings, plain_encoder(templated), 5, packed)
    else:
        dataset = source(prefix, 64, seed=5)
    assert dataset.masked
    found, exercises = np.zeros(3000, np.int64), 0
    for batch in itertools.islice(batches(dataset, 0, 1, packed_documents=packed), dataset.windows_per_epoch):
        labels, mask = batch["labels"], batch["loss_mask"]
        assert mask.dtype == torch.bool and mask.shape == labels.shape
        assert (labels[~mask] == IGNORED).all()
        if source == "recall":
            asked = batch["answers"] > 0
            assert (labels[asked] != IGNORED).all()
            exercises += int(asked.sum())
            labels = labels[~asked]
        found += np.bincount(labels[labels != IGNORED], minlength=3000)
    assert (exercises > 100) == (source == "recall")
    short = wanted - found
    assert short.min() >= 0 and short.sum() < (500 if source == "recall" else 200) < wanted.sum()


def test_padding_behind_answers_is_not_learnt(tmp_path, templated):
    """In a window that is not full, and where exercises are put into it, of which a batch does not know its padding."""
    write(tmp_path, templated, chats(90), loss="answers")
    padded = 0
    source = lambda length: BestFitWindows(tmp_path / "data" / "train", length, seed=5, most_documents=1)  # noqa: E731
    windows = RecallWindows(source, 400, RecallSettings(0.4), plain_encoder(templated), 5)
    for number, batch in enumerate(itertools.islice(batches(windows, 0, 1), 20)):
        base, places = windows.source.window(number), windows.window(number).source_places[1:]
        padding = places >= len(base.tokens) - base.padding
        assert not batch["loss_mask"][0][padding].any()
        padded += int(padding.sum())
    assert padded > 100


def test_a_missing_file_of_answers_is_damage(tmp_path, templated):
    write(tmp_path, templated, chats(6), loss="answers")
    (tmp_path / "data" / "train.answers.npy").unlink()
    with pytest.raises((DamagedError, ConfigError), match=r"answers.npy"):
        DocumentStore(tmp_path / "data" / "train")
