"""A finished folder, and a second process that works on an output."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hylo.io import sealed_directory

HOLDER = """
import sys
from megatron_hylo.io import output_lock

with output_lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def make(path: Path, text: str = "content", overwrite: bool = False, **files: str) -> Path:
    """A finished folder with sub/file and `files`."""
    with sealed_directory(path, overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)
        for name, content in files.items():
            (folder / name).write_text(content)
    return path


@pytest.fixture
def another_process(tmp_path) -> Callable[[Path], subprocess.Popen]:
    """(output) -> a process that has locked it, until its standard input is closed."""
    started = []

    def start(output: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
