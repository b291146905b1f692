"""Every parallel layout over NCCL makes the losses, gradients and weights that one GPU makes, with the kernels of a GPU.

Two precisions: fp32 with every operation in plain torch, which must agree to rounding errors, and bf16 with the fast kernels
(fla, mamba_ssm, SDPA) on one GPU as on many: what is left there is the rounding of bf16 sums in another order.
"""

from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_config
from tests.parity.cases import LAYOUTS, case_config, largest_difference, make_dataset, make_model
from tests.parity.worker import job, launch

GPUS = torch.cuda.device_count()
if GPUS < 2:
    pytest.skip("GPU parity needs two CUDA GPUs: make test-parity-gpu", allow_module_level=True)
pytestmark = [pytest.mark.gpu2, pytest.mark.multirank]
SIZES = dict(
    hidden_size=256, ffn_hidden_size=512, kv_channels=64, q_lora_rank=192, kv_lora_rank=96, qk_head_dim=32,
    qk_pos_emb_head_dim=32, v_head_dim=64, mamba_head_dim=64, mamba_state_dim=64, linear_key_head_dim=96,
    linear_value_head_dim=192, vocab_size=512,
)  # fmt: skip
MODELS = {name: f"{symbol}-" * 4 for name, symbol in dict(attention="*", mla="+", mamba2="M", gdn="G").items()}
MODELS["mixed"] = "G-+-M-*-"
TORCH = "attention=math,causal_conv1d=torch,gated_delta_rule=torch,ssd=torch"
PRECISIONS = {"fp32": (TORCH, 1e-5, 1e-6), "bf16": ("", 3e-2, 2e-3)}  # kernels; relative: of gradients and weights, of losses
TWO = ("tp2", "tp2_sp", "cp2_gather", "cp2_a2a", "pp2", "pp2_vp2", "dp2")
FOUR = ("tp2_sp_cp2", "pp2_cp2", "pp2_vp2_tp2_sp", "cp2_dp2", "tp2_pp2")
CASES = [
    *((model, stage, layout) for layout in TWO for model in MODELS for stage in ("pretrain", "packed")),
    *(("mixed", stage, layout) for layout in TWO for stage in ("distil", "mse")),
    *(("mixed", stage, layout) for layout in FOUR for stage in ("pretrain", "packed", "distil", "mse")),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, one_rank) -> Path:
    """ROOT/{precision}/{model}-{stage}-{layout}.pt, "one" among the layouts."""
    root = tmp_path_factory.mktemp("gpu_parity")
    make_dataset(root / "data")
    make_model(tiny_config("*-*-*-*-", add_qkv_bias=True, **SIZES), root / "teacher", seed=1)
    for name, pattern in MODELS.items():
        make_model(tiny_config(pattern, qk_layernorm=True, add_qkv_bias=True, **SIZES), root / name, seed=2)
    ones = dict.fromkeys((model, stage, "one") for model, stage, _ in CASES)
    for precision, (kernels, *_) in PRECISIONS.items():
        (root / precision).mkdir()
        for ranks in (1, 2, 4):
            jobs = [
                job("measure", case_config(root, *case, precision, 256), root / precision / f"{'-'.join(case)}.pt")
                for case in (*ones, *CASES)
                if LAYOUTS[case[2]][0] == ranks <= GPUS
            ]
            if jobs:
                launch(jobs, ranks, root, gpus=True, kernels=kernels)
    return root


@pytest.mark.parametrize(("model", "stage", "layout"), CASES, ids=lambda value: value)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layout_equals_one_gpu(measured, precision, model, stage, layout):
    if LAYOUTS[layout][0] > GPUS:
        pytest.skip(f"needs {LAYOUTS[layout][0]} CUDA GPUs")
    _, tolerance, loss_tolerance = PRECISIONS[precision]
    here, one = (torch.load(measured / precision / f"{model}-{stage}-{name}.pt") for name in (layout, "one"))
    for mine, theirs in zip(here["steps"], one["steps"], strict=True):
        norms = [step.pop("gradient_norm") for step in (mine, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=tolerance)
        assert mine == pytest.approx(theirs, rel=loss_tolerance)
    for what in ("gradients", "weights"):
        mine, between_ranks, where = here[what]
        difference, name = largest_difference(mine, one[what][0])
        print(f"{precision} | {model} | {stage} | {layout} | {what} | {difference:.1e} | {name}")
        assert between_ranks < tolerance, f"{what}: ranks hold different {where}"
        assert difference < tolerance, f"{what}: {name}"
