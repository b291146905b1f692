"""Whether a run's teacher can read its sequences, before training starts."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.config.teacher_window import check_reach
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.convert.hf_start import read_model_config
from megatron_hylo.teachers.signal import TeacherSignal
from megatron_hylo.teachers.store import StoredTeacher


def check_teacher_window(config: TrainConfig) -> None:
    """Refuse sequences longer than the window of a teacher's folder, where `teacher_window` is not set for them.

    Raises:
        ConfigError: see `TeacherWindow.check`.
    """
    if config.teacher is not None:
        config.teacher_window.check(read_model_config(config.teacher), config.sequence_length, f"teacher {config.teacher}")


def check_signal_window(config: TrainConfig, teacher_signal: TeacherSignal, about: Mapping[str, Any] | None) -> None:
    """Refuse a store of a teacher that read otherwise than the run says, and a server whose teacher reads less.

    Args:
        config: the run.
        teacher_signal: its store or server.
        about: what a server says of its teacher, on every rank.

    Raises:
        ConfigError: says what differs and how to go on.
    """
    if about is not None:
        try:
            check_reach(about.get("reach"), config.sequence_length, f"the teacher at {config.teacher_address}")
        except ConfigError as error:
            raise ConfigError(f"{error} (teacher_window is an option of `hylo serve-teacher`)") from error
    if isinstance(teacher_signal, StoredTeacher) and config.teacher_window.mode != "none":
        theirs, ours = teacher_signal.store.description.get("teacher_window"), asdict(config.teacher_window)
        # a run that leaves YaRN's factor open takes the store's, which was made with segments of another length
        derived = config.teacher_window.is_derived and (theirs or {}).get("rope_scaling", {}).get("rope_type") == "yarn"
        if theirs != ours and not derived:
            raise ConfigError(
                f"{config.teacher_store} was made with teacher_window {theirs or 'none'}, the run says {ours}; give it "
                f"what the store was made with, or cache the teacher again"
            )
