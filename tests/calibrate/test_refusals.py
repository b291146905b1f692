"""`hylo evaluate` and `hylo calibrate` refuse in one sentence, before any work, input that they once took silently."""

import logging
import shutil

import pytest
import torch

from megatron_hylo.calibrate.gather import calibrate
from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.convert.source_path import check_model
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.data.heldout import heldout_windows
from megatron_hylo.eval.folders import evaluate_folder
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.description import read_description
from tests.calibrate.conftest import SETTINGS


@pytest.fixture(scope="module")
def diverged(material):
    """The teacher with one infinite weight."""
    model = load_model(material.teacher)
    with torch.no_grad():
        dict(model.named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"][3, 2] = torch.inf
    save_model(model, material.root / "diverged")
    return material.root / "diverged"


def test_weights_that_are_no_numbers_are_refused_by_name(material, diverged, tmp_path):
    named = r"linear_fc2\.weight.* holds NaN or infinite values"
    with pytest.raises(ConfigError, match=named):
        evaluate_folder(diverged, material.data, sequence_length=40, windows=1)
    with pytest.raises(ConfigError, match=named):
        evaluate_folder(material.teacher, material.data, diverged, sequence_length=40, windows=1)
    with pytest.raises(ConfigError, match=named):
        calibrate(diverged, material.data, tmp_path / "calibration", **SETTINGS)
    with pytest.raises(ConfigError, match=r"tensor model\.layers\.0\.mlp\.down_proj\.weight .*" + named):
        convert_megatron_to_hf(diverged, tmp_path / "hf", verify=False)
    shutil.rmtree(tmp_path / ".calibration.layers", ignore_errors=True)
    assert not (tmp_path / "calibration").exists() and not (tmp_path / "hf").exists()


def test_windows_beyond_the_models_positions_are_said(material, caplog):
    positions = read_description(material.teacher)[0].max_position_embeddings
    with caplog.at_level(logging.WARNING):
        assert evaluate_folder(material.teacher, material.data, sequence_length=positions, windows=1).tokens == positions
        assert not caplog.records
        evaluate_folder(material.teacher, material.data, sequence_length=positions + 1, windows=1)
    assert f"was made for {positions} positions, but sequences have {positions + 1} tokens" in caplog.text


def test_the_length_named_for_short_documents_works(material, tmp_path):
    with pytest.raises(ConfigError, match="use --sequence_length ([0-9]+) or less") as error:
        calibrate(material.teacher, material.data, tmp_path / "out", tokens=2048)
    length = int(str(error.value).split("--sequence_length ")[1].split()[0])
    assert len(heldout_windows(f"{material.data}/heldout", length, 1)) == 1


@pytest.mark.parametrize("settings", [dict(tokens=-1), dict(sequence_length=0)])
def test_counts_below_one_are_refused(material, tmp_path, settings):
    with pytest.raises(ConfigError, match="must be at least 1, got"):
        calibrate(material.teacher, material.data, tmp_path / "out", **SETTINGS | settings)


def test_ranks_that_do_not_divide_heads_are_refused_before_anything_is_written(material, tmp_path):
    with pytest.raises(
        ConfigError, match="tensor_model_parallel_size 4 does not divide num_attention_heads 6; sizes that work"
    ):
        calibrate(
            material.teacher, material.data, tmp_path / "out", **SETTINGS, parallel=ParallelConfig(tensor_model_parallel_size=4)
        )
    assert not list(tmp_path.iterdir())


def test_an_output_inside_an_input_is_refused(material):
    with pytest.raises(ConfigError, match="data/out lies in what is read .* choose an output outside it"):
        calibrate(material.teacher, material.data, material.data / "out", **SETTINGS)


def test_a_run_folder_or_its_parent_suggests_the_model_or_the_newest_checkpoint(material, tmp_path):
    run = tmp_path / "runs" / "stage2"
    for step in (100, 200):
        shutil.copytree(material.teacher, run / "checkpoints" / f"step_{step:08d}", copy_function=shutil.copy)
    (run / "checkpoints" / "step_00000300").mkdir()  # not finished
    for place in (run, run.parent):
        for read in (lambda folder: evaluate_folder(folder, material.data), check_model):
            with pytest.raises(ConfigError, match=r"did you mean .*stage2/checkpoints/step_00000200\?"):
                read(place)
    shutil.copytree(material.teacher, run / "model")
    with pytest.raises(ConfigError, match=r"did you mean .*stage2/model\?"):
        evaluate_folder(run, material.data)
    with pytest.raises(ConfigError, match="there is no such folder"):
        evaluate_folder(tmp_path / "nothing", material.data)
