"""`hylo report`: one HTML page about one or several training runs."""

from pathlib import Path

from megatron_hylo.cli.console import console


def report(runs: list[Path], output: Path | None = None) -> None:
    """Write one self-contained HTML page about runs: curves, held-out quality, settings that differ, environment.

    Args:
        runs: folders of `hylo train`, or folders that hold such folders, as the quickstart's.
        output: .html file to write; by default report.html in the folder that was named, beside it where there are several.
    """
    from megatron_hylo.config.paths import expand_home
    from megatron_hylo.eval.run_report import write_run_report

    console.print(f"wrote {write_run_report([expand_home(run) for run in runs], output)}")
