"""The comparison of kernels with their definitions: right ones pass, wrong outputs, gradients and NaN are named."""

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import get_layout
from megatron_hylo.kernels.recurrence_part import DeltaRulePart
from megatron_hylo.models import decode_check, kernel_cases, kernel_check
from megatron_hylo.models.decode_check import check_decode_kernels
from megatron_hylo.models.kernel_check import check_kernels
from megatron_hylo.train import startup_check
from megatron_hylo.train.startup_check import check_run_kernels, refuse_wrong
from tests.conftest import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_is_right(dtype) -> None:
    checks = check_kernels(tiny_config("G-+-M-*-"), dtype, CPU, parts=True)
    assert [c.operation for c in checks] == [
        "causal_conv1d", "causal_conv1d", "gated_delta_rule", "gated_delta_rule", "attention", "attention",
        "causal_conv1d", "causal_conv1d", "ssd", "ssd", "attention", "attention", "elementwise", "elementwise",
        "rms_norm", "concatenate",
    ]  # fmt: skip
    assert all(c.ok and c.implementation == "torch" for c in checks), checks
    assert dtype == torch.bfloat16 or max(c.error for c in checks) < 1e-5, checks
    refuse_wrong(checks)


@pytest.mark.parametrize(
    "changes",
    [{"linear_conv_kernel_dim": 3}, {"linear_key_head_dim": 6, "linear_value_head_dim": 12}, {"num_query_groups": 1}],
    ids=str,
)
def test_a_check_that_passed_is_kept_for_its_own_shapes_alone(changes) -> None:
    """A convolution of as many channels in other sections, or with other taps, is another case."""
    sizes = dict(linear_key_head_dim=8, linear_value_head_dim=8)
    before, after = (check_kernels(tiny_config("G-W-", **(sizes | more)), torch.float32, CPU) for more in ({}, changes))
    known = {(c.operation, c.shape): c for c in before}
    fresh = check_kernels(tiny_config("G-W-", **(sizes | changes)), torch.float32, CPU, known)
    operations = {"causal_conv1d"} if "num_query_groups" not in changes else {"attention", "window_attention"}
    assert operations <= {c.operation for c in fresh} <= {c.operation for c in after}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_steps_are_checked_and_wrong_ones_named(dtype, monkeypatch) -> None:
    checks = check_decode_kernels(tiny_config("G-+-M-*-K-"), dtype, CPU)
    assert [c.operation for c in checks] == [
        "gated_delta_rule", "decode_attention", "ssd", "decode_attention", "kda", "decode_attention", "decode_attention",
        "matvec", "causal_conv1d_step",
    ]  # fmt: skip
    assert all(c.ok and c.implementation == "torch" for c in checks), checks
    right = decode_check.decode_attention

    def rolled(q, k, *rest, **more):
        return right(q, k.roll(int(q.dtype == dtype), 3), *rest, **more)

    monkeypatch.setattr(decode_check, "decode_attention", rolled)
    known = {(c.operation, c.shape) for c in checks[1:2]}
    checks = check_decode_kernels(tiny_config("G-+-M-*-K-"), dtype, CPU, known)
    bad = [c for c in checks if not c.ok]
    assert len(checks) == 8 and (len(bad) == 3) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("fault", ["output", "gradient", "nan"])
def test_a_wrong_kernel_is_named(fault, monkeypatch) -> None:
    right = kernel_cases.gated_delta_rule

    def wrong(q, k, v, g, beta):
        if fault == "gradient":  # as on Hopper with Triton before 3.7.1: outputs right, a gradient not
            g = g.detach() + 0.5 * (g - g.detach())
        out, state = right(q, k, v, g, beta)
        return (out.roll(1, dims=1) if fault == "output" else out * float("nan") if fault == "nan" else out), state

    monkeypatch.setattr(kernel_cases, "gated_delta_rule", wrong)
    checks = check_kernels(tiny_config("G-"), torch.bfloat16, CPU)
    (bad,) = [c for c in checks if not c.ok]
    assert bad.operation == "gated_delta_rule" and (fault != "gradient" or bad.where == "g")
    with pytest.raises(ConfigError, match=r"gated_delta_rule .* by torch is wrong .*HYLO_KERNELS=gated_delta_rule=torch"):
        refuse_wrong(checks)


