"""Text as users have it: every encoding and every damage is read, or named, counted and left out."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_hylo.cli.main import main
from megatron_hylo.config import ConfigError
from megatron_hylo.data import documents
from megatron_hylo.data import text_files as reader
from megatron_hylo.data.documents import Document, TextCheck, Unreadable
from megatron_hylo.data.inputs import read_documents
from megatron_hylo.data.preprocess import build_dataset, preprocess

GOOD = ["one café", "two 日本 \U0001f600", "three"]
LINES = [json.dumps({"text": text, "name": text}, ensure_ascii=False) for text in GOOD]
MANY = "".join(f"{line}\n" for line in LINES)


def texts(path: Path) -> list[str]:
    """Text of all documents; there must be nothing else."""
    return [document.text for document in read_documents(path)]


def dataset_texts(folder: Path, tokenizer) -> list[str]:
    """Texts of the training documents, decoded by transformers' tokenizer."""
    dataset = IndexedDataset(str(folder / "train"))
    return [tokenizer.decode(dataset[i][:-1]) for i in range(len(dataset))]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_every_encoding_with_a_mark_reads_as_python_decodes_it(tmp_path, encoding, end):
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # Python's codec of a named byte order writes none
    content = (mark + end.join(LINES)).encode(encoding)  # no line end after the last
    for name, data in (
        ("a.jsonl", content),
        ("a.jsonl.gz", gzip.compress(content)),
        ("gzip_inside.JSONL", gzip.compress(content)),
    ):
        (tmp_path / name).write_bytes(data)
        assert texts(tmp_path / name) == GOOD
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes((mark + end.join(GOOD)).encode(encoding))
    assert texts(tmp_path / "text") == ["\n".join(GOOD)]


BAD_LINES = {
    b'{"text": "caf\xe9"}': "invalid bytes",
    b'{"text": "\\ud83d"}': "half a surrogate pair",
    b'{"text": "\xed\xa0\xbd"}': "invalid bytes",
    b'{"text": "a"': "not JSON",
    b"\0\0\0\0": "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": "a", "n": ' + b"1" * 5000 + b"}": "not JSON",
    b'{"body": "a"}': 'no "text"',
    b'{"text": ["a"]}': '"text" is not a string',
    b'{"text": null}': '"text" is not a string',
    b'"a"': "not an object",
    b'{"text": " \\n"}': "empty document",
    b'{"text": "\\ufeff"}': "empty document",
    b"  ": "blank line",
}


def test_bad_lines_are_left_out_named_and_counted(tmp_path, tokenizer, caplog):
    file = tmp_path / "some.jsonl"
    file.write_bytes(b"\n".join([LINES[0].encode(), b'{"text": "\\ufeffsecond \\ud83d\\ude00"}', *BAD_LINES]))
    description = build_dataset(read_documents(file), tokenizer, tmp_path / "data", 0.0)
    assert dataset_texts(tmp_path / "data", tokenizer) == [GOOD[0], "second \U0001f600"]
    expected = {reason: list(BAD_LINES.values()).count(reason) for reason in BAD_LINES.values()}
    assert description.skipped == expected and description.replaced_documents == 0
    assert json.loads((tmp_path / "data" / "data.json").read_text())["skipped"] == expected
    assert f"{file} line 3: invalid bytes (at character 3)" in caplog.text
    assert f"2 documents are used; left out or changed: 2 x invalid bytes ({file} line 3, {file} line 5)" in caplog.text


def test_a_byte_order_mark_is_no_character_of_an_answer():
    """Places of answers move with the text, one that began at the mark but by none."""
    (found,) = TextCheck().usable([Document("s", "n", "\ufeffab cd", answers=((0, 3), (4, 6)))])
    assert [found.text[start:stop] for start, stop in found.answers] == ["ab", "cd"]


def test_a_check_that_goes_on_knows_what_could_be_used(monkeypatch):
    """Nothing but damage from the first document on is hopeless, after a good one it is not."""
    monkeypatch.setattr(documents, "HOPELESS", 3)
    bad = [Unreadable(str(number), "not JSON") for number in range(5)]
    former = TextCheck()
    assert len(list(former.usable([Document("s", "n", "text")]))) == 1
    assert not list(TextCheck("skip", former.state()).usable(bad))
    with pytest.raises(ConfigError, match="nothing of the first 3 documents can be used: 3 x not JSON"):
        list(TextCheck("skip", TextCheck().state()).usable(bad))


