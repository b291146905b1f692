"""Known configurations of Triton kernels: the right one for a shape, and into fla's real autotuners (which need no GPU)."""

import importlib
import json

import pytest

from megatron_hylo.kernels import tuned

BF16 = "torch.bfloat16"
KERNEL = "fla.ops.common.chunk_o:chunk_fwd_kernel_o"


def test_a_shape_takes_the_nearest_larger_one() -> None:
    known = tuned.KnownConfigurations(
        {(8, 256, True, BF16): "large", (4, 128, True, BF16): "near", (2, 64, True, BF16): "small"}
    )
    assert (4, 100, True, BF16) in known and known[4, 100, True, BF16] == "near"
    assert (2, 64, True, BF16) in known and known[2, 64, True, BF16] == "small"
    assert (5, 64, True, BF16) in known and known[5, 64, True, BF16] == "large"
    for unlike in (
        (9, 64, True, BF16),
        (4, 128, False, BF16),
        (4, 128, True, "torch.float32"),
        (4, 128, True),
        (4, None, True, BF16),
    ):
        assert unlike not in known


def test_sizes_of_zero_and_one_compare() -> None:
    assert tuned.distance((0, 1), (1, 2)) == 2
    assert tuned.distance((1, 2), (1, 2)) == 0
    assert tuned.distance((True,), (1,)) is None  # a flag is no size


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """fla's autotuner of one kernel, with its own cache again afterwards; and a folder for configurations."""
    importlib.import_module("fla.ops.gated_delta_rule")
    found = dict(tuned.autotuners())
    for tuner in found.values():
        monkeypatch.setattr(tuner, "cache", {})
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.delenv(tuned.ENVIRONMENT_VARIABLE, raising=False)
    return found[KERNEL]


def test_what_was_found_is_given_to_another_process(kernel, tmp_path) -> None:
    key, best = (6, 256, 512, 64, False, BF16), kernel.configs[-1]
    kernel.cache = {key: best}
    (tmp_path / "sm90.json").write_text(json.dumps({"kernels": tuned.found()}))
    kernel.cache = {}
    assert tuned.install((8, 0)) == 0
    assert tuned.install((9, 0)) == 1
    assert key in kernel.cache and kernel.cache[key] is best
    assert (3, 128, 512, 64, False, BF16) in kernel.cache and (7, 256, 512, 64, False, BF16) not in kernel.cache


def test_a_configuration_that_the_library_no_longer_has_is_left_out(kernel, tmp_path) -> None:
    entry = {"key": [6, BF16], "config": {"kwargs": {"BK": 7}, "num_warps": 4, "num_stages": 2}}
    (tmp_path / "sm90.json").write_text(json.dumps({"kernels": {KERNEL: [entry]}}))
    tuned.install((9, 0))
    assert (6, BF16) not in kernel.cache


def test_the_modes(kernel, monkeypatch) -> None:
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, "always")
    assert tuned.install((9, 0)) == 0
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, "never")
    assert tuned.install((9, 0)) > 20
    assert (1, 2, BF16) in kernel.cache
    assert kernel.cache[1, 2, BF16].num_warps == 4 and kernel.cache[1, 2, BF16] in kernel.configs
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, "sometimes")
    with pytest.raises(ValueError, match="'sometimes'; use one of always, unknown, never"):
        tuned.install((9, 0))
