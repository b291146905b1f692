"""A transformers tokenizer out of a SentencePiece `tokenizer.model`, as the folders of Llama 2 and Mistral hold it.

Merges are ordered by the scores of the pieces that they make, which is SentencePiece's own order; transformers 5 orders
them otherwise where scores and ids disagree ("a  b" becomes other tokens with Mistral's model). The result is compared
with SentencePiece before it is used.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError

BPE = 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_SAMPLES = (
    "Hello  world, this is a test.", " leading and trailing ", "def f(x):\n    return  x**2\n\n\n",
    "Ünïcödé 漢字 \U0001f600 ÅΩ", "1234567890 3.14\t1e-5", "a   b    c     d", "don't stop", "",
)  # fmt: skip


def load_sentencepiece_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of `folder`/tokenizer.model, with the special tokens and chat template of the files beside it.

    Where those do not say it, a text begins with the model's begin-of-text token, as in transformers 4.

    Raises:
        ConfigError: the file is of another format, holds another kind of model than BPE, or tokenises otherwise than
            SentencePiece does.
    """
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.model"
    processor, model = _read(file)
    special = {name: getattr(processor, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
    names = {f"{name}_token": processor.id_to_piece(token) for name, token in special.items() if token >= 0}
    with tempfile.TemporaryDirectory() as scratch:
        _backend(model).save(str(Path(scratch, "tokenizer.json")))
        for name in _BESIDE:
            if (folder / name).is_file():
                shutil.copy(folder / name, scratch)
        given = PreTrainedTokenizerFast.from_pretrained(scratch)
        missing = {name: piece for name, piece in names.items() if getattr(given, name, None) is None}
        if "add_bos_token" not in _settings(folder) and "bos_token" in names:
            missing["add_bos_token"] = True
        tokenizer = PreTrainedTokenizerFast.from_pretrained(scratch, **missing)
    for text in _SAMPLES:
        ours, theirs = tokenizer.encode(text, add_special_tokens=False), processor.encode(text)
        if ours != theirs:
            raise ConfigError(f"{file}: {text!r} becomes tokens {ours}, SentencePiece makes {theirs}; give a tokenizer.json")
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _read(file: Path) -> tuple[Any, Any]:
    """(SentencePieceProcessor, ModelProto)."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        kind = "in tiktoken's format" if _is_tiktoken(file) else "not a whole SentencePiece model"
        raise ConfigError(f"{file} is {kind}; give a folder with tokenizer.json") from error
    messages: Any = sentencepiece_model_pb2  # its classes are made at import time
    model = messages.ModelProto()
    model.ParseFromString(file.read_bytes())
    if model.trainer_spec.model_type != BPE:
        raise ConfigError(f"{file} is a SentencePiece model of another kind than BPE; give a folder with tokenizer.json")
    return processor, model


def _is_tiktoken(file: Path) -> bool:
    """Lines of base64 and a rank, as in Llama 3's own files."""
    first = file.read_bytes()[:200].split(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].isdigit()


def _backend(model: Any) -> Any:
    """tokenizers.Tokenizer of a SentencePiece BPE model."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    ranked = []
    for number, piece in enumerate(model.pieces):
        if piece.type == NORMAL:
            cuts = range(1, len(piece.piece))
            pairs = [(piece.piece[:i], piece.piece[i:]) for i in cuts]
            ranked += [(-piece.score, number, a, b) for a, b in pairs if a in ids and b in ids]
    unknown = next(piece.piece for piece in model.pieces if piece.type == UNKNOWN)
    merges = [(a, b) for _, _, a, b in sorted(ranked, key=lambda entry: entry[:2])]
    backend = Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.trainer_spec.byte_fallback)
    )
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    backend.add_special_tokens(
        [AddedToken(p.piece, normalized=False, special=True) for p in model.pieces if p.type in (UNKNOWN, CONTROL)]
    )
    backend.add_tokens([AddedToken(p.piece, normalized=False) for p in model.pieces if p.type == USER_DEFINED])
    return backend
