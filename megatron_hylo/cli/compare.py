"""`hylo compare`: results of evaluations side by side, with paired differences."""

from collections.abc import Collection
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megatron_hylo.cli.console import console, print_json, results


def compare(folders: list[Path], output: Path | None = None, json: bool = False) -> None:
    """Compare models by their results folders: the paper's table with 95 % intervals, and differences over the same examples.

    The first model is the baseline. Examples are paired by name and right answer; what was not asked of both is counted, and
    left out of the differences.

    Args:
        folders: results folders of `hylo eval`, the baseline's first.
        output: .html file to write: tables, curves by length, heat maps, every task.
        json: print {models, rows} with all values, standard errors, intervals and paired differences.
    """
    from megatron_hylo.config import ConfigError
    from megatron_hylo.config.paths import expand_home
    from megatron_hylo.eval.compare import compare as compare_results
    from megatron_hylo.eval.compare import rows_to_json
    from megatron_hylo.eval.results import read_results

    if len(folders) < 2:
        raise ConfigError(f"compare needs at least two results folders, got {folders[0]}; the first is the baseline")
    if output is not None and output.suffix != ".html" and not output.is_dir():
        raise ConfigError(f"--output {output} must be an .html file")
    folders = [expand_home(folder) for folder in folders]
    read = [read_results(folder) for folder in folders]
    rows = compare_results(read)

    from megatron_hylo.eval import compare_page as page

    names = page.model_names(folders, read)
    if output is not None:
        console.print(f"wrote {page.write_comparison(output, names, read, rows, folders)}", soft_wrap=True)
    if json:
        print_json(rows_to_json(names, read, rows))
        return
    main = page.headline(rows)
    _print_table(["", *names], [*page.size_rows(read), *page.value_rows(main)])
    results.print()
    _print_table([*page.DIFFERENCE_HEAD], page.difference_rows(names, main), page.WORDS)
    for sentence in page.differently_measured(names, read):
        console.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _print_table(head: list[str], rows: list[list[str]], words: Collection[str] = ()) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, title in enumerate(head):
        table.add_column(title, justify="left" if index == 0 or title in words else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # "[40.8, 45.6]" is no markup
    results.print(table)
