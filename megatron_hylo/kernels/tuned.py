"""Tuned configurations of fla's and mamba_ssm's Triton kernels.

Triton tries every configuration of every kernel when a shape is first seen: two to three minutes a shape. What
tools/tune_kernels.py found on a kind of GPU can be kept with the package and is put into the kernels' own autotuners. A
shape that is not in the file takes what was best for the nearest larger one, whose resources it does not exceed; any other
is tuned as ever. `HYLO_AUTOTUNE=always` tunes all shapes; `HYLO_AUTOTUNE=never` none: unknown ones get a modest
configuration, slower but at once, which is what tests want.
"""

import importlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tuned"  # sm90.json: the kernels of one compute capability
LIBRARIES = ("fla.", "mamba_ssm.")
ENVIRONMENT_VARIABLE = "HYLO_AUTOTUNE"
MODES = ("always", "unknown", "never")  # which shapes to tune

logger = logging.getLogger("megatron_hylo.kernels")

Key = tuple[Any, ...]  # of Triton's autotuner: values of the arguments that matter, then the dtypes of the tensors


class KnownConfigurations(dict):
    """An autotuner's cache, Key -> triton.Config, that answers for a smaller shape with what is known of a larger one.

    Args:
        known: to begin with.
        otherwise: for shapes that nothing is known of; None to have them tuned.
    """

    def __init__(self, known: dict[Key, Any], otherwise: Any = None) -> None:
        super().__init__(known)
        self.otherwise = otherwise

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        if not isinstance(key, tuple):
            return False
        larger = {known: far for known in self if (far := distance(key, known)) is not None}
        config = self[min(larger, key=larger.__getitem__)] if larger else self.otherwise
        if config is None:
            return False
        self[key] = config
        return True


def modest(configs: list[Any]) -> Any:
    """The triton.Config of about 4 warps with the fewest stages and smallest blocks: it asks for the least shared memory."""

    def size(config: Any) -> tuple[float, ...]:
        """Rank a configuration: distance from 4 warps, stages, product of its blocks."""
        blocks = [value for value in config.kwargs.values() if _is_size(value)]
        return abs(math.log2(config.num_warps / 4)), config.num_stages, math.prod(blocks)

    return min(configs, key=size)


def distance(wanted: Key, known: Key) -> float | None:
    """Distance to a larger known shape, in powers of two over all sizes; None if it is no larger or another kind."""
    if len(wanted) != len(known):
        return None
    total = 0.0
    for a, b in zip(wanted, known, strict=True):
        if not (_is_size(a) and _is_size(b)):
            if a != b or _is_size(a) != _is_size(b):
                return None
        elif b < a:
            return None
        elif a != b:
            total += math.log2(b / max(a, 0.5))
    return total


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def autotuners() -> Iterator[tuple[str, Any]]:
    """Yield (module:kernel, autotuner) for every autotuned kernel of the libraries that are imported."""
    autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    seen = set()
    for name, module in sorted(sys.modules.items()):
        if not name.startswith(LIBRARIES) or module is None:
            continue
        for value in list(vars(module).values()):
            while value is not None and not isinstance(value, autotuner):  # under @triton.heuristics
                value = vars(value).get("fn") if type(value).__module__.startswith("triton.") else None
            if value is not None and id(value) not in seen and len(value.configs) > 1:
                seen.add(id(value))
                yield f"{value.base_fn.__module__}:{value.base_fn.__name__}", value


def install(capability: tuple[int, int]) -> int:
    """Give the imported kernels' autotuners what is known for this GPU.

    Args:
        capability: of the device, e.g. (9, 0).

    Returns:
        How many autotuners got something. A configuration that the installed library does not offer is left out.

    Raises:
        ValueError: an unknown value of the environment variable.
    """
    mode = os.environ.get(ENVIRONMENT_VARIABLE, "unknown")
    if mode not in MODES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {mode!r}; use one of {', '.join(MODES)}")
    file = FOLDER / f"sm{capability[0]}{capability[1]}.json"
    if mode == "always" or (mode == "unknown" and not file.is_file()):
        return 0
    kernels, count = json.loads(file.read_text())["kernels"] if file.is_file() else {}, 0
    for name, tuner in autotuners():
        if isinstance(tuner.cache, KnownConfigurations) or not (mode == "never" or name in kernels):
            continue
        offered = {_settings(config): config for config in tuner.configs}
        known = {tuple(entry["key"]): offered.get(_settings(entry["config"])) for entry in kernels.get(name, ())}
        known = {key: config for key, config in known.items() if config is not None}
        tuner.cache = KnownConfigurations(known, modest(tuner.configs) if mode == "never" else None)
        count += 1
    return count


def _settings(config: Any) -> str:
    """Canonical JSON of a configuration, from a triton.Config or from its entry in the file."""
    fields = config if isinstance(config, dict) else vars(config)
    return json.dumps([fields["kwargs"], fields["num_warps"], fields["num_stages"]], sort_keys=True)


def found() -> dict[str, list[dict[str, Any]]]:
    """Configurations that the autotuners of this process have chosen: the content of a file of `FOLDER`."""
    result = {}
    for name, tuner in autotuners():
        entries = [
            {"key": list(key), "config": {field: getattr(c, field) for field in ("kwargs", "num_warps", "num_stages")}}
            for key, c in tuner.cache.items()
        ]
        if entries:
            result[name] = sorted(entries, key=lambda entry: str(entry["key"]))
    return dict(sorted(result.items()))
