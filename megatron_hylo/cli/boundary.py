"""The edge of the program: every known kind of failure becomes one sentence on stderr and an exit code.

Exit codes: 1 a failure or a check that did not pass, 2 bad input, 3 stopped by a signal after saving, 130 Ctrl-C.
"""

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from megatron_hylo.cli.console import console
from megatron_hylo.config import ConfigError, RunFailure

EXIT_FAILURE, EXIT_ERROR, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 3, 130
FIRST_RANK_SECONDS = 5.0  # torchrun ends the other ranks within these when the first one fails

NO_THREAD = ("can't start new thread", "unable to start watchdog thread", "Resource temporarily unavailable")
NO_MAPPING = "failed to map segment from shared object"
BESIDE = "nothing was written to {output}; the parts that are done are kept beside it, and the same command goes on"
KEPT = {  # by verb, what Ctrl-C leaves and how to go on; others write their output whole or not at all
    "train": "finished checkpoints in {output}/checkpoints are kept; the same command goes on from the newest, or begins",
    "quickstart": "the steps that are done are kept in {output}; the same command goes on",
    "calibrate": "the layers that are done are kept beside {output}; the same command goes on",
    **dict.fromkeys(("convert", "export", "upcycle", "assemble"), BESIDE),
    "sample-text": "the shards that are done are kept beside {output}; the same command goes on",
    "cache-teacher": "what is done is kept beside {output}; the same command goes on",
    "fetch": "nothing unfinished is kept; run the same command again",
    "watch": "only the watching ends; the run goes on",
    "serve-teacher": "students wait for their timeout; the same command serves them again",
}


@dataclass
class Edge:
    """The verb that runs, once it is known, and the folder that it makes, if any: for the sentence after Ctrl-C."""

    verb: str
    output: object = None


@contextlib.contextmanager
def plain_errors(verb: str, output: object = None) -> Iterator[Edge]:
    """Turn known errors into a sentence and an exit code; a fault of the program itself keeps its traceback.

    Args:
        verb: name on the command line.
        output: folder that the verb makes, if any.

    Yields:
        Both, which may be set as soon as they are known.

    Raises:
        SystemExit: with the exit code.
    """
    edge = Edge(verb, output)
    try:
        yield edge
    except KeyboardInterrupt:
        kept = KEPT.get(
            edge.verb, "nothing was written to {output}; run the same command again" if edge.output else "nothing was changed"
        )
        fail(f"interrupted: {kept.format(output=edge.output)}", EXIT_INTERRUPTED, word="")
    except BrokenPipeError:  # `hylo layouts | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILURE)
    except Exception as error:
        told = sentence(error)
        if told is None:
            raise
        fail(*told)


def sentence(error: Exception) -> tuple[str, int] | None:
    """(sentence, exit code) of an error of a known kind; None for any other, which is a fault of the program."""
    from megatron_hylo.io import DamagedError

    raised, error = error, _met_by_compiler(error)
    if isinstance(error, (ConfigError, DamagedError)):
        return str(error), EXIT_ERROR
    if isinstance(error, RunFailure):
        return str(error), EXIT_FAILURE
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error}; save the file as UTF-8", EXIT_ERROR
    if isinstance(error, _class("safetensors", "SafetensorError")):
        return f"a .safetensors file is damaged or cut off ({error}); copy or export it again", EXIT_ERROR
    if isinstance(error, _class("torch", "OutOfMemoryError")):
        first = str(error).split("\n")[0].split(". ")[0]
        return f"{first}; take a smaller micro-batch, a shorter sequence or more devices", EXIT_FAILURE
    mapping = isinstance(error, ImportError) and NO_MAPPING in str(error)
    if mapping or (isinstance(error, RuntimeError) and str(error).startswith(NO_THREAD)):
        first = " ".join(str(error).strip().splitlines()[-1].split())
        if mapping and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            cause = "the folder of that file may be on a disk that is mounted noexec; set TRITON_CACHE_DIR, TMPDIR to another"
            return f"a compiled library cannot be loaded ({first}): {cause}", EXIT_FAILURE
        return (
            f"a limit of this process is too low ({first}); raise ulimit -v, ulimit -u or the container's pids.max",
            EXIT_FAILURE,
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):  # torch's
        return "the machine's memory is used up; take a smaller batch, or another machine", EXIT_FAILURE
    if isinstance(error, OSError):
        compiler = "" if error is raised else "torch.compile, whose files are in TORCHINDUCTOR_CACHE_DIR: "
        where = compiler + (f"{error.filename}: " if error.filename else "")
        return f"{where}{(error.strerror or str(error)).lower()}", EXIT_FAILURE
    return None


def fail(message: str, code: int, word: str = "error: ") -> None:
    """Print the first rank's error and exit.

    All ranks of a run usually fail alike. Another rank waits for torchrun to end it with the first one; where the first has not
    failed, it prints what is wrong itself.

    Args:
        message: one sentence.
        code: exit code.
        word: printed before it.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(FIRST_RANK_SECONDS)
        word = f"rank {rank}: {word}"
    console.print(f"[bold red]{word}[/]{escape(message)}" if word else escape(message), highlight=False, soft_wrap=True)
    sys.exit(code)


def _met_by_compiler(error: Exception) -> Exception:
    """The error that ended a compilation by torch, such as a full disk; any other as it is.

    torch's compiler raises an error of its own in its place, "from None", so that the first one is left as its context alone.
    """
    while isinstance(error, _class("torch._dynamo.exc", "TorchDynamoException")) and isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def _class(module: str, name: str) -> Any:
    """A class of a module that may not be imported, in which case nothing can have raised it."""
    return getattr(sys.modules.get(module), name, ())
