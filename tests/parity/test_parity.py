"""Every parallelism makes the losses, gradients and weights that one rank makes, for every stage and mixer.

Oracle: the same fp32 model folder trained on one rank. Parallelisms load it, see the same global batches (whatever number
of data-parallel ranks shares them) and go through the training loop's own functions; see worker.py.
"""

import math
from pathlib import Path

import pytest
import torch

from megatron_hylo.teachers.store import write_store
from tests.conftest import tiny_config
from tests.parity.cases import PARALLELISMS, STAGES, case_config, make_dataset, make_model
from tests.parity.faults import FAULTS
from tests.parity.worker import job, launch
from tests.train.runs import relative_difference

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(1800)]  # the first case waits for all: 6 to 10 minutes on 2 cores

MODELS = {
    "mixed": tiny_config("G-+-M-*-"),
    "normed": tiny_config("G-+-M-*-", qk_layernorm=True, add_qkv_bias=True, model_family="qwen3"),
    "tied": tiny_config("*-*-*-*-", untie_embeddings_and_output_weights=False),
}
# MLA's aligned form: biases, q/k-norm by whole heads, and pairs that differ between the two pipeline stages
ALIGNED = {
    "aligned": tiny_config(
        "+-*-*-+-", qk_layernorm=True, qk_head_dim=16, mla_bias=True, mla_rotary_pairs=[[0, 3, 3], [], [], [7, 1, 2]]
    )
}
# heads that two tensor-parallel x two context-parallel ranks share
WIDE = {
    "wide": tiny_config(
        "G-+-M-*-",
        qk_layernorm=True,
        num_attention_heads=8,
        num_query_groups=4,
        mamba_num_heads=8,
        linear_num_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
    )
}
KDA = {"kda": tiny_config("K-+-K-*-")}
# a vocabulary that neither two nor four ranks divide
ODD = {
    "odd": WIDE["wide"].replace(vocab_size=161),
    "odd_tied": WIDE["wide"].replace(vocab_size=161, untie_embeddings_and_output_weights=False),
}
TEACHER = tiny_config("*-*-*-*-", add_qkv_bias=True)
ODD_TEACHER = TEACHER.replace(vocab_size=161, num_attention_heads=8, num_query_groups=4)
HEADS = ["stored", "packed_stored", "reverse"]  # what the head loss reads; few parallelisms will do
WINDOWS = ["windows", "packed_windows"]  # what the teacher reads
COUNTED = ["recall", "answers", "packed_answers_recall_stored"]  # which tokens count
PACKED = [stage for stage in STAGES if stage.startswith("packed") and stage not in HEADS + WINDOWS + COUNTED]
WHOLE = [stage for stage in STAGES if stage not in (*PACKED, *HEADS, *WINDOWS, *COUNTED, "top_k")]
CASES = [
    *(
        (model, stage, parallelism)
        for parallelism in ("tp2", "tp2_sp", "dp2", "cp2_gather")
        for model in MODELS
        for stage in WHOLE
    ),
    *(("mixed", stage, "dp2_plain") for stage in WHOLE),
    *((model, stage, "cp2_a2a") for model in MODELS for stage in ("pretrain", "distil", "mse")),
    ("mixed", "pretrain", "cp2"),
    *(
        ("mixed", stage, parallelism)
        for parallelism in ("tp2", "tp2_sp", "pp2", "cp2_gather", "cp2_a2a", "dp2")
        for stage in HEADS
    ),
    *(("normed", stage, "tp2_sp_cp2") for stage in HEADS),
    ("mixed", "top_k", "tp2"),
    *(("mixed", stage, "cp2_gather") for stage in COUNTED),
    *(
        ("mixed", stage, parallelism)
        for parallelism in ("cp2_gather", "tp2_sp", "pp2_vp2", "tp2_sp_cp2", "pp2_cp2")
        for stage in WINDOWS
    ),
    *(("mixed", "windows", parallelism) for parallelism in ("cp2_a2a", "dp2", "cp3", "tp2_sp_pp2_cp2")),
    *(("normed", stage, parallelism) for parallelism in ("cp2_gather", "cp2_a2a") for stage in PACKED),
    *(("aligned", stage, parallelism) for parallelism in ("cp2_gather", "cp2_a2a") for stage in ("pretrain", "packed")),
    *(("wide", stage, parallelism) for parallelism in ("tp2_sp_cp2_a2a", "cp4_a2a") for stage in ("pretrain", "packed")),
    *(("normed", stage, parallelism) for parallelism in ("tp2_sp", "tp2_sp_cp2") for stage in PACKED),
    *(("mixed", "packed", parallelism) for parallelism in ("pp2", "cp2_dp2", "cp4", "pp2_cp2")),
    ("aligned", "packed", "tp2_sp_cp2"),
    *(("mixed", stage, parallelism) for parallelism in ("tp2_sp", "cp2_gather") for stage in ("mse_pairs", "packed_mse_pairs")),
    *(("normed", stage, "cp3") for stage in ("pretrain", "packed")),
    *((model, stage, parallelism) for parallelism in ("pp2", "pp2_vp2") for model in MODELS for stage in WHOLE),
    *(("normed", stage, parallelism) for parallelism in ("pp2", "pp2_vp2") for stage in PACKED),
    *(("mixed", stage, parallelism) for parallelism in ("pp2_given", "pp4", "pp2_vp2_tp2_sp") for stage in WHOLE),
    *(("tied", stage, "pp4") for stage in ("pretrain", "distil")),
    *(("normed", stage, "pp2_cp2") for stage in ("distil", "mse", "sequential", "packed_distil")),
    *(("aligned", "pretrain", parallelism) for parallelism in ("tp2", "tp2_sp", "pp2", "tp2_sp_cp2")),
    *(("normed", stage, "tp2_sp_cp2") for stage in WHOLE),
    *(("mixed", stage, "cp2_dp2") for stage in ("pretrain", "distil", "mse")),
    *((model, "pretrain", parallelism) for parallelism in ("cp4", "pp2_cp2") for model in ("normed", "tied")),
    *((model, "pretrain", "tp2_pp2") for model in ("normed", "tied", "odd_tied")),
    ("wide", "pretrain", "tp2"),
    ("mixed", "packed_distil", "dp2"),
    ("mixed", "pretrain", "dp4"),
    *(("odd", stage, "tp4") for stage in ("pretrain", "distil", "top_k", "stored")),
    *(("odd", stage, "tp2_sp") for stage in ("packed_distil", "reverse")),
    *(("normed", stage, "tp2_sp_dp2") for stage in ("distil", "mse", "ild", "sequential")),
    *(
        ("kda", stage, parallelism)
        for stage in ("pretrain", "packed")
        for parallelism in ("tp2", "tp2_sp", "cp2_gather", "cp2_a2a", "pp2", "tp2_sp_cp2")
    ),
    *(("kda", stage, "tp2_sp") for stage in ("distil", "mse")),
    *(("normed", stage, "tp2_sp_pp2_cp2") for stage in ("pretrain", "distil", "mse", "packed", "packed_distil")),
]
GRADIENT, WEIGHT, LOSS = 1e-5, 1e-5, 2e-6  # relative; gradients and weights by the norm of each tensor


