"""`python -m megatron_hylo.cli` and `hylo`."""

import sys


def run() -> None:
    """Run `hylo`; Ctrl-C while its modules are imported ends it with a sentence too."""
    try:
        from megatron_hylo.cli.main import main
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing was changed\n")
        sys.exit(130)
    main()


if __name__ == "__main__":
    run()
