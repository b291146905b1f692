"""What `hylo` shows: one console, progress bars on it, and which messages of whom."""

import logging
import os
import warnings
from collections.abc import Iterable

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track as rich_track

console = Console()


def track(items: Iterable, description: str) -> Iterable:
    """The same items with a progress bar, which goes when they end."""
    return rich_track(list(items), description=description, console=console, transient=True)


def set_up_logging() -> None:
    """Our own messages on the main rank; of other packages only errors, and no progress bars of theirs."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    logging.getLogger("megatron_hylo").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\b.*")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
