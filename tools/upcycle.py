#!/usr/bin/env python3
"""Make a hybrid's model folder from a teacher's.

python tools/upcycle.py TEACHER_DIR HYBRID_DIR --layout llama3.2-1b-4mla12gdn
"""

import sys

from megatron_hylo.cli.main import main

if __name__ == "__main__":
    main(["upcycle", *sys.argv[1:]])
