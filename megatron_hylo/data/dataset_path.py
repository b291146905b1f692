"""Paths of datasets, looked at before PyTorch is imported, so that one at which there is no dataset is refused at once."""

from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.io.folder_kinds import hint, is_a


def check_indexed_dataset(prefix: str | Path) -> None:
    """Refuse a path at which there is no indexed dataset; nothing is read.

    Args:
        prefix: path without .bin or .idx.

    Raises:
        ConfigError: one of the files is not there.
    """
    if not all(Path(f"{prefix}{suffix}").exists() for suffix in (".bin", ".idx")):
        folder, split = Path(prefix).parent, Path(prefix).name
        meant = hint(folder, "dataset")
        if split == "heldout" and is_a(folder, "dataset"):
            meant = f"; {folder} has no documents held out, as --heldout_fraction above 0 would have"
        raise ConfigError(f"there is no dataset {prefix}.bin with {prefix}.idx{meant}; `hylo preprocess` makes one")
