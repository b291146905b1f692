"""Output of `hylo train --dry_run`."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from megatron_hylo.cli.boundary import EXIT_ERROR
from megatron_hylo.cli.console import print_json, results

if TYPE_CHECKING:
    from megatron_hylo.train.dry_run import DryRun

TITLES = {  # figures of the plan that are shown, in this order
    "steps": "steps", "tokens": "tokens", "ranks": "ranks", "parameters": "parameters", "memory": "memory of a rank",
    "checkpoint_gib": "a checkpoint, GiB", "disk_gib": "disk for all that is kept, GiB", "tokens_per_second": "tokens/s",
    "hours": "hours left", "hours_from": "speed is from",
}  # fmt: skip


def print_dry_run(found: "DryRun", as_json: bool) -> int:
    """Print settings, plan and checks of a run; returns the exit code: 0, or 2 where the run would not start.

    Args:
        found: of `train.dry_run.dry_run`.
        as_json: print {settings, plan, checks, ok} instead of tables.
    """
    if as_json:
        print_json(asdict(found) | {"ok": found.ok})
        return 0 if found.ok else EXIT_ERROR
    settings, plan, checks = (Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False) for _ in range(3))
    for name, value in found.settings.items():
        settings.add_row(name, Text(value if isinstance(value, str) else json.dumps(value)))
    for name, title in TITLES.items():
        if name in found.plan:
            value = found.plan[name]
            plan.add_row(title, f"{value:,}" if isinstance(value, int) else str(value))
    for what, said, well in found.checks:
        checks.add_row(Text("ok" if well else "WRONG", style="green" if well else "bold red"), what, Text(said))
    for title, table in (("settings (others are defaults)", settings), ("plan", plan), ("checks", checks)):
        results.print(Text(title, style="bold"))
        results.print(table)
    wrong = sum(not well for *_, well in found.checks)
    results.print(f"{wrong} of {len(found.checks)} checks failed: the run would not start" if wrong else "the run can start")
    return EXIT_ERROR if wrong else 0
