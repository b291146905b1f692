#!/usr/bin/env python3
"""Tokenise text into a dataset folder for training: `hylo preprocess` with its options.

python tools/preprocess_data.py TEXT_DIR_OR_JSONL DATA_DIR --tokenizer HF_DIR
"""

import sys

from megatron_hylo.cli.main import main

if __name__ == "__main__":
    main(["preprocess", *sys.argv[1:]])
