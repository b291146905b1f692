"""The cache of fetched inputs: folders that are checked on every use and made again when damaged."""

import contextlib
import logging
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from megatron_hylo.config import ConfigError
from megatron_hylo.io import DamagedError, atomic_directory, cache_dir, has_manifest, verify_manifest

logger = logging.getLogger("megatron_hylo.data")
TOOL_TIMEOUT = 3600.0  # seconds; pip, npm and apt give up on a dead network long before


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, built if it is missing or damaged.

    Processes that ask at the same time wait for one of them to build it. Not for use inside a process group:
    fetch before it is initialised.

    Args:
        name: folder name; it should change when what `build` makes does.
        build: writes the content into the empty folder that it is given.
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


def run_tool(command: Sequence[str], otherwise: str, cwd: Path | None = None) -> str:
    """Run a package manager and return its standard output.

    Args:
        command: program and arguments.
        otherwise: what the user can do when it fails; ends the error message.
        cwd: folder to run in.

    Raises:
        ConfigError: the program is missing, failed or hung; one sentence with its last word and `otherwise`.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=TOOL_TIMEOUT
        )
    except FileNotFoundError as error:
        raise ConfigError(f"{name} is not installed here; {otherwise}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{name} did not finish within {TOOL_TIMEOUT:.0f} s; {otherwise}") from error
    if done.returncode:
        logger.debug("%s\n%s%s", " ".join(command), done.stdout, done.stderr)
        lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        raise ConfigError(f"{name} failed: {lines[-1] if lines else f'exit status {done.returncode}'}; {otherwise}")
    return done.stdout


@contextlib.contextmanager
def working(message: str) -> Iterator[None]:
    """Show that something long goes on: a spinner on a terminal, and a log line."""
    logger.info("%s", message)
    with Console(stderr=True).status(message):
        yield
