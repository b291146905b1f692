"""Stop signals and the save switch of a run: from its first moment to its end.

Until the first step of a start is done there is nothing to save, and a signal ends the run at once, wherever it is: reading
weights, tuning kernels, waiting for other ranks. After that the loop obeys it between steps, and an evaluation between its
batches, once all ranks know of it: a checkpoint is saved first.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hylo.io import is_launched_first
from megatron_hylo.io.start_up import stop_asked
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.callback import Stopped

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAVE_SWITCH = "save_now"  # file in the run folder: a checkpoint is saved after the present step, and the file removed
NOTHING, SAVE, STOP = 0, 1, 2  # what ranks agree on; the largest number counts


class EvaluationStopped(Exception):
    """A stop was asked for during an evaluation, on all ranks at the same batch."""


class StopRequest:
    """Remembers a stop signal and looks for the save switch; ranks agree on both. A second Ctrl-C ends at once.

    Args:
        folder: run folder, in which the save switch is looked for.
    """

    def __init__(self, folder: Path) -> None:
        self.switch = folder / SAVE_SWITCH
        self.seen: int | None = None
        self.starting = True  # nothing to save yet
        self.beat: Callable[[], None] = lambda: None  # called whenever the ranks have met
        self.what_follows = "stopping after this step, with a checkpoint"
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others may have no handlers
            self.previous = {s: signal.signal(s, self._remember) for s in STOP_SIGNALS}

    def _remember(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and (self.seen == number or self.starting):
            raise KeyboardInterrupt("interrupted by Ctrl-C; the same command goes on from the newest checkpoint, or begins")
        first, self.seen = self.seen is None, number
        if first and is_launched_first():  # not by print, which may be under way
            again = "; Ctrl-C once more ends at once" if number == signal.SIGINT else ""
            what = "stopping before the first step" if self.starting else self.what_follows
            os.write(2, f"\n{signal.Signals(number).name}: {what}{again}\n".encode())
        if first and self.starting:  # the same signal from Slurm and from torchrun must not break into what closes
            raise _stopped_in_startup()

    def reason(self, error: BaseException | None) -> BaseException | None:
        """Return what ended the run: `error`, or `Stopped` for a failure in start-up that followed a stop signal.

        A rank that fails because another one has stopped, in a collective of both, has stopped too.
        """
        return _stopped_in_startup() if isinstance(error, Exception) and self.starting and self.seen is not None else error

    def agreed(self, device: torch.device, look: bool = True) -> int:
        """Agree on what all ranks do next, the same on each: NOTHING, SAVE or STOP, once any of them was asked.

        Args:
            device: of this rank.
            look: also for the save switch.
        """
        mine = STOP if self.seen is not None else SAVE if look and is_main() and self.switch.exists() else NOTHING
        flag = torch.tensor([mine], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        decision = int(flag.item())
        self.beat()
        return decision

    def saved(self) -> None:
        """Remove the save switch, after a checkpoint."""
        if is_main():
            self.switch.unlink(missing_ok=True)

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def _stopped_in_startup() -> Stopped:
    return Stopped("stopped before the first step; nothing is lost, run the same command to begin or resume")


@contextlib.contextmanager
def stop_request(folder: Path) -> Iterator[StopRequest]:
    """Context in which stop signals are obeyed, start-up included.

    Args:
        folder: run folder.

    Raises:
        Stopped: a signal came before the first step was done; in place of errors that followed from it on other ranks.
    """
    request = StopRequest(folder)
    try:
        if stop_asked():  # while this process was starting
            raise _stopped_in_startup()
        yield request
    except Exception as error:
        reason = request.reason(error)
        if reason is None or reason is error:
            raise
        raise reason from error
    finally:
        request.restore()


def stopping_track(request: StopRequest, device: torch.device, shared: int) -> Callable[..., Iterator[Any]]:
    """Track for an evaluation's batches that ends it once a stop was asked for on any rank.

    Args:
        request: of the run.
        device: of this rank.
        shared: number of batches that every rank has; the ranks agree before each of these.

    Returns:
        (batches, description) -> the same batches; raises EvaluationStopped before a batch, on all ranks before the same one.
    """

    def track(batches: Any, _: str) -> Iterator[Any]:
        """Yield the batches until the ranks agree to stop."""
        for index, batch in enumerate(batches):
            if index < shared and request.agreed(device, look=False) == STOP:
                raise EvaluationStopped
            yield batch

    return track
