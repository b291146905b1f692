"""Every setting of a training run. A recipe (YAML) holds these keys; the command line overrides them."""

import difflib
from dataclasses import dataclass, field, fields
from typing import Literal

from megatron_hylo.config import ConfigError, Fp8, ParallelConfig, RopeScaling, recomputed_layers
from megatron_hylo.config.paths import expand_home

PREFIXES = ("", "second_")  # of a run's students: RUN/model and RUN/second_model, loss and second_loss

PATHS = ("data", "output", "model", "scratch", "second_model", "teacher", "teacher_store")  # `~` is expanded in these


@dataclass
class OptimizerSettings:
    """AdamW with a cosine schedule; fp32 master weights always. A_log, dt_bias, D, biases and norms never decay.

    Args:
        lr: peak learning rate of everything but the mixers.
        mixer_lr: peak learning rate of the token mixers; lr by default.
        min_lr_ratio: final / peak learning rate.
        warmup_ratio: part of the steps spent warming up.
        weight_decay: decoupled, of all but the parameters named above.
        adam_beta1: decay of the gradient's mean.
        adam_beta2: decay of the squared gradient's mean.
        adam_eps: added to its root.
        clip_grad: largest global gradient norm; 0: no clipping.
        use_distributed_optimizer: shard optimizer state over the data-parallel ranks.
        offload: its state rests in the CPU's memory during forward and backward passes: less memory, the same numbers.
    """

    lr: float = 6e-5
    mixer_lr: float | None = None
    min_lr_ratio: float = 0.0
    warmup_ratio: float = 0.01
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = True
    offload: bool = False


