"""Modelling code beside the weights of a saved model, so that transformers loads the folder without this package."""

import re
from pathlib import Path

MODELLING = Path(__file__).parent
KERNELS = Path(__file__).parents[1] / "kernels"
_KERNEL_IMPORT = re.compile(r"^(\s*from )megatron_hylo\.kernels(\.\w+ import )", re.MULTILINE)
_RELATIVE_IMPORT = re.compile(r"^\s*from \.(\w+) import ", re.MULTILINE)
_MEGATRON_IMPORT = re.compile(r"^\s*(?:from|import)\s+megatron.*$", re.MULTILINE)


def copy_modelling_code(folder: Path) -> list[Path]:
    """Write modeling_hylo.py and every file of ours that it imports, flat, with relative imports only.

    Args:
        folder: an existing folder.

    Returns:
        The files written.

    Raises:
        RuntimeError: a file imports something of Megatron or of this project other than the kernels.
    """
    written: dict[str, Path] = {}
    wanted = ["modeling_hylo"]
    while wanted:
        name = wanted.pop()
        source = next(place for place in (MODELLING / f"{name}.py", KERNELS / f"{name}.py") if place.is_file())
        text = _KERNEL_IMPORT.sub(r"\1\2", source.read_text())
        if left := _MEGATRON_IMPORT.search(text):
            raise RuntimeError(f"{source.name} cannot be exported, it needs {left.group().strip()!r}; import from kernels only")
        written[name] = folder / source.name
        written[name].write_text(text)
        wanted += [n for n in _RELATIVE_IMPORT.findall(text) if n not in written and n not in wanted]
    model = written["modeling_hylo"]
    named = {"modeling_hylo", *_RELATIVE_IMPORT.findall(model.read_text())}
    lines = [f"    from .{name} import __doc__  # noqa: F401\n" for name in sorted(written.keys() - named)]
    if lines:
        reason = "transformers 4 copies only those files of a local folder that the model's file itself imports"
        model.write_text(f"{model.read_text()}\n\nif False:  # {reason}\n{''.join(lines)}")
    return list(written.values())
