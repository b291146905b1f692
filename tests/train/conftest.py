"""A tiny dataset, teacher and student on disk, and the settings of a short run with them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_hylo.config import from_dict
from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.data.preprocess import build_dataset
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from tests.conftest import tiny_config
from tests.data.conftest import make_documents, tokenizer  # noqa: F401  the fixture

VOCABULARY = 304


@pytest.fixture(scope="session")
def material(tmp_path_factory, one_rank, tokenizer) -> SimpleNamespace:  # noqa: F811
    """Folders: `data`, `teacher` (with tokenizer), `student` (all four mixers, without)."""
    torch.set_num_threads(1)  # as in the subprocesses, whose results are compared bit for bit
    root = tmp_path_factory.mktemp("train")
    build_dataset(make_documents(60), tokenizer, root / "data", heldout_fraction=0.1)
    tokenizer.save_pretrained(root / "tokenizer")
    for name, pattern, seed in (("teacher", "*-*-*-*-", 1), ("student", "G-+-M-*-", 2)):
        torch.manual_seed(seed)
        files = root / "tokenizer" if name == "teacher" else None
        save_model(build_model(tiny_config(pattern, vocab_size=VOCABULARY)), root / name, files)
    return SimpleNamespace(data=root / "data", teacher=root / "teacher", student=root / "student")


@pytest.fixture
def suited(tmp_path, material, tokenizer) -> dict[str, str]:  # noqa: F811
    """Fields of a run whose models have sizes that fast kernels and FP8 products take."""
    sizes = dict(
        hidden_size=128, ffn_hidden_size=256, kv_channels=32, q_lora_rank=96, kv_lora_rank=48, qk_head_dim=32,
        qk_pos_emb_head_dim=32, v_head_dim=32, mamba_head_dim=32, mamba_state_dim=32, linear_key_head_dim=64,
        linear_value_head_dim=128, vocab_size=VOCABULARY, max_position_embeddings=512,
    )  # fmt: skip
    for name, pattern, seed in (("teacher", "*-*-*-*-", 1), ("model", "G-+-M-*-", 2)):
        torch.manual_seed(seed)
        files = material.teacher / "tokenizer" if name == "teacher" else None
        save_model(build_model(tiny_config(pattern, **sizes)), tmp_path / "suited" / name, files)
    return {name: str(tmp_path / "suited" / name) for name in ("teacher", "model")}


@pytest.fixture
def settings(material, tmp_path):
    """(stage, steps, output folder, other fields) -> TrainConfig of a tiny fp32 run; groups of fields may be given as dicts."""

    def make(stage: str = "distil", steps: int = 5, output: Path | None = None, **changes) -> TrainConfig:
        fields = dict(
            stage=stage,
            data=str(material.data),
            output=str(output or tmp_path / "run"),
            model=str(material.student),
            teacher=None if stage == "pretrain" else str(material.teacher),
            sequence_length=16,
            global_batch_size=4,
            micro_batch_size=2,
            train_tokens=steps * 4 * 16,
            precision="fp32",
            optimizer=OptimizerSettings(lr=2e-3, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0.0),
            eval_windows=4,
            logging=dict(log_interval=1, tensorboard=False),
        )
        logging = fields["logging"] | changes.pop("logging", {})
        return from_dict(TrainConfig, fields | changes | {"logging": logging}, "settings")

    return make
