"""Every setting of a training run. A recipe (YAML) holds these keys; the command line overrides them."""

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from megatron_hylo.config import ConfigError, Fp8, ParallelConfig, RopeScaling, TeacherWindow, recomputed_layers
from megatron_hylo.config.evaluation import SuiteSettings
from megatron_hylo.config.paths import expand_home, hugging_face_folder
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.config.renamed import RENAMED
from megatron_hylo.config.text import TextSettings
from megatron_hylo.config.train_settings import (
    AlignSettings,
    CheckpointSettings,
    EvaluationSettings,
    KLSettings,
    LoggingSettings,
    OptimizerSettings,
    ProfileSettings,
    at_least_one,
    flatten,
)

__all__ = [
    "PATHS", "PREFIXES", "AlignSettings", "CheckpointSettings", "EvaluationSettings", "KLSettings", "LoggingSettings",
    "OptimizerSettings", "ProfileSettings", "TrainConfig",
]  # fmt: skip

PREFIXES = ("", "second_")  # of a run's students: RUN/model and RUN/second_model, loss and second_loss

PATHS = ("data", "output", "model", "scratch", "second_model", "teacher", "teacher_store")  # `~` is expanded in these


@dataclass
class TrainConfig:
    """Settings of one run of one training stage.

    Args:
        stage: pretrain: cross-entropy on text; align: stage 1, layer by layer; distil: stages 2 and 3, KL to a teacher.
        data: dataset folder made by `hylo preprocess` (train and heldout).
        output: run folder: checkpoints/, logs, final model/ (and second_model/).
        model: model folder, training checkpoint, or hf:PATH of a Hugging Face folder to start from; pretrain may give `scratch`
            instead.
        scratch: pretrain from random weights: a named layout, a base model, or a model folder's shape.
        second_model: align: another student (all linear beside all MLA, say) of the same teacher pass.
        teacher: model folder, or hf:PATH of a Hugging Face folder, of the frozen teacher (align, distil).
        teacher_store: distil: learn from a `hylo cache-teacher` folder; `teacher` then only evaluates.
        teacher_address: distil: learn from `hylo serve-teacher` at HOST:PORT; `teacher` then only evaluates.
        sequence_length: tokens a sample.
        recall: facts and questions inserted in the training text; a fact and its question share a window, and with
            packed_documents a document.
        text: what the training windows are made of.
        packed_documents: block attention, convolutions and recurrent states across documents of a window; otherwise they are
            separated by their end token only.
        global_batch_size: samples a step, over all ranks.
        micro_batch_size: samples a forward pass of one rank.
        train_tokens: tokens in all; rounded up to whole steps.
        extend_tokens: tokens beyond train_tokens, by which a run goes on, finished or not, with its optimizer's state. The
            learning rate is that of a run of both together from there on: it jumps up, and the log says from what to what.
        trainable: all, or the token mixers alone; align never trains embedding and head, and anything but mixers only with ild.
        optimizer: learning rates and the rest of AdamW.
        keep_optimizer_state: begin with the optimizer's state of model too, a checkpoint of another run
            (RUN/checkpoints/step_N); schedule and place in the text begin anew. false: with its weights alone.
        precision: dtype of weights and activations; the optimizer's copies are fp32 in both.
        linear_precision: precision of the student's linear maps, forward and backward; fp8 needs a GPU that has it.
        teacher_precision: precision of the teacher's linear maps, the student's or fp8; held-out KL is to that teacher too.
        teacher_offload: keep the teacher's weights in CPU memory and prefetch them layer by layer: for long sequences, where
            copies take less time than computing.
        teacher_window: how a teacher reads sequences longer than its window.
        rope_scaling: how the student's attention and MLA layers turn from this run on (YaRN for longer sequences; nope: no
            rotation; none: unscaled), kept with the model; null: as they do.
        rotary_base: their theta from this run on; null: as it is.
        distil: loss of pretrain and distil.
        align: loss of align.
        loss_chunk_tokens: tokens whose logits exist at a time.
        recompute: compute activations again in the backward pass: less memory, a third more work. true: of all layers; or
            symbols of layers: '-' MLPs, 'G-' MLPs and Gated DeltaNet.
        cuda_graphs: capture a step as CUDA graphs and replay it, so that small models do not wait for Python; one GPU only.
        parallel: sizes of the parallel groups.
        backend: library of linear maps and SwiGLU: te is Transformer Engine, local torch and Megatron-Core; auto: te on a
            GPU that has it.
        seed: decides the order of the text and random weights.
        deterministic: the same losses each time, bit for bit, on the same kind and number of GPUs; slower, most of all in
            attention.
        max_skipped_steps: steps in a row that are skipped for NaN or infinity in loss or gradients; one more ends the run.
        allow_change: keys (optimizer.lr,max_skipped_steps) of which a run that goes on may have other values than it was
            started with, or (data, teacher) that may hold something else; kept in OUTPUT/history.json. A list, or with commas.
        eval_interval: steps between held-out evaluations; 0: at the end only.
        eval_windows: held-out windows of sequence_length, of each text; with recall as many of recall exercises.
        eval_data: more dataset folders of the same tokenizer whose held-out text is measured too, [FOLDER, ...].
        evaluation: suites of `hylo eval` that are run between steps.
        checkpoint: how often checkpoints are saved, and how.
        logging: what is recorded, and how often.
        profile: steps of which a torch.profiler trace is written.
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
    recall: RecallSettings = field(default_factory=RecallSettings)
    text: TextSettings = field(default_factory=TextSettings)
    packed_documents: bool = False
    global_batch_size: int = 32
    micro_batch_size: int = 1
    train_tokens: int = 10_000_000
    extend_tokens: int = 0
    # what is trained
    trainable: Literal["all", "mixers"] = "all"
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    keep_optimizer_state: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    linear_precision: Literal["same", "fp8"] = "same"
    teacher_precision: Literal["same", "fp8"] = "same"
    teacher_offload: bool = False
    teacher_window: TeacherWindow = field(default_factory=TeacherWindow)
    rope_scaling: RopeScaling | None = None
    rotary_base: float | None = None
    distil: KLSettings = field(default_factory=KLSettings)
    align: AlignSettings = field(default_factory=AlignSettings)
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
    eval_interval: int = 0
    eval_windows: int = 32
    eval_data: list[str] = field(default_factory=list)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)

    def __post_init__(self) -> None:
        for name in PATHS:
            if (getattr(self, name) or "").startswith("~"):
                setattr(self, name, str(expand_home(getattr(self, name))))
        self.eval_data = [str(expand_home(folder)) if folder.startswith("~") else folder for folder in self.eval_data]
        at_least_one(self, "", "sequence_length", "global_batch_size", "micro_batch_size", "train_tokens", "loss_chunk_tokens")
        if self.extend_tokens < 0:
            raise ConfigError(f"extend_tokens must be at least 0, got {self.extend_tokens}")
        if self.keep_optimizer_state and (self.model is None or self.second_model):
            raise ConfigError(
                f"keep_optimizer_state is for one model that is a checkpoint of another run (RUN/checkpoints/step_N), got "
                f"model {self.model} and second_model {self.second_model}; leave it out, or give that"
            )
        self._check_allowed_changes()
        recomputed_layers(self.recompute)
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
        if self.teacher_store and hugging_face_folder(self.teacher or ""):
            raise ConfigError(
                f"teacher_store {self.teacher_store} knows its teacher by the model folder it was made of, got teacher "
                f"{self.teacher}; give that folder (`hylo convert` makes it), or leave teacher out"
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
        if self.teacher_window.mode != "none" and (self.stage == "pretrain" or self.teacher_address):
            raise ConfigError(
                "teacher_window is for a teacher that this run loads, or a store of one; give it to `hylo serve-teacher` where "
                "the teacher is at an address"
            )
        if self.teacher_window.mode == "windows" and self.stage == "align":
            raise ConfigError(
                "stage align learns the hidden states of every layer, which teacher_window.mode windows has of the last alone; "
                "use mode rope or shorter sequences"
            )
        if self.stage == "pretrain" and self.teacher:
            raise ConfigError("stage pretrain learns from text alone; leave teacher out, or use stage distil")
        if self.optimizer.name == "muon" and self.optimizer.use_distributed_optimizer:
            raise ConfigError(
                "optimizer.name muon needs optimizer.use_distributed_optimizer false: it orthogonalises whole matrices, so its "
                "state is not divided over data-parallel ranks"
            )
        if self.precision == "bf16" and not (self.optimizer.use_distributed_optimizer or self.optimizer.name == "muon"):
            raise ConfigError(
                "precision bf16 needs optimizer.use_distributed_optimizer true: Megatron-Core's plain optimizer cannot save "
                "bf16 weights beside the fp32 A_log and dt_bias of linear layers"
            )
        if self.cuda_graphs and (self.recompute or self.packed_documents):
            asked = {f"recompute {self.recompute}": self.recompute, "packed_documents": self.packed_documents}
            said = " and ".join(name for name, given in asked.items() if given)
            raise ConfigError(f"cuda_graphs cannot capture {said}; set cuda_graphs false, or leave that out")
        self.check_graphs()
        if self.teacher_store and self.text != TextSettings():
            raise ConfigError(
                f"teacher_store {self.teacher_store} is of the documents of data, end to end; leave text as it is"
            )
        if self.recall.share and self.teacher_store and self.recall.kl_within != 0:
            raise ConfigError(
                f"recall.kl_within {self.recall.kl_within} asks for a KL at answers, which the teacher of teacher_store "
                f"{self.teacher_store} never read: exercises are made while training. Set recall.kl_within 0, or learn from a "
                f"teacher folder or a teacher_address"
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

        self.suite_settings()  # refuses what cannot be measured

    def suite_settings(self) -> SuiteSettings | None:
        """Settings of the suites, on the run's own held-out text; None where none are run."""
        chosen = self.evaluation
        if not chosen.every:
            return None
        length = min(self.sequence_length, 2048)
        return SuiteSettings(chosen.suites, self.data, chosen.limit, chosen.lengths, length)  # type: ignore[arg-type]

    @property
    def allowed_changes(self) -> set[str]:
        """Keys of allow_change, as they are written on the command line."""
        keys = self.allow_change.split(",") if isinstance(self.allow_change, str) else self.allow_change
        return {key.strip() for key in keys if key.strip()}

    def _check_allowed_changes(self) -> None:
        known = {f.name for f in fields(self)} | {f"rope_scaling.{f.name}" for f in fields(RopeScaling)}
        groups = {f.name: value for f in fields(self) if is_dataclass(value := getattr(self, f.name))}
        known |= {f"{name}.{f.name}" for name, group in groups.items() for f in fields(group)}
        for key in sorted(self.allowed_changes - known):
            near = [name for name in known if name.endswith(f".{key}")] or difflib.get_close_matches(key, known, cutoff=0.5)
            near = [RENAMED[key]] if key in RENAMED else near
            meant = f"did you mean {' or '.join(sorted(near))}? " if near else ""
            raise ConfigError(f"allow_change {key!r} is no setting of a run; {meant}`hylo train --help` lists them")

    def check_graphs(self, ranks: int = 1) -> None:
        """Refuse CUDA graphs on several ranks: what these exchange for gradients, updates and layers was never captured.

        Args:
            ranks: processes of the run; 1 where their number is not known yet.

        Raises:
            ConfigError: names the parallel sizes, or the number of ranks.
        """
        if not self.cuda_graphs:
            return
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
                 "expert_model_parallel_size")  # fmt: skip
        given = [f"parallel.{name} {size}" for name in names if (size := getattr(self.parallel, name)) > 1]
        if given or ranks > 1:
            raise ConfigError(
                f"cuda_graphs is for one GPU, got {' and '.join(given) or f'{ranks} ranks'}: what ranks exchange was never "
                f"captured; set cuda_graphs false, or train on one GPU"
            )

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

    def changed_settings(self) -> dict[str, Any]:
        """Settings that are not the defaults, flat, without paths."""
        default = flatten(asdict(TrainConfig("pretrain", "-", "-", scratch="-")))
        given = flatten(asdict(self))
        left_out = (*PATHS, "stage", "eval_data", "text.blend")
        return {name: value for name, value in given.items() if name not in left_out and value != default.get(name)}

    @property
    def loss_in_words(self) -> str:
        """Quantity and unit of the loss that a run logs."""
        recall = " + answer_weight x cross-entropy of recall answers" if self.recall.share else ""
        answers_alone = self.recall.share and self.recall.cross_entropy == "answers"
        text = "cross-entropy without recall's facts and questions" if answers_alone else "cross-entropy"
        if self.stage == "pretrain":
            return f"{text}{recall}, nats a token"
        if self.stage == "distil":
            c = self.distil
            weights = [f"{w:g} x {name}" for w, name in ((c.kl_weight, "KL"), (c.ce_weight, text)) if w]
            return f"{' + '.join(weights)}{recall}, nats a token"
        return {
            "mse": "squared error of a layer's mixer output / the teacher's energy, summed over layers; 1 a layer for output 0",
            "ild": "L2 distances of a layer's output and its mixer's from the teacher's, means over tokens, summed over layers",
            "sequential": "squared distance of the hidden state after a mixer from the teacher's / their energies, summed over "
            "layers",
        }[self.align.loss]

    @property
    def student_fp8(self) -> Fp8 | None:
        """Formats of the student's linear maps, as models are built with them."""
        return "hybrid" if self.linear_precision == "fp8" else None

    @property
    def teacher_fp8(self) -> Fp8 | None:
        """Formats of the teacher's linear maps."""
        return "e4m3" if self.teacher_precision == "fp8" else None

    @property
    def train_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return -(-self.total_tokens // (self.global_batch_size * self.sequence_length))

    @property
    def total_tokens(self) -> int:
        """Tokens of the run, extensions included."""
        return self.train_tokens + self.extend_tokens

    def is_logged(self, step: int) -> bool:
        """Whether a step, counted from 1, is recorded: the first, the last, and every `logging.log_interval`."""
        return step % self.logging.log_interval == 0 or step in (1, self.train_steps)

    def micro_batches(self, data_parallel_size: int) -> int:
        """Number of forward passes that a rank makes in one step.

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
