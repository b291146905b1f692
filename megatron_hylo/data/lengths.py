"""Table and plot of how long a dataset's documents are: what a long-context stage can learn from it."""

from pathlib import Path

import numpy as np

BOUNDS = tuple(1024 * 2**i for i in range(8))  # 1K to 128K tokens


def long_shares(lengths: np.ndarray) -> list[float]:
    """Part of the tokens that is in documents longer than each of `BOUNDS`."""
    total = max(1, int(lengths.sum()))
    return [float(lengths[lengths > bound].sum()) / total for bound in BOUNDS]


def length_table(lengths: np.ndarray) -> str:
    """Two lines: lengths, and the share of tokens in documents longer than that."""
    names = "".join(f"{f'> {bound // 1024}K':>8}" for bound in BOUNDS)
    shares = "".join(f"{share:>8.1%}" for share in long_shares(lengths))
    return f"documents of tokens {names}\nshare of all tokens {shares}"


def plot_lengths(lengths: np.ndarray, file: Path) -> None:
    """Draw the table as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar([f"> {bound // 1024}K" for bound in BOUNDS], [100 * share for share in long_shares(lengths)])
    axes.bar_label(bars, fmt="%.0f")
    axes.set_xlabel("tokens of the document")
    axes.set_ylabel("% of all tokens")
    figure.savefig(file, dpi=120)
