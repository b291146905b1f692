"""Specifications of tiny sweeps, and the verb on them."""

from pathlib import Path

import pytest
import yaml

from megatron_hylo.cli.main import main
from tests.train.conftest import material, tokenizer  # noqa: F401  fixtures


@pytest.fixture
def spec(material, tmp_path):  # noqa: F811
    """Write a specification of tiny runs with changes; returns its file."""

    def write(**changes) -> Path:
        values = dict(
            output=str(tmp_path / "sweep"), teacher=str(material.teacher), student=dict(init="paper", linear="G"),
            train=dict(
                stage="distil", data=str(material.data), sequence_length=16, global_batch_size=4, micro_batch_size=4,
                precision="fp32", eval_windows=4, logging=dict(log_interval=1, tensorboard=False),
            ),
            grid={"student.mla": [1], "train.train_tokens": [64, 128, 256]},
        )  # fmt: skip
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values | changes))
        return tmp_path / "tiny.yaml"

    return write


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", *map(str, words)])
    return ended.value.code
