"""Commands that documents, examples and scripts show are accepted by the real parser."""

import contextlib
import io
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_hylo.cli.main import VERBS
from megatron_hylo.cli.parser import build_parser

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")])
COMMAND = re.compile(r"^\s*(\S+=\S+\s+)*((\.venv/bin/)?hylo|torchrun .*-m megatron_hylo\.cli) ")


@pytest.fixture(scope="module")
def parser():
    return build_parser(VERBS)


def commands(text: str) -> list[list[str]]:
    """Arguments of every `hylo` command in the shell blocks of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if COMMAND.match(line)]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[next(i for i, w in enumerate(line) if w.endswith(("hylo", "megatron_hylo.cli"))) + 1 :] for line in words]


def refused(parser, arguments: list[str]) -> str:
    """Return the parser's error about a command; nothing where it accepts it."""
    if "..." in arguments or "--config" in arguments:  # the rest is the reader's
        return ""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            parser.parse_args(arguments)
        except SystemExit as end:
            return said.getvalue() if end.code else ""
        except Exception as error:
            return str(error)
    return ""


def test_commands_of_the_documents_are_accepted(parser):
    found = {page.relative_to(ROOT): commands(page.read_text()) for page in PAGES}
    assert sum(map(len, found.values())) > 20
    assert {f"{page}: {shlex.join(c)}": said for page, cs in found.items() for c in cs if (said := refused(parser, c))} == {}


def test_options_in_running_text_are_in_the_reference():
    known = set(re.findall(r"--[\w.]+", (ROOT / "docs" / "cli.md").read_text()))
    inline = {page.name: re.findall(r"`hylo [^`]*`", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)) for page in PAGES}
    used = {(name, option) for name, codes in inline.items() for code in codes for option in re.findall(r"--[\w.]+", code)}
    assert len(used) > 8 and {(name, option) for name, option in used if option not in known} == set()


def test_a_wrong_command_is_found(parser):
    (wrong,) = commands("```sh\nA=b hylo generate model --prompt \\\n  text   # comment\n```")
    assert wrong == ["generate", "model", "--prompt", "text"] and refused(parser, wrong)


@pytest.mark.parametrize(("linear", "gpu"), [("gdn", False), ("mamba2", True)])
def test_the_example_runs_commands_that_are_accepted(parser, tmp_path, linear, gpu):
    fakes = {"hylo": 'printf "%s\\0" "$@" >>"$RECORD"; printf "\\n" >>"$RECORD"; echo a'}
    fakes["nvidia-smi"] = 'echo "GPU 0: made"' if gpu else "exit 9"
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "RECORD": str(tmp_path / "record"), "LINEAR": linear}
    script = ROOT / "examples" / "smollm2" / "run.sh"
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, "no GPU here" in done.stderr) == (0, not gpu), done.stderr
    ran = [line.split("\0")[:-1] for line in (tmp_path / "record").read_text().split("\n")[:-1]]
    verbs = "convert preprocess calibrate upcycle train train export evaluate evaluate generate report"
    assert " ".join(c[0] for c in ran if c[0] != "fetch") == verbs
    assert {shlex.join(c): said for c in ran if (said := refused(parser, c))} == {}
    tokens = sum(int(c[c.index("--train_tokens") + 1]) for c in ran if c[0] == "train")
    assert tokens == (30_000_000 if gpu else 22_528)
