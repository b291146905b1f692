"""Forms of input: compressed files, patterns, keys, Parquet, chats; each gives the documents that its plain form gives."""

import bz2
import gzip
import json
import lzma
import os

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_hylo.config import ConfigError
from megatron_hylo.data.chat import chat_field
from megatron_hylo.data.documents import Document, TextField, Unreadable
from megatron_hylo.data.inputs import InputReader, read_documents
from megatron_hylo.data.lengths import BOUNDS, length_table, long_shares
from megatron_hylo.data.preprocess import preprocess
from tests.data.conftest import make_documents

COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
ROWS = [{"body": document.text, "name": document.name} for document in make_documents(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
BODY = TextField("body")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_reads_as_the_plain_one(tmp_path, suffix):
    """Lines with a byte order mark, and a text file; a cut one gives what is there and says where it ends."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + LINES))
    plain = list(read_documents(tmp_path / "a.jsonl", BODY))
    assert len(plain) == 300 and all(isinstance(document, Document) for document in plain)
    assert list(read_documents(tmp_path / f"a.jsonl{suffix}", BODY)) == plain
    (tmp_path / f"b.txt{suffix}").write_bytes(COMPRESS[suffix](LINES))
    assert [document.text.encode() for document in read_documents(tmp_path / f"b.txt{suffix}")] == [LINES]
    noise = np.random.default_rng(0).bytes(1_500_000 if suffix == ".bz2" else 200_000).hex()  # bz2 has blocks of 900 kB
    whole = COMPRESS[suffix](LINES + json.dumps({"body": noise}).encode())
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])
    *found, last = read_documents(tmp_path / f"cut.jsonl{suffix}", BODY)
    assert isinstance(last, Unreadable) and last.reason in ("the rest of the file cannot be read", "not JSON")


def test_patterns_and_several_inputs_are_read_in_order(tmp_path):
    for name, row in zip("bac", ROWS):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    found = list(InputReader([tmp_path / "c.jsonl", tmp_path / "[ab].jsonl"], BODY).items())
    assert [document.text for document in found] == [ROWS[i]["body"] for i in (2, 1, 0)]
    with pytest.raises(ConfigError, match="no file is named like"):
        list(InputReader([tmp_path / "*.zst"], BODY).items())


def test_a_key_that_is_not_there_is_counted_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"text": "y"}\n{"body": 3}\n')
    one, *bad = read_documents(tmp_path / "a.jsonl", BODY)
    assert isinstance(one, Document) and one.text == "x"
    assert [(item.where[-6:], item.reason) for item in bad] == [
        ("line 2", 'no "body"'), ("line 3", '"body" is not a string'),
    ]  # fmt: skip


def test_parquet_rows_are_the_documents_of_the_same_lines(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"body": None}]), tmp_path / "a.parquet")
    *found, last = InputReader([tmp_path / "a.parquet"], BODY).items()
    assert found == list(read_documents(tmp_path / "a.jsonl", BODY))
    assert last.where.endswith("row 301") and last.reason == '"body" is not a string'
    with pytest.raises(ConfigError, match="no column 'text'; its columns are body, name"):
        list(InputReader([tmp_path / "a.parquet"], TextField()).items())
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:1000])
    (bad,) = InputReader([tmp_path / "b.parquet"], BODY).items()
    assert bad.where == str(tmp_path / "b.parquet") and bad.reason == "file cannot be read"


def test_items_from_any_place_on_are_those_behind_it(tmp_path, monkeypatch):
    """Places are files of folders, lines, compressed or not, and rows in batches of several."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("megatron_hylo.data.inputs.ROWS", 4)
    (tmp_path / "folder").mkdir()
    for row in ROWS[:3]:
        (tmp_path / "folder" / row["name"]).write_text(row["body"])
    lines = LINES.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines[3:6], b"\n", b"no JSON\n", lines[6]]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[7:10])))
    parquet.write_table(pyarrow.Table.from_pylist([*ROWS[10:16], {"body": None}, *ROWS[16:19]]), tmp_path / "c.parquet")
    given = [tmp_path / name for name in ("folder", "a.jsonl", "b.jsonl.gz", "c.parquet")]
    reader = InputReader(given, BODY)
    whole, places = [], [(0, 0)]
    for item in reader.items():
        whole.append(item)
        places.append(reader.position)
    assert sum(isinstance(item, Document) for item in whole) == 19 and len(whole) == 22
    for number, place in enumerate(places):
        assert list(InputReader(given, BODY).items(place)) == whole[number:]


def test_a_file_that_was_written_again_is_another(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (before,) = (file.identity for file in InputReader([tmp_path / "a.jsonl"], BODY).files)
    os.utime(tmp_path / "a.jsonl", (1, 1))  # as large as before
    (after,) = (file.identity for file in InputReader([tmp_path / "a.jsonl"], BODY).files)
    assert before[:2] == after[:2] == (str(tmp_path / "a.jsonl"), len(LINES)) and before != after


def test_chats_are_written_by_the_template_and_its_special_tokens_are_tokens(tmp_path, tokenizer):
    """Ids are transformers' own; a conversation of another form is left out, by line."""
    with pytest.raises(ConfigError, match="no chat_template"):
        chat_field(tokenizer, "messages")
    tokenizer = type(tokenizer).from_pretrained(_saved(tokenizer, tmp_path / "tokenizer"))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('role') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    chats = [[{"role": "user", "content": f"{i} the state"}, {"role": "assistant", "content": "is small"}] for i in range(20)]
    lines = [{"messages": chat} for chat in chats] + [{"messages": [{"role": "x", "content": "y"}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = preprocess(tmp_path / "a.jsonl", tmp_path / "data", tmp_path / "tokenizer", 0, chat=True)
    assert said.train_documents == 20 and said.skipped == {'"messages" does not fit the chat template': 1}
    data = IndexedDataset(str(tmp_path / "data" / "train"))
    for i, chat in enumerate(chats):
        wanted = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
        assert wanted.count(1) == 2
        assert data[i].tolist() == [*wanted, 0]


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_the_table_is_the_share_of_tokens_in_longer_documents(tmp_path):
    lengths = np.array([100, 1024, 1025, 5000, 200_000])
    shares = long_shares(lengths)
    assert shares[0] == pytest.approx((1025 + 5000 + 200_000) / lengths.sum())
    assert shares[3:] == [pytest.approx(200_000 / lengths.sum())] * 5
    assert len(shares) == len(BOUNDS) == 8 and BOUNDS[-1] == 131072
    assert length_table(lengths).splitlines()[1].split()[-1] == f"{200_000 / lengths.sum():.1%}"
