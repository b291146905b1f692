"""Items made before they are asked for."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

AHEAD = 4  # items


def ahead(items: Iterator[Any], count: int = AHEAD) -> Iterator[Any]:
    """The same items, made in a thread before they are asked for; an error is raised where its item would be."""
    ready: queue.Queue = queue.Queue(maxsize=count)
    stop = threading.Event()

    def put(entry: tuple[Any, BaseException | None]) -> bool:
        """Put an entry as soon as there is room; False once nobody reads any longer."""
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        """Put all items, or the error that ends them, from the thread."""
        try:
            for item in items:
                if not put((item, None)):
                    return
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=make, name="feed", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        with contextlib.suppress(queue.Empty):  # whoever waits for a place need not wait for its time to be over
            while True:
                ready.get_nowait()
        thread.join(timeout=10)  # what it reads from may be used again
