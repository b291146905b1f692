"""How much a quickstart calibrates and trains, by device and initialisation, and the settings of its stages."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_hylo.config.train import AlignSettings, CheckpointSettings, LoggingSettings, OptimizerSettings, TrainConfig


@dataclass(frozen=True)
class Budget:
    """How much a quickstart trains: on a CPU so much that all ends within 15 minutes."""

    sequence_length: int
    align_batch_size: int
    distil_batch_size: int
    micro_batch_size: int
    calibration_tokens: int
    calibration_length: int
    sequential: bool  # let calibrated layers correct those before them
    align_loss: Literal["mse", "ild", "sequential"]
    align_tokens: int
    distil_tokens: int
    eval_windows: int
    precision: Literal["bf16", "fp32"]
    align_mixer_lr: float
    mixer_lr: float
    lr: float
    cuda_graphs: bool = False


CPU = Budget(
    sequence_length=256, align_batch_size=2, distil_batch_size=2, micro_batch_size=2, calibration_tokens=16_384,
    calibration_length=512, sequential=False, align_loss="mse", align_tokens=4_096, distil_tokens=18_432,
    eval_windows=8, precision="fp32", align_mixer_lr=1.25e-4, mixer_lr=1.25e-4, lr=1e-4,
)  # fmt: skip
GPU = Budget(
    sequence_length=2048, align_batch_size=8, distil_batch_size=8, micro_batch_size=8, calibration_tokens=262_144,
    calibration_length=2048, sequential=False, align_loss="mse", align_tokens=655_360,
    distil_tokens=16_777_216, eval_windows=128, precision="bf16", align_mixer_lr=1e-3, mixer_lr=1e-3, lr=2e-4,
    cuda_graphs=True,
)  # fmt: skip
BUDGETS = {  # the paper's start has further to go: larger steps, a longer stage 1
    ("cpu", "calibrated"): CPU,
    ("cpu", "paper"): replace(CPU, align_loss="ild", align_tokens=6_144, align_mixer_lr=2e-3, mixer_lr=1e-3, lr=5e-4),
    ("cuda", "calibrated"): GPU,
    ("cuda", "paper"): replace(GPU, align_loss="ild", align_tokens=655_360, align_mixer_lr=2e-3),
}


def stage_config(
    stage: Literal["align", "distil"], budget: Budget, model: Path, teacher: Path, data: Path, output: Path, tokens: int
) -> TrainConfig:
    """The settings of one stage within a budget.

    Args:
        stage: "align" or "distil".
        budget: how to train.
        model, teacher, data: folders to start from.
        output: folder of runs; this one goes into OUTPUT/STAGE.
        tokens: of this stage.
    """
    align = stage == "align"
    batch = budget.align_batch_size if align else budget.distil_batch_size
    quarter = max(1, tokens // (batch * budget.sequence_length) // 4)
    return TrainConfig(
        stage=stage,
        data=str(data),
        output=str(output / stage),
        model=str(model),
        teacher=str(teacher),
        sequence_length=budget.sequence_length,
        global_batch_size=batch,
        micro_batch_size=budget.micro_batch_size,
        train_tokens=tokens,
        trainable="mixers" if align else "all",
        align=AlignSettings(loss=budget.align_loss),
        precision=budget.precision,
        cuda_graphs=budget.cuda_graphs,
        optimizer=OptimizerSettings(
            lr=budget.lr,
            mixer_lr=budget.align_mixer_lr if align else budget.mixer_lr,
            warmup_ratio=0.05,
            min_lr_ratio=0.05,
        ),
        eval_windows=budget.eval_windows,
        eval_interval=0 if align else quarter,
        checkpoint=CheckpointSettings(save_interval=quarter, keep=1, async_save=False),  # without memory for copies
        logging=LoggingSettings(log_interval=5),
    )
