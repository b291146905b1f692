"""Generate docs/cli.md, the reference of all verbs and options, from the parser of `hylo`.

python -m megatron_hylo.cli.reference > docs/cli.md
"""

import argparse
import sys
import types
import typing
from argparse import Action
from collections.abc import Callable, Iterable, Iterator

from jsonargparse import ArgumentParser

from megatron_hylo.cli import main
from megatron_hylo.cli.parser import build_parser
from megatron_hylo.cli.types import NUMBERS

HEAD = """# Command line

<!-- Generated from the parser by `python -m megatron_hylo.cli.reference > docs/cli.md`; a test holds it up to date. -->

Every option is written `--option value` or `--option=value`; the arguments in capitals come without a name, in the order
shown. `hylo VERB --help` prints what is here; every verb also takes `-v`, for more details on stderr. Results are on stdout,
everything else on stderr. Exit codes: 0 success, 1 failure or a check that did not pass, 2 bad input (with a sentence),
3 stopped by a signal after saving, 130 Ctrl-C.
"""


def reference(verbs: Iterable[Callable] | None = None) -> str:
    """Render the reference as Markdown: one section a verb, with its description and a table of its arguments.

    Args:
        verbs: functions of the verbs, as `build_parser` takes them; all verbs of `hylo` by default.
    """
    parser = build_parser(main.VERBS if verbs is None else verbs)
    assert parser._subcommands_action is not None, "the parser of hylo has a subcommand for each verb"
    sections = [_section(name, sub) for name, sub in parser._subcommands_action._name_parser_map.items()]
    return "\n".join([HEAD, *sections])


def _section(name: str, parser: ArgumentParser) -> str:
    actions = list(_arguments(parser))
    positional = [a.dest.upper() if _required(a) else f"[{a.dest.upper()}]" for a in actions if not a.option_strings]
    required = [f"{_option(a)} {a.dest.upper()}" for a in actions if a.option_strings and _required(a)]
    usage = " ".join(["hylo", name, *positional, *required, "[options]"])
    rows = [f"| {_name(a)} | {_type(a)} | {_default(a)} | {_cell(a.help or '')} |" for a in actions]
    table = ["| argument | values | default | meaning |", "|---|---|---|---|", *rows] if rows else []
    return "\n".join([f"## {name}", "", f"`{usage}`", "", _dedented(parser.description or ""), "", *table, ""])


def _arguments(parser: ArgumentParser) -> Iterator[Action]:
    """Arguments that a user gives: no help, no groups of settings that only hold others, no printing of configurations."""
    actions = [a for a in parser._actions if a.dest.split(".")[-1] not in ("help", "verbose", "print_config", "print_shtab")]
    for action in actions:
        if not any(other.dest.startswith(f"{action.dest}.") for other in actions):
            yield action


def _option(action: Action) -> str:
    return max((name for name in action.option_strings if not name.endswith("+")), key=len)  # --list+ appends to a list


def _name(action: Action) -> str:
    return f"`{_option(action) if action.option_strings else action.dest.upper()}`"


def _required(action: Action) -> bool:
    return bool(action.required) and action.nargs != "?"


def _type(action: Action) -> str:
    if action.nargs == 0:
        return "switch"
    kind = getattr(action, "_typehint", None) or action.type
    return _cell(_words(kind)) if kind is not None else "YAML file" if action.dest == "config" else ""


def _words(kind: typing.Any) -> str:
    """Name a type by the values that a user writes: literals one by one, None as null."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is list:
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return f"{{name: {_words(parts[1])}}}"
    names = {type(None): "null", bool: "true or false", str: "text", float: "number", int: "integer"}
    if (name := getattr(kind, "__name__", "")) in NUMBERS:
        return NUMBERS[name]
    return names.get(kind) or ("path" if "Path" in str(kind) else str(getattr(kind, "__name__", kind)))


def _default(action: Action) -> str:
    if action.nargs == 0 or action.dest == "config":
        return ""
    if _required(action):
        return "required"
    value = action.default
    return (
        ""
        if value in (None, "") or action.nargs == argparse.ZERO_OR_MORE
        else f"`{str(value).lower() if isinstance(value, bool) else value}`"
    )


def _dedented(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
