"""Settings of `hylo upcycle`. A YAML file holds these keys; the command line overrides them."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.layouts import Shapes, get_layout, hybrid_config
from megatron_hylo.config.model import ModelConfig
from megatron_hylo.config.paths import expand_home

CALIBRATED = ("calibrated", "taylor")  # initialisers that read a calibration folder, in shapes of the teacher
SIZES = (  # that a layout and its teacher share
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size",
)  # fmt: skip
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

    def hybrid(self, teacher: ModelConfig) -> ModelConfig:
        """Configuration of the hybrid that is made of a teacher, from the layout's name or the pattern.

        Raises:
            ConfigError: both or neither given, a pattern that does not fit, a layout of another base, no calibration where the
                initialiser reads it.
        """
        overrides: dict[str, Any] = {**(self.overrides or {})}
        if (self.layout is None) == (self.pattern is None):
            raise ConfigError(f"give either a layout name or a pattern, not {'neither' if self.layout is None else 'both'}")
        if self.layout is None:
            assert self.pattern is not None, "checked above"
            made = hybrid_config(teacher, self.pattern, shapes=self.mixer_shapes, **overrides)
        else:
            named = get_layout(self.layout)
            for name in SIZES:
                ours, theirs = getattr(named.config, name), getattr(teacher, name)
                if ours != theirs:
                    raise ConfigError(
                        f"layout {self.layout} has {name} {ours}, the teacher {theirs}; upcycle a model of the sizes of "
                        f"{named.base}, or give a pattern of {teacher.num_hidden_layers} mixers in place of the layout"
                    )
            made = hybrid_config(teacher, named.config.mixers, base_name=named.base, shapes=named.shapes, **overrides)
        if self.reads_statistics and self.calibration is None:
            raise ConfigError(f"init `{self.init}` needs --calibration, a folder made by `hylo calibrate`; or use --init paper")
        return made
