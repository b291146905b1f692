"""`hylo <verb>`: one thin function a verb; parser.py turns their signatures into options, boundary.py errors into sentences."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hylo.cli.boundary import EXIT_ERROR, EXIT_STOPPED, plain_errors
from megatron_hylo.cli.compare import compare
from megatron_hylo.cli.console import console, set_up_logging
from megatron_hylo.cli.conversion import convert, export, verify
from megatron_hylo.cli.doctor import doctor
from megatron_hylo.cli.evaluation import eval as eval_suites
from megatron_hylo.cli.evaluation import evaluate
from megatron_hylo.cli.generate import generate
from megatron_hylo.cli.layouts import layouts, scripts
from megatron_hylo.cli.parser import build_parser, command, parameters, settings_of
from megatron_hylo.cli.plan import plan
from megatron_hylo.cli.report import report
from megatron_hylo.cli.runs import runs
from megatron_hylo.cli.sweep import sweep
from megatron_hylo.cli.text import fetch, preprocess, sample_text
from megatron_hylo.cli.train import quickstart, train
from megatron_hylo.cli.upcycle import assemble, cache_teacher, calibrate, select, serve_teacher, upcycle
from megatron_hylo.cli.watch import watch
from megatron_hylo.config import ConfigError
from megatron_hylo.config.paths import expand_home
from megatron_hylo.config.renamed import refuse_renamed
from megatron_hylo.io import is_launched_first
from megatron_hylo.io.start_up import quick_exit

__all__ = ["EXIT_ERROR", "EXIT_STOPPED", "QUICK", "VERBS", "main"]

VERBS: tuple[Callable, ...] = (
    quickstart, layouts, fetch, convert, verify, preprocess, sample_text, calibrate, upcycle, select, assemble, cache_teacher,
    serve_teacher, plan, sweep, train, runs, watch, report, evaluate, eval_suites, compare, export, generate, doctor, scripts,
)  # fmt: skip
QUICK = (layouts, plan, scripts, runs, watch, report, compare)  # these start without PyTorch and print their result at once


def main(command_line: list[str] | None = None) -> None:
    """Run `hylo`: exits 0 on success, 1 on failure, 2 on bad input, 3 when stopped by a signal, 130 after Ctrl-C."""
    words = sys.argv[1:] if command_line is None else command_line
    by_name = {command(verb): verb for verb in VERBS}
    with plain_errors("hylo") as edge:  # one edge around all of it: between two, Ctrl-C would end in a traceback
        set_up_logging("-v" in words or "--verbose" in words)
        parser = build_parser(VERBS, chosen=next((word for word in words if word in by_name), ""))
        refuse_renamed(words)
        parsed = parser.parse_args(words)
        edge.verb, edge.output = parsed.verb, parsed[parsed.verb].get("output")
        verb = by_name[parsed.verb]
        if verb not in QUICK and is_launched_first():  # libraries take seconds to load, or a download does
            console.print(f"hylo {shlex.join(words)}", style="dim", highlight=False, markup=False, soft_wrap=True)
        values = parser.instantiate(parsed)[parsed.verb]
        if verb not in QUICK:
            _check_kernels()
        code = _run(verb, {name: values[name] for name in parameters(verb)})
        quick_exit()
        sys.exit(code or 0)


def _check_kernels() -> None:
    """Refuse names of kernels in the environment that there are not."""
    from megatron_hylo.kernels.implementations import ENVIRONMENT_VARIABLE, asked_for

    try:
        asked_for()
    except ValueError as error:
        raise ConfigError(f"{ENVIRONMENT_VARIABLE}: {error}") from error


def _run(verb: Callable, values: dict[str, Any]) -> int | None:
    """Call a verb with its options; its output belongs to this process meanwhile."""
    from megatron_hylo.io import output_lock, plain_os_errors

    values = {name: expand_home(value) if isinstance(value, Path) else value for name, value in values.items()}
    if settings := settings_of(verb):
        name, kind = settings
        config = kind(**{field: values.pop(field) for field in kind.__dataclass_fields__})
        values |= {name: config, "output": config.output}
    output = values.pop("output") if settings else values.get("output")
    with plain_os_errors(), output_lock(output):
        return verb(**values)


if __name__ == "__main__":
    main()
