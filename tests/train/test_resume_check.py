"""A run is resumed with the same content wherever it lies; other content and settings are refused, or asked for.

Oracles: the manifest of a copy, a run that was never interrupted, the formula of the learning rate.
"""

import json
import logging
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.config.renamed import RENAMED
from megatron_hylo.config.text import TextPart, TextSettings
from megatron_hylo.config.train import AlignSettings, KLSettings, OptimizerSettings, TrainConfig
from megatron_hylo.data import packed, recall, recall_text
from megatron_hylo.data.preprocess import build_dataset
from megatron_hylo.data.training_windows import training_windows, windows_identity
from megatron_hylo.io.identity import content_identity
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.train.checkpoint import latest_checkpoint
from megatron_hylo.train.dry_run import dry_run
from megatron_hylo.train.loop import train
from megatron_hylo.train.resume_check import Resume, check_resume
from tests.data.conftest import make_documents
from tests.train.runs import metrics, weights

CONSTANT = OptimizerSettings(lr=2e-3, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0.0, min_lr_ratio=1.0)


@pytest.fixture
def started(settings, material, tmp_path):
    """Settings of a run that was started: data and teacher in folders of its own, as copies."""
    for name in ("data", "teacher"):
        shutil.copytree(getattr(material, name), tmp_path / name)
    config = settings(
        "align", data=str(tmp_path / "data"), teacher=str(tmp_path / "teacher"), second_model=str(material.student)
    )
    check_resume(config, Path(config.output)).record(0)
    return config


def test_the_same_content_goes_on_at_any_path(started, tmp_path, monkeypatch):
    run = Path(started.output)
    monkeypatch.chdir(tmp_path)
    os.symlink(tmp_path / "data", tmp_path / "mount")
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere" / "copy")
    places = ("data", f"{started.data}/", "./data", "mount", "elsewhere/copy")
    for place in places:
        check_resume(replace(started, data=place), run).record(0)
    shutil.rmtree(started.data)
    check_resume(replace(started, data="elsewhere/copy"), run).record(0)
    history = json.loads((run / "history.json").read_text())
    assert history["changes"] == []
    assert history["inputs"]["data"] == {"path": "elsewhere/copy", "identity": content_identity("elsewhere/copy")}
    assert set(history["inputs"]) == {"model", "second_model", "teacher", "data"}


def test_a_model_made_again_is_the_same_and_one_changed_weight_is_not(material, tmp_path):
    model = load_model(material.student)
    save_model(model, tmp_path / "again", provenance={"from": "elsewhere"})
    assert content_identity(tmp_path / "again") == content_identity(material.student)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    save_model(model, tmp_path / "other")
    assert content_identity(tmp_path / "other") != content_identity(material.student)
    (tmp_path / "again" / "manifest.json").unlink()  # then files are read
    assert content_identity(tmp_path / "again") == content_identity(material.student)


def test_other_content_at_the_same_path_is_refused_and_recorded_where_allowed(started, tokenizer, material):
    run = Path(started.output)
    build_dataset(make_documents(61), tokenizer, started.data, heldout_fraction=0.1, overwrite=True)
    with pytest.raises(ConfigError, match=r"was started with data = .*content .* now .*--allow_change data"):
        check_resume(started, run)
    allowed = replace(started, allow_change="data, max_skipped_steps", max_skipped_steps=9)
    check_resume(allowed, run).record(3)
    changes = json.loads((run / "history.json").read_text())["changes"]
    assert [(c["key"], c["step"]) for c in changes] == [("data", 3), ("max_skipped_steps", 3)]
    assert (changes[1]["from"], changes[1]["to"]) == (3, 9) and changes[1]["user"] and changes[1]["time"]
    assert json.loads((run / "config.json").read_text())["max_skipped_steps"] == 9
    check_resume(replace(allowed, allow_change=""), run)  # what was asked for once is the run's
    shutil.rmtree(started.teacher)
    shutil.copytree(material.student, started.teacher)
    with pytest.raises(ConfigError, match="was started with teacher"):
        check_resume(replace(allowed, allow_change=""), run)
    check_resume(replace(allowed, allow_change=["teacher"]), run)


def test_other_exercises_or_another_loss_of_them_are_refused_unless_allowed(started):
    changed = replace(started, recall=RecallSettings(cross_entropy="answers"))
    with pytest.raises(ConfigError, match="recall.cross_entropy = all, now answers; .*--allow_change recall.cross_entropy"):
        check_resume(changed, Path(started.output))
    allowed = check_resume(replace(changed, allow_change="recall.cross_entropy"), Path(started.output))
    assert allowed.changes == [{"key": "recall.cross_entropy", "from": "all", "to": "answers"}]


