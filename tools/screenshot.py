"""An SVG of what a verb of `hylo` prints, for documentation.

python tools/screenshot.py docs/runs.svg runs /shared/hylo/runs
"""

import re
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT

from megatron_hylo.cli.console import results
from megatron_hylo.cli.main import main

WIDTH = 130


def screenshot(file: Path, words: list[str]) -> None:
    """Run `hylo` with these words and write what it prints as results to a file."""
    results.record, results.width = True, WIDTH
    try:
        main(words)
    except SystemExit as end:
        if end.code:
            raise
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S)  # no fonts from elsewhere
    file.write_text(results.export_svg(title=f"hylo {' '.join(words)}", code_format=form))


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), sys.argv[2:])
