"""Callbacks of the training loop: what happens around its steps."""

from dataclasses import dataclass, field

from megatron_hylo.train.nan_guard import SkippedSteps


class Stopped(BaseException):
    """Training was asked to stop before its end and has saved; the message says how to resume.

    It is no `Exception`, as KeyboardInterrupt is none: before the first step a signal raises it inside whatever runs then, and
    libraries take an Exception for a failure of their own. torch.compile wraps one into an error of its compiler, or passes
    over it and goes on.
    """


@dataclass
class Progress:
    """Position of a run.

    Args:
        step: optimizer steps done.
        consumed: samples of all ranks used so far, skipped steps' included.
        skipped: counts of steps without an update.
        metrics: of the latest step, means over all ranks.
    """

    step: int
    consumed: int
    skipped: SkippedSteps
    metrics: dict[str, float] = field(default_factory=dict)


class Callback:
    """Acts before or after steps, when the run ends well, and when the loop is left; all ranks call all of it."""

    def before_step(self, progress: Progress) -> None:
        """Called before each step."""

    def after_step(self, progress: Progress) -> None:
        """Called after each step, whose number is `progress.step`."""

    def at_end(self, progress: Progress) -> None:
        """Called once, after the last step of a run."""

    def close(self) -> None:
        """Called however the loop is left."""
