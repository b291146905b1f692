"""Starts of `preprocess` that were killed go on, and make the same bytes; changed inputs and settings are noticed."""

import gzip
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.data import make_dataset as module
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.io.progress import show_progress
from tests.data.conftest import make_documents
from tests.forked import running

ROOT = Path(__file__).parents[2]
SLOW = """
import sys, time
from megatron_hylo.data import make_dataset as module
module.SAVE_SECONDS, module.BATCH_DOCUMENTS = 0.0, 64
from megatron_hylo.data.preprocess import preprocess
write, seconds = module._write, iter([0.02] * 40 + [600])  # it waits in the middle, however late it is killed
module._write = lambda *arguments: (time.sleep(next(seconds)), write(*arguments))
preprocess(sys.argv[1], sys.argv[2], sys.argv[3], 0.1, more_inputs=sys.argv[4:], workers=2)
"""


@pytest.fixture
def inputs(tmp_path, tokenizer):
    """A folder, plain and compressed lines with bad ones among them."""
    tokenizer.save_pretrained(tmp_path / "hf")
    (tmp_path / "text").mkdir()
    documents = make_documents(6000, words=8)
    for document in documents[:20]:
        (tmp_path / "text" / document.name).write_text(document.text)
    lines = [json.dumps({"text": document.text, "name": document.name}) for document in documents[20:]]
    lines[7], lines[2000] = '{"text": 3}', lines[2000][:-4]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:3000]) + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[3000:]).encode()))
    return [tmp_path / "text", tmp_path / "hf", tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]


def made(inputs, out, **changes):
    text, tokenizer, *more = inputs
    return preprocess(text, out, tokenizer, 0.1, **({"more_inputs": more, "workers": 1} | changes))


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def documents_saved(out):
    state = out.parent / f".{out.name}.parts" / "state.json"
    return json.loads(state.read_text())["state"]["taken"] if state.is_file() else 0


def test_a_killed_start_goes_on_and_makes_the_same_bytes(tmp_path, inputs, monkeypatch, caplog):
    """SIGKILL of one with two processes, then a stop of one with one; nothing is at the final place, and nothing is lost."""
    text, tokenizer, *more = inputs
    whole = made(inputs, tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", SLOW, text, out, tokenizer, *more]
    with running(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as child:
        while documents_saved(out) < 700:
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    killed = documents_saved(out)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".killed.lock", ".killed.parts"] and not out.exists()
    done = stopped(inputs, out, monkeypatch, after=20)
    assert 700 <= killed < done < whole.train_documents + whole.heldout_documents
    with open(tmp_path / ".killed.parts" / "train.bin", "ab") as file:
        file.write(b"written after the last save")
    with caplog.at_level(logging.INFO):
        assert made(inputs, out) == whole
    assert f"going on with {out} at document {done:,}" in caplog.text
    assert whole.skipped == {'"text" is not a string': 1, "not JSON": 1}
    assert content(out) == content(tmp_path / "whole")
    assert not (tmp_path / ".killed.parts").exists()


class Stop(Exception):
    """Ends a start in the middle."""


def stopped(inputs, out, monkeypatch, after=3, **changes):
    """Start and stop after a number of batches; the number of documents that were saved."""
    counted = iter(range(10**6))

    def write(*arguments):
        if next(counted) == after:
            raise Stop
        original(*arguments)

    original = module._write
    with monkeypatch.context() as patch:
        patch.setattr(module, "SAVE_SECONDS", 0.0)
        patch.setattr(module, "BATCH_DOCUMENTS", 64)
        patch.setattr(module, "_write", write)
        with pytest.raises(Stop):
            made(inputs, out, **changes)
    return documents_saved(out)


def test_one_document_that_is_left_is_divided_as_in_a_whole_start(tmp_path, inputs, monkeypatch):
    """The first batch decided for all; what a later start reads is no small set of its own, and is counted with the former."""
    lines = [json.dumps({"text": document.text, "name": document.name}) for document in make_documents(70)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    few = [tmp_path / "few.jsonl", inputs[1]]
    assert stopped(few, tmp_path / "out", monkeypatch, after=1, max_documents=65) == 64
    with monkeypatch.context() as patch:
        patch.setattr(module, "BATCH_DOCUMENTS", 64)
        assert made(few, tmp_path / "out", max_documents=65) == made(few, tmp_path / "whole", max_documents=65)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("changed", ["setting", "input", "none", "damaged"])
def test_changed_inputs_and_settings_begin_anew_and_say_so(tmp_path, inputs, monkeypatch, caplog, changed):
    assert stopped(inputs, tmp_path / "out", monkeypatch) == 192
    changes = {"on_bad_text": "replace"} if changed == "setting" else {}
    if changed == "input":
        with open(inputs[2], "a") as file:
            file.write('{"text": "one more"}\n')
    if changed == "damaged":
        (tmp_path / ".out.parts" / "train.bin").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        made(inputs, tmp_path / "out", **changes)
    assert ("going on with" in caplog.text) == (changed == "none")
    said = {
        "setting": "had other inputs or settings (on_bad_text: skip -> replace); beginning anew",
        "input": f"had other inputs or settings (inputs: {inputs[2]} has changed); beginning anew",
    }
    assert said.get(changed, "") in caplog.text and ("beginning anew" in caplog.text) == (changed in said)
    made(inputs, tmp_path / "whole", **changes)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("changed", ["tokenizer", "chat_template", "key"])
def test_another_tokenizer_template_or_key_begins_anew(tmp_path, inputs, monkeypatch, caplog, changed):
    """Ids and text of the documents that are there would be others."""
    chats = [[{"role": "user", "content": document.text}] for document in make_documents(70)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat, "key": chat * 2}) for chat in chats))
    few, template = [tmp_path / "chats.jsonl", inputs[1]], inputs[1] / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert stopped(few, tmp_path / "out", monkeypatch, after=1, chat=True) == 64
    if changed == "chat_template":
        template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    elif changed == "tokenizer":
        text = json.loads((inputs[1] / "tokenizer.json").read_text())
        vocabulary = text["model"]["vocab"]
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
        (inputs[1] / "tokenizer.json").write_text(json.dumps(text))
    key = "key" if changed == "key" else None
    made(few, tmp_path / "out", chat=True, key=key)
    assert f"had other inputs or settings ({changed}" in caplog.text and "beginning anew" in caplog.text
    made(few, tmp_path / "whole", chat=True, key=key)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_progress_says_the_share_of_the_input_and_goes_on_from_there(tmp_path, inputs, monkeypatch, capsys):
    monkeypatch.setattr("megatron_hylo.io.progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 64)
    stopped(inputs, tmp_path / "out", monkeypatch, after=20)
    made(inputs, tmp_path / "out", track=show_progress)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenising, from")]
    assert "left" in lines[1] and lines[-1].endswith(tuple("0123456789"))
    start = int(lines[0].split("from ")[1].split("%")[0])
    assert 10 < start < 60


def test_what_cannot_be_asked_for_is_refused(tmp_path, inputs):
    with pytest.raises(ConfigError, match="loss answers is for chat data"):
        made(inputs, tmp_path / "out", loss="answers")
    with pytest.raises(ConfigError, match="workers must be at least 1, got 0"):
        made(inputs, tmp_path / "out", workers=0)