@pytest.mark.parametrize("part", ["readout", "transition", "increment"])
def test_a_wrong_part_of_a_split_sequence_is_named(part, monkeypatch) -> None:
    right = DeltaRulePart.begin

    def wrong(cls, *inputs):
        found, affine = right(*inputs)
        return found, affine._replace(**{part: 0.5 * getattr(affine, part)})

    monkeypatch.setattr(DeltaRulePart, "begin", classmethod(wrong))
    bad = [c.shape for c in check_kernels(tiny_config("G-"), torch.float32, CPU, parts=True) if not c.ok]
    assert len(bad) == 1 and bad[0].endswith("split")


def test_doctor_fails_where_a_kernel_is_wrong(monkeypatch, capsys) -> None:
    from megatron_hylo.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--layout", "smollm2-135m-8mla22gdn-teacher"])
    assert ended.value.code == 0 and "WRONG" not in capsys.readouterr().out
    monkeypatch.setattr(kernel_cases, "causal_conv1d_sections", lambda sections, *_: [x * 1.1 for x in sections])
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--layout", "smollm2-135m-8mla22gdn-teacher"])
    assert ended.value.code == 1 and "WRONG" in capsys.readouterr().out


def test_each_shape_is_checked_once_on_a_machine(monkeypatch, tmp_path) -> None:
    """Another run's models are checked at the shapes that no run had before; a wrong kernel is not kept as checked."""
    monkeypatch.setenv("MEGATRON_HYLO_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    here = lambda config, dtype, device, known, parts: check_kernels(config, dtype, CPU, known, parts)  # noqa: E731
    monkeypatch.setattr(startup_check, "check_kernels", here)
    right, run = kernel_check._check, []
    monkeypatch.setattr(kernel_check, "_check", lambda case, dtype: run.append(case.operation) or right(case, dtype))

    def checked(*patterns: str, dtype: torch.dtype = torch.float32) -> list[str]:
        run.clear()
        check_run_kernels([tiny_config(pattern) for pattern in patterns], dtype, torch.device("cuda"))
        return list(run)

    assert set(checked("M-", "*-")) == {"causal_conv1d", "ssd", "attention", "elementwise", "rms_norm", "concatenate"}
    assert checked("*-") == checked("*-M-") == []
    assert set(checked("G-M-")) == {"causal_conv1d", "gated_delta_rule"}
    assert len(list((tmp_path / "kernel_checks").iterdir())) == 1
    assert "ssd" in checked("M-", dtype=torch.bfloat16)
    monkeypatch.setattr(startup_check, "versions", lambda: {"torch": "another"})
    monkeypatch.setattr(kernel_cases, "ssd", lambda x, **_: (x.roll(1, 1), None))
    for _ in range(2):
        with pytest.raises(ConfigError, match="ssd .* is wrong on this machine"):
            checked("M-")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("layout", ["smollm2-135m-8mla22gdn-teacher", "llama3.2-1b-4mla12gdn", "llama3.2-1b-4mla12m2"])
def test_fast_kernels_are_right_and_checked_once(layout, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MEGATRON_HYLO_CACHE", str(tmp_path))
    config, cuda = get_layout(layout).config, torch.device("cuda")
    check_run_kernels([config], torch.bfloat16, cuda, parts=True)
    (file,) = (tmp_path / "kernel_checks").iterdir()
    assert '"triton"' in file.read_text()
    monkeypatch.setattr(kernel_check, "_check", lambda *_: pytest.fail("checked again"))
    check_run_kernels([config], torch.bfloat16, cuda, parts=True)
    monkeypatch.undo()
    checks = check_decode_kernels(config, torch.bfloat16, cuda)
    assert all(c.ok for c in checks) and {c.implementation for c in checks} >= {"triton"}, checks
