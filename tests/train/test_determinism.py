"""`deterministic`: the same bits twice, torch's switch off afterwards."""

import os
from pathlib import Path

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.train.determinism import ENVIRONMENT, MAMBA, determinism
from megatron_hylo.train.loop import train
from tests.train.runs import metrics, weights


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A user's shell has nothing set."""
    for name in (*ENVIRONMENT, MAMBA):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=[pytest.mark.gpu, NEEDS_GPU])])
def test_two_runs_are_the_same(settings, suited, tmp_path, precision):
    """On a GPU with all its fast kernels, sequences of several chunks."""
    long = suited | dict(sequence_length=300) if precision == "bf16" else {}
    for name in ("one", "other"):
        train(settings(steps=6, output=tmp_path / name, deterministic=True, precision=precision, **long))
    for metric in ("loss", "gradient_norm"):
        assert metrics(tmp_path / "one", metric) == metrics(tmp_path / "other", metric)
    one, other = (weights(tmp_path / name / "model") for name in ("one", "other"))
    assert one.keys() == other.keys()
    different = {  # tensor -> largest difference, how many elements, of how many
        name: (float((x.float() - other[name].float()).abs().max()), int((x != other[name]).sum()), x.numel())
        for name, x in one.items()
        if not torch.equal(x, other[name])
    }
    assert not different


def test_the_switch_is_on_while_training_alone(settings, monkeypatch):
    from megatron_hylo.train import loop

    seen, right = [], loop.training_step
    monkeypatch.setattr(
        loop,
        "training_step",
        lambda *a, **k: seen.append(torch.are_deterministic_algorithms_enabled()) or right(*a, **k),
    )
    train(settings(steps=2, deterministic=True))
    assert seen == [True, True] and not torch.are_deterministic_algorithms_enabled()
    assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT


def test_timed_kernels_are_refused(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("HYLO_AUTOTUNE", "always")
    with pytest.raises(ConfigError, match="deterministic needs HYLO_AUTOTUNE=never in the environment, not always; unset it"):
        train(settings(deterministic=True))
    assert not Path(tmp_path / "run").exists()


def test_kernels_of_mamba_ssm_that_add_atomically_are_refused(monkeypatch):
    monkeypatch.setenv(MAMBA, "0")
    with pytest.raises(ConfigError, match="deterministic needs MAMBA_DETERMINISTIC=1 in the environment, not 0; unset it"):
        with determinism(True):
            pass