def test_a_rare_byte_can_be_replaced_as_python_does(tmp_path, tokenizer):
    raw = [b"caf\xe9 and \xf0\x9f\x98 and \xff\xfe", b"good"]
    file = tmp_path / "some.jsonl"
    file.write_bytes(b"\n".join(b'{"text": "%s", "name": "n\xff"}' % text for text in raw) + b'\n{"text": "half \\ud83d"}\n{')
    description = build_dataset(read_documents(file), tokenizer, tmp_path / "data", 0.0, on_bad_text="replace")
    assert dataset_texts(tmp_path / "data", tokenizer) == [*(t.decode(errors="replace") for t in raw), "half \ufffd"]
    assert description.replaced_documents == 2 and description.skipped == {"not JSON": 1}


@pytest.mark.parametrize("line", [line for line, reason in BAD_LINES.items() if not reason.startswith(("empty", "blank"))])
def test_error_on_bad_text_names_file_and_line_and_leaves_nothing(tmp_path, tokenizer, line):
    file = tmp_path / "some.jsonl"
    file.write_bytes(LINES[0].encode() + b"\n\n" + line)
    with pytest.raises(ConfigError, match=r"some\.jsonl line 3: "):
        build_dataset(read_documents(file), tokenizer, tmp_path / "data", 0.0, on_bad_text="error")
    assert [path.name for path in tmp_path.iterdir()] == ["some.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MANY.encode("utf-16-le"), "NUL bytes: a binary file, or UTF-16 without a byte order mark; convert it, e.g. iconv"),
        (b"PK\x03\x04\0\0", "NUL bytes: a binary file"),
        (json.dumps([{"text": "a"}]).encode(), "is a JSON array.*jq -c"),
        (json.dumps({"text": "a"}, indent=1).encode(), "JSON over several lines.*jq -c"),
        (b"", "there is no text in the documents"),
        (b"\n\n", r"no text in the documents: 2 x blank line \(.*line 1, .*line 2\)"),
        (b'{"body": "a"}\n' * 2000, r'nothing of the first 1,000 documents can be used: 1,000 x no "text"'),
        (b'\n{"body": "a"}', 'no text in the documents: 1 x blank line .* 1 x no "text"'),
    ],
)
def test_a_file_that_gives_nothing_is_an_error(tmp_path, tokenizer, content, message):
    (tmp_path / "some.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        build_dataset(read_documents(tmp_path / "some.jsonl"), tokenizer, tmp_path / "data", 0.0)


def test_a_cut_gzip_gives_what_is_there_and_says_where_it_ends(tmp_path, tokenizer, caplog):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": f"{i} {rng.bytes(50).hex()}"}) for i in range(2000)]
    packed = gzip.compress("\n".join(lines).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "damaged.jsonl.gz").write_bytes(packed[:60_000] + b"\xff" * 9 + packed[60_009:])
    for name in ("cut", "damaged"):
        *read, last = read_documents(tmp_path / f"{name}.jsonl.gz")
        assert [d.text for d in read[:500]] == [json.loads(line)["text"] for line in lines[:500]]
        assert last.where.endswith(f"line {len(read) + 1:,}") and last.reason == "the rest of the file cannot be read"
    description = build_dataset(read_documents(tmp_path / "cut.jsonl.gz"), tokenizer, tmp_path / "data", 0.0)
    assert description.skipped == {"the rest of the file cannot be read": 1} and "ended before" in caplog.text


def test_files_of_a_folder_that_are_no_text_are_named(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    (folder / "good.md").write_text("good\n")
    (folder / "deep" / "also.TXT").write_text("also")
    (folder / "picture.png").write_bytes(b"\x89")
    (folder / "._good.txt").write_bytes(b"\0\5\x16\7Mac OS X")
    (folder / "late.txt").write_bytes(b"a" * 5000 + b"\0")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "gone.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("name in Latin-1")
    description = build_dataset(read_documents(folder), tokenizer, tmp_path / "data", 0.0)
    assert sorted(dataset_texts(tmp_path / "data", tokenizer)) == ["also", "good\n", "name in Latin-1"]
    assert description.skipped == {"not text": 2, "not a file": 2, "invalid bytes": 1}
    assert f"{folder}/latin.txt: invalid bytes" in caplog.text and "1 files are not read" in caplog.text


def test_a_line_longer_than_memory_allows_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_CHARACTERS", 100)
    long = json.dumps({"text": "a" * 350})
    (tmp_path / "some.jsonl").write_text("\n".join([LINES[0], long, LINES[2], long]))
    first, second, third, last = read_documents(tmp_path / "some.jsonl")
    assert (first.text, third.text) == (GOOD[0], GOOD[2])
    assert second == Unreadable(f"{tmp_path / 'some.jsonl'} line 2", "longer than 100 characters") and last.where.endswith("4")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Knows two words and has no token for others: the Rust encoder raises, without saying at which document."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "end": 2}, unk_token="missing"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end")


def test_a_tokenizer_that_fails_on_some_documents_loses_only_these(tmp_path, caplog):
    many = [Document("made", str(i), "c a" if i in (3, 4, 1500) else "a b") for i in range(2000)]
    description = build_dataset(many, word_tokenizer(), tmp_path / "data", 0.0)
    assert description.train_documents == 1997 and description.skipped == {"tokenizer failed": 3}
    assert "made/1500: tokenizer failed (WordLevel error: Missing [UNK] token" in caplog.text
    with pytest.raises(ConfigError, match="nothing of the first 1,0.. documents can be used.*tokenizer failed"):
        build_dataset([Document("made", str(i), "c") for i in range(3000)], word_tokenizer(), tmp_path / "none", 0.0)
    silent = Tokenizer(models.BPE(vocab={"a": 0, "end": 1}, merges=[]))  # drops what it does not know, without a word
    silent = PreTrainedTokenizerFast(tokenizer_object=silent, eos_token="end")
    made = build_dataset([Document("made", "1", "日本"), Document("made", "2", "a")], silent, tmp_path / "silent", 0.0)
    assert made.train_documents == 1 and made.skipped == {"tokenizer failed": 1}


def test_documents_of_a_folder_and_of_a_jsonl(tmp_path):
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.md").write_text("B")
    (folder / "deep" / "a.TXT").write_text("A")
    assert list(read_documents(folder)) == [Document("text", "b.md", "B"), Document("text", "deep/a.TXT", "A")]
    lines = [{"text": "x\u2028y"}, {"source": "s", "name": "n", "text": "N"}]
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    first, second = read_documents(file)
    assert (first.source, first.text, len(first.name)) == ("some", "x\u2028y", 16) and second == Document("s", "n", "N")
    file.write_text(json.dumps(lines[0]) + "\n")
    assert next(read_documents(file)).name == first.name  # of the text alone, wherever it stands


def test_nothing_to_read_is_refused(tmp_path):
    (tmp_path / "a.pdf").touch()
    for path, message in (("", "holds no .txt"), ("a.pdf", "is not a .jsonl"), ("gone", "does not exist")):
        with pytest.raises(ConfigError, match=message):
            list(read_documents(tmp_path / path))
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8bno")
    (bad,) = read_documents(tmp_path / "a.jsonl.gz")
    assert bad.where == str(tmp_path / "a.jsonl.gz") and bad.reason == "file cannot be read"


def test_hylo_preprocess_says_what_it_left_out(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "hf")
    (tmp_path / "some.jsonl").write_bytes(MANY.encode() + b'{"text": "caf\xe9"}\n')
    command = ["preprocess", str(tmp_path / "some.jsonl"), str(tmp_path / "data"), "--tokenizer", str(tmp_path / "hf")]
    with pytest.raises(SystemExit) as exit:
        main([*command, "--on_bad_text", "error"])
    assert exit.value.code == 2 and not (tmp_path / "data").exists()
    with pytest.raises(SystemExit) as exit:
        main(command)
    assert exit.value.code == 0
    assert json.loads((tmp_path / "data" / "data.json").read_text())["skipped"] == {"invalid bytes": 1}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        preprocess(str(tmp_path / "some.jsonl"), str(tmp_path / "other"), str(tmp_path / "empty"))
