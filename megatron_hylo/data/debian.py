"""Plain-text manuals out of Debian packages, without root and without touching the system's package state.

apt runs on the system's own sources, but keeps its lists and downloads in a folder of ours; packages are verified
by apt (signed release files) and unpacked, never installed.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.data.text_files import read_text_folder
from megatron_hylo.io.cache import logger, run_tool, working

OWN_TEXT = "check the network, or train on your own text with --text DIR"
DEBIAN_12 = (
    "these packages are of Debian 12, whose apt sources must be configured and reachable; `hylo fetch manuals` has text that "
    "needs PyPI alone, and --text DIR trains on your own"
)


class NotOffered(ConfigError):
    """Debian's packages of text cannot be had here: there is no apt, or its sources do not have them or are not reached."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


@dataclass(frozen=True)
class TextPackage:
    """A package's folder of text, and the .deb that published numbers were measured with."""

    folder: str  # inside the package
    suffixes: tuple[str, ...]  # of text files, apart from a .gz; "" of those without any
    measured_version: str
    measured_sha256: str


PACKAGES = {
    "anarchism": TextPackage(
        "usr/share/doc/anarchism/markdown",
        (".md",),
        "15.3-3",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    ),
    "linux-doc-6.1": TextPackage(
        "usr/share/doc/linux-doc-6.1/Documentation",
        (".rst", ".txt"),
        "6.1.192-2",
        "d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
    ),
    "python3.11-doc": TextPackage(
        "usr/share/doc/python3.11/html/_sources",
        (".txt",),
        "3.11.2-6+deb12u9",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    ),
    "perl-doc": TextPackage(
        "usr/share/perl",
        (".pod",),
        "5.36.0-7+deb12u4",
        "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
    ),
    "vim-runtime": TextPackage(
        "usr/share/vim/vim90/doc",
        (".txt",),
        "2:9.0.1378-2+deb12u2",
        "6a3dd2317a593742cb247f3494d986b3127887dbe1449253b8efa6112289854e",
    ),
    "libpython3.11-stdlib": TextPackage(
        "usr/lib/python3.11",
        (".py",),
        "3.11.2-6+deb12u9",
        "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
    ),
    "python3-sympy": TextPackage(
        "usr/lib/python3/dist-packages/sympy",
        (".py",),
        "1.11.1-1",
        "b437232be31819aafd267ddf2132c16293ef75e02fd58b4ad31eee3ef1d5b49e",
    ),
    "fortunes": TextPackage(
        "usr/share/games/fortunes",
        ("",),
        "1:1.99.1-7.3",
        "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
    ),
    "git-doc": TextPackage(
        "usr/share/doc/git-doc",
        (".txt",),
        "1:2.39.5-0+deb12u3",
        "3c89668a11053a6bafade3de1f611f4613db31e082af63f43d8c5b69ad8795ec",
    ),
    "debian-reference-en": TextPackage(
        "usr/share/debian-reference",
        (".txt",),
        "2.100",
        "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
    ),
    "developers-reference": TextPackage(
        "usr/share/developers-reference/_sources",
        (".txt",),
        "12.18",
        "0dba82f6fa16e373f2a84ad07e7971aa9264ad2e7d2ae46b37edbc9c5fd57e2e",
    ),
    "debian-policy": TextPackage(
        "usr/share/doc/debian-policy/policy.html/_sources",
        (".txt",),
        "4.6.2.0",
        "ef9d01b625c3b87c3a845c2cd1b66f1a16e9240b2b9e5bee53472a00e8457a39",
    ),
    "jargon": TextPackage(
        "usr/share/info",
        (".info",),
        "4.0.0-5.3",
        "6f4db0f1a4f2b658d8a09e89fdb1814ad1487854463f01dc9158267811d4650f",
    ),
    "doc-debian": TextPackage(
        "usr/share/doc/debian",
        (".txt",),
        "11.3+nmu1",
        "b9bff49f22b334cb6fedc071d81669e72cc2fa0dcd65e110785f69d9941f2773",
    ),
    "python3-django": TextPackage(
        "usr/lib/python3/dist-packages/django",
        (".py",),
        "3:3.2.25-0+deb12u7",
        "9ad8ed29d9026207970777e194f658c39b3a7a96a932967f043503fc25bdc319",
    ),
}
DOCUMENTS = ("anarchism", "linux-doc-6.1", "python3.11-doc")  # a book and two manuals
LIBRARY = (
    *DOCUMENTS,
    "perl-doc",
    "vim-runtime",
    "libpython3.11-stdlib",
    "python3-sympy",
    "fortunes",
)  # with two manuals, source code and dialogues
UNSEEN = (
    "git-doc",
    "debian-reference-en",
    "developers-reference",
    "debian-policy",
    "jargon",
    "doc-debian",
    "python3-django",
)  # for evaluation alone

