"""`hylo` where no file may grow past a limit: LIMIT, then the verb and its arguments."""

import resource
import sys

from megatron_hylo.cli.main import main

if __name__ == "__main__":
    limit = int(sys.argv.pop(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main()
