"""Statistics that would make a bad layer are refused, by the layer's number and the reason."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_hylo.calibrate.statistics import check_statistics, layer_file
from megatron_hylo.config import ConfigError


@pytest.fixture
def good(material) -> dict[str, torch.Tensor]:
    return load_file(material.done / layer_file(2))


def test_measured_statistics_pass(good):
    check_statistics(good)


@pytest.mark.parametrize("name", ["input_second_moment", "query_second_moment", "length_moment", "output_energy", "sink_mass"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(name, value, good):
    good[name].view(-1)[0] = value
    with pytest.raises(ConfigError, match=f"layer 2: {name} is not finite"):
        check_statistics(good)


def test_too_few_tokens(good):
    check_statistics(good | {"tokens": torch.tensor(192)})
    with pytest.raises(ConfigError, match="layer 2: 191 calibration tokens are too few for 48 channels; give at least 192"):
        check_statistics(good | {"tokens": torch.tensor(191)})


def test_singular_covariance(good):
    values, vectors = torch.linalg.eigh(good["input_second_moment"].double())
    values[:3] = 0
    good["input_second_moment"] = (vectors * values) @ vectors.T
    with pytest.raises(ConfigError, match="layer 2: .*singular, rank 45 of 48"):
        check_statistics(good)


def test_singular_covariance_as_it_is_stored(good):
    """fp32 files leave noise of 1e-7 where a direction is missing."""
    x = torch.randn(300, 40, dtype=torch.float64) @ torch.randn(40, 48, dtype=torch.float64)
    good["input_second_moment"] = (x.T @ x / 300).float()
    with pytest.raises(ConfigError, match="layer 2: .*singular"):
        check_statistics(good)


def test_a_channel_switched_off_is_not_singular(good):
    good["input_second_moment"][5] = good["input_second_moment"][:, 5] = 0
    check_statistics(good)


@pytest.mark.parametrize("name, head", [("query_second_moment", 4), ("key_second_moment", 1), ("head_energy", 3)])
def test_silent_head(name, head, good):
    good[name][head] = 0
    with pytest.raises(ConfigError, match=f"layer 2: head {head} never fires .*{name}.* keep that layer attention"):
        check_statistics(good)


def test_all_heads_silent(good):
    good["head_energy"][:] = 0
    with pytest.raises(ConfigError, match="layer 2: head 0 never fires"):
        check_statistics(good)