def test_a_blend_is_compared_by_what_its_folders_hold(settings, material, tokenizer, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(material.data, tmp_path / name)
    (tmp_path / "two").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "two")

    def blend(*parts: tuple[str, float], **changes) -> TrainConfig:
        """A run of a blend of these (folder, weight)."""
        return settings(text=TextSettings([TextPart(str(tmp_path / name), weight) for name, weight in parts]), **changes)

    started = blend(("one", 1.0), ("two", 3.0))
    run = Path(started.output)
    check_resume(started, run).record(0)
    assert check_resume(blend(("one", 1.0), ("moved", 3.0)), run).changes == []
    with pytest.raises(ConfigError, match=r"text.blend = .*one x 1, .*two x 3 .*now .*two x 2 .*--allow_change text.blend"):
        check_resume(blend(("one", 1.0), ("two", 2.0)), run)
    build_dataset(make_documents(61), tokenizer, tmp_path / "two", heldout_fraction=0.1, overwrite=True)
    with pytest.raises(
        ConfigError, match=r"was started with text.blend = .*two x 3 \(content .* now .*--allow_change text.blend"
    ):
        check_resume(started, run)
    check_resume(replace(started, allow_change="text.blend"), run).record(2)
    assert check_resume(started, run).changes == []


def in_a_run(config: TrainConfig) -> Resume:
    """Compare a start as `train` does."""
    resume = check_resume(config, Path(config.output))
    resume.check_windows(windows_identity(training_windows(config)))
    return resume


RECALL = RecallSettings(share=0.5, tasks=["passkey"])


def other_wording(monkeypatch):
    """One question of the exercises has another word."""
    first, *others = recall_text.SECRET_WORDINGS
    changed = ((first[0], (first[1][0].replace("Someone", "Somebody"), *first[1][1:])), *others)
    monkeypatch.setattr(recall_text, "SECRET_WORDINGS", changed)


def other_places(monkeypatch):
    """Exercises begin at a window's start more often."""
    monkeypatch.setattr(recall, "AT_START", 0.9)


def other_order(monkeypatch):
    """Windows come in another order."""
    monkeypatch.setattr(packed, "WINDOW_ORDER", 7)


@pytest.mark.parametrize(
    ("version", "key", "what"),
    [
        (other_wording, "recall", "recall exercises"),
        (other_places, "recall", "recall exercises"),
        (other_order, "text", "text"),
    ],
)
def test_other_windows_of_the_same_settings_are_refused_unless_allowed(version, key, what, settings, monkeypatch):
    """Another version of the package makes them, say."""
    config = settings(sequence_length=128, recall=RECALL)
    in_a_run(config).record(0)
    assert in_a_run(replace(config, extend_tokens=10_000)).changes[0]["key"] == "train_tokens"
    version(monkeypatch)
    with pytest.raises(
        ConfigError, match=rf"{config.output} learnt from other training windows .* their {what} differ, .*{key}$"
    ):
        in_a_run(config)
    wrong = {what: said for what, said, well in dry_run(config).checks if not well}
    assert f"their {what} differ" in wrong["run folder"]
    in_a_run(replace(config, allow_change=key)).record(3)
    history = json.loads((Path(config.output) / "history.json").read_text())
    assert [(change["key"], change["step"]) for change in history["changes"]] == [(key, 3)]
    assert in_a_run(config).changes == []


def test_another_tokenizer_of_the_same_text_makes_other_exercises(settings, material, tmp_path):
    shutil.copytree(material.data, tmp_path / "data")
    config = settings(data=str(tmp_path / "data"), sequence_length=128, recall=RECALL)
    in_a_run(config).record(0)
    file = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
    file.write_text(json.dumps(tokenizer))
    (tmp_path / "data" / "manifest.json").unlink()  # changed on purpose
    with pytest.raises(
        ConfigError, match=r"their recall exercises differ, by the tokenizer in .*data, .*--allow_change recall$"
    ):
        in_a_run(config)


def test_windows_of_settings_that_may_change_are_taken(settings):
    config = settings(sequence_length=128, recall=RECALL)
    in_a_run(config).record(0)
    changed = replace(config, recall=replace(RECALL, share=0.6), allow_change="recall.share")
    in_a_run(changed).record(4)
    assert in_a_run(replace(changed, allow_change="")).changes == []


def test_a_run_that_kept_no_windows_takes_those_of_now(settings, monkeypatch, caplog):
    config = settings(sequence_length=128, recall=RECALL)
    check_resume(config, Path(config.output)).record(0)
    in_a_run(config).record(1)
    assert "did not keep which training windows it learns from" in caplog.text
    other_wording(monkeypatch)
    with pytest.raises(ConfigError, match="learnt from other training windows"):
        in_a_run(config)


