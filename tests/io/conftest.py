"""A finished folder, and a second process that works on an output."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hylo.io import atomic_directory

HOLDER = """
import contextlib
import sys
from megatron_hylo.io import output_lock

with contextlib.ExitStack() as held:
    for output in sys.argv[1:]:
        held.enter_context(output_lock(output))
    print("locked", flush=True)
    sys.stdin.read()
"""


def make(path: Path, text: str = "content", overwrite: bool = False, **files: str) -> Path:
    """A finished folder with sub/file and `files`."""
    with atomic_directory(path, overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)
        for name, content in files.items():
            (folder / name).write_text(content)
    return path


@pytest.fixture
def another_process(tmp_path) -> Callable[..., subprocess.Popen]:
    """(*outputs) -> a process that has locked them, until its standard input is closed."""
    started = []

    def start(*outputs: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *outputs], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
