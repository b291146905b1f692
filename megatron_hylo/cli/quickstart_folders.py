"""Run folder of a quickstart, looked at before PyTorch is imported, so that one of another quickstart is refused at once."""

from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import get_layout
from megatron_hylo.io import check_free, has_manifest, read_json
from megatron_hylo.io.identity import text_identity
from megatron_hylo.models.description import read_description

FOLDERS = ("teacher", "data", "calibration", "hybrid", "export")  # of OUTPUT, beside the runs align and distil
LAYOUT = {
    ("paper", "gdn"): "smollm2-135m-8mla22gdn",
    ("paper", "mamba2"): "smollm2-135m-8mla22m2",
    ("calibrated", "gdn"): "smollm2-135m-8mla22gdn-teacher",
    ("calibrated", "mamba2"): "smollm2-135m-8mla22m2-teacher",
}


def default_output(linear: str, init: str) -> Path:
    """Run folder of each kind of hybrid: runs/quickstart, runs/quickstart_mamba2, runs/quickstart_paper and so on."""
    kind = [name for name, usual in ((linear, "gdn"), (init, "calibrated")) if name != usual]
    return Path("runs") / "_".join(["quickstart", *kind])


def read_results(output: Path) -> dict[str, Any]:
    """Read OUTPUT/results.json, what finished steps found; empty where there is none."""
    file = output / "results.json"
    return read_json(file) if file.is_file() else {}


def check_output(output: Path, linear: str, init: str, text: str | None) -> None:
    """Refuse a run folder of which a part could not be written, or that was made of another text or is another hybrid's.

    Args:
        output: the run folder, which need not be there.
        linear: "gdn" or "mamba2".
        init: "calibrated" or "paper".
        text: own training text, folder or .jsonl; None for the default ones.

    Raises:
        ConfigError: names the part and what to do.
        DamagedError: results.json or the hybrid's hylo.json cannot be read.
    """
    for name in FOLDERS:  # before hours of work of which one could not be written
        if not has_manifest(output / name):
            check_free(output / name, overwrite=False, sources=[text])
    if has_manifest(output / "data"):
        wanted = known_texts(text)
        if read_results(output).get("text", wanted[0]) not in wanted:
            raise ConfigError(
                f"{output / 'data'} was made of another text than {text or 'the default'}; give another --output for it"
            )
    if has_manifest(output / "hybrid"):
        layout = LAYOUT[init, linear]
        config, description = read_description(output / "hybrid")
        if config.mixers != get_layout(layout).config.mixers or description["provenance"].get("init") != init:
            raise ConfigError(f"{output / 'hybrid'} is another model than {layout}, {init}; give another --output for it")


def known_texts(text: str | None) -> list[str]:
    """Names in results.json of the text that is given, by its content, or of the default ones."""
    return [text_identity(text)] if text else ["documents", "manuals"]
