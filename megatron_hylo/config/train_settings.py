"""Groups of training settings: optimizer, losses, checkpoints, evaluation, logging, profiler."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_hylo.config import ConfigError


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested settings as on the command line: {"optimizer": {"lr": 1}} becomes {"optimizer.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def at_least_one(settings: object, prefix: str, *names: str) -> None:
    """Refuse values below 1.

    Args:
        settings: group of settings.
        prefix: what the group is called on the command line, with its dot.
        names: fields to check.

    Raises:
        ConfigError: one of them is below 1.
    """
    for name in names:
        if (value := getattr(settings, name)) < 1:
            raise ConfigError(f"{prefix}{name} must be at least 1, got {value}")


@dataclass
class OptimizerSettings:
    """AdamW or Muon with a cosine schedule; fp32 master weights always. A_log, dt_bias, D, biases and norms never decay.

    Muon updates the weight matrices of mixers and MLPs; AdamW everything else beside it, with the adam_ settings: embedding,
    head, norms, biases, convolutions, A_log and the like. Matrices that are computed in one product (a linear mixer's input
    projection, gate and up of an MLP, queries, keys and values) are one matrix to Muon. An element of its update has a root
    mean square of about muon_extra_scale_factor x learning rate, whatever the shape, so that AdamW's rates serve both.

    Args:
        name: adamw, or muon, whose state is whole on every data-parallel rank (use_distributed_optimizer false).
        lr: peak learning rate of everything but the mixers.
        mixer_lr: peak learning rate of the token mixers; lr by default.
        min_lr_ratio: final / peak learning rate.
        warmup_ratio: part of the steps spent warming up.
        weight_decay: decoupled, of all but the parameters named above.
        adam_beta1: decay of the gradient's mean.
        adam_beta2: decay of the squared gradient's mean.
        adam_eps: added to its root.
        muon_momentum: decay of the gradient's mean that Muon orthogonalises, Nesterov's way.
        muon_extra_scale_factor: size of Muon's update / learning rate; AdamW's own is 0.2 to 0.4 (arXiv:2502.16982).
        clip_grad: largest global gradient norm; 0: no clipping.
        use_distributed_optimizer: shard optimizer state over the data-parallel ranks.
        offload: keep its state in CPU memory during forward and backward passes: less memory, the same numbers.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 6e-5
    mixer_lr: float | None = None
    min_lr_ratio: float = 0.0
    warmup_ratio: float = 0.01
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_extra_scale_factor: float = 0.2
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = True
    offload: bool = False


@dataclass(frozen=True)
class KLSettings:
    """Loss of the output head: kl_weight * KL to the teacher + ce_weight * cross-entropy on the text (distill/head_loss.py).

    Args:
        kl_direction: forward is KL(teacher || student), reverse KL(student || teacher).
        kl_temperature: divides the logits of both; the KL is multiplied by its square.
        kl_top_k: the teacher's k most likely tokens one by one, all others as one class; null: all one by one.
        kl_weight: weight of the KL.
        ce_weight: weight of the cross-entropy; without a teacher it is the whole loss, whatever this is.
    """

    kl_direction: Literal["forward", "reverse"] = "forward"
    kl_temperature: float = 1.0
    kl_top_k: int | None = None
    kl_weight: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kl_temperature <= 0:
            raise ConfigError(f"kl_temperature must be positive, got {self.kl_temperature}")
        if self.kl_top_k is not None and self.kl_top_k < 1:
            raise ConfigError(
                f"kl_top_k must be at least 1, got {self.kl_top_k}; leave it out (null) for the KL over the whole vocabulary"
            )


@dataclass
class AlignSettings:
    """Loss of stage align (distill/alignment.py).

    Args:
        loss: error of the mixers' outputs, the paper's Enhanced ILD, or distance of hidden states.
        hidden_weight: with ild, weight of the layer-output term.
        mixer_weight: with ild, weight of the mixer-output term.
    """

    loss: Literal["mse", "ild", "sequential"] = "mse"
    hidden_weight: float = 1.0
    mixer_weight: float = 1.0


@dataclass
class CheckpointSettings:
    """Checkpoints of a run.

    Args:
        save_interval: steps between checkpoints.
        keep: newest ones that stay.
        async_save: write them while training goes on; takes memory for a copy of a rank's part.
        export_every: steps between checkpoints that OUTPUT/exports holds as Hugging Face folders, too: a multiple of
            save_interval. The last step has one as well. 0: none.
    """

    save_interval: int = 500
    keep: int = 2
    async_save: bool = True
    export_every: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "checkpoint.", "save_interval", "keep")
        if self.export_every < 0 or self.export_every % self.save_interval:
            raise ConfigError(
                f"checkpoint.export_every must be 0 or a multiple of checkpoint.save_interval {self.save_interval}, got "
                f"{self.export_every}"
            )


@dataclass
class EvaluationSettings:
    """Suites of an evaluation that a run takes between its steps (eval/suites.py); results are metrics eval/SUITE/TASK/METRIC.

    Every rank measures a part of the examples. With tensor or pipeline parallelism it needs memory for the whole model
    meanwhile; where that is too much, measure checkpoints with `hylo eval` in another job.

    Args:
        every: steps between evaluations, which come at the end as well; 0: none.
        suites: some of ppl, recall, ruler, commonsense, gsm8k.
        limit: examples of each task, and of each length where it has lengths.
        lengths: tokens of a context; null: the suites' own up to what the model was trained for.
        keep_best: metric (recall/mean/exact/4096) whose best student is kept in OUTPUT/best_model; null: none.
    """

    every: int = 0
    suites: list[str] = field(default_factory=list)
    limit: int = 20
    lengths: list[int] | None = None
    keep_best: str | None = None

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"evaluation.every must be 0 (no evaluation) or more, got {self.every}")
        if bool(self.every) != bool(self.suites):
            raise ConfigError(
                f"evaluation needs both every and suites, or neither, got every {self.every} and suites {self.suites}"
            )
        if self.keep_best and self.keep_best.split("/")[0] not in self.suites:
            raise ConfigError(
                f"evaluation.keep_best {self.keep_best!r} is not of evaluation.suites {self.suites}; give SUITE/TASK/METRIC, "
                f"with /LENGTH where the task has lengths"
            )


@dataclass
class LoggingSettings:
    """Records of a run besides metrics.jsonl, and their interval.

    Args:
        log_interval: steps between records.
        tensorboard: write OUTPUT/tensorboard.
        wandb: log to Weights & Biases as well.
        wandb_project: name of the project there.
    """

    log_interval: int = 10
    tensorboard: bool = True
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "megatron_hylo"

    def __post_init__(self) -> None:
        at_least_one(self, "logging.", "log_interval")


@dataclass
class ProfileSettings:
    """A torch.profiler trace of some steps, one file a rank in OUTPUT/profile (open it in Perfetto).

    Args:
        start_step: first step of the trace, counted from 1.
        steps: number of steps; 0: no trace.
    """

    start_step: int = 10
    steps: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "profile.", "start_step")
        if self.steps < 0:
            raise ConfigError(f"profile.steps must be 0 (no trace) or more, got {self.steps}")
