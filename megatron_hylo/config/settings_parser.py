"""Parser of settings, from a command line, a YAML file or a mapping, with one meaning of null in all of them."""

import json
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cached_property
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from megatron_hylo.config.errors import ConfigError

NULL = ("null", "~")  # YAML's words for it
# jsonargparse's words for a mistake inside an option that is settings or null, or a list of settings
INSIDE = re.compile(
    r"""Parser\ key\ "(?P<option>[^"]+)":\s+(?:Does\ not\ validate\ against\ any\ of\ the\ Union\ subtypes.*?-\ )?
    (?:Problem\ with\ given\ class_path\ '[^']+':\s+)?
    (?:Parser\ key\ "(?P<key>[^"]+)":(?P<mistake>.*)|Option\ '(?P<unknown>[^']+)'\ is\ not\ accepted)""",
    re.DOTALL | re.VERBOSE,
)
OR_NULL = "\n    - Expected a <class 'NoneType'>\n  Given value type:"  # goes on with the whole option's value


class SettingsParser(ArgumentParser):
    """A parser for which null in place of a group of settings (`optimizer: null`) is the group's defaults.

    Where an option's own type has a null (`rotary_base`), that is its value; for every other option null is refused.
    jsonargparse passes both on, to classes that fail with them.

    A mistake inside an option that is settings or null (`rope_scaling`), or a list of settings, is named as in groups:
    `rope_scaling.factor`. For jsonargparse such an option is one value, and its message names the option alone.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise or exit as jsonargparse does, with the whole name of the setting in the message."""
        super().error(whole_name(message), ex)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line as jsonargparse does, with `--optimizer null` besides."""
        return super().parse_args(None if args is None else self._spelt_line(args), *others, **settings)

    def instantiate(self, namespace: Namespace, *others: Any, **settings: Any) -> Namespace:
        """Make objects of what was parsed, as jsonargparse does, with the defaults of groups that are null.

        A null that an option does not take, and a group that is no mapping, are errors as in parsing.

        Raises:
            ConfigError: what a settings class says of its values; or ArgumentError, where that comes from jsonargparse.
            ValueError: any other one of jsonargparse.
        """
        try:
            return super().instantiate(self._without_nulls(namespace.clone()), *others, **settings)
        except ValueError as error:
            if (own := _own(error)) is None:
                raise
            raise own from None

    def spelt_out(self, values: dict[str, Any]) -> dict[str, Any]:
        """Settings with a group's defaults in place of its null, so that what they are merged over has no effect there.

        Args:
            values: nested settings as a YAML file has them; not changed.
        """
        found = dict(values)
        for name, group in self._default_groups.items():
            first, _, rest = name.partition(".")
            if not rest and first in found and found[first] is None:
                found[first] = group.as_dict()
            elif rest and "." not in rest and isinstance(found.get(first), dict) and found[first].get(rest, 0) is None:
                found[first] = found[first] | {rest: group.as_dict()}
        return found

    @cached_property
    def inner_parsers(self) -> dict[str, "SettingsParser"]:
        """Parsers of the settings inside options that are settings or null, or a list of settings, by the option's name."""
        found = {}
        for action in self._actions:
            classes = [kind for kind in get_args(getattr(action, "_typehint", None)) if is_dataclass(kind)]
            if classes and not action.dest.endswith(".help"):
                found[action.dest] = SettingsParser(exit_on_error=False)
                found[action.dest].add_class_arguments(classes[0], as_group=False)
        return found

    @cached_property
    def _own_defaults(self) -> Namespace:
        return self.get_defaults()

    @cached_property
    def _default_groups(self) -> dict[str, Namespace]:
        """Defaults of the groups of settings by name, outer ones before those inside them."""
        return {name: group for name in self.groups or () if isinstance(group := self._own_defaults.get(name), Namespace)}

    def _spelt_line(self, args: Sequence[str]) -> list[str]:
        """The command line with a group's defaults, as JSON, for its null: options before it are to have no effect."""
        words, groups = list(args), self._default_groups
        for place, word in enumerate(args):
            option, equals, value = word.partition("=")
            if (group := groups.get(option.removeprefix("--"))) is None or not option.startswith("--"):
                continue
            if value in NULL:
                words[place] = f"{option}={json.dumps(group.as_dict())}"
            elif not equals and args[place + 1 : place + 2] and args[place + 1] in NULL:
                words[place + 1] = json.dumps(group.as_dict())
        return words

    def _without_nulls(self, parsed: Namespace) -> Namespace:
        for name, group in self._default_groups.items():
            value = parsed.get(name)
            if value is None:
                parsed[name] = group.clone()
            elif not isinstance(value, Namespace):
                self.error(f"{name} must be a mapping of settings, got {value!r}")
        for name, parser in self.inner_parsers.items():
            value = parsed.get(name)
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, Namespace):
                    try:
                        parser._without_nulls(one)
                    except ArgumentError as error:  # begins with the inner name
                        self.error(f"{name}.{error}", error)
        for name, value in parsed.items():
            if value is not None or (default := self._own_defaults.get(name)) is None:
                continue
            try:
                self.validate(Namespace({name: None}), skip_unset=False, skip_required=True)
            except TypeError as error:
                self.error(f"{name} is null; give a value, or leave it out for its default {json.dumps(default)}", error)
        return parsed


def whole_name(message: str) -> str:
    """Replace the name of an option by that of the setting inside it which is wrong; other messages are left as they are.

    Args:
        message: of jsonargparse.
    """
    found = INSIDE.match(message)
    if found is None:
        return message
    if found["unknown"]:
        return f"Group '{found['option']}' does not accept option '{found['unknown']}'"
    return f'Parser key "{found["option"]}.{found["key"]}":{found["mistake"].split(OR_NULL)[0]}'


def _own(error: ValueError) -> BaseException | None:
    """The error of a settings class, which jsonargparse puts among those of a union's other types; None: there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, (ConfigError, ArgumentError)):
        found = found.__cause__
    return found
