"""How a teacher reads sequences that are longer than its window."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.model import ModelConfig
from megatron_hylo.config.rope import RopeScaling

WAYS = (
    "train on shorter sequences; stretch its positions by teacher_window.mode rope (with teacher_window.rope_scaling or "
    "teacher_window.rotary_base); let it read overlapping windows of its own length by teacher_window.mode windows; or take a "
    "teacher with a longer window"
)


@dataclass(frozen=True)
class TeacherWindow:
    """How a teacher reads sequences longer than its window (`max_position_embeddings`); see docs/long_context.md.

    Args:
        mode: none: it reads nothing longer; rope: other rotary positions stretch its window; windows: it reads overlapping
            windows of its own length, and every token but those at a sequence's start has half a window or more before it.
        rope_scaling: rope: takes the place of the teacher's own scaling.
        rotary_base: rope: takes the place of the teacher's theta; null: its own.
        length: windows: tokens of one; null: the teacher's window.
    """

    mode: Literal["none", "rope", "windows"] = "none"
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rotary_base: float | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("none", "rope", "windows"):
            raise ConfigError(f"teacher_window.mode {self.mode!r} is not supported; use none, rope or windows")
        stretched = self.rope_scaling.rope_type != "none" or self.rotary_base is not None
        if stretched != (self.mode == "rope"):
            raise ConfigError(
                "teacher_window.mode rope goes with teacher_window.rope_scaling, teacher_window.rotary_base or both; other "
                "modes with neither"
            )
        if self.length is not None and (self.mode != "windows" or self.length < 2):
            raise ConfigError(f"teacher_window.length {self.length} must be at least 2, and is for teacher_window.mode windows")
        if self.rotary_base is not None and not self.rotary_base > 0:
            raise ConfigError(f"teacher_window.rotary_base must be positive, got {self.rotary_base}")

    def changes(self) -> dict[str, Any]:
        """Fields of the teacher's `ModelConfig` that it is loaded with instead of its own."""
        return rope_changes(self.rope_scaling, self.rotary_base) if self.mode == "rope" else {}

    def window(self, teacher: ModelConfig, sequence_length: int) -> int | None:
        """Tokens of the windows that a sequence is read in; None: it is read whole."""
        window = self.length or own_window(teacher)
        return window if self.mode == "windows" and window < sequence_length else None

    def reach(self, teacher: ModelConfig) -> int | None:
        """Tokens of the longest sequence that the teacher can read; None: any."""
        scaling = self.rope_scaling
        if self.mode == "none":
            return own_window(teacher)
        if scaling.rope_type == "yarn":
            return int(scaling.factor * scaling.original_max_position_embeddings)
        return int(scaling.factor * own_window(teacher)) if scaling.rope_type == "linear" else None

    def check(self, teacher: ModelConfig, sequence_length: int, name: str) -> None:
        """Refuse a sequence that the teacher cannot read.

        Args:
            teacher: the teacher's own configuration.
            sequence_length: tokens.
            name: of the teacher, for the sentence.

        Raises:
            ConfigError: it is longer than the teacher's window, and nothing is set for that, or too little.
        """
        if self.length is not None and self.length > own_window(teacher):
            raise ConfigError(
                f"teacher_window.length {self.length} is more than the {own_window(teacher)} tokens of the window of {name}"
            )
        check_reach(self.reach(teacher), sequence_length, name, self.mode)


OWN_WINDOW = TeacherWindow()  # nothing longer than that


def check_reach(reach: int | None, sequence_length: int, name: str, mode: str = "none") -> None:
    """Refuse a sequence beyond a teacher's reach, where its predictions are noise.

    Args:
        reach: tokens; None: any.
        sequence_length: tokens.
        name: of the teacher.
        mode: of its `TeacherWindow`.

    Raises:
        ConfigError: the sequence is longer; says how to go on.
    """
    if reach is None or sequence_length <= reach:
        return
    if mode == "rope":
        raise ConfigError(
            f"teacher_window.rope_scaling lets {name} read {reach} tokens, sequence_length is {sequence_length}; raise its "
            f"factor, or use teacher_window.mode windows"
        )
    raise ConfigError(
        f"sequence_length {sequence_length} is more than the window of {reach} tokens that {name} was trained for, beyond "
        f"which it predicts noise: {WAYS}"
    )


def own_window(teacher: ModelConfig) -> int:
    """Tokens that a model reads as it is: `max_position_embeddings`, or what its own YaRN stretches them to."""
    scaling = teacher.rope_scaling
    stretched = scaling.factor * scaling.original_max_position_embeddings if scaling.rope_type == "yarn" else 0
    return max(teacher.max_position_embeddings, int(stretched))


def rope_changes(scaling: RopeScaling | None, rotary_base: float | None) -> dict[str, Any]:
    """Fields of a `ModelConfig` that change how attention and MLA layers turn; None leaves the model's own."""
    scalings = {} if scaling is None else {"rope_scaling": scaling, "mla_rope_scaling": scaling}
    return scalings | ({} if rotary_base is None else {"rotary_base": rotary_base})
