"""Which layers of a hybrid keep a per-token cache (MLA) and which become linear: rules over measured losses.

Given is the loss of models with some layers MLA and the others their aligned linear twins: KL(teacher || model), loss at recall
answers, or both; `upcycle.select_folder` measures it. Nothing here knows of models.
"""

from collections.abc import Callable, Sequence

from megatron_hylo.config import ConfigError


def check_count(count: int, num_layers: int) -> None:
    """Refuse a number of MLA layers that leaves nothing to choose.

    Raises:
        ConfigError: not between 1 and num_layers - 1.
    """
    if not 1 <= count < num_layers:
        raise ConfigError(f"count, the number of MLA layers, must lie between 1 and {num_layers - 1}, got {count}")


def smart_layers(gains: Sequence[float], count: int) -> tuple[int, ...]:
    """SMART, the layer selection of Zebra-Llama (arXiv:2505.17272, section 3), which HyLo builds on.

    A layer's sensitivity is the KL that the all-linear model loses when this layer alone becomes MLA. Then, for L layers
    and K MLA layers,
      1. terminals are preserved: the most sensitive of the first floor(L / K) layers is MLA, and of the last ones too;
      2. between them MLA layers are near-uniformly spaced: the runs of linear layers between two neighbours are as long
         as each other, or one longer;
      3. among all such choices the one of the largest total sensitivity is taken.
    All MLA lists that Zebra-Llama and HyLo publish obey rules 1 and 2. One MLA layer is the most sensitive of all.

    Args:
        gains: sensitivity of each layer, [L]; may be negative.
        count: K.

    Returns:
        K layer indices, ascending; the lower index where two are as good.

    Raises:
        ConfigError: count is not between 1 and L - 1.
    """
    layers = len(gains)
    check_count(count, layers)

    def most_sensitive(among: range) -> int:
        """Layer of largest gain."""
        return max(among, key=lambda layer: gains[layer])

    if count == 1:
        return (most_sensitive(range(layers)),)
    reach = layers // count
    first, last = most_sensitive(range(reach)), most_sensitive(range(layers - reach, layers))
    shortest, longer = divmod(last - first + 1 - count, count - 1)
    runs = (shortest, shortest + 1) if longer else (shortest,)
    best: dict[int, tuple[float, tuple[int, ...]]] = {first: (gains[first], (first,))}  # last layer chosen -> (total, layers)
    for _ in range(count - 1):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for layer, (total, chosen) in best.items():
            for run in runs:
                nearest = layer + 1 + run
                if nearest <= last and (nearest not in reached or total + gains[nearest] > reached[nearest][0]):
                    reached[nearest] = (total + gains[nearest], (*chosen, nearest))
        best = reached
    return best[last][1]


def greedy_layers(num_layers: int, count: int, measure: Callable[[tuple[int, ...], list[int]], dict[int, float]]) -> list[int]:
    """One MLA layer after another, each the one that lowers the loss most beside those chosen before.

    Args:
        num_layers: L.
        count: layers to choose.
        measure: (MLA layers so far, candidates) -> loss with each candidate added.

    Returns:
        Layers in the order chosen; the lower index where two are as good.

    Raises:
        ConfigError: count is not between 1 and L - 1.
    """
    check_count(count, num_layers)
    chosen: list[int] = []
    for _ in range(count):
        losses = measure(tuple(chosen), [layer for layer in range(num_layers) if layer not in chosen])
        chosen.append(min(losses, key=losses.__getitem__))
    return chosen


def backward_layers(
    num_layers: int, count: int, measure: Callable[[tuple[int, ...], list[int]], dict[int, float]]
) -> list[int]:
    """Backward elimination: from MLA everywhere, one layer after another becomes linear, each the one that costs least.

    Args:
        num_layers: L.
        count: layers that stay MLA.
        measure: (MLA layers so far, candidates) -> loss with each candidate linear.

    Returns:
        Layers in the order given up; the lower index where two are as good.

    Raises:
        ConfigError: count is not between 1 and L - 1.
    """
    check_count(count, num_layers)
    left = list(range(num_layers))
    given_up: list[int] = []
    while len(left) > count:
        losses = measure(tuple(left), list(left))
        given_up.append(min(losses, key=losses.__getitem__))
        left.remove(given_up[-1])
    return given_up
