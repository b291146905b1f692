"""Programs that wait for a signal in one call of a function, which is the number-th of that name.

However late a busy machine lets a test send its signal, the program has not gone past that call by then; a signal that comes
earlier is taken wherever the program is, and the call does not wait.
"""

import functools
import importlib
import os
import runpy
import select
import signal
import sys
from pathlib import Path

from tests.forked import Program

HELD = "held until a signal comes"  # printed when the call is reached
Hold = tuple[str, int]  # "package.module:name" and the number of the call


def step(number: int) -> Hold:
    """Before a step of training."""
    return "megatron_hylo.train.loop:training_step", number


def folder(number: int) -> Hold:
    """Before a complete folder is renamed to its place, the so-manieth of the program."""
    return "megatron_hylo.io._folders:_replace", number


def held_program(held: Hold, words: list, log: Path) -> Program:
    """`hylo WORDS`."""
    return Program("tests.held", [*held, "megatron_hylo.cli", *words], log)


def hold(target: str, call: int) -> None:
    """Replace "package.module:name" by a function whose so-manieth call begins once a signal with a handler has come."""
    module, _, name = target.partition(":")
    place = importlib.import_module(module)
    function, calls = getattr(place, name), []
    came, comes = os.pipe()
    os.set_blocking(comes, False)
    signal.set_wakeup_fd(comes)  # written to before handlers run, so that no signal is missed

    @functools.wraps(function)
    def held(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            print(HELD, flush=True)
            select.select([came], [], [])
        return function(*arguments, **named)

    setattr(place, name, held)


if __name__ == "__main__":
    _, target, call, module, *arguments = sys.argv
    hold(target, int(call))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
