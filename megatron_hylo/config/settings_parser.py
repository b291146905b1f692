"""Parser of settings, from a command line, a YAML file or a mapping, with one meaning of null in all of them."""

import json
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from megatron_hylo.config.errors import ConfigError

NULL = ("null", "~")  # YAML's words for it


class SettingsParser(ArgumentParser):
    """A parser for which null in place of a group of settings (`optimizer: null`) is the group's defaults.

    Where an option's own type has a null (`rotary_base`), that is its value; for every other option null is refused.
    jsonargparse passes both on, to classes that fail with them.
    """

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line as jsonargparse does, with `--optimizer null` besides."""
        return super().parse_args(None if args is None else self._spelt_out(args), *others, **settings)

    def instantiate(self, namespace: Namespace, *others: Any, **settings: Any) -> Namespace:
        """Make objects of what was parsed, as jsonargparse does, with the defaults of groups that are null.

        A null that an option does not take, and a group that is no mapping, are errors as in parsing.
        """
        try:
            return super().instantiate(self._without_nulls(namespace.clone()), *others, **settings)
        except ValueError as error:
            if (own := _own(error)) is None:
                raise
            raise own from None

    def _groups(self) -> dict[str, Namespace]:
        """Defaults of the groups of settings by name, outer ones before those inside them."""
        defaults = self.get_defaults()
        return {name: group for name in self.groups or () if isinstance(group := defaults.get(name), Namespace)}

    def _spelt_out(self, args: Sequence[str]) -> list[str]:
        """The command line with a group's defaults, as JSON, for its null: options before it are to have no effect."""
        words, groups = list(args), self._groups()
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
        for name, group in self._groups().items():
            value = parsed.get(name)
            if value is None:
                parsed[name] = group.clone()
            elif not isinstance(value, Namespace):
                self.error(f"{name} must be a mapping of settings, got {value!r}")
        defaults = self.get_defaults()
        for name, value in parsed.items():
            if value is not None or (default := defaults.get(name)) is None:
                continue
            try:
                self.validate(Namespace({name: None}), skip_unset=False, skip_required=True)
            except TypeError as error:
                self.error(f"{name} is null; give a value, or leave it out for its default {json.dumps(default)}", error)
        return parsed


def _own(error: ValueError) -> BaseException | None:
    """The error of a settings class, which jsonargparse puts among those of a union's other types; None: there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, (ConfigError, ArgumentError)):
        found = found.__cause__
    return found