def test_training_compares_windows_before_it_reads_weights(settings, monkeypatch):
    config = settings(sequence_length=128, recall=RECALL)
    train(config)
    other_wording(monkeypatch)
    monkeypatch.setattr("megatron_hylo.train.loop.build_run", lambda *given, **named: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="learnt from other training windows"):
        train(replace(config, extend_tokens=2 * config.train_tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "TEACHER"}, "was started with model .* use another output .* its checkpoints are of that model"),
        ({"second_model": None}, "second_model"),
        ({"align": AlignSettings("ild")}, "align.loss = mse, now ild; use another output"),
        ({"global_batch_size": 8}, "its position in the data counts batches"),
        ({"optimizer": replace(CONSTANT, mixer_lr=None)}, "mixers must keep a learning rate of their own"),
    ],
)
def test_what_checkpoints_are_made_of_cannot_change(started, changes, message):
    keys = ["model", "second_model", "align", "global_batch_size", "optimizer"]
    changes = {name: started.teacher if value == "TEACHER" else value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=message):
        check_resume(replace(started, allow_change=keys, **changes), Path(started.output))


def test_a_key_that_is_no_setting_is_refused_with_the_one_meant(settings):
    with pytest.raises(ConfigError, match="'lr' is no setting of a run; did you mean optimizer.lr"):
        settings(allow_change="lr")
    with pytest.raises(ConfigError, match="did you mean .*max_skipped_steps"):
        settings(allow_change=["max_skiped_steps"])


def test_a_run_of_a_version_without_identities(started, tokenizer, tmp_path, caplog):
    """Its inputs are taken as they are, once, and said so; a path that is written otherwise is compared if that can be."""
    run = Path(started.output)
    (run / "history.json").unlink()
    with caplog.at_level(logging.WARNING):
        check_resume(started, run)
    assert "did not keep what its inputs hold: model, second_model, teacher, data taken as they are now" in caplog.text
    shutil.copytree(started.data, tmp_path / "copy")
    build_dataset(make_documents(61), tokenizer, tmp_path / "other", heldout_fraction=0.1)
    check_resume(replace(started, data=str(tmp_path / "copy")), run)
    with pytest.raises(ConfigError, match="was started with data"):
        check_resume(replace(started, data=str(tmp_path / "other")), run)
    check_resume(started, run).record(0)
    caplog.clear()
    check_resume(started, run)
    assert not caplog.text
    (run / "history.json").unlink()
    shutil.rmtree(started.data)
    with pytest.raises(ConfigError, match="is not there any more.*cannot be compared"):
        check_resume(replace(started, data=str(tmp_path / "copy")), run)


def test_another_teacher_behind_the_same_address_is_refused(settings, tmp_path):
    config = settings(teacher=None, teacher_address="node7:29600")
    run = Path(config.output)
    first = check_resume(config, run)
    first.check_remote("a" * 64)
    first.record(0)
    moved = check_resume(replace(config, teacher_address="node8:29600"), run)
    moved.check_remote("a" * 64)
    with pytest.raises(ConfigError, match="learnt from another teacher .content aaaaaaaaaaaa"):
        check_resume(config, run).check_remote("b" * 64)
    asked = check_resume(replace(config, allow_change="teacher_address"), run)
    asked.check_remote("b" * 64)
    asked.record(4)
    check_resume(config, run).check_remote("b" * 64)


