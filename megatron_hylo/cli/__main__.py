"""`python -m megatron_hylo.cli` and `hylo`."""

import sys


def run() -> None:
    """Run `hylo`; Ctrl-C while its modules are imported, or outside of its own edge, ends it with a sentence too."""
    try:
        from megatron_hylo.cli.main import main

        main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    run()
