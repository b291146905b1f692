"""`python -m megatron_hylo.cli`: `hylo` under torchrun."""

from megatron_hylo.cli.main import main

if __name__ == "__main__":
    main()
