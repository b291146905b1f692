"""Mistakes of a command line or a recipe, in two lines: the mistake with what was probably meant, and where help is."""

import difflib
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_hylo.cli.types import NUMBERS
from megatron_hylo.config import ConfigError
from megatron_hylo.config.renamed import recipes
from megatron_hylo.config.settings_parser import SettingsParser, whole_name
from megatron_hylo.io import is_launched_first

EXIT_USAGE = 2


class Parser(SettingsParser):
    """A parser that ends with exit code 2 and a sentence, where jsonargparse would print the usage of all options."""

    whole: "Parser | None" = None  # of a verb's parser: that of the whole command line

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Any = None, **settings: Any) -> Any:  # type: ignore[override]
        """Parse a command line as jsonargparse does; a recipe that is not UTF-8 is an error as well."""
        try:
            return super().parse_args(args, **settings)
        except UnicodeDecodeError as error:
            self.error(f"not UTF-8: {error}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and exit.

        Args:
            message: jsonargparse's.
            ex: its exception.

        Raises:
            ConfigError: this is no verb's parser.
        """
        message, whole = whole_name(message), self.whole or self
        if whole._subcommands_action is None:  # jsonargparse's own parser of a class that an option may be
            raise ConfigError(message)
        words, verbs = list(whole.args), whole._subcommands_action._name_parser_map
        verb = next((word for word in words if word in verbs), None)
        said = explain(message, verbs[verb] if verb else whole, verb, words, list(verbs))
        if is_launched_first():
            sys.stderr.write(f"error: {said}\n`hylo {f'{verb} ' if verb else ''}--help` lists what there is\n")
        sys.exit(EXIT_USAGE)


def explain(message: str, parser: SettingsParser, verb: str | None, words: list[str], verbs: list[str]) -> str:
    """Turn a message of jsonargparse into a sentence.

    Args:
        message: one or several lines, of jsonargparse 4.
        parser: of the verb; the whole one where there is no verb.
        verb: its name.
        words: the command line.
        verbs: names of all verbs.
    """
    recipe = next(recipes(words), None)
    if found := re.match(r"unrecognized arguments: (.*)", message, re.S):
        return _unrecognised(found[1].split(), parser, verb, verbs)
    if found := re.match(r"argument verb: invalid choice: '(.*?)' ", message):
        return f"hylo has no verb {found[1]}{near(found[1], verbs)}"
    if 'expected "verb" to be one of' in message:
        return f"hylo needs a verb: {', '.join(verbs)}"
    if found := re.match(r"Subcommand '.*?' does not accept option '(.*?)'", message):
        return f"{_place(recipe, found[1])}unknown key {found[1]}{near(found[1], _keys(parser), 'did you mean {}?')}"
    if found := re.match(r"Group '(.*?)' does not accept option '(.*?)'", message):
        return _unknown_inside(found, parser, verb, words, recipe)
    if found := re.match(r"the following arguments are required: (.*)", message):
        return f"hylo {verb} needs {', '.join(_shown(name, parser) for name in found[1].split(', '))}"
    if found := re.match(r"argument (--\S+): expected one argument", message):
        return f"{found[1]} needs a value: {_allowed(_type(found[1][2:], parser))}"
    if found := re.match(r"argument (--\S+): ignored explicit argument '(.*)'", message):
        return f"{found[1]} is a switch and takes no value, got {found[2]}; leave it out or write {found[1]} alone"
    if found := re.match(r'Parser key "config": (File does not exist|Path is not a file|.*?): \'?(.*?)\'?$', message):
        return f"--config: {found[1][0].lower()}{found[1][1:]}: {found[2]}"
    if found := re.match(r"(\S+) is null;", message):
        of = next((one for one in reversed([*recipes(words)]) if _is_null(one, found[1])), None)
        return f"{_place(of, found[1])}{message}"
    if found := re.match(r"(\S+) must be a mapping of settings", message):
        return f"{_place(recipe, found[1])}{message}"
    if message.startswith("not UTF-8"):
        return f"the recipe (--config) is not UTF-8: {recipe}{message.removeprefix('not UTF-8')}; save it so"
    if message.startswith("Problems parsing config"):
        return _yaml_error(recipe, message)
    if message.startswith("Unexpected config"):
        return f"{recipe} holds no settings; a recipe is YAML with a line `key: value` for each"
    if found := re.match(r'Parser key "(.*?)"', message):
        return _wrong_value(found[1], message, parser, words, recipe)
    return " ".join(message.split())


def near(word: str, known: Iterable[str], ask: str = "did you mean {}?") -> str:
    """The question whether a known word was meant, with what separates it from the sentence; empty where none is near.

    Args:
        word: as given.
        known: words there are; `optimizer.lr` is near `lr`.
        ask: the question.
    """
    known = list(known)
    last = [name for name in known if name.split(".")[-1] == word.split(".")[-1]]
    found = last or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    found = found or [name for name in known if name.split(".")[-1] in difflib.get_close_matches(word, [name.split(".")[-1]])]
    return f"; {ask.format(' or '.join(found[:3]))}" if found else ""


def _unrecognised(words: list[str], parser: SettingsParser, verb: str | None, verbs: list[str]) -> str:
    option = next((word for word in words if word.startswith("-")), None)
    if option is None:
        switch = " (switches such as --overwrite take none)" if words[0].lower() in ("true", "false") else ""
        return f"hylo {verb} takes no further value, got {' '.join(words)}{switch}"
    name = option.split("=")[0]
    if verb is None:
        return f"hylo has no option {name}{near(name, ['--help', '--version'])}"
    key, positional = name.lstrip("-"), [a.dest for a in parser._actions if not a.option_strings]
    if key in positional:
        return f"hylo {verb} takes {key.upper()} without {name}, in the order {' '.join(positional).upper()}"
    meant = near(key, [k for k in _keys(parser) if k not in positional], "did you mean --{}?").replace(" or ", " or --")
    return f"hylo {verb} has no option {name}{meant}"


def _is_on(words: list[str], key: str) -> bool:
    """Whether a command line gives an option, or a group of settings with it."""
    parts = key.split(".")
    options = {f"--{'.'.join(parts[:end])}" for end in range(1, len(parts) + 1)}
    return any(word.split("=")[0].removesuffix("+") in options for word in words)


def _unknown_inside(found: re.Match, parser: SettingsParser, verb: str | None, words: list[str], recipe: str | None) -> str:
    """The sentence on an unknown key inside an option that is settings or null, or a list of settings."""
    option, name = found[1], f"{found[1]}.{found[2]}"
    meant = near(name, [f"{option}.{key}" for key in _keys(parser.inner_parsers[option])])
    if recipe is None or _is_on(words, name):
        return f"hylo {verb} has no option --{name}{meant.replace('mean ', 'mean --').replace(' or ', ' or --')}"
    return f"{_place(recipe, name)}unknown key {name}{meant}"


def _keys(parser: SettingsParser) -> list[str]:
    """Options of a verb as YAML keys."""
    hidden = ("help", "print_config", "print_shtab", "config")
    names = [a.dest for a in parser._actions if a.dest not in hidden and not a.dest.endswith(".help")]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]  # no groups of settings


def _shown(name: str, parser: SettingsParser) -> str:
    """A required argument as the usage writes it; jsonargparse puts the verb before its name."""
    key = name.split(".", 1)[-1]
    action = next((a for a in parser._actions if a.dest == key), None)
    return f"--{key}" if action is None or action.option_strings else key.upper()


def _type(key: str, parser: SettingsParser) -> Any:
    for name, inner in parser.inner_parsers.items():
        if key.startswith(f"{name}."):
            return _type(key.removeprefix(f"{name}."), inner)
    action = next((a for a in parser._actions if a.dest == key), None)
    return getattr(action, "_typehint", None) or getattr(action, "type", None)


def _literals(kind: Any) -> tuple[Any, ...]:
    """Values of a Literal; none of another type."""
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _allowed(kind: Any) -> str:
    """Values that a type takes, in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(map(str, parts)) if len(parts) < 3 else f"one of {', '.join(map(str, parts))}"
    if parts and origin not in (list, dict):
        return " or ".join(_allowed(part) for part in parts)
    if origin is dict:
        return f"a mapping such as {{name: {_allowed(parts[1])}}}"
    if origin is list:
        return f"a list of {', '.join(map(str, named))}" if (named := _literals(parts[0])) else "a list such as [a, b]"
    if (name := getattr(kind, "__name__", "")) in NUMBERS:
        return f"{'an' if name.endswith('Int') else 'a'} {NUMBERS[name]}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    return names.get(kind) or ("a path" if "Path" in str(kind) else "a mapping")


def _wrong_value(key: str, message: str, parser: SettingsParser, words: list[str], recipe: str | None) -> str:
    kind = _type(key, parser)
    value = re.search(r"(?:Got value|Given value): (.*)", message) or re.search(
        r"(\S+) does not conform|literal for .*: '(.*)'", message
    )
    got = next((group for group in value.groups() if group), "nothing") if value else ""
    given = f", got {got}" if value else ""
    literals = [str(part) for part in _literals(kind) or _literals(next(iter(typing.get_args(kind)), None))]
    action = next((a for a in parser._actions if a.dest == key), None)
    positional = action is not None and not action.option_strings
    on_line = positional or _is_on(words, key)
    name = (key.upper() if positional else f"--{key}") if on_line or recipe is None else f"{_place(recipe, key)}{key}"
    return f"{name} must be {_allowed(kind)}{given}{near(got, literals) if literals else ''}"


def _place(recipe: str | None, key: str) -> str:
    """FILE:LINE of a key in a recipe, with a colon; empty where it cannot be found."""
    if recipe is None:
        return ""
    path = _nodes(recipe, key)
    return f"{recipe}:{path[-1][0].start_mark.line + 1}: " if path else f"{recipe}: "


def _is_null(recipe: str, key: str) -> bool:
    """Whether a recipe has a key and its value is null."""
    path = _nodes(recipe, key)
    return bool(path) and path[-1][0].value == key.split(".")[-1] and path[-1][1].tag.endswith(":null")


def _nodes(recipe: str, key: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Name and value of a recipe's key and of those around it, outer ones first, as far as they are there."""
    try:
        node = yaml.compose(Path(recipe).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    path: list[tuple[yaml.Node, yaml.Node]] = []
    for part in [key] if _child(node, key) else key.split("."):
        found = _child(node, part)
        if found is None:
            break
        path.append(found)
        node = found[1]
    return path


def _child(node: Any, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next(((name, value) for name, value in pairs if name.value == key), None)


def _yaml_error(recipe: str | None, message: str) -> str:
    """FILE:LINE and the parser's complaint; lines and columns are from 1."""
    lines = re.findall(r"line (\d+), column (\d+)", message)
    parts = message.removeprefix("Problems parsing config:").splitlines()
    words = [part.strip() for part in parts if "<unicode string>" not in part]
    line, column = lines[-1] if lines else ("?", "?")
    return f"{recipe}:{line}: not YAML: {', '.join(words)} (column {column})"
