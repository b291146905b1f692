"""torchrun that ends with the workers' own words and exit code.

    python -m megatron_hylo.train.launch --standalone --nproc-per-node 8 -m megatron_hylo.cli train ...

takes torchrun's arguments. torchrun itself answers a worker that does not end with 0 by two reports and a traceback of its
own, also after a stop on request (exit code 3) and an error that was said in a sentence (2), and then ends with 1.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hylo.io.start_up import quick_exit, quick_imports

SAID = (2, 3, 130)  # exit codes of `hylo` after which nothing needs to be added


def main(arguments: Sequence[str] | None = None) -> None:
    """Run workers as torchrun does and exit with the code of the first that failed.

    Args:
        arguments: torchrun's; by default those of the command line.
    """
    with quick_imports():
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

    parsed = parse_args(list(sys.argv[1:] if arguments is None else arguments))
    # torchrun answers Ctrl-C by ending the workers within 30 seconds; here they get it too, and have the time that saving takes
    parsed.signals_to_handle = ",".join(name for name in parsed.signals_to_handle.split(",") if name != "SIGINT")
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _forward)
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    failed = None
    with tempfile.TemporaryDirectory(prefix="hylo_launch_") as logs:  # torchrun leaves one behind, which the workers do not use
        parsed.log_dir = parsed.log_dir or logs
        try:
            run(parsed)
        except ChildFailedError as error:
            failed = error.get_first_failure()
    quick_exit()
    if failed is not None:
        rank, failure = failed
        code = failure.exitcode
        if code not in SAID:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            print(f"error: rank {rank} ended first, with {how}; what it printed is above", file=sys.stderr)
        sys.exit(code if code >= 0 else 128 - code)


def _forward(number: int, frame: Any) -> None:
    """Signal the workers, which are in sessions of their own, where the terminal's Ctrl-C does not reach them."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


if __name__ == "__main__":
    main()
