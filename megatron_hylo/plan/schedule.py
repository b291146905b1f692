"""Discrete-event simulator of pipeline schedules: 1F1B and the interleaved one, as Megatron-Core orders them.

A pass of a model chunk starts when its rank is free and what it needs has arrived; a rank takes its passes in the order of the
schedule. Order per rank (Megatron-Core 0.19, `core/pipeline_parallel/schedules.py`): warm-up forward passes, then forward and
backward in turn, then the backward passes that are left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_hylo.config import ConfigError


@dataclass(frozen=True)
class Event:
    """One pass of a micro-batch over a model chunk.

    Args:
        rank: pipeline rank.
        kind: "F" or "B".
        chunk: model chunk of the rank, 0 without virtual stages.
        micro_batch: counted from 0.
        start, end: seconds.
    """

    rank: int
    kind: str
    chunk: int
    micro_batch: int
    start: float = 0.0
    end: float = 0.0


FILLS = 4  # micro-batches a rank after which the bubble does not change any more

Pass = tuple[str, int, int]  # kind, chunk, micro-batch


def order(rank: int, ranks: int, micro_batches: int, chunks: int = 1) -> list[Pass]:
    """Passes of one pipeline rank in their order.

    Args:
        rank, ranks: place in the pipeline, and its size.
        micro_batches: of a step.
        chunks: model chunks of each rank; above 1 the schedule is interleaved.

    Raises:
        ConfigError: interleaved with micro-batches that the ranks do not divide.
    """
    if chunks == 1:
        warmup = min(ranks - rank - 1, micro_batches)
        forward = [("F", 0, i) for i in range(micro_batches)]
        backward = [("B", 0, i) for i in range(micro_batches)]
    else:
        if micro_batches % ranks:
            raise ConfigError(f"{micro_batches} micro-batches must be a multiple of {ranks} pipeline ranks where interleaved")
        total = micro_batches * chunks
        warmup = min((ranks - rank - 1) * 2 + (chunks - 1) * ranks, total)
        places = [
            (group + i, chunk) for group in range(0, micro_batches, ranks) for chunk in range(chunks) for i in range(ranks)
        ]
        forward = [("F", chunk, i) for i, chunk in places]
        backward = [("B", chunks - 1 - chunk, i) for i, chunk in places]
    passes = forward[:warmup]
    for there, back in zip(forward[warmup:], backward):
        passes += [there, back]
    return passes + backward[len(forward) - warmup :]


def simulate(
    ranks: int,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    chunks: int = 1,
    transfer: float = 0.0,
) -> list[Event]:
    """Simulate one step.

    Args:
        ranks: of the pipeline.
        micro_batches: of the step.
        forward, backward: seconds of a pass over each pipeline stage; stage i is on rank i modulo the ranks.
        chunks: model chunks of each rank.
        transfer: seconds until a stage's output has arrived at the next one.

    Returns:
        All passes by their start.

    Raises:
        ConfigError: as many times as there are stages are not given.
        RuntimeError: the order of the passes has a deadlock, which is a mistake in `order`.
    """
    if len(forward) != ranks * chunks or len(backward) != ranks * chunks:
        raise ConfigError(
            f"{ranks} ranks of {chunks} chunks have {ranks * chunks} stages, got {len(forward)} and {len(backward)} times"
        )
    left = [order(rank, ranks, micro_batches, chunks) for rank in range(ranks)]
    done: dict[tuple[str, int, int], float] = {}  # kind, stage, micro-batch -> when its result is where it is needed
    free, events = [0.0] * ranks, list[Event]()
    while any(left):
        moved = False
        for rank, passes in enumerate(left):
            while passes:
                kind, chunk, i = passes[0]
                stage = chunk * ranks + rank
                ready = _ready(done, kind, stage, i, ranks * chunks)
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = start + (forward if kind == "F" else backward)[stage]
                done[kind, stage, i] = free[rank] + transfer
                events.append(Event(rank, kind, chunk, i, start, free[rank]))
                passes.pop(0)
                moved = True
        if not moved:
            raise RuntimeError("the schedule waits for itself")
    return sorted(events, key=lambda event: (event.start, event.rank))


def _ready(done: dict[Pass, float], kind: str, stage: int, i: int, stages: int) -> float | None:
    """When the inputs of a pass are there; None where what makes them has not run."""
    if kind == "F":
        return 0.0 if stage == 0 else done.get(("F", stage - 1, i))
    if stage == stages - 1:
        return done.get(("F", stage, i))
    return done.get(("B", stage + 1, i)) if ("F", stage, i) in done else None


def bubble(events: Sequence[Event]) -> float:
    """Share of all ranks' time in which they compute nothing, from the start of the step to its end."""
    ranks, end = 1 + max(event.rank for event in events), max(event.end for event in events)
    return 1 - sum(event.end - event.start for event in events) / (ranks * end)


def idle_seconds(ranks: int, micro_batches: int, forward: Sequence[float], backward: Sequence[float], chunks: int = 1) -> float:
    """Seconds of a step in which the slowest rank waits for the others: the pipeline's bubble.

    Every micro-batch after the pipeline is full adds the slowest rank's own time and no wait, so a few times as many as there
    are ranks are simulated.

    Args:
        ranks, micro_batches, forward, backward, chunks: as of `simulate`.
    """
    if ranks == 1:
        return 0.0
    simulated = min(micro_batches, FILLS * ranks)
    busy = max(sum(forward[rank::ranks]) + sum(backward[rank::ranks]) for rank in range(ranks))
    return step_seconds(simulate(ranks, simulated, forward, backward, chunks)) - simulated * busy


def step_seconds(events: Sequence[Event]) -> float:
    """Seconds of the whole step."""
    return max(event.end for event in events)


def ascii_chart(
    events: Sequence[Event], width: int = 96, name: Callable[[Event], str] = lambda e: f"{e.micro_batch % 10}"
) -> str:
    """Draw a schedule, one line a rank: a forward pass is a row of its digit, a backward pass its digit and dots.

    Args:
        events: of `simulate`.
        width: characters of a line.
        name: one character for a pass, by default the last digit of its micro-batch.
    """
    end, ranks = step_seconds(events), 1 + max(event.rank for event in events)
    lines = [[" "] * width for _ in range(ranks)]
    for event in events:
        first, last = int(event.start / end * width), max(int(event.end / end * width), int(event.start / end * width) + 1)
        for place in range(first, min(last, width)):
            lines[event.rank][place] = name(event) if event.kind == "F" or place == first else "."
    return "\n".join("".join(line) for line in lines)
