"""Chosen settings in the text of a recipe; its other lines and all comments stay."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from megatron_hylo.config.recipe_lines import row


def with_settings(text: str, settings: dict[str, Any]) -> str:
    """Replace values of keys in a recipe's YAML, or append keys that it lacks.

    Args:
        text: the recipe, block style, two spaces a level, as megatron_hylo/recipes has it.
        settings: new values by key; "parallel.context_parallel_size" is a key of the block `parallel`.
    """
    lines = text.splitlines()
    for name, value in settings.items():
        group, _, key = name.rpartition(".")
        start, end = _block(lines, group)
        written = yaml.safe_dump(value, default_flow_style=True).replace("\n...", "").strip()
        pattern = re.compile(rf"^{'  ' if group else ''}{re.escape(key)}:")
        found = next((i for i in range(start, end) if pattern.match(lines[i])), None)
        setting = f"{'  ' if group else ''}{key}: {written}"
        if found is None:
            lines.insert(end, row(setting, "chosen by hylo plan"))
        elif not lines[found].split("#")[0].split(":", 1)[1].strip() == written:
            lines[found] = row(setting, "chosen by hylo plan")
    return "".join(f"{line}\n" for line in lines)


def write_recipe(file: Path, text: str) -> None:
    """Write a recipe whole or not at all; folders above it are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_name(f".{file.name}.{os.getpid()}")
    made.write_text(text)
    made.replace(file)


def _block(lines: list[str], group: str) -> tuple[int, int]:
    """Lines of a block, without its first; all lines for the top level. The block is made at the end where it is not there."""
    if not group:
        return 0, len(lines)
    start = next((i for i, line in enumerate(lines) if re.match(rf"^{re.escape(group)}:", line)), None)
    if start is None:
        lines += ["", f"{group}:"]
        return len(lines), len(lines)
    end = next((i for i in range(start + 1, len(lines)) if not re.match(r"^\s+\S|^\s*#", lines[i])), len(lines))
    return start + 1, end