@dataclass
class TrainConfig:
    """One run of one stage.

    Args:
        stage: pretrain: cross-entropy on text; align: stage 1, layer by layer; distil: stages 2 and 3, KL to a teacher.
        data: dataset folder made by `hylo preprocess` (train and heldout).
        output: run folder: checkpoints/, logs, final model/ (and second_model/).
        model: model folder to start from; pretrain may give `scratch` instead.
        scratch: pretrain from random weights: a named layout, a base model, or a model folder's shape.
        second_model: align: another student (all linear beside all MLA, say) of the same teacher pass.
        teacher: model folder of the frozen teacher (align, distil).
        teacher_store: distil: learn from a `hylo cache-teacher` folder; `teacher` then only evaluates.
        teacher_address: distil: learn from `hylo serve-teacher` at HOST:PORT; `teacher` then only evaluates.
        sequence_length: tokens a sample.
        packed_documents: documents in a window do not see each other; else only their end token parts them.
        global_batch_size: samples a step, over all ranks.
        micro_batch_size: samples a forward pass of one rank.
        train_tokens: tokens in all; rounded up to whole steps. A run started again with more goes on, finished or not, with
            its optimizer's state, on the learning-rate schedule of the longer run.
        trainable: all, or the token mixers alone; align never trains embedding and head, and but for ild mixers alone.
        optimizer: learning rates and the rest of AdamW.
        precision: of weights and activations; the optimizer's copies are fp32 in both.
        linear_precision: of the products in the student's linear maps, forward and backward: fp8 on GPUs that have it.
        teacher_precision: the student's, or fp8 for a teacher's linear maps; held-out KL is to that teacher too.
        teacher_offload: a teacher's weights rest in the CPU's memory and come to the GPU layer by layer: for long sequences,
            where copies take less time than computing.
        mla_rope_scaling: stretch MLA's rotary frequencies for longer sequences.
        kl_direction: distil: KL(teacher || student), or KL(student || teacher).
        kl_temperature: distil: divides the logits of both, and the KL counts its square.
        kl_top_k: distil: the teacher's k most likely tokens one by one, all others as one class; null: all one by one.
        ce_weight: distil: weight of cross-entropy on the text beside KL to the teacher.
        align_loss: align: error of the mixers' outputs, the paper's Enhanced ILD, or distance of hidden states; see
            distill/alignment.py.
        hidden_weight: align with ild: weight of the layer-output term.
        mixer_weight: align with ild: weight of the mixer-output term.
        loss_chunk_tokens: tokens whose logits exist at a time.
        recompute: compute activations again in the backward pass: less memory, a third more work. Of all layers, or of those
            with these symbols: '-' MLPs, 'G-' these and Gated DeltaNet.
        cuda_graphs: replay a recorded step: small models no longer wait for Python; tried on one GPU only.
        parallel: how ranks are divided.
        backend: of linear maps and SwiGLU: te is Transformer Engine, local torch and Megatron-Core; auto: te on a GPU
            that has it.
        seed: of the order of the text and of random weights.
        deterministic: the same losses each time, bit for bit, on the same kind and number of GPUs; slower, most of all in
            attention.
        max_skipped_steps: in a row, for NaN or infinity in loss or gradients; one more ends the run.
        allow_change: keys (optimizer.lr,max_skipped_steps) of which a run that goes on may have other values than it was
            started with, or (data, teacher) that may hold something else; kept in OUTPUT/history.json. A list, or with commas.
        log_interval: steps between records.
        eval_interval: steps between held-out evaluations; 0: at the end only.
        eval_windows: held-out windows of sequence_length.
        save_interval: steps between checkpoints.
        keep_checkpoints: newest ones that stay.
        async_save: write checkpoints while training goes on; takes memory for a copy of a rank's part.
        tensorboard: write OUTPUT/tensorboard.
        wandb: log there as well.
        wandb_project: its project.
    """

    stage: Literal["pretrain", "align", "distil"]
    data: str
    output: str
    model: str | None = None
    scratch: str | None = None
    second_model: str | None = None
    teacher: str | None = None
    teacher_store: str | None = None
    teacher_address: str | None = None
    # amount of work
    sequence_length: int = 2048
    packed_documents: bool = False
    global_batch_size: int = 32
    micro_batch_size: int = 1
    train_tokens: int = 10_000_000
    # what is trained
    trainable: Literal["all", "mixers"] = "all"
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    precision: Literal["bf16", "fp32"] = "bf16"
    linear_precision: Literal["same", "fp8"] = "same"
    teacher_precision: Literal["same", "fp8"] = "same"
    teacher_offload: bool = False
    mla_rope_scaling: RopeScaling | None = None
    kl_direction: Literal["forward", "reverse"] = "forward"
    kl_temperature: float = 1.0
    kl_top_k: int | None = None
    ce_weight: float = 0.0
    align_loss: Literal["mse", "ild", "sequential"] = "mse"
    hidden_weight: float = 1.0
    mixer_weight: float = 1.0
    loss_chunk_tokens: int = 1024
    recompute: bool | str = False
    cuda_graphs: bool = False
    # where
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    backend: Literal["auto", "local", "te"] = "auto"
    seed: int = 1234
    deterministic: bool = False
    max_skipped_steps: int = 3
    # record and resume
    allow_change: list[str] | str = ""
    log_interval: int = 10
    eval_interval: int = 0
    eval_windows: int = 32
    save_interval: int = 500
    keep_checkpoints: int = 2
    async_save: bool = True
    tensorboard: bool = True
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "megatron_hylo"

    def __post_init__(self) -> None:
        for name in PATHS:
            if (getattr(self, name) or "").startswith("~"):
                setattr(self, name, str(expand_home(getattr(self, name))))
        for name in ("sequence_length", "global_batch_size", "micro_batch_size", "train_tokens", "loss_chunk_tokens",
                     "log_interval", "save_interval", "keep_checkpoints"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._check_allowed_changes()
        recomputed_layers(self.recompute)
        if self.kl_temperature <= 0:
            raise ConfigError(f"kl_temperature must be positive, got {self.kl_temperature}")
        if self.kl_top_k is not None and self.kl_top_k < 1:
            raise ConfigError(
                f"kl_top_k must be at least 1, got {self.kl_top_k}; leave it out (null) for the KL over the whole vocabulary"
            )
        elsewhere = {name: getattr(self, name) for name in ("teacher_store", "teacher_address") if getattr(self, name)}
        if self.stage in ("align", "distil") and not (self.model and (self.teacher or elsewhere)):
            raise ConfigError(
                f"stage {self.stage} needs both model and teacher (model folders); distil may have a teacher_store or a "
                f"teacher_address"
            )
        if elsewhere and self.stage != "distil":
            raise ConfigError(
                f"{min(elsewhere)} is for stage distil; stage {self.stage} does not learn from a teacher's outputs alone"
            )
        if len(elsewhere) > 1:
            raise ConfigError("teacher_store and teacher_address are two places of the same teacher; give one of them")
        if self.second_model and self.stage != "align":
            raise ConfigError(
                f"second_model is for stage align alone, where two students share the teacher's pass; stage {self.stage} "
                f"trains one model a run"
            )
        if self.stage == "pretrain" and bool(self.model) == bool(self.scratch):
            raise ConfigError("stage pretrain needs either model (a folder to continue from) or scratch (a layout to make)")
        if self.stage == "pretrain" and self.teacher:
            raise ConfigError("stage pretrain learns from text alone; leave teacher out, or use stage distil")
        if self.precision == "bf16" and not self.optimizer.use_distributed_optimizer:
            raise ConfigError(
                "precision bf16 needs optimizer.use_distributed_optimizer true: Megatron-Core's plain optimizer cannot save "
                "bf16 weights beside the fp32 A_log and dt_bias of linear layers"
            )
        if self.cuda_graphs and (self.recompute or self.packed_documents or self.parallel.pipeline_stages > 1):
            raise ConfigError(
                "cuda_graphs cannot record recompute, packed_documents or pipeline stages; set cuda_graphs false, or leave "
                "those out"
            )
        parallel, parts = self.parallel, self.parallel.context_parallel_size
        if parallel.sequence_parallel:
            parts *= parallel.tensor_model_parallel_size
        if self.sequence_length % parts:
            raise ConfigError(
                f"sequence_length {self.sequence_length} must be a multiple of {parts} = context_parallel_size "
                f"{parallel.context_parallel_size}"
                + (
                    f" x tensor_model_parallel_size {parts // parallel.context_parallel_size}"
                    if parallel.sequence_parallel
                    else ""
                )
            )
        for name in ("linear_precision", "teacher_precision"):
            if getattr(self, name) == "fp8":
                self._check_fp8(name, parts)
        if self.teacher_offload and (self.teacher is None or self.teacher_precision == "fp8" or self.cuda_graphs):
            raise ConfigError(
                f"teacher_offload needs a teacher folder, teacher_precision same and cuda_graphs false, got {self.teacher}, "
                f"{self.teacher_precision} and {self.cuda_graphs}"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )

    @property
    def allowed_changes(self) -> set[str]:
        """Keys of allow_change, as on the command line."""
        keys = self.allow_change.split(",") if isinstance(self.allow_change, str) else self.allow_change
        return {key.strip() for key in keys if key.strip()}

    def _check_allowed_changes(self) -> None:
        known = {f.name for f in fields(self)} | {f"optimizer.{f.name}" for f in fields(OptimizerSettings)}
        known |= {f"mla_rope_scaling.{f.name}" for f in fields(RopeScaling)}
        for key in sorted(self.allowed_changes - known):
            near = [name for name in known if name.endswith(f".{key}")] or difflib.get_close_matches(key, known, cutoff=0.5)
            meant = f"did you mean {' or '.join(sorted(near))}? " if near else ""
            raise ConfigError(f"allow_change {key!r} is no setting of a run; {meant}`hylo train --help` lists them")

    def _check_fp8(self, name: str, parts: int) -> None:
        """Refuse what is known to be wrong before there is a machine to ask; `parts` ranks share a sequence."""
        elsewhere, teachers = self.teacher_store or self.teacher_address, name == "teacher_precision"
        each = 8 if teachers else 16
        for wrong, needed in (
            (teachers and elsewhere, f"a teacher on the student's ranks, got {elsewhere} to learn from"),
            (teachers and self.teacher is None, f"a teacher, got none (stage {self.stage})"),
            (not teachers and self.cuda_graphs, "cuda_graphs false"),
            (self.precision != "bf16", f"precision bf16, got {self.precision}"),
            (self.backend == "local", f"backend te or auto, got {self.backend}"),
            (
                self.sequence_length % (each * parts),
                f"a sequence_length that is a multiple of {each * parts} ({each} tokens a rank), got {self.sequence_length}",
            ),
        ):
            if wrong:
                raise ConfigError(f"{name} fp8 needs {needed}; change that, or set {name} same")

    @property
    def student_fp8(self) -> Fp8 | None:
        """Formats of the student's linear maps, as models are built with."""
        return "hybrid" if self.linear_precision == "fp8" else None

    @property
    def teacher_fp8(self) -> Fp8 | None:
        """The same of the teacher's."""
        return "e4m3" if self.teacher_precision == "fp8" else None

    @property
    def train_steps(self) -> int:
        """Optimizer steps."""
        return -(-self.train_tokens // (self.global_batch_size * self.sequence_length))

    def micro_batches(self, data_parallel_size: int) -> int:
        """Forward passes a rank makes in one step.

        Raises:
            ConfigError: the ranks do not share the batch evenly.
        """
        per_pass = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % per_pass:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} must be a multiple of micro_batch_size {self.micro_batch_size} x "
                f"{data_parallel_size} data-parallel ranks = {per_pass}"
            )
        count, ranks = self.global_batch_size // per_pass, self.parallel.pipeline_model_parallel_size
        if self.parallel.virtual_pipeline_model_parallel_size > 1 and count % ranks and self.stage != "align":
            raise ConfigError(
                f"{count} micro-batches a step must be a multiple of pipeline_model_parallel_size {ranks} where stages are "
                f"interleaved; change global_batch_size {self.global_batch_size} or micro_batch_size {self.micro_batch_size}"
            )
        return count