def selected(request: pytest.FixtureRequest) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(cases, planted faults) of the tests that were selected, so that `-k` costs no others."""
    specs = [item.callspec.params for item in request.session.items if item.path == request.path]
    cases = dict.fromkeys((spec["model"], spec["stage"], spec["parallelism"]) for spec in specs if "model" in spec)
    return list(cases), [spec["fault"] for spec in specs if "fault" in spec]


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory, one_rank) -> Path:
    """ROOT/{model}-{stage}-{parallelism}.pt, "one" among the parallelisms, of all cases that are asked for."""
    cases, faults = selected(request)
    root = tmp_path_factory.mktemp("parity")
    make_dataset(root / "data")
    make_dataset(root / "chat", answers=True)
    make_model(TEACHER, root / "teacher", seed=1)
    make_model(ODD_TEACHER, root / "odd_teacher", seed=1)
    for name, config in (MODELS | ALIGNED | WIDE | KDA | ODD).items():
        make_model(config, root / name, seed=2)

    for kind in ("", "odd_"):
        write_store(root / f"{kind}teacher", root / "data", root / f"{kind}store", sequence_length=48, precision=torch.float32)

    ones = dict.fromkeys((model, stage, "one") for model, stage, _ in [*cases, *(FAULTS[fault][1:] for fault in faults)])
    ones["mixed", "distil", "one"] = None  # what the top-k's KL is compared with
    for ranks in (1, 2, 3, 4, 8):
        jobs = [
            job("measure", case_config(root, *case), root / f"{'-'.join(case)}.pt")
            for case in (*ones, *cases)
            if PARALLELISMS[case[2]][0] == ranks
        ]
        jobs += [
            job("measure", case_config(root, *case), root / f"{fault}.pt", fault)
            for fault in faults
            for case in [FAULTS[fault][1:]]
            if PARALLELISMS[case[2]][0] == ranks
        ]
        jobs.sort(key=lambda job: str(job["config"]["parallel"]))  # process groups are made anew where they change
        launch(jobs, ranks, root)
    return root


@pytest.mark.parametrize(("model", "stage", "parallelism"), CASES, ids=lambda value: value)
def test_parallelism_equals_one_rank(measured, model, stage, parallelism):
    here, one = (torch.load(measured / f"{model}-{stage}-{name}.pt") for name in (parallelism, "one"))
    for mine, theirs in zip(here["steps"], one["steps"], strict=True):
        norms = [{name: step.pop(name) for name in list(step) if name.startswith("gradient_norm")} for step in (mine, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=GRADIENT)
        by_kind = [norm for name, norm in norms[0].items() if "/" in name]
        assert len(by_kind) > 2 and math.hypot(*by_kind) == pytest.approx(norms[0]["gradient_norm"], rel=1e-6)
        assert mine == pytest.approx(theirs, rel=LOSS)
    for mine, theirs in zip(here["quality"], one["quality"], strict=True):
        assert mine == pytest.approx(theirs, rel=LOSS)
    for what, tolerance in (("gradients", GRADIENT), ("weights", WEIGHT)):
        mine, between_ranks, where = here[what]
        assert between_ranks < tolerance, f"{what}: ranks hold different {where}"
        difference, name = relative_difference(mine, one[what][0])
        print(f"{model} | {stage} | {parallelism} | {what} | {difference:.1e} | {name}")
        assert difference < tolerance, f"{what}: {name}"


@pytest.mark.parametrize(("model", "stage", "parallelism"), [("mixed", "top_k", "tp2")])
def test_the_top_k_reaches_the_loss(measured, model, stage, parallelism):
    """Classes that are merged lose some of the KL between them."""
    kls = [torch.load(measured / f"{model}-{name}-one.pt")["steps"][0]["kl"] for name in (stage, "distil")]
    assert 0 < kls[0] < 0.9 * kls[1]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_its_case(measured, fault):
    _, model, stage, parallelism = FAULTS[fault]
    assert (model, stage, parallelism) in CASES
    faulty, one = torch.load(measured / f"{fault}.pt"), torch.load(measured / f"{model}-{stage}-one.pt")
    (mine, between_ranks, where), theirs = faulty["gradients"], one["gradients"][0]
    difference, name = relative_difference(mine, theirs)
    norm, right = (run["steps"][0]["gradient_norm"] for run in (faulty, one))
    qualities = [[quality["cross_entropy"] for quality in run["quality"]] for run in (faulty, one)]
    evaluated = max(abs(a - b) / b for a, b in zip(*qualities))
    worst, name = max(
        (difference, name), (between_ranks, where), (abs(norm - right) / right, "norm of all gradients"),
        (evaluated, "evaluation"),
    )  # fmt: skip
    print(f"{fault} | {model}-{stage}-{parallelism} | {worst:.1e} | {name}")
    assert worst > 100 * GRADIENT


@pytest.mark.parametrize(("model", "stage"), [("normed", "pretrain")])
@pytest.mark.parametrize(("parallelism", "ranks"), [("cp2_gather", 2), ("cp4", 4), ("tp2_sp_cp2", 2)])
def test_context_parallelism_moves_what_the_formulas_say(measured, model, stage, parallelism, ranks):
    """Bytes of each mixer's forward passes, fp32, against docs/parallelism.md."""
    c, (passes, length), tp = MODELS["normed"], (4, 24), 2 if parallelism.startswith("tp2") else 1
    part, taps = length // ranks, c.linear_conv_kernel_dim - 1
    gdn_heads, keys, values = c.linear_num_heads // tp, c.linear_key_head_dim, c.linear_value_head_dim
    heads, groups = c.mamba_num_heads // tp, c.num_query_groups // tp
    numbers = {
        "G": gdn_heads * keys * (keys + values) + taps * gdn_heads * (2 * keys + values),
        "+": part // tp * (c.kv_lora_rank + c.qk_pos_emb_head_dim),  # each tensor-parallel rank its piece
        "M": heads * (c.mamba_head_dim * c.mamba_state_dim + 1)
        + taps * (groups * (c.mamba_head_dim + c.mamba_state_dim) + heads * c.mamba_state_dim),
        "*": part * 2 * groups * c.kv_channels,
    }  # fmt: skip
    queries = part // 2 * c.num_attention_heads // tp  # traded, and their outputs: a half of them
    traded = {"+": queries * (c.qk_head_dim + c.qk_pos_emb_head_dim + c.v_head_dim), "*": queries * 2 * c.kv_channels}
    found = torch.load(measured / f"{model}-{stage}-{parallelism}.pt")["received"]
    assert found == [4 * passes * ((ranks - 1) * numbers[symbol] + traded.get(symbol, 0)) for symbol in c.mixers]


