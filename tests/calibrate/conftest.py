"""A dataset with enough different tokens for a covariance of full rank, a teacher, and its calibration, on disk."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_hylo.calibrate.gather import calibrate
from megatron_hylo.data.documents import Document
from megatron_hylo.data.preprocess import build_dataset
from megatron_hylo.models.checkpoint import save_model
from tests.calibrate.tiny import random_teacher
from tests.conftest import tiny_config
from tests.data.conftest import tokenizer  # noqa: F401  the fixture

VOCABULARY = 304
SETTINGS = dict(tokens=960, sequence_length=40, heldout=4)


def make_text(count: int) -> list[Document]:
    """Documents of random letters."""
    generator = random.Random(count)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ,.;:!?"
    return [Document("made", f"{i}.txt", "".join(generator.choices(letters, k=160))) for i in range(count)]


@pytest.fixture(scope="session")
def material(tmp_path_factory, one_rank, tokenizer) -> SimpleNamespace:  # noqa: F811
    """Folders `data`, `teacher` (q/k-norm and biases), `other` (another checkpoint), and `done`, made by `calibrate`."""
    torch.set_num_threads(1)  # as in the subprocesses
    root: Path = tmp_path_factory.mktemp("calibrate")
    build_dataset(make_text(40), tokenizer, root / "data", heldout_fraction=0.2)
    config = tiny_config("*-*-*-", vocab_size=VOCABULARY, qk_layernorm=True, model_family="qwen3")
    for name, seed in (("teacher", 1), ("other", 2)):
        model = random_teacher(config, seed)
        with torch.no_grad():
            model.embedding.word_embeddings.weight.normal_()
        save_model(model, root / name)
    calibrate(root / "teacher", root / "data", root / "done", **SETTINGS)
    return SimpleNamespace(root=root, data=root / "data", teacher=root / "teacher", other=root / "other", done=root / "done")
