"""Two students aligned in one run end as they would each alone: weights, metrics, checkpoints, evaluation.

Oracle: two runs of one student each over the same data.
"""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_hylo.cli.main import EXIT_STOPPED
from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.config.train import OptimizerSettings
from megatron_hylo.io import verify_manifest
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.description import read_description
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.train.loop import train
from tests import held
from tests.conftest import tiny_config
from tests.parity.worker import job, launch
from tests.train.conftest import VOCABULARY
from tests.train.runs import metrics, relative_difference, start_train, weights

RESULTS = (("model", ""), ("second_model", "second_"))  # folder of a run, prefix of its metrics


@pytest.fixture(scope="module")
def students(one_rank, tmp_path_factory) -> tuple[str, str]:
    """An all-MLA and an all-linear model folder."""
    root = tmp_path_factory.mktemp("pure")
    for seed, (name, symbol) in enumerate((("mla", "+"), ("linear", "G"))):
        torch.manual_seed(seed)
        save_model(build_model(tiny_config(f"{symbol}-" * 4, vocab_size=VOCABULARY)), root / name)
    return str(root / "mla"), str(root / "linear")


def assert_equal_runs(pair: Path, alone: list[Path]) -> None:
    """Everything a pair's run holds of either student is, bit for bit, what the run of that student alone holds."""
    for (folder, prefix), single in zip(RESULTS, alone):
        verify_manifest(pair / folder)
        mine, theirs = weights(pair / folder), weights(single / "model")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        for name in ("loss", "gradient_norm", "heldout_perplexity", "heldout_kl"):
            assert metrics(pair, f"{prefix}{name}") == metrics(single, name)
        assert read_description(pair / folder)[1] == read_description(single / "model")[1]
        quality = json.loads((pair / f"{prefix}quality.json").read_text())
        assert quality == json.loads((single / "quality.json").read_text())


@pytest.mark.parametrize(("loss", "precision"), [("mse", "bf16"), ("mse", "fp32"), ("ild", "fp32")])
def test_a_pair_equals_two_runs_bit_for_bit_with_clipping(settings, students, tmp_path, loss, precision):
    # both students' norms are far above it, so a norm of the two together would clip otherwise
    optimizer = OptimizerSettings(lr=2e-3, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0.0, clip_grad=1e-3)

    def run(name: str, **models) -> Path:
        config = settings(
            "align", steps=5, output=tmp_path / name, eval_interval=2, optimizer=optimizer,
            precision=precision, **models, align=dict(loss=loss))  # fmt: skip
        quality = train(config)
        assert quality == train(config)  # finished: read, not repeated
        return tmp_path / name

    pair = run("pair", model=students[0], second_model=students[1])
    alone = [run(f"alone{i}", model=folder) for i, folder in enumerate(students)]
    assert_equal_runs(pair, alone)
    assert all(norm > 1e-2 for _, prefix in RESULTS for norm in metrics(pair, f"{prefix}gradient_norm").values())
    assert [load_model(pair / folder).config.hylo.mixers for folder, _ in RESULTS] == ["++++", "GGGG"]
    if loss == "mse":
        per_layer = metrics(pair, "second_loss_per_layer")
        assert per_layer == pytest.approx({step: value / 4 for step, value in metrics(pair, "second_loss").items()}, rel=1e-6)
        log = (pair / "log.txt").read_text()
        assert "loss: squared error of a layer's mixer output / the teacher's energy" in log and " a layer)  lr " in log


def test_interrupt_saves_both_and_the_same_command_resumes_bit_for_bit(settings, students, tmp_path):
    models = dict(model=students[0], second_model=students[1], precision="bf16")
    stopped = settings("align", steps=24, output=tmp_path / "stopped", **models)
    process = start_train(stopped, held.step(20))
    written = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (written.is_file() and written.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_STOPPED, output
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    verify_manifest(checkpoint)
    assert not (tmp_path / "stopped" / "model").exists() and not (tmp_path / "stopped" / "second_model").exists()

    train(stopped)
    whole = settings("align", steps=24, output=tmp_path / "whole", **models)
    train(whole)
    for name in ("loss", "second_loss", "second_gradient_norm"):
        assert metrics(tmp_path / "stopped", name) == metrics(tmp_path / "whole", name)
    for folder, _ in RESULTS:
        assert relative_difference(weights(tmp_path / "stopped" / folder), weights(tmp_path / "whole" / folder))[0] == 0


@pytest.mark.multirank
def test_a_pair_on_two_ranks_equals_two_runs_there_and_resumes_on_one(settings, students, tmp_path):
    parallelisms = {"dp2": {}, "tp2_sp": dict(tensor_model_parallel_size=2, sequence_parallel=True)}

    def config(name: str, groups: dict, **models):
        # adam_eps above rounding errors: Adam's first steps are signs of gradients otherwise
        optimizer = OptimizerSettings(lr=2e-3, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0, adam_eps=1e-3)
        return settings(
            "align", steps=4, output=tmp_path / name, micro_batch_size=1, optimizer=optimizer,
            parallel=ParallelConfig(**groups), **models, checkpoint=dict(save_interval=2))  # fmt: skip

    both = dict(model=students[0], second_model=students[1])
    jobs = []
    for parallelism, groups in parallelisms.items():
        jobs.append(job("train", config(f"{parallelism}_pair", groups, **both)))
        jobs += [job("train", config(f"{parallelism}_{i}", groups, model=folder)) for i, folder in enumerate(students)]
    launch(jobs, 2, tmp_path)
    for parallelism in parallelisms:
        assert_equal_runs(tmp_path / f"{parallelism}_pair", [tmp_path / f"{parallelism}_{i}" for i in (0, 1)])
        saved = tmp_path / f"{parallelism}_pair" / "checkpoints" / "step_00000002"
        shutil.copytree(saved, tmp_path / f"{parallelism}_one" / "checkpoints" / saved.name)
        train(config(f"{parallelism}_one", {}, **both))
        assert list(metrics(tmp_path / f"{parallelism}_one")) == [3, 4]
        for folder, _ in RESULTS:
            here, there = (weights(tmp_path / f"{parallelism}_{name}" / folder) for name in ("one", "pair"))
            difference, where = relative_difference(here, there)
            assert difference < 1e-5, f"{parallelism}: {where}"


def test_what_two_students_cannot_do_is_refused(settings, students, one_rank, tmp_path):
    with pytest.raises(ConfigError, match="second_model is for stage align alone.*stage distil trains one model"):
        settings("distil", second_model=students[1])
    save_model(build_model(tiny_config("G-G-", vocab_size=VOCABULARY)), tmp_path / "shallow")
    with pytest.raises(ConfigError, match="same num_hidden_layers: student 2, teacher 4"):
        train(settings("align", model=students[0], second_model=str(tmp_path / "shallow")))
