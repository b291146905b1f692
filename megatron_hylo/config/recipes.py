"""Recipes of the training stages: the YAML that `hylo train --config` reads, for any named layout, every key commented.

The files of megatron_hylo/recipes/, which the Slurm scripts name, are those of Llama-3.2-1B:

    python -m megatron_hylo.config.recipes megatron_hylo/recipes

`hylo scripts FOLDER --layout NAME` writes those of another layout. There are 18 layouts of five bases and five stages: files of
all would be ninety that differ in a dozen numbers.
"""

import sys
from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import LAYOUTS, get_layout
from megatron_hylo.config.recipe_families import FAMILIES, SCRIPTED, STAGES
from megatron_hylo.config.recipe_lines import Recipe

DEFAULT_LAYOUT = "llama3.2-1b-4mla12gdn"


def recipe(layout: str, stage: str, name: str | None = None) -> str:
    """Write a stage's recipe out.

    Args:
        layout: a named layout (`hylo layouts`).
        stage: a key of `STAGES`.
        name: of the recipe's file, without its stage; the layout by default.

    Raises:
        ConfigError: no such layout or stage.
    """
    if stage not in STAGES:
        raise ConfigError(f"there is no recipe of stage {stage!r}; choose one of {', '.join(STAGES)}")
    return "".join(f"{line}\n" for line in Recipe(get_layout(layout), stage, name or layout).lines())


def recipe_files(layout: str) -> dict[str, str]:
    """Recipes of every stage of a layout by file name."""
    return {f"{stage}_{layout}.yaml": recipe(layout, stage) for stage in STAGES}


def default_files() -> dict[str, str]:
    """Recipes that the Slurm scripts name, by file name: those of Llama-3.2-1B."""
    base = LAYOUTS[DEFAULT_LAYOUT].base
    return {f"{stage}_{base}.yaml": recipe(DEFAULT_LAYOUT, stage, base) for stage in SCRIPTED}


def stage_scripts(layout: str, scripts: Path) -> dict[str, str]:
    """Slurm scripts of every stage of a layout by file name, written after those of Llama-3.2-1B.

    Args:
        layout: a named layout.
        scripts: folder of the Slurm scripts of Llama-3.2-1B.
    """
    default, chosen = LAYOUTS[DEFAULT_LAYOUT], get_layout(layout)
    family = FAMILIES[chosen.base]
    found = {}
    for stage in STAGES:
        like = stage if stage in SCRIPTED else "stage3_ctx64k"
        text = (scripts / f"{like}.sh").read_text().replace(like, stage)
        if like != stage:
            text = text.replace("64K", f"{STAGES[stage] // 1024}K")
        models = {DEFAULT_LAYOUT: layout, default.base: chosen.base, FAMILIES[default.base].teacher[1]: family.teacher[1]}
        for old, new in models.items():
            text = text.replace(f'/models/{old}"', f'/models/{new}"')
        text = text.replace(f"recipes/{stage}_{default.base}.yaml", f"recipes/{stage}_{layout}.yaml")
        text = text.replace("--gpus-per-node=8", f"--gpus-per-node={family.gpus}")
        found[f"{stage}.sh"] = text
    return found


if __name__ == "__main__":
    for file, text in default_files().items():
        (Path(sys.argv[1]) / file).write_text(text)
