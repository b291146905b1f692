"""Set-up of a training run: models, optimizers, data and objective of one rank, without a run folder.

The training loop, the parity tests and the benchmarks build their runs here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_hylo.config import ConfigError, ModelConfig, ParallelConfig
from megatron_hylo.config.layouts import parameter_count, pipeline_layers
from megatron_hylo.config.mlps import check_expert_parallel
from megatron_hylo.config.teacher_window import rope_changes
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.convert.hf_start import load_model_chunks, read_model_config
from megatron_hylo.data.training_windows import training_windows
from megatron_hylo.data.windows import WindowSource
from megatron_hylo.models.frozen import FrozenModel, as_frozen, freeze
from megatron_hylo.models.hylo_model import HyloModel, build_chunks
from megatron_hylo.plan.flops import forward_flops_per_token, mlp_flops, teacher_flops_per_token
from megatron_hylo.plan.memory import Memory, predict_memory
from megatron_hylo.teachers.remote import RemoteTeacher
from megatron_hylo.teachers.signal import TeacherSignal
from megatron_hylo.teachers.store import StoredTeacher, TeacherStore
from megatron_hylo.train.data_loader import TimedBatches, rank_batches
from megatron_hylo.train.inputs import scratch_config
from megatron_hylo.train.muon import check_muon
from megatron_hylo.train.objectives import Objective, get_objective
from megatron_hylo.train.optimizer import TrainingState, build_training_state, choose_trainable

NO_PATH = "-"  # given for a path of a configuration whose models or batches come from the caller

Students = Sequence[Sequence[HyloModel]]
Teacher = Sequence[HyloModel] | None


@dataclass
class Run:
    """One rank's share of a training run.

    Args:
        config: settings of the run.
        device: device of this rank.
        students: this rank's chunks of each student, one a virtual pipeline stage.
        teacher: its chunks of a teacher on the same ranks.
        teacher_signal: a stored or remote teacher.
        objective: losses and gradients of a step.
        states: each student's data-parallel wrappers, optimizer and learning-rate schedule.
        dataset: training windows; None where config.data is "-" and the caller makes the batches.
        micro_batches: forward passes of this rank in a step.
    """

    config: TrainConfig
    device: torch.device
    students: Students
    teacher: FrozenModel | None
    teacher_signal: TeacherSignal | None
    objective: Objective
    states: list[TrainingState]
    dataset: WindowSource | None
    micro_batches: int

    def batches(self, consumed_samples: int = 0) -> TimedBatches:
        """Start this rank's endless data loader after `consumed_samples` windows of all ranks; see `rank_batches`."""
        assert self.dataset is not None, "a run whose data is '-' has batches of its caller"
        reads = self.teacher_signal if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None
        return rank_batches(self.config, self.dataset, consumed_samples, self.device, reads)

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs a token: forward and backward of the students, forward of a teacher on these ranks."""
        config, head = self.config, self.config.stage != "align"
        shapes = [chunks[0].config.hylo for chunks in self.students]
        flops = sum(3 * forward_flops_per_token(c, config.sequence_length, head) for c in shapes)
        if config.stage == "align" and config.align.loss == "mse":  # runs no MLP of a student
            flops -= sum(3 * mlp_flops(c) for c in shapes)
        if self.teacher is None or self.teacher_signal is not None:
            return flops
        shape, window = self.teacher[0].config.hylo, self.teacher.window
        return flops + teacher_flops_per_token(shape, config.sequence_length, window, head)

    def describe(self) -> str:
        """Name the students, the amount of work, the precision, the ranks and what CUDA graphs have."""
        config, shapes = self.config, [chunks[0].config.hylo for chunks in self.students]
        models = [f"{c.mixers} ({parameter_count(c) / 1e6:,.0f} M parameters)" for c in shapes]
        ranks = torch.distributed.get_world_size()
        graphs = ""
        if config.cuda_graphs:
            why = "optimizer.offload moves its state" if config.optimizer.offload else "Apex"
            captured = all(state.capturable for state in self.states)
            graphs = ", CUDA graphs of " + ("passes and update" if captured else f"the passes, not of the update ({why})")
        return (
            f"{' and '.join(models)}, {config.train_steps} steps of {config.global_batch_size} x {config.sequence_length} "
            f"tokens, {config.precision}, {ranks} rank{'s' if ranks > 1 else ''}{graphs}"
        )

    def predict_memory(self) -> Memory:
        """Memory that this rank's GPU will need."""
        sharded = self.config.optimizer.use_distributed_optimizer
        shards = parallel_state.get_data_parallel_world_size(with_context_parallel=True) if sharded else 1
        experts = parallel_state.get_expert_data_parallel_world_size() if sharded else 1
        return predict_memory(self.config, self.students, self.teacher, self.teacher_signal, shards, experts)


