"""Whatever a run reads is verified before it trains: a flipped bit is named, so is JSON that was cut short."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.io import DamagedError
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.train.loop import train
from tests.conftest import tiny_config
from tests.train.runs import metrics


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [flip, cut])
@pytest.mark.parametrize(
    "name",
    ["data/train.bin", "data/train.idx", "data/heldout.bin", "data/data.json", "data/manifest.json", "model/hylo.json",
     "model/manifest.json", "model/weights/.metadata", "teacher/weights/.metadata"],
)  # fmt: skip
def test_damage_is_named_before_anything_is_trained(settings, material, tmp_path, name, spoil):
    config = settings()
    for field in ("data", "model", "teacher"):
        shutil.copytree(getattr(config, field), tmp_path / field)
        setattr(config, field, str(tmp_path / field))
    if name.endswith("manifest.json"):
        spoil = cut  # a bit of it is a bit of a hash, and the file that has it is named
    spoil(tmp_path / name)
    with pytest.raises(DamagedError, match=f"{tmp_path / name} "):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_runs_own_files_are_named_when_they_are_damaged(settings, tmp_path):
    config = settings(steps=1)
    train(config)
    run = Path(config.output)
    losses = metrics(run)
    cut(run / "quality.json")
    with pytest.raises(DamagedError, match=f"{run}/quality.json is not readable JSON.*; make it again"):
        train(config)
    shutil.rmtree(run / "model")
    with open(run / "metrics.jsonl", "ab") as file:  # what a file system may leave of a line after a power cut
        file.write(b"\x00" * 40 + b"\n")
    train(config)
    assert metrics(run) == losses
    (run / "config.json").write_text(json.dumps({})[:1])
    with pytest.raises(DamagedError, match=f"{run}/config.json is not readable JSON"):
        train(config)


def test_a_dataset_without_a_description_is_judged_by_its_tokens(settings, material, tmp_path):
    shutil.copytree(material.data, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()  # another program's
    (tmp_path / "data" / "data.json").unlink()
    train(settings(steps=1))
    train(settings(steps=1, data=str(tmp_path / "data"), output=tmp_path / "other"))
    assert metrics(tmp_path / "other") == metrics(tmp_path / "run")
    save_model(build_model(tiny_config("G-+-M-*-", vocab_size=100)), tmp_path / "small")
    with pytest.raises(ConfigError, match="100"):  # the text has tokens beyond this vocabulary
        train(
            settings("pretrain", steps=1, data=str(tmp_path / "data"), model=str(tmp_path / "small"), output=tmp_path / "third")
        )


def test_somebody_elses_file_in_an_old_checkpoint_is_kept(settings, tmp_path):
    config = settings(steps=3, checkpoint=dict(save_interval=1, keep=1, async_save=False))
    train(config)
    run = Path(config.output)
    (run / "checkpoints" / "step_00000003" / "notes.txt").write_text("a good one")
    train(settings(steps=4, checkpoint=dict(save_interval=1, keep=1, async_save=False)))
    assert (run / "checkpoints" / "step_00000003" / "notes.txt").is_file()
