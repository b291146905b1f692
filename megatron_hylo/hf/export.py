"""Copy the modelling code beside exported weights, so that transformers can load them where this project is absent."""

import re
from pathlib import Path

from megatron_hylo import hf, kernels

MODELLING, KERNELS = Path(hf.__file__).parent, Path(kernels.__file__).parent
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
    return list(written.values())
