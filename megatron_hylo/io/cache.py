"""Cache of downloaded inputs: directories that are verified on every use and rebuilt when damaged."""

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from megatron_hylo.config import ConfigError
from megatron_hylo.io import DamagedError, atomic_directory, cache_dir, has_manifest, verify_manifest

logger = logging.getLogger("megatron_hylo.data")
TOOL_TIMEOUT = 3600.0  # seconds; pip, npm and apt give up on a dead network long before


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cache directory `name`, built if it is missing or damaged.

    Processes that ask at the same time wait for one of them to build it. It must not run inside a process group: download
    before that is initialised.

    Args:
        name: directory name; it should change when the output of `build` does.
        build: writes the content into the empty directory that it is given.
    """
    folder = cache_dir() / name
    with FileLock(cache_dir() / f"{name}.lock"):
        if has_manifest(folder):
            try:
                verify_manifest(folder)
                return folder
            except DamagedError as error:
                logger.warning("%s; fetching it again", error)
        with atomic_directory(folder, overwrite=True) as partial:
            build(partial)
    return folder


def run_tool(
    command: Sequence[str], otherwise: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """Run a package manager and return its standard output.

    Args:
        command: program and arguments.
        otherwise: advice for the user, which ends the error message.
        cwd: working directory.
        environment: its variables, by default this process's.

    Raises:
        ConfigError: the program is missing, failed or hung; the message has its last output line and `otherwise`.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=TOOL_TIMEOUT,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ConfigError(f"{name} is not installed here; {otherwise}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{name} did not finish within {TOOL_TIMEOUT:.0f} s; {otherwise}") from error
    if done.returncode:
        logger.debug("%s\n%s%s", " ".join(command), done.stdout, done.stderr)
        lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        raise ConfigError(f"{name} failed: {lines[-1] if lines else f'exit status {done.returncode}'}; {otherwise}")
    return done.stdout


def pip_download(what: Sequence[str], into: Path, otherwise: str, environment: Mapping[str, str] | None = None) -> None:
    """Download packages without what they need, from the index that this Python's pip is configured for.

    Args:
        what: requirements, and options of `pip download`.
        into: existing folder for the files.
        otherwise: advice for the user, which ends the error message.
        environment: pip's variables, by default this process's.

    Raises:
        ConfigError: pip is missing or failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries=2", "--dest", str(into), *what]
    run_tool(command, otherwise, environment=environment)


@contextlib.contextmanager
def working(message: str) -> Iterator[None]:
    """Show that a long operation is running: a spinner on a terminal, and a log line."""
    logger.info("%s", message)
    with Console(stderr=True).status(message):
        yield