@pytest.mark.parametrize(("model", "stage"), [("wide", "pretrain")])
@pytest.mark.parametrize(("parallelism", "ranks", "tp"), [("cp4_a2a", 4, 1), ("tp2_sp_cp2_a2a", 2, 2)])
def test_trading_sequence_for_heads_moves_what_the_formulas_say(measured, model, stage, parallelism, ranks, tp):
    """A rank keeps its share of the heads of its own tokens and gets that of the others' tokens, there and back."""
    c, passes, share = WIDE["wide"], 4, 24 // ranks / ranks / tp
    gdn_value = c.linear_num_heads * c.linear_value_head_dim
    mamba_inner = c.mamba_num_heads * c.mamba_head_dim
    query_head = c.qk_head_dim + c.qk_pos_emb_head_dim
    widths = {
        "G": c.linear_num_heads * (2 * c.linear_key_head_dim + 2) + gdn_value + gdn_value,
        "+": c.num_attention_heads * (query_head + c.v_head_dim),
        "M": c.num_query_groups * (c.mamba_head_dim + c.mamba_state_dim)
        + c.mamba_num_heads * (c.mamba_state_dim + 1) + mamba_inner,
        "*": (2 * c.num_attention_heads + 2 * c.num_query_groups) * c.kv_channels,
    }  # fmt: skip
    latents = 24 // ranks // tp * (c.kv_lora_rank + c.qk_pos_emb_head_dim)
    numbers = {symbol: share * width + (latents if symbol == "+" else 0) for symbol, width in widths.items()}
    found = torch.load(measured / f"{model}-{stage}-{parallelism}.pt")["received"]
    assert found == [4 * passes * (ranks - 1) * numbers[symbol] for symbol in c.mixers]