def build_run(
    config: TrainConfig,
    device: torch.device,
    *,
    models: tuple[Students, Teacher] | None = None,
    dataset: WindowSource | None = None,
    teacher_signal: TeacherSignal | None = None,
) -> Run:
    """Build models, optimizers, data and objective of this rank; all ranks call it, after `initialize`.

    Args:
        config: settings of the run; `data` may be "-", then the caller makes the batches.
        device: device of this rank.
        models: (students, teacher), this rank's chunks of each, as `build_models` returns them; by default they are loaded
            from the folders of `config`.
        dataset: training windows that are open already; by default those of `config`.
        teacher_signal: a stored or remote teacher that is open already; by default that of `config`.

    Raises:
        ConfigError: ranks do not share the batch evenly, the text is too short, or a student does not fit its teacher.
    """
    micro_batches = config.micro_batches(parallel_state.get_data_parallel_world_size())
    if dataset is None and config.data != NO_PATH:
        dataset = training_windows(config)
    signal = open_teacher_signal(config) if teacher_signal is None else teacher_signal
    students, chunks = models or build_models(config)
    teacher = as_frozen(chunks) if chunks is not None else None
    objective = get_objective(config, teacher, signal)
    for student in students:
        objective.check(student[0])
        choose_trainable(student, config)
    states = [build_training_state(student, config) for student in students]
    return Run(config, device, students, teacher, signal, objective, states, dataset, micro_batches)


def build_models(config: TrainConfig) -> tuple[list[list[HyloModel]], FrozenModel | None]:
    """Load or make this rank's chunks of (the students, the teacher); paired layers are on the same ranks."""
    for shape in architectures(config):
        check_experts(config, shape)
    check_muon(config, architectures(config))
    architecture, dtype = architectures(config)[0], params_dtype(config)
    layers = pipeline_layers(architecture, config.parallel.pipeline_stages, config.parallel.pipeline_layers)
    shared: dict[str, Any] = dict(
        parallel=replace(config.parallel, pipeline_layers=layers), params_dtype=dtype, backend=config.backend
    )
    how: dict[str, Any] = dict(recompute=config.recompute, fp8=config.student_fp8)
    changes = rope_changes(config.rope_scaling, config.rotary_base)
    # what is saved says the longest sequence it was trained with
    trained = [max(c.max_position_embeddings, config.sequence_length) for c in architectures(config)]
    if config.model:
        folders = [folder for folder in (config.model, config.second_model) if folder]
        students = [
            _load_chunks(folder, **how, **shared, **changes, max_position_embeddings=length)
            for folder, length in zip(folders, trained)
        ]
    else:
        students = [build_chunks(architecture.replace(**changes, max_position_embeddings=trained[0]), **how, **shared)]
    teacher = None
    if config.teacher:
        shape = read_model_config(config.teacher)
        reading = config.teacher_window.resolve(shape, config.sequence_length)
        window = reading.window(shape, config.sequence_length)
        if window is not None:  # each context-parallel rank reads windows of its own
            shared["parallel"] = replace(shared["parallel"], context_parallel_size=1)
        chunks = _load_chunks(config.teacher, fp8=config.teacher_fp8, **shared, **reading.changes())
        teacher = freeze(chunks, config.teacher_offload, window)
    return [[chunk.train() for chunk in student] for student in students], teacher


def open_teacher_signal(config: TrainConfig) -> TeacherSignal | None:
    """Open the stored teacher of a run, or connect to its remote one; None where it has neither."""
    if config.teacher_store is not None:
        return StoredTeacher(TeacherStore(config.teacher_store, config.data, config.teacher), params_dtype(config))
    if config.teacher_address is not None:
        minutes = config.parallel.distributed_timeout_minutes
        return RemoteTeacher(config.teacher_address, params_dtype(config), timedelta(minutes=minutes))
    return None


def check_experts(config: TrainConfig, shape: ModelConfig) -> None:
    """Refuse settings under which mixtures of experts do not train.

    Args:
        config: settings of the run.
        shape: one of its models.

    Raises:
        ConfigError: CUDA graphs or FP8, or what `check_expert_parallel` refuses.
    """
    check_expert_parallel(shape, config.parallel, trained=True)
    if shape.has_experts and config.cuda_graphs:
        raise ConfigError("cuda_graphs cannot capture mixtures of experts, whose products depend on the tokens; set it false")
    for name in ("teacher_precision", "linear_precision"):
        if shape.has_experts and getattr(config, name) == "fp8":
            raise ConfigError(f"{name} fp8 is not supported for mixtures of experts; set it to same")


def params_dtype(config: TrainConfig) -> torch.dtype:
    """Dtype of weights and activations."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def architectures(config: TrainConfig) -> list[ModelConfig]:
    """Configurations of all models of a run: the student, a second one, the teacher."""
    folders = [folder for folder in (config.model, config.second_model, config.teacher) if folder]
    scratch = [] if config.scratch is None or config.model else [scratch_config(config.scratch)]
    return scratch + [read_model_config(folder) for folder in folders]


def _load_chunks(model: str, parallel: ParallelConfig, **settings: Any) -> list[HyloModel]:
    """Load this rank's chunks, divided as `parallel` says, or evenly by weights in a model of another depth (a teacher's)."""
    if sum(parallel.pipeline_layers or ()) != read_model_config(model).num_hidden_layers:
        parallel = replace(parallel, pipeline_layers=None)
    return load_model_chunks(model, parallel, **settings)