@pytest.mark.parametrize("distributed", [True, False])
def test_training_longer_equals_a_run_that_was_long_from_the_start(settings, tmp_path, distributed, caplog):
    """With a constant learning rate, bit for bit: the optimizer's state is kept, though the shorter run had ended."""
    optimizer = replace(CONSTANT, use_distributed_optimizer=distributed)
    whole = settings("pretrain", steps=6, output=tmp_path / "whole", optimizer=optimizer)
    grown = settings("pretrain", steps=3, output=tmp_path / "grown", optimizer=optimizer)
    train(whole)
    train(grown)
    assert latest_checkpoint(tmp_path / "grown").name == "step_00000003"
    more = whole.train_tokens - grown.train_tokens
    longer = replace(grown, train_tokens=whole.train_tokens) if distributed else replace(grown, extend_tokens=more)
    train(longer)
    assert metrics(tmp_path / "grown") == metrics(tmp_path / "whole")
    mine, theirs = weights(tmp_path / "grown" / "model"), weights(tmp_path / "whole" / "model")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    (change,) = json.loads((tmp_path / "grown" / "history.json").read_text())["changes"]
    assert (change["key"], change["step"], change["to"]) == ("train_tokens", 3, whole.train_tokens)
    written = (tmp_path / "grown" / "model" / "manifest.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        train(longer)  # finished now, as a job that is put back into the queue finds it
    assert "is already trained; give --extend_tokens N to train on" in caplog.text
    assert (tmp_path / "grown" / "model" / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="train_tokens = 384, now 192; give --extend_tokens 192 as well .* --model .*step_0"):
        train(grown)
    with pytest.raises(ConfigError, match="extend_tokens must be at least 0"):
        replace(grown, extend_tokens=-1)


@pytest.mark.parametrize("distributed", [True, False])
def test_a_changed_learning_rate_follows_the_formula_of_the_longer_schedule(settings, tmp_path, distributed, caplog):
    optimizer = OptimizerSettings(lr=2e-3, mixer_lr=4e-3, warmup_ratio=0.0, use_distributed_optimizer=distributed)
    config = settings("pretrain", steps=2, optimizer=optimizer)
    train(config)
    raised = replace(optimizer, lr=1e-3, mixer_lr=6e-3, weight_decay=0.2)
    longer = replace(config, train_tokens=2 * config.train_tokens, optimizer=raised)
    with pytest.raises(ConfigError, match=r"optimizer.lr = 0.002, now 0.001.*--allow_change optimizer.lr"):
        train(longer)
    with caplog.at_level(logging.WARNING):
        train(replace(longer, allow_change="optimizer"))
    assert "goes on to step 4 from its checkpoint of step 2" in caplog.text
    assert "learning rate at step 2: 0.0005, where the schedule so far has 0 (now warm-up to step 0" in caplog.text
    run = Path(config.output)
    for name, peaks in (("rest", (2e-3, 1e-3)), ("mixers", (4e-3, 6e-3))):
        wanted = [peaks[0] * (1 + math.cos(math.pi * step / 2)) / 2 for step in (0, 1)]
        wanted += [peaks[1] * (1 + math.cos(math.pi * step / 4)) / 2 for step in (2, 3)]
        assert list(metrics(run, f"learning_rate_{name}").values()) == pytest.approx(wanted, rel=1e-6)


def test_a_checkpoint_without_manifest_is_said_and_the_one_before_goes_on(settings, tmp_path, caplog):
    config = settings("pretrain", steps=4, checkpoint=dict(save_interval=2, keep=9))
    train(config)
    run = Path(config.output)
    whole = metrics(run)
    shutil.rmtree(run / "model")
    (run / "checkpoints" / "step_00000004" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        train(config)
    assert "step_00000004 has no manifest.json" in caplog.text and "goes on at step 2, not 4" in caplog.text
    assert metrics(run) == whole
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept[:2] == ["step_00000002", "step_00000004"] and kept[2].startswith("unfinished_step_00000004")


@pytest.mark.parametrize("packed_documents", [False, True])
def test_normalised_squares_do_not_depend_on_the_micro_batch_size(settings, tmp_path, packed_documents):
    losses = []
    for size in (1, 4):
        config = settings(
            "align", steps=2, output=tmp_path / str(size), micro_batch_size=size, packed_documents=packed_documents
        )
        train(config)
        losses.append([*metrics(tmp_path / str(size)).values(), *metrics(tmp_path / str(size), "gradient_norm").values()])
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)


def test_a_run_folder_with_the_names_of_an_earlier_version_goes_on(started):
    """Its settings are compared under their present names, which its files have from then on."""
    run = Path(started.output)
    file = run / "config.json"
    saved = json.loads(file.read_text())
    for name, new in RENAMED.items():
        group, _, key = new.rpartition(".")
        saved[name] = saved[group][key] if group else saved[key]
    for group in ("distil", "align", "checkpoint", "logging", "profile", "rope_scaling"):
        del saved[group]
    file.write_text(json.dumps(saved))
    change = {"time": "", "user": "", "step": 0, "key": "hidden_weight", "from": 1.0, "to": 1.0}
    history = json.loads((run / "history.json").read_text())
    (run / "history.json").write_text(json.dumps(history | {"changes": [change]}))
    with pytest.raises(ConfigError, match=r"started with align\.loss = mse, now ild"):
        check_resume(replace(started, align=AlignSettings("ild")), run)
    with pytest.raises(ConfigError, match=r"distil\.ce_weight = 0\.0, now 0\.5; .* by --allow_change distil\.ce_weight"):
        check_resume(replace(started, distil=KLSettings(ce_weight=0.5)), run)
    check_resume(started, run).record(0)
    assert json.loads(file.read_text())["align"]["loss"] == "mse" and not RENAMED.keys() & json.loads(file.read_text()).keys()
    assert [change["key"] for change in json.loads((run / "history.json").read_text())["changes"]] == ["align.hidden_weight"]
