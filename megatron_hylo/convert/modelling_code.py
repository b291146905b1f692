"""Modelling code and tokenizer files of an export, so that transformers 4 and 5 load it without this package."""

import json
import re
from pathlib import Path

from megatron_hylo.io import write_json

MODELLING, KERNELS = (Path(__file__).parents[1] / name for name in ("hf", "kernels"))
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


def make_tokenizer_portable(folder: Path) -> None:
    """Let AutoTokenizer of transformers 4 and 5 read a folder's tokenizer.json without the model's code.

    Without a tokenizer_class transformers 4 asks config.json for one, and so for the modelling code of a hybrid; and what
    transformers 5 saves, a class TokenizersBackend and a list of extra special tokens, it does not read at all.

    Args:
        folder: an exported folder; tokenizer_config.json is written again where that is needed.
    """
    file = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file():
        return
    before = json.loads(file.read_text()) if file.is_file() else {}
    settings = dict(before)
    if settings.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # 4's name of it, which 5 knows too
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])  # else 4 gives the model token_type_ids
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings != before:
        write_json(file, settings)
