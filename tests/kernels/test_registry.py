"""The choice of implementation: logged once, overridden in tests, never a silent fallback."""

import logging

import pytest
import torch

from megatron_hylo.kernels import registry
from megatron_hylo.kernels.implementations import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS
from megatron_hylo.kernels.registry import Unsupported
from megatron_hylo.kernels.ssd import ssd


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_logged", set())
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_choice_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    x, dt, A = torch.randn(1, 3, 2, 4), torch.rand(1, 3, 2), -torch.rand(2)
    with caplog.at_level(logging.DEBUG, logger="megatron_hylo.kernels"):
        ssd(x, dt, A, x, x)
        ssd(x, dt, A, x, x)
    assert [record.getMessage() for record in caplog.records] == ["ssd: torch (mamba_ssm needs a CUDA device)"]
    assert registry.in_use() == {"ssd": "torch"} and caplog.records[0].levelno == logging.DEBUG
    registry.use("concatenate", "triton", "available")
    registry.use("attention", "torch", "a CPU")
    assert registry.in_words() == "torch: attention, ssd; triton: concatenate"


def test_missing_library_is_a_warning_that_says_what_to_install(caplog: pytest.LogCaptureFixture) -> None:
    unsupported = Unsupported("fla does not import", "pip install flash-linear-attention")
    assert registry.select("gated_delta_rule", "fla", unsupported) == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "pip install flash-linear-attention" in record.getMessage()


def test_without_an_obstacle_the_fast_one_runs() -> None:
    assert registry.select("gated_delta_rule", "fla", None) == "fla"


def test_an_override_wins_and_ends_with_its_block() -> None:
    with registry.override("ssd", "torch"):
        with registry.override("ssd", "mamba_ssm"):
            assert registry.overridden("ssd") == "mamba_ssm"
        assert registry.select("ssd", "mamba_ssm", None) == "torch"
    assert registry.overridden("ssd") is None


def test_environment_variable_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "ssd=torch, attention=math")
    assert registry.select("ssd", "mamba_ssm", None) == "torch"
    assert registry.overridden("attention") == "math"
    assert registry.overridden("causal_conv1d") is None


def test_overriding_by_what_cannot_run_is_an_error() -> None:
    x, dt, A = torch.randn(1, 3, 2, 4), torch.rand(1, 3, 2), -torch.rand(2)
    with registry.override("ssd", "mamba_ssm"), pytest.raises(RuntimeError, match="needs a CUDA device"):
        ssd(x, dt, A, x, x)


def test_unknown_names_list_the_allowed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=", ".join(sorted(IMPLEMENTATIONS))), registry.override("sdd", "torch"):
        pass
    with pytest.raises(ValueError, match="torch, mamba_ssm"):
        registry.use("ssd", "fla", "")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "ssd")
    with pytest.raises(ValueError, match="torch, mamba_ssm"):
        registry.overridden("ssd")


def test_import_error_tells_why_a_module_is_missing() -> None:
    assert registry.import_error("torch.nn") is None
    assert "no_such_library" in registry.import_error("no_such_library.ops")


def test_untuned_runs_torch_but_where_the_user_demands_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "ssd=mamba_ssm")
    with registry.untuned():
        assert registry.select("gated_delta_rule", "fla", None) == "torch"
        assert registry.select("causal_conv1d", "fla", None) == "torch"
        assert registry.select("ssd", "mamba_ssm", None) == "mamba_ssm"
    assert registry.select("gated_delta_rule", "fla", None) == "fla"
