"""`hylo layouts` and `hylo scripts`: the named hybrids, and recipes and Slurm scripts for them."""

import shutil
from pathlib import Path

from rich.table import Table

import megatron_hylo
from megatron_hylo.cli.console import console, print_json, results


def layouts(json: bool = False) -> None:
    """Show the named layouts: parameters and KV cache of each.

    Args:
        json: print an array of {name, params, kv_percent, kv_bytes_per_token} instead of a table.
    """
    from megatron_hylo.config.layouts import layout_rows

    rows = layout_rows()
    if json:
        print_json(rows)
        return
    table = Table(title="Named layouts (KV bytes a token in bf16)")
    table.add_column("layout", no_wrap=True)
    for name in ("parameters", "KV %", "KV bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row["name"]), f"{row['params']:,}", f"{row['kv_percent']:.1f}", f"{row['kv_bytes_per_token']:,}")
    results.print(table)


def scripts(folder: Path, layout: str | None = None, overwrite: bool = False) -> None:
    """Write the Slurm scripts and the recipes of all stages to a folder, for other layouts or where there is no checkout.

    Args:
        folder: to make; `sbatch FOLDER/slurm/stage1_ild.sh` then reads FOLDER/megatron_hylo/recipes.
        layout: a named layout (`hylo layouts`) whose recipes are written, at 2K, 8K, 32K, 64K and 128K; by default those of
            Llama-3.2-1B.
        overwrite: replace what is there.
    """
    from megatron_hylo.config.recipes import recipe_files, stage_scripts
    from megatron_hylo.io import atomic_directory

    package = Path(megatron_hylo.__path__[0])
    recipes = None if layout is None else recipe_files(layout)  # refused before anything is made
    with atomic_directory(folder, overwrite) as made:
        shutil.copytree(package / "slurm", made / "slurm")
        kept = made / "megatron_hylo" / "recipes"
        if layout is None or recipes is None:
            shutil.copytree(package / "recipes", kept)
        else:
            kept.mkdir(parents=True)
            for name, text in recipes.items():
                (kept / name).write_text(text)
            for name, text in stage_scripts(layout, package / "slurm").items():
                (made / "slurm" / name).write_text(text)
    console.print(f"wrote {folder}; set HYLO_PYTHON to the Python that this package is installed in")
