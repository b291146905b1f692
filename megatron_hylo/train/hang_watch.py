"""Hang watch: names the rank that has stopped a run, with the Python stack of every rank, before the ranks' timeout ends it."""

import contextlib
import faulthandler
import logging
import re
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from megatron_hylo.io import barrier
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.callback import Callback, Progress

logger = logging.getLogger("megatron_hylo.train")
STACKS = "stacks"  # folder of a run: rank_00003.txt, there while the run goes on and after a hang
GRACE_SECONDS = 10.0  # once the main rank has noticed its own silence it lets all write their stacks
FRAME = re.compile(r'  File "(.*?)", line (\d+) in (\S+)')


def hosts() -> list[str]:
    """Name of each rank's host; all ranks call it."""
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, socket.gethostname())
    return found


class HangWatch(Callback):
    """Every rank writes the stacks of its threads once it has taken no step for some time; the main rank compares them.

    The stacks are written by a thread of C, so a rank that hangs in a library is seen as well. A rank without a file is one
    whose process was stopped or is gone.

    Args:
        run: run folder.
        seconds: without a step.
        hosts: name of each rank's host.
    """

    def __init__(self, run: Path, seconds: float, hosts: list[str]) -> None:
        self.folder, self.seconds, self.hosts = run / STACKS, seconds, hosts
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob("rank_*.txt"):
                old.unlink()
        barrier()
        rank = torch.distributed.get_rank()
        self.path = self.folder / f"rank_{rank:05d}.txt"
        self.file = open(self.path, "w")
        self.step, self.ended = 0, threading.Event()
        self.beat()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        if is_main():
            self.watcher.start()

    def beat(self) -> None:
        """Begin to count the silence anew."""
        self.last = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds, file=self.file)

    def after_step(self, progress: Progress) -> None:
        """Note a step."""
        self.step = progress.step
        self.beat()

    def at_end(self, progress: Progress) -> None:
        """Watch what follows the last step as one more."""
        self.beat()

    def close(self) -> None:
        """Stop watching; remove the stacks where there was no hang."""
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        with contextlib.suppress(OSError):
            if not self.path.stat().st_size:
                self.path.unlink()
            self.folder.rmdir()  # once it is empty

    def _watch(self) -> None:
        told = -1
        while not self.ended.wait(min(self.seconds / 4, 10.0)):
            last = self.last
            if time.monotonic() - last > self.seconds and told != self.step:
                if self.ended.wait(min(GRACE_SECONDS, self.seconds)) or self.last != last:
                    continue
                told = self.step
                logger.warning("%s", describe_hang(self.folder, self.hosts, self.step, self.seconds))


def describe_hang(folder: Path, hosts: list[str], step: int, seconds: float) -> str:
    """Name the ranks that the others wait for: those without a stack, else those that are somewhere else than most.

    Args:
        folder: of the stacks.
        hosts: name of each rank's host.
        step: newest step.
        seconds: without another.
    """
    places: list[str | None] = [_place(folder / f"rank_{rank:05d}.txt") for rank in range(len(hosts))]
    begin = f"no step for {seconds / 60:.3g} minutes after step {step}"
    end = f"stacks of all ranks: {folder}"
    silent = [rank for rank, place in enumerate(places) if place is None]
    if silent:
        names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in silent)
        return f"{begin}: {names} wrote no stack, so the process has stopped or is gone; {end}"
    most, count = Counter(places).most_common(1)[0]
    others = [f"rank {rank} on {hosts[rank]} is in {place}" for rank, place in enumerate(places) if place != most]
    if not others:
        return f"{begin}: all ranks are in {most}; {end}"
    return f"{begin}: {', '.join(others)}; the other {count} are in {most}; {end}"


def _place(file: Path) -> str | None:
    """Innermost call of ours in a rank's main thread, which faulthandler writes last; None without a stack."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    frames = FRAME.findall(text.split("Thread ")[-1])
    if not frames:
        return None
    own = [frame for frame in frames if "megatron_hylo" in frame[0] and not frame[0].endswith("hang_watch.py")]
    path, line, function = (own or frames)[0]
    return f"{function} ({Path(path).name}:{line})"
