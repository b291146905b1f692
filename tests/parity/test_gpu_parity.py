"""Every parallelism over NCCL makes the losses, gradients and weights that one GPU makes, with the kernels of a GPU.

Two precisions: fp32 with every operation in plain torch, which must agree to rounding errors; and bf16 with the fast kernels
(fla, mamba_ssm, SDPA) on one GPU as on many, whose sums are rounded in another order. There the yardstick of each tensor is
what bf16 costs at all: the difference between one GPU in bf16 and one GPU in fp32.
"""

from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_config
from tests.parity.cases import PARALLELISMS, case_config, make_dataset, make_model
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
TORCH = "attention=math,causal_conv1d=torch,elementwise=torch,gated_delta_rule=torch,head_softmax=torch,ssd=torch"
KERNELS = {"fp32": TORCH, "bf16": ""}
TENSOR = 2e-5  # relative difference of gradients and weights in fp32
DECAYS = ("A_log", "dt_bias")  # a few numbers each, whose gradients are sums over all tokens that nearly cancel
DECAY = 5e-4  # the same for these
ROUNDING = 4.0  # the same in bf16, in units of what bf16 costs; a gradient that misses a rank's part is off by dozens
NUMBERS = {"fp32": {"loss": 1e-6, "gradient_norm": 1e-5}, "bf16": {"loss": 2e-3, "gradient_norm": 2e-2}}
TWO = ("tp2", "tp2_sp", "cp2_gather", "cp2_a2a", "pp2", "pp2_vp2", "dp2")
FOUR = ("tp2_sp_cp2", "pp2_cp2", "pp2_vp2_tp2_sp", "cp2_dp2", "tp2_pp2")
ALL = (*TWO, *FOUR, "tp2_sp_pp2_cp2")
CASES = [
    *((model, stage, parallelism) for parallelism in ALL for model in MODELS for stage in ("pretrain", "packed")),
    *(("mixed", stage, parallelism) for parallelism in ALL for stage in ("distil", "mse")),
]


@pytest.fixture(scope="module", params=KERNELS)
def measured(request, tmp_path_factory, one_rank) -> tuple[str, Path]:
    """A precision, and a folder of {model}-{stage}-{parallelism}.pt, "one" among the parallelisms."""
    precision, root = request.param, tmp_path_factory.mktemp(f"gpu_parity_{request.param}")
    make_dataset(root / "data")
    make_model(tiny_config("*-*-*-*-", add_qkv_bias=True, **SIZES), root / "teacher", seed=1)
    for name, pattern in MODELS.items():
        make_model(tiny_config(pattern, qk_layernorm=True, add_qkv_bias=True, **SIZES), root / name, seed=2)
    chosen = [item.callspec.params for item in request.session.items if item.path == request.path]  # by -k, say
    cases = [tuple(p[n] for n in ("model", "stage", "parallelism")) for p in chosen if p["measured"] == precision]
    ones = dict.fromkeys((model, stage, "one") for model, stage, _ in cases)
    folders = {name: root / name for name in dict.fromkeys(("fp32", precision))}
    for name, folder in folders.items():  # in fp32 one GPU for both
        folder.mkdir()
        for ranks in (1, 2, 4, 8) if name == precision else (1,):
            jobs = [
                job("measure", case_config(root, *case, 4, name, 256), folder / f"{'-'.join(case)}.pt")
                for case in (*ones, *cases)
                if PARALLELISMS[case[2]][0] == ranks <= GPUS
            ]
            if jobs:
                launch(jobs, ranks, root, gpus=True, kernels=KERNELS[name])
    return precision, root


@pytest.mark.parametrize(("model", "stage", "parallelism"), CASES, ids=lambda value: value)
def test_parallelism_equals_one_gpu(measured, model, stage, parallelism):
    if PARALLELISMS[parallelism][0] > GPUS:
        pytest.skip(f"needs {PARALLELISMS[parallelism][0]} CUDA GPUs")
    precision, root = measured
    here, one = (torch.load(root / precision / f"{model}-{stage}-{name}.pt") for name in (parallelism, "one"))
    exact = torch.load(root / "fp32" / f"{model}-{stage}-one.pt")
    for what in ("gradients", "weights"):
        (mine, between_ranks, where), theirs, truth = here[what], one[what][0], exact[what][0]
        apart = {n: float((mine[n] - theirs[n]).norm()) for n in theirs}
        norms = {n: max(float(theirs[n].norm()), 1e-30) for n in theirs}
        if precision == "fp32":
            limits = {n: (DECAY if n.endswith(DECAYS) else TENSOR) * norms[n] for n in theirs}
        else:
            limits = {n: ROUNDING * (float((theirs[n] - truth[n]).norm()) + TENSOR * norms[n]) for n in theirs}
        used, name = max((apart[n] / limits[n], n) for n in theirs)
        largest = max(apart[n] / norms[n] for n in theirs)
        print(f"{precision} | {model} | {stage} | {parallelism} | {what} | {largest:.1e} | {used:.2f} of the limit of {name}")
        assert used < 1, name
        assert between_ranks < TENSOR, f"{what}: ranks hold different {where}"
    for mine, theirs in zip(here["steps"], one["steps"], strict=True):
        for name, tolerance in NUMBERS[precision].items():
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance), name
