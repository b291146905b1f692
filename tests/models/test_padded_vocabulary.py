"""A vocabulary that tensor parallelism does not divide: stored without padding, bit for bit, whatever the ranks.

That losses and gradients are those of one rank is in tests/parity (models `odd`) and tests/distill/head_loss_ranks.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.config.train import CheckpointSettings, LoggingSettings, OptimizerSettings, TrainConfig
from megatron_hylo.models.padded_vocabulary import padded_vocabulary
from megatron_hylo.teachers.store_writer import write_store
from megatron_hylo.train.loop import train
from tests.conftest import tiny_config
from tests.parity.cases import make_dataset, make_model
from tests.parity.worker import job, launch
from tests.train.runs import metrics, relative_difference, weights

SIZES = dict(num_attention_heads=8, num_query_groups=4, linear_num_heads=4, vocab_size=161)


def test_padding_is_the_next_multiple():
    assert [padded_vocabulary(151_669, ranks) for ranks in (1, 2, 4, 8)] == [151_669, 151_670, 151_672, 151_672]
    assert padded_vocabulary(128_256, 8) == 128_256
    with pytest.raises(ConfigError, match="size 4 leaves a rank without any of 5 tokens; use fewer ranks"):
        padded_vocabulary(5, 4)


@pytest.mark.multirank
def test_four_ranks_and_two_go_on_and_write_as_one_rank_does(tmp_path, one_rank):
    """One rank's checkpoint goes on on four ranks, and theirs on two; with either optimizer, head and embedding apart and tied.
    A model folder that four ranks copy, and the head in a store that two write, are the same bit for bit.
    """
    make_dataset(tmp_path / "data")
    for suffix in ("bin", "idx"):
        shutil.copy(tmp_path / "data" / f"train.{suffix}", tmp_path / "data" / f"heldout.{suffix}")
    for apart in (True, False):
        sizes = SIZES | dict(untie_embeddings_and_output_weights=apart)
        make_model(tiny_config("*-G-", **sizes), tmp_path / f"model_{apart}", seed=2)
    make_model(tiny_config("*-", **SIZES), tmp_path / "teacher", seed=1)

    def config(name: str, ranks: int, apart: bool = True, model: str | None = None) -> TrainConfig:
        optimizer = OptimizerSettings(lr=2e-3, weight_decay=0.1, warmup_ratio=0, adam_eps=1e-3, use_distributed_optimizer=apart)
        return TrainConfig(
            "pretrain", str(tmp_path / "data"), str(tmp_path / name), model=str(tmp_path / (model or f"model_{apart}")),
            sequence_length=24, global_batch_size=2, train_tokens=4 * 2 * 24, precision="fp32", eval_windows=3,
            checkpoint=CheckpointSettings(save_interval=1, keep=4),
            logging=LoggingSettings(log_interval=1, tensorboard=False),
            parallel=ParallelConfig(tensor_model_parallel_size=ranks), optimizer=optimizer,
        )  # fmt: skip

    step = "checkpoints/step_0000000"
    for apart in (True, False):
        train(config(f"one_{apart}", 1, apart))
    write_store(tmp_path / "teacher", tmp_path / "data", tmp_path / "store_1", sequence_length=48, precision=torch.float32)
    jobs = [job("copy", config(f"copy_{apart}", 4, apart)) for apart in (True, False)]
    jobs += [job("train", config(f"four_{apart}", 4, apart), tmp_path / f"one_{apart}" / f"{step}1") for apart in (True, False)]
    launch(jobs, 4, tmp_path)
    jobs = [job("train", config(f"two_{apart}", 2, apart), tmp_path / f"four_{apart}" / f"{step}3") for apart in (True, False)]
    launch([*jobs, job("store", config("store_2", 2, model="teacher"))], 2, tmp_path)

    heads = [load_file(tmp_path / f"store_{ranks}" / "codec.safetensors")["head"] for ranks in (1, 2)]
    assert torch.equal(*heads) and len(heads[0]) == 161
    for apart in (True, False):
        original, copy = weights(tmp_path / f"model_{apart}"), weights(tmp_path / f"copy_{apart}")
        assert original["embedding.word_embeddings.weight"].shape == (161, 48) and ("output_layer.weight" in original) == apart
        assert original.keys() == copy.keys() and all(torch.equal(original[name], copy[name]) for name in original)
        whole, one = metrics(tmp_path / f"one_{apart}"), tmp_path / f"one_{apart}"
        for name, steps, parts in (("four", [2, 3, 4], ("model", f"{step}3")), ("two", [4], ("model",))):
            run = tmp_path / f"{name}_{apart}"
            found = metrics(run)
            assert list(found) == steps and found == pytest.approx({n: whole[n] for n in steps}, rel=1e-6)
            for part in parts:  # a checkpoint with its moments
                mine, theirs = (
                    {n: x for n, x in weights(folder / part).items() if torch.is_tensor(x) and x.is_floating_point()}
                    for folder in (run, one)
                )
                assert part == "model" or mine["optimizer.state.exp_avg_sq.embedding.word_embeddings.weight"].shape == (161, 48)
                difference, where = relative_difference(mine, theirs)
                assert difference < 1e-5, (run.name, part, where)
            qualities = [json.loads((folder / "quality.json").read_text())["cross_entropy"] for folder in (run, one)]
            assert qualities[0] == pytest.approx(qualities[1], rel=1e-6)
