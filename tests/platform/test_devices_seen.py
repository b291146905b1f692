"""GPUs that are there and are not seen, or that do not suffice, are spoken of. Without a GPU, drivers' files are made."""

import logging

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.platform import distributed


@pytest.mark.parametrize(
    "files, variable, cuda, words",
    [
        (
            ["nvidia0", "nvidia1", "nvidiactl"],
            None,
            "13.0",
            "none of this machine's NVIDIA GPUs (2; the driver may be too old for",
        ),
        (["nvidia0"], "3", "13.0", "NVIDIA GPUs (1; CUDA_VISIBLE_DEVICES is 3)"),
        (["nvidia0"], "0", None, "is built without CUDA"),
        (["nvidia0"], "", "13.0", ""),
        (["nvidia0"], "-1", "13.0", ""),
        (["nvidiactl", "null"], None, "13.0", ""),
    ],
)
def test_gpus_that_pytorch_does_not_see_are_said(files, variable, cuda, words, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    found = distributed.unseen_gpus()
    assert words in found and bool(found) == bool(words)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.unseen_gpus() == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is seen")
def test_a_run_on_the_cpu_of_a_machine_with_gpus_warns_once(one_rank, tmp_path, monkeypatch, caplog):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    distributed._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "megatron_hylo.platform"):
        distributed.initialize()
        distributed.initialize()
    assert [record.message[:34] for record in caplog.records] == ["running on the CPU, as PyTorch see"]


def test_more_ranks_than_gpus_are_refused(one_rank, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(ConfigError, match="number 5 of this machine.*2 visible GPUs; .*torchrun --nproc-per-node 2"):
        distributed.initialize()
