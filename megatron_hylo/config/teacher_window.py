"""How a teacher reads sequences that are longer than its window."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.model import ModelConfig
from megatron_hylo.config.rope import RopeScaling

FAR = 4.0  # times its window: stretched further a teacher teaches little, and windows are better (benchmarks/results/recall.md)
QWEN3_WINDOW, QWEN3_TRAINED = 40960, 32768  # its max_position_embeddings, and what its published YaRN stretches


@dataclass(frozen=True)
class TeacherWindow:
    """How a teacher reads sequences longer than its window (`max_position_embeddings`); see docs/long_context.md.

    Args:
        mode: none: it reads nothing longer; rope: other rotary positions stretch its window, which with answers at weight 1
            teaches recall better up to 4 times its length; windows: it reads overlapping windows of its own length, and every
            token but those at a sequence's start has half a window or more before it; better beyond 4 times, and what recipes
            have past the window at any length, with heavy answers (recall.answer_weight 10).
        rope_scaling: rope: takes the place of the teacher's own scaling. With neither it nor rotary_base: YaRN, by the smallest
            factor that reaches the sequence's length.
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
        if self._stretches and self.mode != "rope":
            scaling, base = self.rope_scaling, self.rotary_base
            given = {} if scaling.rope_type == "none" else {"rope_scaling": f"{scaling.rope_type} by {scaling.factor:g}"}
            given |= {} if base is None else {"rotary_base": f"{base:g}"}
            names = [f"teacher_window.{name}" for name in given]
            raise ConfigError(
                f"teacher_window.mode rope alone takes {' and '.join(names)} ({', '.join(given.values())}), got mode "
                f"{self.mode}; set {' and '.join(names)} null, which drops a recipe's, or take mode rope"
            )
        if self.length is not None and (self.mode != "windows" or self.length < 2):
            raise ConfigError(f"teacher_window.length {self.length} must be at least 2, and is for teacher_window.mode windows")
        if self.rotary_base is not None and not self.rotary_base > 0:
            raise ConfigError(f"teacher_window.rotary_base must be positive, got {self.rotary_base}")

    @property
    def _stretches(self) -> bool:
        return self.rope_scaling.rope_type != "none" or self.rotary_base is not None

    @property
    def is_derived(self) -> bool:
        """Whether mode rope leaves YaRN's factor to be derived from the sequence's length."""
        return self.mode == "rope" and not self._stretches

    def resolve(self, teacher: ModelConfig, sequence_length: int) -> "TeacherWindow":
        """Replace mode rope without a scaling by what it comes to for sequences of one length; else return the same.

        Args:
            teacher: the teacher's own configuration.
            sequence_length: tokens.

        Returns:
            Mode none where the teacher reads so much as it is.

        Raises:
            ConfigError: the teacher's own scaling is of a kind that YaRN cannot take the place of unasked.
        """
        if not self.is_derived:
            return self
        if sequence_length <= own_window(teacher):
            return OWN_WINDOW
        factor, origin = yarn_factor(teacher, sequence_length), yarn_origin(teacher)
        if factor is None:
            raise ConfigError(
                f"teacher_window.mode rope derives YaRN for a teacher without a scaling of its own, or with YaRN; this one has "
                f"{teacher.rope_scaling.rope_type}: give teacher_window.rope_scaling, or use mode windows"
            )
        return TeacherWindow("rope", RopeScaling("yarn", factor=factor, original_max_position_embeddings=origin))

    def changes(self) -> dict[str, Any]:
        """Fields of the teacher's `ModelConfig` that it is loaded with instead of its own; of a resolved setting."""
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
            return int(scaling.factor * scaling.original_max_position_embeddings + 1e-6)
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
        reach = self.resolve(teacher, sequence_length).reach(teacher)
        check_reach(reach, sequence_length, name, self.mode, yarn_factor(teacher, sequence_length))


OWN_WINDOW = TeacherWindow()  # nothing longer than that


