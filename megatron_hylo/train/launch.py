"""torchrun that ends with the workers' own words and exit code.

    python -m megatron_hylo.train.launch --standalone --nproc-per-node 8 -m megatron_hylo.cli train ...

takes torchrun's arguments. torchrun itself answers a worker that does not end with 0 by two reports and a traceback of its
own, also after a stop on request (exit code 3) and an error that was said in a sentence (2), and then ends with 1.
"""

import logging
import sys
from collections.abc import Sequence

SAID = (2, 3)  # exit codes of `hylo` after which nothing needs to be added


def main(arguments: Sequence[str] | None = None) -> None:
    """Run workers as torchrun does and exit with the code of the first that failed.

    Args:
        arguments: torchrun's; by default those of the command line.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run(parse_args(list(sys.argv[1:] if arguments is None else arguments)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code not in SAID:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            print(f"error: rank {rank} ended first, with {how}; what it printed is above", file=sys.stderr)
        sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
