#!/usr/bin/env python3
"""Convert a Megatron model folder or training checkpoint to a Hugging Face folder.

python tools/convert_megatron_to_hf.py MODEL_DIR HF_DIR [--overwrite]
"""

import sys

from megatron_hylo.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:], "--to", "hf"])
