"""Settings of `hylo upcycle`. A YAML file holds these keys; the command line overrides them."""

from dataclasses import dataclass
from typing import Literal

from megatron_hylo.config.layouts import Shapes
from megatron_hylo.config.paths import expand_home

CALIBRATED = ("calibrated", "taylor")  # initialisers that read a calibration folder, in shapes of the teacher
PATHS = ("teacher", "output", "calibration")  # `~` is expanded in these


@dataclass
class UpcycleConfig:
    """One hybrid made from a teacher; kept in its hylo.json as provenance.

    Args:
        teacher: model folder of the teacher.
        output: model folder to make.
        layout: a named layout (see `hylo layouts`), or
        pattern: one mixer a layer out of * W + M G K, e.g. "GG+G..."; MLPs may be written ("G-G-+-...").
        init: calibrated, paper (HyLo's own), or taylor (Taylor-Calibrate's start of Gated DeltaNet, to compare with); the
            first and the last need --calibration.
        calibration: folder made by `hylo calibrate`; with it any initialisation is also measured on held-out text.
        shapes: dimensions of a pattern's mixers; teacher for calibrated and taylor, the paper's otherwise.
        rotary: which of the teacher's rotary components MLA keeps: energy (the most useful), all or fastest (standard
            tables), table (the standard table of the layout's own dimensions).
        sequential: let each layer make up for what the layers before it got wrong: much better before training with
            262,144 calibration tokens or more, not with fewer.
        mlps: with sequential, let MLPs make up for it too (their last linear map changes); false keeps the teacher's.
        seed: of the tensors the initialiser draws at random.
        overrides: dimensions that replace the layout's, e.g. {kv_lora_rank: 64}.
        overwrite: replace what is there.
    """

    teacher: str
    output: str
    layout: str | None = None
    pattern: str | None = None
    init: str = "calibrated"
    calibration: str | None = None
    shapes: Literal["paper", "teacher"] | None = None
    rotary: Literal["energy", "all", "fastest", "table"] = "energy"
    sequential: bool = False
    mlps: bool = True
    seed: int = 0
    overrides: dict[str, int] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in PATHS:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, str(expand_home(value)))

    @property
    def reads_statistics(self) -> bool:
        """Whether the initialiser works from a calibration folder."""
        return self.init in CALIBRATED

    @property
    def mixer_shapes(self) -> Shapes:
        """Shapes of a pattern's mixers, with the initialiser's default where none are given."""
        return self.shapes or ("teacher" if self.reads_statistics else "paper")
