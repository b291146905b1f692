"""The Python interface and the command line offer the same settings with the same defaults."""

import inspect

import pytest

import megatron_hylo as mh
from megatron_hylo.cli import conversion, evaluation, generate, upcycle
from megatron_hylo.serve.generate import generate_text

SWITCHES = {"verify": "no_verify"}  # on by default in Python; on the command line an option switches them off
PYTHON_ONLY = {"on_text", "track"}


def settings(function) -> dict[str, object]:
    """Defaults by name of a function's parameters, those without one left out."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.default is not p.empty}


@pytest.mark.parametrize(
    ("function", "verb"),
    [
        (mh.convert.__wrapped__, conversion.convert),
        (mh.calibrate.__wrapped__, upcycle.calibrate),
        (mh.evaluate, evaluation.evaluate),
        (mh.export, conversion.export),
        (generate_text, generate.generate),
    ],
    ids=["convert", "calibrate", "evaluate", "export", "generate"],
)
def test_defaults_match_the_verb(function, verb):
    named = settings(verb)
    for name, default in settings(function).items():
        if name in SWITCHES:
            name, default = SWITCHES[name], not default
        assert name in PYTHON_ONLY or named[name] == default, name
