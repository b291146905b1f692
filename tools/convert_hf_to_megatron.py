#!/usr/bin/env python3
"""Convert a Hugging Face checkpoint (Llama, Qwen2.5, Qwen3, exported hybrid, or a .gguf file) to a Megatron model folder.

python tools/convert_hf_to_megatron.py HF_DIR MODEL_DIR [--overwrite]
"""

import sys

from megatron_hylo.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:], "--to", "megatron"])
