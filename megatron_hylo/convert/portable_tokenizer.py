"""Tokenizer files of an export, so that transformers 4 and 5 read them without the model's code."""

import json
from pathlib import Path

from megatron_hylo.io import write_json


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