def check_reach(reach: int | None, sequence_length: int, name: str, mode: str = "none", factor: float | None = None) -> None:
    """Refuse a sequence beyond a teacher's reach, where its predictions are noise.

    Args:
        reach: tokens; None: any.
        sequence_length: tokens.
        name: of the teacher.
        mode: of its `TeacherWindow`.
        factor: of the YaRN that teacher_window.mode rope would derive; None: it would derive none.

    Raises:
        ConfigError: the sequence is longer; says which options to add.
    """
    if reach is None or sequence_length <= reach:
        return
    if mode == "rope":
        raise ConfigError(
            f"teacher_window.rope_scaling lets {name} read {reach} tokens, sequence_length is {sequence_length}; raise its "
            f"factor, leave rope_scaling out to have it derived, or use --teacher_window.mode windows"
        )
    derived = "with --teacher_window.rope_scaling" if factor is None else f"YaRN by {factor:g}"
    ways = {
        "rope": f"--teacher_window.mode rope ({derived}: its positions are stretched)",
        "windows": "--teacher_window.mode windows (it reads overlapping windows of its own length)",
    }
    near = sequence_length <= FAR * reach
    windows = (
        "as recipes do with heavy answers (recall.answer_weight 10)" if near else "the better way for recall at this length"
    )
    rope = ", the better way for recall with a weight of 1" if near else ""
    raise ConfigError(
        f"sequence_length {sequence_length} is more than the window of {reach} tokens that {name} was trained for, beyond "
        f"which it predicts noise. Add {ways['windows']}, {windows}, or {ways['rope']}{rope}; or take "
        f"--sequence_length {reach}, or a teacher with a longer window"
    )


def own_window(teacher: ModelConfig) -> int:
    """Tokens that a model reads as it is: `max_position_embeddings`, or what its own YaRN stretches them to."""
    scaling = teacher.rope_scaling
    stretched = scaling.factor * scaling.original_max_position_embeddings if scaling.rope_type == "yarn" else 0
    return max(teacher.max_position_embeddings, int(stretched))


def yarn_origin(teacher: ModelConfig) -> int:
    """Tokens that a teacher's frequencies were trained for, which YaRN stretches.

    They are its `max_position_embeddings`, what its own YaRN stretches, or Qwen3's 32,768, below its `max_position_embeddings`.
    """
    if teacher.rope_scaling.rope_type == "yarn":
        return teacher.rope_scaling.original_max_position_embeddings
    window = teacher.max_position_embeddings
    return QWEN3_TRAINED if teacher.model_family == "qwen3" and window == QWEN3_WINDOW else window


def yarn_factor(teacher: ModelConfig, sequence_length: int) -> float | None:
    """Smallest factor of YaRN with which a teacher reads a sequence; None where its own scaling is of another kind.

    Args:
        teacher: its own configuration.
        sequence_length: tokens.
    """
    known = teacher.rope_scaling.rope_type in ("none", "yarn")
    return max(1.0, sequence_length / yarn_origin(teacher)) if known else None


def rope_changes(scaling: RopeScaling | None, rotary_base: float | None) -> dict[str, Any]:
    """Fields of a `ModelConfig` that change how attention and MLA layers turn; None leaves the model's own."""
    scalings = {} if scaling is None else {"rope_scaling": scaling, "mla_rope_scaling": scaling}
    return scalings | ({} if rotary_base is None else {"rotary_base": rotary_base})


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of a sequence, of which [first, end) are taken from it."""

    begin: int
    first: int
    end: int


def windows_of(length: int, window: int) -> list[Window]:
    """The windows of a sequence, in order, each token taken from one.

    Args:
        length: tokens of the sequence, at least 1.
        window: tokens of a window, at least 2; a shorter sequence is one.
    """
    if length <= window:
        return [Window(0, 0, length)]
    found = [Window(0, 0, window)]
    while (first := found[-1].end) < length:
        end = min(first + window // 2, length)
        found.append(Window(end - window, first, end))
    return found


def repeats(length: int, window: int) -> float:
    """Tokens read in windows for each token of a sequence."""
    return len(windows_of(length, window)) * min(window, length) / length
