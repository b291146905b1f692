"""Type of the progress displays that long-running functions accept."""

from collections.abc import Callable, Iterable

Track = Callable[[Iterable, str], Iterable]  # (items, description) -> the same items


def no_progress(items: Iterable, description: str) -> Iterable:
    """Return the items unchanged: the default `track` argument, which shows no progress."""
    return items
