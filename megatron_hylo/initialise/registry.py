"""Initialisers by name: functions from one attention layer of the teacher to one mixer of the student.

An initialiser is registered for a name and a mixer symbol, e.g. ("paper", "G"). It sees plain tensors of
one layer and knows nothing of files, Megatron or parallelism. A new one is a new file in this package, imported
by its `__init__.py`; every later step is blind to which was used.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.mixers import COPIED_SYMBOLS, complete

TeacherLayer = Mapping[str, Tensor]
"""One attention layer's tensors, any float dtype, without prefix: `q_proj.weight` [Hq*dh, d], `k_proj.weight` and
`v_proj.weight` [Hkv*dh, d], `o_proj.weight` [d, Hq*dh]; `{q,k,v}_proj.bias` with add_qkv_bias; `{q,k}_norm.weight`
[dh] with qk_layernorm."""

CalibrationStatistics = Mapping[str, Tensor]
"""Measurements of one layer of the teacher, by name (the list is in `megatron_hylo.calibrate.statistics`); an
initialiser that needs none ignores it. They may lie on a GPU while the teacher's tensors lie on the CPU: an initialiser
computes where the statistics are, and so moves weights there first."""

Initialiser = Callable[
    [TeacherLayer, ModelConfig, ModelConfig, torch.Generator, CalibrationStatistics | None],
    dict[str, Tensor],
]
"""(teacher, config, teacher_config, generator, statistics) -> the student's mixer.

`config` is the student's. All random numbers come from `generator` (a CPU one). The result holds exactly the
names and shapes of `get_mixer(symbol).tensors(config)`, fp32, contiguous, on the CPU, sharing no memory with the teacher.
Raises ConfigError where the student's dimensions do not fit the map."""

_INITIALISERS: dict[tuple[str, str], Initialiser] = {}


def needed_statistics(statistics: CalibrationStatistics | None) -> CalibrationStatistics:
    """Return the statistics that a calibrated initialiser was given.

    Raises:
        ConfigError: there are none.
    """
    if statistics is None:
        raise ConfigError("this initialiser needs calibration statistics: run `hylo calibrate`, give --calibration")
    return statistics


def register_initialiser(name: str, symbol: str) -> Callable[[Initialiser], Initialiser]:
    """Decorator: make an initialiser known.

    Args:
        name: of the family, e.g. "paper".
        symbol: the mixer it makes.

    Raises:
        ConfigError: the name is already taken for that symbol.
    """

    def register(function: Initialiser) -> Initialiser:
        """Register the function and return it; ConfigError for a name and mixer that are taken."""
        if (name, symbol) in _INITIALISERS:
            raise ConfigError(f"initialiser {name!r} for mixer {symbol!r} is already registered; choose another name")
        _INITIALISERS[name, symbol] = function
        return function

    return register


def get_initialiser(name: str, symbol: str) -> Initialiser:
    """Look an initialiser up.

    Args:
        name: of the family, e.g. "paper".
        symbol: the mixer to make.

    Raises:
        ConfigError: no such name, or it does not make that mixer.
    """
    if (name, symbol) in _INITIALISERS:
        return _INITIALISERS[name, symbol]
    if name not in initialiser_names():
        raise ConfigError(f"unknown initialiser {name!r}; known: {', '.join(initialiser_names())}")
    makes = " ".join(s for n, s in _INITIALISERS if n == name)
    raise ConfigError(f"initialiser {name!r} does not make mixer {symbol!r}; it makes {makes}")


def initialiser_names() -> list[str]:
    """Names that `get_initialiser` knows, sorted."""
    return sorted({name for name, _ in _INITIALISERS})


def check_complete(*names: str) -> None:
    """Check that families make every mixer but attention, which is copied; called when the package is imported.

    Args:
        names: the families.

    Raises:
        RuntimeError: a mixer that a family does not make.
    """
    for name in names:
        made = [symbol for family, symbol in _INITIALISERS if family == name]
        complete(made, f"initialise: {name!r}", besides=COPIED_SYMBOLS)
