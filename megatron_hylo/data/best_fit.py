"""Packing of whole documents into windows: best fit, longest first, then gaps closed with fragments of what fills least.

Documents are sorted by length, O(N log N). All documents of one length are placed at once, into all windows with the same room
at once: best fit takes the least room that is enough, and a window that took one document has less room than before, so it
takes as many as fit before another is tried. Each step but the last of a length empties one class of room for good, so that
steps are about as many as lengths, whatever the number of documents.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Pieces of all windows, window by window; without a cap on pieces every window is full.

    Attributes:
        first: [windows + 1] int64, each window's first piece; last: all pieces.
        document: [pieces] int64, index into the lengths.
        start: [pieces] int64, its first token in the document.
        length: [pieces] int64.
        fragments: pieces that are not a whole document.
        left_out: tokens at the end that fill no window.
        padding: tokens that windows with as many pieces as they may have lack.
    """

    first: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    fragments: int
    left_out: int
    padding: int


def pack_best_fit(lengths: np.ndarray, capacity: int, most_documents: int | None = None) -> Packing:
    """Full windows of documents, as few cut as can be.

    A document longer than a window is cut into full windows and one rest. Where a document is cut, the next piece begins with
    the last token of the one before, so that each token behind a document's first is predicted once.

    Args:
        lengths: tokens of each document, int64; those of 0 are in no window.
        capacity: tokens of a window, at least 2.
        most_documents: pieces of a window, fragments included; one that is not full with them stays so, and no token is left
            out.
    """
    lengths = np.asarray(lengths, np.int64)
    step = capacity - 1
    full = np.where(lengths >= capacity, (lengths - 1) // step, 0)  # windows of one document alone
    rest = lengths - full * step
    whole_document = np.repeat(np.arange(len(lengths)), full)
    whole_start = (np.arange(len(whole_document)) - np.repeat(np.cumsum(full) - full, full)) * step
    loose = np.flatnonzero(np.where(full > 0, rest > 1, rest > 0))
    loose = loose[np.argsort(-rest[loose], kind="stable")]
    most = most_documents or len(lengths) + 1
    window, filled = _best_fit(rest[loose], capacity, most)
    order = np.argsort(window, kind="stable")
    bins = np.argsort(-filled, kind="stable")  # the fullest first
    place = np.empty_like(bins)
    place[bins] = np.arange(len(bins))
    loose, window = loose[order], place[window[order]]
    order = np.argsort(window, kind="stable")
    loose, window = loose[order], window[order]
    pieces, kept, left_out = _close_gaps(
        loose, (full * step)[loose], rest[loose], window, filled[bins], capacity, most_documents
    )
    document = np.concatenate([whole_document, pieces[1]])
    start = np.concatenate([whole_start, pieces[2]])
    length = np.concatenate([np.full(len(whole_document), capacity), pieces[3]])
    window = np.concatenate([np.arange(len(whole_document)), len(whole_document) + pieces[0]])
    order = np.argsort(window, kind="stable")
    first = np.searchsorted(window[order], np.arange(len(whole_document) + kept + 1))
    fragments = int((length != lengths[document]).sum())
    padding = (len(whole_document) + kept) * capacity - int(length.sum())
    return Packing(first, document[order], start[order], length[order], fragments, left_out, padding)


def _best_fit(lengths: np.ndarray, capacity: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(the window of each document, the tokens in each window) for lengths in descending order, each at most `capacity`."""
    window = np.empty(len(lengths), np.int64)
    edges = np.flatnonzero(np.diff(lengths, prepend=-1)) if len(lengths) else np.zeros(0, np.int64)
    rooms: list[int] = []  # ascending, those of which there are windows
    classes: dict[int, list[tuple[np.ndarray, int]]] = {}  # room -> windows, and how many documents each has
    made, room_of = 0, np.full(len(lengths), capacity, np.int64)
    for begin, end in zip(edges.tolist(), [*edges[1:].tolist(), len(lengths)]):
        length = int(lengths[begin])
        done = begin
        while done < end:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                found, count = classes[room].pop()
                if not classes[room]:
                    del classes[room], rooms[at]
            else:
                room, count, fits = capacity, 0, min(capacity // length, most)
                found = np.arange(made, made + -(-(end - done) // fits))
                made += len(found)
            fits = min(room // length, most - count)
            takers = min(len(found), (end - done) // fits)
            if takers:
                window[done : done + takers * fits] = np.repeat(found[:takers], fits)
                room_of[found[:takers]] = room - fits * length
                _keep(rooms, classes, room - fits * length, found[:takers], count + fits, most)
                done += takers * fits
            if takers < len(found) and done < end:  # fewer than fit in one window
                some = end - done
                window[done:end] = found[takers]
                room_of[found[takers]] = room - some * length
                _keep(rooms, classes, room - some * length, found[takers : takers + 1], count + some, most)
                done, takers = end, takers + 1
            if takers < len(found):
                _keep(rooms, classes, room, found[takers:], count, most)
    return window, capacity - room_of[:made]


def _keep(
    rooms: list[int], classes: dict[int, list[tuple[np.ndarray, int]]], room: int, windows: np.ndarray, count: int, most: int
) -> None:
    if room and count < most:
        if room not in classes:
            classes[room] = []
            insort(rooms, room)
        classes[room].append((windows, count))


def _close_gaps(
    document: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    window: np.ndarray,
    filled: np.ndarray,
    capacity: int,
    most: int | None,
) -> tuple[tuple[np.ndarray, ...], int, int]:
    """Fill the gaps of the fuller windows with the pieces of the emptier ones, cut where they do not fit.

    Pieces are ordered by window and windows by descending fill.

    Returns:
        ((window, document, start, length) of the pieces, windows that are kept, tokens that are left). Kept are the full
        windows, and with `most` pieces for a window all others too.
    """
    edges = np.searchsorted(window, np.arange(len(filled) + 1))
    counts = np.diff(edges)
    low, high = int(np.searchsorted(-filled, -capacity, side="right")), len(filled)
    given: list[tuple[int, int, int]] = []  # document, start, length; of windows that are taken apart, the next one last
    added: list[tuple[int, int, int, int]] = []
    while low < high:
        gap, room = capacity - int(filled[low]), len(window) if most is None else most - int(counts[low])
        while gap and room and (given or high - 1 > low):
            if not given:
                high -= 1
                mine = slice(edges[high], edges[high + 1])
                given = list(zip(document[mine].tolist(), start[mine].tolist(), length[mine].tolist()))
            number, begin, size = given.pop()
            take = min(gap, size)
            added.append((low, number, begin, take))
            if take < size:
                given.append((number, begin + take - 1, size - take + 1))
            gap, room = gap - take, room - 1
        if gap and room:
            break
        low += 1
    last = [size for *_, size in given] + [size for number, *_, size in added if number == low]
    left = sum(last) + (int(filled[low]) if low < high else 0)
    if most is not None:  # the window that is being filled, and what is left of the one that was taken apart
        low, left = low + (low < high), 0
    kept = slice(0, edges[low])
    if most is not None and given:
        added += [(low, *piece) for piece in given]
        low += 1
    extra = np.array([piece for piece in added if piece[0] < low], np.int64).reshape(-1, 4).T
    columns = [np.concatenate([old[kept], new]) for old, new in zip((window, document, start, length), extra)]
    return tuple(columns), low, left
