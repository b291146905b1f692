"""Material that the parity tests share: stages, parallelisms, models and text that would show a fault."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_hylo.config import ModelConfig, ParallelConfig, from_dict
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from tests.conftest import EXPERTS, tiny_config

STAGES = {
    "pretrain": dict(stage="pretrain"),
    "distil": dict(stage="distil", distil=dict(ce_weight=0.3)),
    "mse": dict(stage="align", align=dict(loss="mse")),
    "ild": dict(stage="align", align=dict(loss="ild")),
    "sequential": dict(stage="align", align=dict(loss="sequential")),
    "packed": dict(stage="pretrain", packed_documents=True),
    "packed_distil": dict(stage="distil", packed_documents=True, distil=dict(ce_weight=0.3)),
    "reverse": dict(stage="distil", distil=dict(ce_weight=0.3, kl_direction="reverse", kl_temperature=2.0)),
    "top_k": dict(stage="distil", distil=dict(ce_weight=0.3, kl_top_k=50)),  # with few the KL is near its rounding errors
    "stored": dict(stage="distil", teacher_store="store", distil=dict(ce_weight=0.3)),
    "packed_stored": dict(stage="distil", teacher_store="store", packed_documents=True, distil=dict(ce_weight=0.3)),
    "windows": dict(stage="distil", teacher_window=dict(mode="windows", length=10), distil=dict(ce_weight=0.3)),
    "packed_windows": dict(
        stage="distil", teacher_window=dict(mode="windows", length=10), packed_documents=True, distil=dict(ce_weight=0.3)
    ),
    "packed_mse": dict(stage="align", packed_documents=True, align=dict(loss="mse")),
    "recall": dict(
        stage="distil",
        packed_documents=True,
        distil=dict(ce_weight=0.3),
        sequence_length=256,
        recall=RecallSettings(0.7, ["key_value"], 3.0, cross_entropy="answers"),
    ),
    # chat data, of which only answers are learnt
    "answers": dict(stage="distil", data="chat", distil=dict(ce_weight=0.3)),
    "packed_answers_recall_stored": dict(
        stage="distil",
        data="chat",
        teacher_store="store",
        packed_documents=True,
        distil=dict(ce_weight=0.3),
        sequence_length=256,
        recall=RecallSettings(0.7, ["key_value"], 3.0),
    ),
    "mse_pairs": dict(stage="align", micro_batch_size=2, align=dict(loss="mse")),
    "packed_mse_pairs": dict(stage="align", micro_batch_size=2, packed_documents=True, align=dict(loss="mse")),
}
# name: (ranks, parallel groups, distributed optimizer)
PARALLELISMS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "one": (1, {}, False),
    "tp2": (2, dict(tensor_model_parallel_size=2), True),
    "tp4": (4, dict(tensor_model_parallel_size=4), True),
    "tp2_sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True), True),
    "pp2": (2, dict(pipeline_model_parallel_size=2), True),
    "pp2_vp2": (2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), True),
    "pp2_given": (2, dict(pipeline_model_parallel_size=2, pipeline_layers=[3, 1]), False),
    "pp4": (4, dict(pipeline_model_parallel_size=4), True),
    "pp2_vp2_tp2_sp": (
        4,
        dict(
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            tensor_model_parallel_size=2,
            sequence_parallel=True,
        ),
        True,
    ),
    "dp2": (2, {}, True),
    "dp2_plain": (2, {}, False),
    "dp4": (4, {}, True),
    "ep2": (2, dict(expert_model_parallel_size=2), True),
    "ep2_plain": (2, dict(expert_model_parallel_size=2), False),
    "cp2_ep2": (2, dict(context_parallel_size=2, cp_comm_type="all_gather", expert_model_parallel_size=2), True),
    "pp2_ep2": (4, dict(pipeline_model_parallel_size=2, expert_model_parallel_size=2), True),
    "tp2_sp_ep2": (4, dict(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2), True),
    "ep2_dp2": (4, dict(expert_model_parallel_size=2), True),
    "cp2": (2, dict(context_parallel_size=2), True),
    "cp2_gather": (2, dict(context_parallel_size=2, cp_comm_type="all_gather"), True),
    "cp2_a2a": (2, dict(context_parallel_size=2, cp_comm_type="a2a"), True),
    "cp4_a2a": (4, dict(context_parallel_size=4, cp_comm_type="a2a"), True),
    "tp2_sp_cp2_a2a": (
        4,
        dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2, cp_comm_type="a2a"),
        True,
    ),
    "tp2_sp_cp2": (4, dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2), True),
    "cp2_dp2": (4, dict(context_parallel_size=2, cp_comm_type="all_gather"), True),
    "pp2_cp2": (4, dict(pipeline_model_parallel_size=2, context_parallel_size=2), True),
    "cp3": (3, dict(context_parallel_size=3, cp_comm_type="all_gather"), True),
    "cp4": (4, dict(context_parallel_size=4), False),
    "tp2_pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), True),
    "tp2_sp_dp2": (4, dict(tensor_model_parallel_size=2, sequence_parallel=True), True),
    "tp2_sp_pp2_cp2": (
        8,
        dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2, context_parallel_size=2),
        True,
    ),
}


MODELS = {
    "mixed": tiny_config("G-+-M-*-"),
    "normed": tiny_config("G-+-M-*-", qk_layernorm=True, add_qkv_bias=True, model_family="qwen3"),
    "tied": tiny_config("*-*-*-*-", untie_embeddings_and_output_weights=False),
    # MLA's aligned form: biases, q/k-norm by whole heads, and pairs that differ between the two pipeline stages
    "aligned": tiny_config(
        "+-*-*-+-", qk_layernorm=True, qk_head_dim=16, mla_bias=True, mla_rotary_pairs=[[0, 3, 3], [], [], [7, 1, 2]]
    ),
    # heads that two tensor-parallel x two context-parallel ranks share
    "wide": tiny_config(
        "G-+-M-*-", qk_layernorm=True, num_attention_heads=8, num_query_groups=4, mamba_num_heads=8, linear_num_heads=4,
        linear_key_head_dim=12, linear_value_head_dim=20,
    ),
    "kda": tiny_config("K-+-K-*-"),
    "windowed": tiny_config("W-+-*-W-", attention_window=7),
    "teacher": tiny_config("*-*-*-*-", add_qkv_bias=True),
    "experts": tiny_config("GE+EM-*E", qk_layernorm=True, **EXPERTS),
    "experts_teacher": tiny_config("*E*E*-*E", qk_layernorm=True, moe_router_pre_softmax=True, **EXPERTS),
}  # fmt: skip
MODELS |= {  # a vocabulary that neither two nor four ranks divide
    "odd": MODELS["wide"].replace(vocab_size=161),
    "odd_tied": MODELS["wide"].replace(vocab_size=161, untie_embeddings_and_output_weights=False),
    "odd_teacher": MODELS["teacher"].replace(vocab_size=161, num_attention_heads=8, num_query_groups=4),
}


def teacher_of(model: str, stage: str) -> str | None:
    """Name of the teacher of a model in a stage; None in one without."""
    kind = next((f"{kind}_" for kind in ("odd", "experts") if model.startswith(kind)), "")
    return None if STAGES[stage]["stage"] == "pretrain" else f"{kind}teacher"


def global_batch_size(stage: str, parallelism: str) -> int:
    """Windows of a step of a case: two passes, which show that gradients accumulate, but more where they are shared out."""
    ranks, groups, _ = PARALLELISMS[parallelism]
    pipeline = groups.get("pipeline_model_parallel_size", 1)
    alike = pipeline * groups.get("tensor_model_parallel_size", 1) * groups.get("context_parallel_size", 1)
    return 4 if ranks > alike or pipeline > 1 or STAGES[stage].get("micro_batch_size", 1) > 1 else 2


def case_config(
    root: Path, model: str, stage: str, parallelism: str, batch: int, precision: str = "fp32", sequence_length: int = 24
) -> TrainConfig:
    """Settings of two steps of `batch` windows of a stage under a parallelism.

    ROOT has the folders data, chat, MODEL, its teacher and {teacher}_store. bf16 needs the distributed optimizer, also on one
    rank.
    """
    _, groups, distributed = PARALLELISMS[parallelism]
    settings, teacher = dict(STAGES[stage]), teacher_of(model, stage)
    if "teacher_store" in settings:
        settings["teacher_store"], teacher = str(root / f"{teacher}_store"), None
    sequence_length = settings.pop("sequence_length", sequence_length)
    fields = dict(
        data=str(root / settings.pop("data", "data")), output="unused", model=str(root / model),
        teacher=teacher and str(root / teacher),
        sequence_length=sequence_length, global_batch_size=batch, train_tokens=batch * sequence_length * 10,
        precision=precision, parallel=ParallelConfig(**groups), loss_chunk_tokens=7, **settings,
        seed=2,  # documents begin in each of its first windows, also at a cut, and no gradient of A_log or D nearly cancels
        optimizer=OptimizerSettings(
            lr=1e-3, mixer_lr=2e-3, weight_decay=0.1, warmup_ratio=0,
            use_distributed_optimizer=distributed or precision == "bf16",
            adam_eps=1e-3,  # above rounding errors: the first steps of Adam are signs of gradients otherwise
        ),
    )  # fmt: skip
    return from_dict(TrainConfig, fields, stage)


def make_model(config: ModelConfig, folder: Path, seed: int) -> None:
    """A model folder whose weights are large enough, and whose norms and biases uneven enough, to show a fault."""
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("up_proj.bias"):  # small: large ones make all keys alike, and the norms' gradients rounding errors
                p.uniform_(-0.1, 0.1)
            elif name.endswith(".bias") or p.dim() == 3:
                p.uniform_(-0.5, 0.5)
            elif "norm" in name:
                p.uniform_(0.5, 1.5)
            elif name.endswith(("A_log", "dt_bias")):
                p.uniform_(-1, 1)
            elif name.endswith(".D"):  # small: where D x is most of Mamba2's output, the norm cancels D's gradient
                p.uniform_(0.1, 0.3)
            elif p.dim() == 2:
                p.normal_(std=0.42 * config.hidden_size**-0.5)
    save_model(model, folder)


def make_dataset(folder: Path, answers: bool = False) -> None:
    """Random tokens, in documents of several lengths, and a tokenizer of single characters.

    Args:
        folder: to make.
        answers: let only 5 of every 7 tokens be learnt, as those of answers.
    """
    folder.mkdir()
    builder = IndexedDatasetBuilder(str(folder / "train.bin"), dtype=np.uint16)
    generator = np.random.default_rng(0)
    for length in (50, 200, 31, 400, *generator.integers(1, 20, 40).tolist()):
        builder.add_document(generator.integers(0, 160, length).tolist(), [length])
    builder.finalize(str(folder / "train.idx"))
    (folder / "data.json").write_text('{"vocab_size": 160}')
    if answers:
        starts = np.arange(0, 600, 7)
        np.save(folder / "train.answers.npy", np.stack([starts, starts + 5]))
    characters = Tokenizer(models.WordLevel({chr(code): code for code in (10, *range(32, 127))}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters).save_pretrained(folder / "tokenizer")
