"""Ctrl-C on any line of `hylo`'s own start and end: one sentence, exit code 130, no traceback."""

import sys

import pytest

from megatron_hylo.cli import __main__ as program
from megatron_hylo.cli.boundary import EXIT_INTERRUPTED
from megatron_hylo.cli.main import main

KEPT = "interrupted: nothing was written to NEW; the parts that are done are kept beside it, and the same command goes on"


def interrupted_on(monkeypatch, capsys, line: int) -> tuple[int, str, bool]:
    """(exit code, what was printed, whether it was reached): `hylo convert` with Ctrl-C before the line-th line of main."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code is not main.__code__:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    monkeypatch.setattr(sys, "argv", ["hylo", "convert", "none", "NEW"])
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(SystemExit) as ended:
            program.run()
    finally:
        sys.settrace(before)
    return ended.value.code, "".join(capsys.readouterr()), seen >= line


def test_ctrl_c_on_every_line_of_main(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    codes, said, reached, line = [], [], True, 0
    while reached:
        line += 1
        code, words, reached = interrupted_on(monkeypatch, capsys, line)
        codes.append(code)
        said.append(words)
    assert set(codes[:-1]) == {EXIT_INTERRUPTED} and codes[-1] != EXIT_INTERRUPTED  # the last one ran to its end
    assert len(codes) > 10 and all("interrupted" in words and "Traceback" not in words for words in said[:-1])
    announced = [words for words in said[:-1] if "hylo convert" in words]
    assert sum(KEPT in words for words in announced) >= 2  # on the edge's own last line the folder is not known any more