# Hooks of the system's apt (cleaning its caches, telling its desktop) must not run for our private state; the user
# that apt would drop to cannot write into a home folder.
APT_CONFIG = """\
Dir::State "{root}/state";
Dir::State::status "{root}/state/status";
Dir::Cache "{root}/cache";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


def download_debs(names: Sequence[str], private: Path, into: Path) -> dict[str, Path]:
    """Download packages at the version that the system's apt sources offer.

    Args:
        names: package names.
        private: folder for apt's lists, kept for the next time.
        into: existing folder for the .deb files.

    Returns:
        Package name -> .deb file.

    Raises:
        NotOffered: not a Debian-like system, offline, or a package is not offered here.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise NotOffered(f"{tool} is not installed", DEBIAN_12)
    apt = _private_apt(private)
    with working(f"downloading Debian packages {', '.join(names)}"):
        fresh = not any((private / "state" / "lists").glob("*_Packages*"))
        if fresh:
            _update(apt)
        try:
            _download(apt, names, into)
        except NotOffered:
            if fresh:
                raise
            _update(apt)  # the lists may name a version that has been replaced since
            _download(apt, names, into)
    debs = {run_tool(["dpkg-deb", "-f", str(deb), "Package"], OWN_TEXT).strip(): deb for deb in sorted(into.glob("*.deb"))}
    return {name: debs[name] for name in names}


def package_version(deb: Path) -> str:
    """Version field of a .deb file."""
    return run_tool(["dpkg-deb", "-f", str(deb), "Version"], OWN_TEXT).strip()


def read_texts(name: str, deb: Path, scratch: Path) -> Iterator[tuple[str, str]]:
    """Text files of a package, as `read_text_folder` yields them.

    Args:
        name: package name, a key of `PACKAGES`.
        deb: its file.
        scratch: folder to unpack into.
    """
    run_tool(["dpkg-deb", "-x", str(deb), str(scratch)], "the download is damaged: run again")
    return read_text_folder(scratch / PACKAGES[name].folder, PACKAGES[name].suffixes, name)


def _download(apt: list[str], names: Sequence[str], into: Path) -> None:
    try:
        run_tool([*apt, "download", *names], DEBIAN_12, cwd=into)
    except ConfigError as error:
        raise NotOffered(str(error).removesuffix(f"; {DEBIAN_12}"), DEBIAN_12) from error


def _update(apt: list[str]) -> None:
    try:
        run_tool([*apt, "update"], "going on with the other sources")
    except ConfigError as error:  # one broken source does not matter unless it is the one that is needed
        logger.warning("%s", error)


def _private_apt(private: Path) -> list[str]:
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (private / folder).mkdir(parents=True, exist_ok=True)
    (private / "state" / "status").touch()  # nothing is installed, as far as downloading is concerned
    config = private / "apt.conf"
    config.write_text(APT_CONFIG.format(root=private))
    return ["apt-get", "-qq", f"--config-file={config}"]
