"""A vocabulary that tensor parallelism does not divide: stored without padding, bit for bit, whatever the ranks.

That losses and gradients are those of one rank is in tests/parity (models `odd`) and tests/distill/head_loss_ranks.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.distill.teacher_store import write_store
from megatron_hylo.models.padded_vocabulary import padded_vocabulary
from megatron_hylo.train.config import OptimizerSettings, TrainConfig
from megatron_hylo.train.loop import train
from tests.conftest import tiny_config
from tests.parity.cases import make_dataset, make_model
from tests.parity.worker import job, launch
from tests.train.runs import metrics, relative_difference, weights

ROOT, SHARED = Path(__file__).parents[2], dict(num_attention_heads=8, num_query_groups=4, linear_num_heads=4, vocab_size=161)


def test_padding_is_the_next_multiple():
    assert [padded_vocabulary(151_669, ranks) for ranks in (1, 2, 4, 8)] == [151_669, 151_670, 151_672, 151_672]
    assert padded_vocabulary(128_256, 8) == 128_256
    with pytest.raises(ConfigError, match="size 4 leaves a rank without any of 5 tokens; use fewer ranks"):
        padded_vocabulary(5, 4)


@pytest.mark.multirank
@pytest.mark.parametrize("distributed", [True, False])
def test_checkpoints_resume_under_other_ranks_as_one_rank_uninterrupted(tmp_path, one_rank, distributed):
    """One rank, then four, then two; embedding and head tied under one optimizer, apart under the other."""
    make_dataset(tmp_path / "data")
    for split in ("bin", "idx"):
        shutil.copy(tmp_path / "data" / f"train.{split}", tmp_path / "data" / f"heldout.{split}")
    make_model(tiny_config("G-*-", **SHARED, untie_embeddings_and_output_weights=distributed), tmp_path / "model", seed=2)

    def config(name: str, ranks: int) -> TrainConfig:
        optimizer = OptimizerSettings(
            lr=2e-3, weight_decay=0.1, warmup_ratio=0, adam_eps=1e-3, use_distributed_optimizer=distributed
        )
        return TrainConfig(
            "pretrain", str(tmp_path / "data"), str(tmp_path / name), model=str(tmp_path / "model"), sequence_length=24,
            global_batch_size=2, train_tokens=4 * 2 * 24, precision="fp32", save_interval=1, log_interval=1, eval_windows=3,
            keep_checkpoints=4, parallel=ParallelConfig(tensor_model_parallel_size=ranks), optimizer=optimizer, tensorboard=False,
        )  # fmt: skip

    train(config("one", 1))
    step = "checkpoints/step_0000000"
    launch([job("copy", config("copy", 4)), job("train", config("four", 4), tmp_path / "one" / f"{step}1")], 4, tmp_path)
    launch([job("train", config("two", 2), tmp_path / "four" / f"{step}3")], 2, tmp_path)
    original, copy = weights(tmp_path / "model"), weights(tmp_path / "copy")
    assert original["embedding.word_embeddings.weight"].shape == (161, 48)
    assert original.keys() == copy.keys() and all(torch.equal(original[name], copy[name]) for name in original)
    whole = metrics(tmp_path / "one")
    for name, steps in (("four", [2, 3, 4]), ("two", [4])):
        found = metrics(tmp_path / name)
        assert list(found) == steps and found == pytest.approx({n: whole[n] for n in steps}, rel=1e-6)
        for part in ("model", f"{step}3") if name == "four" else ("model",):  # moments too
            difference, where = relative_difference(weights(tmp_path / name / part), weights(tmp_path / "one" / part))
            assert difference < 1e-5, (name, part, where)
        qualities = [json.loads((tmp_path / run / "quality.json").read_text())["cross_entropy"] for run in (name, "one")]
        assert qualities[0] == pytest.approx(qualities[1], rel=1e-6)


@pytest.mark.multirank
def test_a_teacher_store_written_by_two_ranks_has_the_head_of_one(tmp_path, one_rank):
    make_dataset(tmp_path / "data")
    make_model(tiny_config("*-*-", **SHARED), tmp_path / "teacher", seed=1)
    arguments = [str(tmp_path / "teacher"), str(tmp_path / "data")]
    write_store(*arguments, tmp_path / "one", sequence_length=48, precision=torch.float32)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "megatron_hylo.cli", "cache-teacher", *arguments, str(tmp_path / "two"), "--tensor_model_parallel_size", "2",
               "--sequence_length", "48", "--precision", "fp32"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "codec.safetensors") for name in ("one", "two"))
    assert torch.equal(one["head"], two["head"]) and len(one["head"]) == 161
