"""The parser of `hylo <verb>`: jsonargparse turns the verbs' signatures into options, YAML keys and help."""

import inspect
from collections.abc import Callable, Iterable
from typing import get_args, get_origin

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from megatron_hylo.config.train import TrainConfig


def build_parser(verbs: Iterable[Callable]) -> ArgumentParser:
    """The whole command line.

    Args:
        verbs: one function a verb; a verb that takes a TrainConfig has its fields as options, and recipes by --config.
    """
    parser = ArgumentParser(prog="hylo", description="Long-context upcycling: a pretrained Transformer in, a hybrid out.")
    commands = parser.add_subcommands(required=True, dest="verb")
    for verb in verbs:
        summary = (verb.__doc__ or "").split("\n\n")[0]
        sub = ArgumentParser(description=(verb.__doc__ or "").split("Args:")[0].strip())
        if [p.annotation for p in inspect.signature(verb).parameters.values()] == [TrainConfig]:
            sub.add_argument("--config", action="config", help="recipe (YAML); later options override it")
            sub.add_class_arguments(TrainConfig)
        else:
            _add_arguments(sub, verb)
        commands.add_subcommand(command(verb), sub, help=summary)
    return parser


def command(verb: Callable) -> str:
    """What a verb is called on the command line."""
    return verb.__name__.replace("_", "-")


def _add_arguments(parser: ArgumentParser, verb: Callable) -> None:
    """Required parameters as positionals (lists: one or more), keyword-only ones as options, `bool = False` as switches."""
    parameters = inspect.signature(verb).parameters.values()
    documented = {p.arg_name: p.description for p in parse_docstring(verb.__doc__).params}
    switches = [p.name for p in parameters if p.annotation is bool and p.default is False]
    named = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    several = {
        p.name: get_args(p.annotation)[0] for p in parameters if get_origin(p.annotation) is list and p.default is p.empty
    }
    for name, kind in several.items():
        parser.add_argument(name, type=kind, nargs="+", help=documented[name])
    parser.add_function_arguments(verb, as_positional=True, skip={*switches, *named, *several})
    for name, kind in named.items():
        parser.add_argument(f"--{name}", type=kind, required=True, help=documented[name])
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true", help=documented[name])
