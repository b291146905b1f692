"""Folders of another kind than the wanted one are named, with the folder that was probably meant."""

import json

import pytest

from megatron_hylo.calibrate.description import read_calibration
from megatron_hylo.config import ConfigError
from megatron_hylo.convert.source_path import check_hf_folder, check_model, check_source
from megatron_hylo.data.dataset_path import check_indexed_dataset
from megatron_hylo.data.load_tokenizer import find_tokenizer
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.eval.results import read_results
from megatron_hylo.eval.runs import run_folders
from megatron_hylo.io import atomic_directory
from megatron_hylo.models.description import read_description
from megatron_hylo.teachers.store import TeacherStore

FOLDERS = {  # folder -> files that tell its kind
    "run/model": ("hylo.json",), "data": ("train.bin", "train.idx"), "calibration": ("calibration.json",),
    "store": ("store.json",), "results": ("results.json", "samples.jsonl"), "hf": ("config.json",),
}  # fmt: skip
RUN = {"run/config.json": {"stage": "distil"}, "run/history.json": {}, "run/metrics.jsonl": {}}
READERS = {
    "model": read_description,
    "any model": check_model,
    "hf": lambda path: check_source(path),
    "hf:": check_hf_folder,
    "dataset": lambda path: check_indexed_dataset(path / "train"),
    "calibration": read_calibration,
    "store": lambda path: TeacherStore(path, path),
    "results": read_results,
    "tokenizer": find_tokenizer,
    "run": run_folders,
}


@pytest.fixture
def root(tmp_path):
    """A folder of each kind, as far as its kind can be told, and an empty one."""
    for folder, names in FOLDERS.items():
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        with atomic_directory(tmp_path / folder) as made:
            for name in names:
                (made / name).write_text("{}")
    for name, content in RUN.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "given", "said"),
    [
        *((wanted, "run", "did you mean ROOT/run/model?") for wanted in ("model", "any model", "tokenizer")),
        *((wanted, "run", "it is the folder of a training run") for wanted in ("hf", "hf:", "dataset", "calibration", "store")),
        *((wanted, "data", "it is a dataset folder") for wanted in ("model", "any model", "hf", "hf:", "calibration", "store")),
        *((wanted, "run/model", "it is a model folder") for wanted in ("hf", "dataset", "calibration", "store", "results")),
        *((wanted, "calibration", "it is a calibration folder") for wanted in ("model", "any model", "dataset", "tokenizer")),
        *((wanted, "store", "it is a teacher store") for wanted in ("model", "dataset", "calibration", "run")),
        *((wanted, "results", "it is a results folder") for wanted in ("model", "any model", "dataset")),
        ("model", "hf", "a Hugging Face folder is read by `hylo train` as hf:"),
        *((wanted, "hf", "it is a Hugging Face folder") for wanted in ("dataset", "calibration", "tokenizer")),
        *((wanted, "nowhere", "there is no such folder") for wanted in ("model", "dataset", "calibration", "tokenizer", "hf:")),
        *((wanted, "hf/config.json", "it is a file") for wanted in ("model", "calibration", "tokenizer")),
        ("model", "run/model/hylo.json", "did you mean ROOT/run/model?"),
        ("dataset", "data/train", "did you mean ROOT/data?"),
        ("dataset", ".", "did you mean ROOT/data?"),
        ("calibration", ".", "did you mean ROOT/calibration?"),
        ("run", "run/model", "did you mean ROOT/run?"),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_is_named(root, wanted, given, said):
    with pytest.raises(ConfigError) as error:
        READERS[wanted](root / given)
    assert said.replace("ROOT", str(root)) in str(error.value)


@pytest.mark.parametrize("wanted", ["model", "any model", "dataset", "calibration", "store", "results", "tokenizer"])
def test_nothing_is_said_of_an_empty_folder(root, wanted):
    with pytest.raises(ConfigError) as error:
        READERS[wanted](root / "empty")
    assert not any(words in str(error.value) for words in ("did you mean", "it is", "no such"))


def test_a_dataset_without_held_out_documents_is_said(root):
    with pytest.raises(ConfigError, match="data has no documents held out, as --heldout_fraction above 0 would have"):
        check_indexed_dataset(root / "data" / "heldout")


@pytest.mark.parametrize("given", ["nowhere", "empty", "hf/config.json", "hf", "run"])
def test_a_missing_tokenizer_is_one_sentence_for_the_verb_and_in_python(root, given):
    (root / "text.txt").write_text("a text")
    with pytest.raises(ConfigError) as early:
        find_tokenizer(root / given)
    with pytest.raises(ConfigError) as late:
        preprocess(root / "text.txt", root / "out", root / given)
    assert str(early.value) == str(late.value) and str(late.value).count("holds no tokenizer") == 1
