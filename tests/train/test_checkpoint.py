"""Training checkpoints: any parallelism resumes them, a killed save leaves none, old ones go, damage is named.

Oracle of resuming: the same run on one rank without interruption.
"""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_hylo.config import ParallelConfig
from megatron_hylo.config.train import OptimizerSettings
from megatron_hylo.eval.runs import read_lines
from megatron_hylo.io import DamagedError, has_manifest
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.train.checkpoint import latest_checkpoint
from megatron_hylo.train.loop import train
from tests import held
from tests.conftest import EXPERTS, tiny_config
from tests.parity.worker import job, launch
from tests.train.conftest import VOCABULARY
from tests.train.runs import metrics, relative_difference, start_train, weights

SUITES = dict(every=5, suites=["ppl"], limit=4, lengths=[16, 48])
CONTINUED = {
    "tp2_sp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": dict(pipeline_model_parallel_size=2),
    "pp2_vp2": dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "ep2": dict(expert_model_parallel_size=2),
}


def quality(run: Path) -> dict:
    """Held-out measures at a run's end, without those it has not."""
    return {name: value for name, value in json.loads((run / "quality.json").read_text()).items() if value is not None}


def last_record(run: Path, start: str) -> dict[str, float]:
    """Metrics of the newest record that has some whose names begin so, by name."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [found for r in records if (found := {name: r[name] for name in r if name.startswith(start)})][-1]


@pytest.mark.multirank
def test_resuming_under_another_parallelism_equals_one_rank_uninterrupted(settings, tmp_path):
    """So do suites at the end, whose examples the ranks divide, with weights gathered from all of them.

    What is resumed was written by expert-parallel ranks, whose experts have an optimizer of their own; `ep2` once by one rank.
    """
    save_model(build_model(tiny_config("G-+EM-*E", vocab_size=VOCABULARY, **EXPERTS)), tmp_path / "experts")

    def config(name: str, distributed: bool, groups: dict):
        # adam_eps above rounding errors: Adam's first steps are signs of gradients otherwise
        optimizer = OptimizerSettings(
            lr=2e-3, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0, adam_eps=1e-3, use_distributed_optimizer=distributed
        )
        return settings(
            "pretrain", steps=5, output=tmp_path / name, model=str(tmp_path / "experts"), micro_batch_size=1,
            optimizer=optimizer,
            parallel=ParallelConfig(**groups), checkpoint=dict(save_interval=3),
            evaluation=SUITES if distributed else {})  # fmt: skip

    train(config("whole", True, {}))
    saved = {d: tmp_path / f"saved_{d}" / "checkpoints" / "step_00000003" for d in (True, False)}
    jobs = [job("train", config(f"saved_{d}", d, CONTINUED["ep2"])) for d in (True, False)]
    for name, groups in CONTINUED.items():
        starts = saved | ({True: tmp_path / "whole" / "checkpoints" / "step_00000003"} if name == "ep2" else {})
        jobs += [job("train", config(f"{name}_{d}", d, groups), starts[d]) for d in (True, False)]
    launch(jobs, 2, tmp_path)
    for d in (True, False):
        shutil.copytree(saved[d], tmp_path / f"one_{d}" / "checkpoints" / saved[d].name)
        train(config(f"one_{d}", d, {}))

    assert set(last_record(tmp_path / "whole", "eval/")) == {
        "eval/ppl/heldout/perplexity/16",
        *(f"eval/ppl/by_position/perplexity/{n}" for n in (16, 48)),
    }
    for name in ("saved", *CONTINUED):
        mine, theirs = (last_record(tmp_path / run, "eval/") for run in (f"{name}_True", "whole"))
        assert mine == pytest.approx(theirs, rel=1e-5), name
    whole = metrics(tmp_path / "whole")
    for d in (True, False):
        assert list(metrics(tmp_path / f"saved_{d}")) == [1, 2, 3, 4, 5]
        for name in ("saved", "one", *CONTINUED):
            run = tmp_path / f"{name}_{d}"
            steps = metrics(run)
            assert list(steps)[-2:] == [4, 5] and len(steps) == (5 if name == "saved" else 2)
            for step, loss in steps.items():
                assert loss == pytest.approx(whole[step], rel=1e-6), f"{run.name}: step {step}"
            difference, where = relative_difference(weights(run / "model"), weights(tmp_path / "whole" / "model"))
            assert difference < 1e-5, f"{run.name}: {where}"
            assert quality(run) == pytest.approx(quality(tmp_path / "whole"), rel=1e-5), run.name


def test_killed_save_leaves_no_checkpoint_and_the_earlier_one_is_used(settings, tmp_path):
    config = settings(steps=4, output=tmp_path / "killed", checkpoint=dict(save_interval=1, keep=4))
    process = start_train(config, held.folder(2))
    checkpoints = tmp_path / "killed" / "checkpoints"
    partial = checkpoints / ".step_00000002.partial"
    while process.poll() is None and not partial.is_dir():
        time.sleep(0.0005)
    process.kill()  # with the processes that write files for it
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert partial.is_dir() and not has_manifest(checkpoints / "step_00000002")
    assert latest_checkpoint(tmp_path / "killed") == checkpoints / "step_00000001"

    train(config)
    assert sorted(p.name for p in checkpoints.iterdir()) == [f"step_0000000{i}" for i in (1, 2, 3, 4)]
    whole = settings(steps=4, output=tmp_path / "whole")
    train(whole)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_checkpoint_written_during_later_steps_holds_its_own(one_rank, settings, tmp_path, monkeypatch):
    # the plain optimizer: tensors that are not parts of buffers, which Megatron-Core copies in any case
    optimizer = OptimizerSettings(lr=2e-3, use_distributed_optimizer=False)
    right = dist_checkpointing.save

    def late(*args, **kwargs):
        """Writes only after the step that follows."""
        request = right(*args, **kwargs)

        def write(*what):
            while 3 not in [line["step"] for line in read_lines(tmp_path / "late" / "metrics.jsonl")]:
                time.sleep(0.01)
            request.async_fn(*what)

        return request._replace(async_fn=write)

    train(
        settings(
            steps=4,
            output=tmp_path / "prompt",
            optimizer=optimizer,
            checkpoint=dict(save_interval=2, async_save=False),
            logging=dict(log_interval=1),
        )
    )
    with monkeypatch.context() as patched:
        patched.setattr(dist_checkpointing, "save", late)
        config = settings(
            steps=4,
            output=tmp_path / "late",
            optimizer=optimizer,
            checkpoint=dict(save_interval=2),
            logging=dict(log_interval=1),
        )
        patched.setattr("megatron_hylo.train.callbacks.save_model", lambda *_, **__: None)  # is written the same way
        train(config)
    prompt, written_late = (tmp_path / name / "checkpoints" / "step_00000002" for name in ("prompt", "late"))
    names = [sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) for folder in (prompt, written_late)]
    assert names[0] == names[1]
    late_weights, weights_then = (dict(load_model(folder).named_parameters()) for folder in (written_late, prompt))
    assert all(torch.equal(late_weights[name], weights_then[name]) for name in weights_then)
    shutil.rmtree(written_late.with_name("step_00000004"))
    train(config)  # resumes from it
    assert relative_difference(weights(tmp_path / "late" / "model"), weights(tmp_path / "prompt" / "model"))[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU: from a GPU tensors are copied by Megatron-Core alone")
def test_a_checkpoint_on_its_way_is_in_memory_once(one_rank, settings, monkeypatch):
    right, left = dist_checkpointing.save, []

    def watched(*args, **kwargs):
        request = right(*args, **kwargs)
        _, planned, _ = request.async_fn_args  # with Megatron-Core's copies of what are parts of buffers

        def write(rank, buckets, results):
            counts = [[len(tensors) for *_, (_, tensors) in found] for found in (buckets, planned)]
            left.append([sum(numbers) for numbers in counts])
            request.async_fn(rank, buckets, results)

        return request._replace(async_fn=write)

    monkeypatch.setattr(dist_checkpointing, "save", watched)
    train(settings(steps=2, checkpoint=dict(save_interval=1)))
    assert left and all(written > 0 and planned == 0 for written, planned in left)


def test_only_the_newest_are_kept(settings):
    config = settings(steps=6, checkpoint=dict(save_interval=1, keep=2))
    train(config)
    kept = sorted(p.name for p in (Path(config.output) / "checkpoints").iterdir())
    assert kept == ["step_00000005", "step_00000006"]  # the last one is of the run's end


@pytest.mark.parametrize("trainable", ["all", "mixers"])
def test_resumed_and_damaged(settings, tmp_path, trainable):
    first = settings(steps=4, output=tmp_path / "first", trainable=trainable, checkpoint=dict(save_interval=2))
    train(first)
    second = settings(steps=4, output=tmp_path / "second", trainable=trainable, checkpoint=dict(save_interval=2))
    newest = tmp_path / "second" / "checkpoints" / "step_00000002"
    shutil.copytree(tmp_path / "first" / "checkpoints" / "step_00000002", newest)
    file = max(newest.glob("weights/*.distcp"), key=lambda f: f.stat().st_size)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedError, match=file.name):
        train(second)
    file.write_bytes(content)
    train(second)
    assert list(metrics(tmp_path / "second")) == [3, 4]
    assert relative_difference(weights(tmp_path / "second" / "model"), weights(tmp_path / "first" / "model"))[0] == 0
