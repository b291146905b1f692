"""Every `hylo` command line in the documents and scripts is one that the parser takes."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_hylo.cli.main import VERBS
from megatron_hylo.cli.parser import build_parser

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "examples/**/*", "megatron_hylo/recipes/*.yaml", "slurm/*.sh")
    for path in ROOT.glob(pattern)
    if path.is_file() and path.name != "cli.md"  # generated from the parser
)
RECIPE = next((ROOT / "megatron_hylo" / "recipes").glob("*.yaml"))
# what runs hylo in a line of a shell: hylo, .venv/bin/hylo, $hylo, torchrun ... -m megatron_hylo.cli
START = re.compile(r"(?:(?:^|[\s('\"/])hylo|\$\{?hylo\}?|-m megatron_hylo\.cli)\s+(?=[a-z-]+\b)")
# they stand for a value; 8 is one of most types
FILLED = (
    r"\$\(\(.*?\)\)",
    r"\"?\$\(.*?\)\"?(?=[\s\"]|$)",
    r"\$\{[^}]*\}",
    r"\$\w+",
)
UNFINISHED = re.compile(r"error: (hylo \S+ needs |--\S+ needs a value)")


def in_text(text: str) -> list[str]:
    """Commands named within sentences; most leave arguments out."""
    return [" ".join(found.split()) for found in re.findall(r"`(hylo [a-z][^`]*)`", text)]


def in_shell(text: str) -> list[str]:
    """Commands of lines of a shell, without comments."""
    lines = [re.split(r"(?:^|\s)#", line)[0] for line in re.sub(r"\\\n\s*", " ", text).splitlines()]
    return [f"hylo {line[start.end() :]}" for line in lines if (start := START.search(line))]


def commands(path: Path) -> list[tuple[str, bool]]:
    """(command line, whether it is whole) of each command in a file."""
    text = path.read_text()
    if path.suffix == ".md":
        shell = "\n".join(re.findall(r"^ *```(?:sh|bash|shell|console)\n(.*?)^ *```", text, re.M | re.S))
        text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    else:
        comments = [line.lstrip("# ") for line in text.splitlines() if line.lstrip().startswith("#")]
        shell, text = "" if path.suffix == ".yaml" else text, "\n".join(comments)
        shell += "\n" + "\n".join(line for line in comments if line.startswith(("hylo ", "torchrun ")))
    whole = [(line, "..." not in line) for line in in_shell(shell) if '"$@"' not in line]
    return [(line, False) for line in in_text(text)] + whole


def words(line: str) -> list[str]:
    """Arguments of a command line, with values in the place of variables and of files."""
    for pattern in FILLED:
        line = re.sub(pattern, "8", line)
    given = shlex.split(re.split(r"\s(?:\||>|2>|&&)|;|\)$", line)[0])[1:]
    given = [word for word in given if word not in ("...", "[...]", "$@")]
    return [str(RECIPE) if before == "--config" else word for before, word in zip(["", *given], given)]


def refused(line: str, whole: bool, capsys) -> str:
    """The parser's complaint; empty where it takes the line, or a mention is merely not finished."""
    try:
        build_parser(VERBS).parse_args(words(line))
    except SystemExit as stopped:
        said = capsys.readouterr().err.splitlines()[:1]
        return "" if stopped.code == 0 or not whole and UNFINISHED.match(said[0]) else said[0]
    return ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_commands_are_commands(path, capsys):
    complaints = [f"{line}: {said}" for line, whole in commands(path) if (said := refused(line, whole, capsys))]
    assert not complaints, "\n".join(complaints)


def test_commands_are_found_and_wrong_ones_refused(tmp_path, capsys):
    """The search sees what users copy, and the parser refuses what was wrong once."""
    found = [(words(line), whole) for path in FILES for line, whole in commands(path)]
    assert sum(whole for _, whole in found) >= 25 and len(found) >= 80
    assert {"convert", "preprocess", "upcycle", "train", "evaluate", "generate"} <= {
        given[0] for given, whole in found if whole
    }
    page = tmp_path / "page.md"
    page.write_text(
        "Use `hylo generate MODEL --prompt TEXT`, see `hylo train`.\n"
        "```sh\nhylo upcycle a b --pattern GG \\\n  --sequential true  # no\nhylo layouts | head\n```\n"
    )
    assert [bool(refused(*each, capsys)) for each in commands(page)] == [True, False, True, False]
