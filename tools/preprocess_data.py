"""Tokenise text into a dataset folder for training.

python tools/preprocess_data.py --input TEXT_DIR_OR_JSONL --tokenizer HF_DIR --output DATA_DIR
"""

import json
import logging
from dataclasses import asdict

from jsonargparse import CLI

from megatron_hylo.config import ConfigError
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.io import DamagedError, plain_os_errors


def main() -> None:
    """Run `preprocess` with the command line's options and print what was made."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with plain_os_errors():
            description = CLI(preprocess, as_positional=False)
    except (ConfigError, DamagedError) as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps({name: value for name, value in asdict(description).items() if name != "heldout_names"}))


if __name__ == "__main__":
    main()
