#!/usr/bin/env python3
"""Choose which layers of a hybrid are MLA, given an aligned all-MLA and an aligned all-linear model.

python tools/select_layers.py TEACHER_DIR --mla MLA_DIR --linear LINEAR_DIR --data DATA_DIR --count 4
"""

import sys

from megatron_hylo.cli.main import main

if __name__ == "__main__":
    main(["select", *sys.argv[1:]])
