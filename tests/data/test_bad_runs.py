"""Disks that fill and files that were cut: a clear sentence, and nothing lost."""

import resource
import signal

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.data import make_dataset as module
from megatron_hylo.data.packed import DocumentStore
from megatron_hylo.io import DamagedError
from tests.data.test_resume_preprocess import content, inputs, made

__all__ = ["inputs"]  # a fixture


def test_a_disk_that_fills_is_said_and_the_next_start_goes_on(tmp_path, inputs, monkeypatch, caplog):
    """A limit on the size of files stands for the disk: the kernel refuses the write in both."""
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 256)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, before[1]))
    try:
        with pytest.raises(ConfigError, match="make space, or look at your quota, and run again"):
            made(inputs, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.parts" / "state.json").is_file()
    caplog.set_level("INFO")
    made(inputs, tmp_path / "out")
    assert "going on with" in caplog.text
    made(inputs, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_cut_file_of_a_dataset_is_named(tmp_path, inputs, name, manifest):
    out = tmp_path / "out"
    made(inputs, out, max_documents=50, more_inputs=())
    (out / name).write_bytes((out / name).read_bytes()[:-3])
    if not manifest:
        (out / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
        DocumentStore(out / "train")
