"""A folder that transformers cannot load is named, and so is a transformers that is too old."""

import tomllib
from pathlib import Path

import pytest
import transformers

from megatron_hylo.config import ConfigError
from megatron_hylo.io.foreign import OLDEST, load_foreign_tokenizer


def test_oldest_transformers_is_the_requirement_s():
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    assert f"transformers>={OLDEST},<6" in project["dependencies"]


def test_an_old_transformers_is_named_where_a_folder_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizerOfAnotherVersion"}')
    with pytest.raises(ConfigError, match="cannot be loaded: .*are never run"):
        load_foreign_tokenizer(tmp_path)
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ConfigError, match="cannot be loaded: .*; transformers 4.57.1 is installed, 5.17 or later is needed"):
        load_foreign_tokenizer(tmp_path)
