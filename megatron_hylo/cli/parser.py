"""The parser of `hylo <verb>`: jsonargparse turns the verbs' signatures into options, YAML keys and help."""

import inspect
from collections.abc import Callable, Iterable, Set
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

import megatron_hylo
from megatron_hylo.cli.usage import Parser
from megatron_hylo.config.train import TrainConfig

Verb = Callable[..., Any]


def build_parser(verbs: Iterable[Verb], chosen: str | None = None) -> ArgumentParser:
    """Build the parser of the whole command line.

    Args:
        verbs: one function a verb; the fields of a parameter that is a dataclass are options and keys of --config's YAML.
        chosen: name of the verb whose options are needed, which saves the time to build those of all; None: of every verb.
    """
    parser = Parser(prog="hylo", description="Long-context upcycling: a pretrained Transformer in, a hybrid out.")
    parser.add_argument(
        "--version", action="version", version=f"hylo {megatron_hylo.__version__}", help="Show the version and exit."
    )
    commands = parser.add_subcommands(required=True, dest="verb")
    for verb in verbs:
        sub = Parser(description=(verb.__doc__ or "").split("Args:")[0].strip())
        sub.whole = parser
        if chosen in (None, command(verb)):
            _add_options(sub, verb)
        commands.add_subcommand(command(verb), sub, help=(verb.__doc__ or "").split("\n\n")[0])
    return parser


def _add_options(parser: ArgumentParser, verb: Verb) -> None:
    besides: Set[str] = frozenset()
    if settings := settings_of(verb):
        besides, kind = {settings[0]}, settings[1]
        parser.add_argument("--config", action="config", help="recipe (YAML); later options override it")
        _add_arguments(parser, parser.add_class_arguments, kind, as_positional=kind is not TrainConfig)  # recipes hold it
    _add_arguments(parser, parser.add_function_arguments, verb, as_positional=True, besides=besides)
    parser.add_argument("-v", "--verbose", action="store_true", help="show details on stderr")


def command(verb: Verb) -> str:
    """Name of a verb on the command line."""
    return verb.__name__.replace("_", "-")


def settings_of(verb: Verb) -> tuple[str, Any] | None:
    """(name, class) of a verb's required parameter that is a dataclass; None where there is none."""
    given = inspect.signature(verb).parameters.values()
    return next(((p.name, p.annotation) for p in given if is_dataclass(p.annotation) and p.default is p.empty), None)


def parameters(verb: Verb) -> dict[str, inspect.Parameter]:
    """Options of a verb by name: its parameters, and the fields of the dataclass among them."""
    own = dict(inspect.signature(verb).parameters)
    if settings := settings_of(verb):
        own = {**inspect.signature(settings[1]).parameters, **own}
        del own[settings[0]]
    return own


def _add_arguments(
    parser: ArgumentParser, add: Callable, source: Callable, as_positional: bool, besides: Set[str] = frozenset()
) -> None:
    """Required parameters as positionals (lists: one or more), keyword-only ones as options, `bool = False` as switches.

    A parameter of type `tuple[X, ...]` is a positional too: none, one or more.

    Args:
        parser: of one verb.
        add: its method for a function's or a class's arguments.
        source: the function or class.
        as_positional: false where required parameters are options and switches take a value.
        besides: parameters to leave out.
    """
    documented = {p.arg_name: p.description for p in parse_docstring(source.__doc__ or "").params}
    switches: list[str] = []
    named: dict[str, Any] = {}
    several: dict[str, Any] = {}
    any_number: dict[str, Any] = {}
    if as_positional:
        given = [p for p in inspect.signature(source).parameters.values() if p.name not in besides]
        switches = [p.name for p in given if p.annotation is bool and p.default is False]
        named = {p.name: p.annotation for p in given if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
        several = {
            p.name: get_args(p.annotation)[0] for p in given if get_origin(p.annotation) is list and p.default is p.empty
        }
        any_number = {p.name: get_args(p.annotation)[0] for p in given if get_origin(p.annotation) is tuple}
    for name, kind in several.items():
        parser.add_argument(name, type=kind, nargs="+", help=documented[name])
    for name, kind in any_number.items():
        parser.add_argument(name, type=kind, nargs="*", default=[], help=documented[name])
    add(source, as_positional=as_positional, skip={*switches, *named, *several, *any_number, *besides})
    for name, kind in named.items():
        parser.add_argument(f"--{name}", type=kind, required=True, help=documented[name])
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true", help=documented[name])
