"""Rules of layer selection: SMART against all choices it allows, written out; greedy against trying everything."""

import itertools

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import LAYOUTS
from megatron_hylo.upcycle.select import Selection
from megatron_hylo.upcycle.selection import backward_layers, greedy_layers, smart_layers

# MLA layers of Zebra-Llama's models (arXiv:2505.17272, code and model cards): (layers, indices)
ZEBRA = [
    (16, (0, 5, 10, 14)),
    (16, (0, 2, 5, 8, 11, 14)),
    (16, tuple(range(0, 16, 2))),
    (28, (0, 5, 10, 16, 21, 26)),
    (28, (0, 3, 7, 10, 14, 18, 22, 26)),
    (28, tuple(range(0, 28, 2))),
    (32, (0, 4, 8, 12, 16, 20, 25, 30)),
    (32, tuple(range(0, 32, 2))),
]
PUBLISHED = ZEBRA + [  # those of our own shapes may have layers that another method chose
    (layout.config.num_hidden_layers, layout.mla_layers) for layout in LAYOUTS.values() if layout.shapes == "paper"
]


def spaced(chosen: tuple[int, ...]) -> bool:
    """Runs of linear layers between neighbours differ by one at most."""
    runs = [b - a - 1 for a, b in itertools.pairwise(chosen)]
    return not runs or max(runs) - min(runs) <= 1


def allowed(layers: int, count: int) -> list[tuple[int, ...]]:
    """All choices with a layer near either end and near-uniform spacing."""
    reach = layers // count
    choices = itertools.combinations(range(layers), count)
    return [c for c in choices if c[0] < reach and c[-1] >= layers - reach and spaced(c)]


def gains_of(layers: int, seed: int) -> list[float]:
    """Sensitivities, some of them negative."""
    return torch.randn(layers, generator=torch.Generator().manual_seed(seed)).add(0.5).tolist()


@pytest.mark.parametrize(("layers", "count"), [(8, 2), (8, 3), (9, 4), (12, 5), (12, 7), (13, 3), (16, 4), (16, 6), (10, 9)])
@pytest.mark.parametrize("seed", range(5))
def test_smart_equals_the_best_of_all_choices_its_rules_allow(layers, count, seed):
    gains = gains_of(layers, seed)
    reach = layers // count
    first, last = (max(r, key=gains.__getitem__) for r in (range(reach), range(layers - reach, layers)))
    fitting = [c for c in allowed(layers, count) if c[0] == first and c[-1] == last]
    assert fitting
    assert smart_layers(gains, count) == max(fitting, key=lambda c: sum(gains[layer] for layer in c))


@pytest.mark.parametrize(("layers", "chosen"), PUBLISHED)
def test_published_layers_obey_the_rules_and_come_out_where_they_are_the_sensitive_ones(layers, chosen):
    reach = layers // len(chosen)
    assert chosen[0] < reach and chosen[-1] >= layers - reach and spaced(chosen)
    noise = gains_of(layers, 0)
    assert smart_layers([10.0 * (layer in chosen) + 0.1 * noise[layer] for layer in range(layers)], len(chosen)) == chosen


def test_smart_takes_the_most_sensitive_end_layers_even_where_others_are_more_sensitive():
    gains = [0.1, 0.2, 9.0, 8.0, 0.0, 0.0, 0.3, 0.1]  # 8 layers, 4 MLA: one of the first two, one of the last two
    assert smart_layers(gains, 4) == (1, 2, 4, 6)  # with 2 and 3 both there would be runs of none and of two


@pytest.mark.parametrize("layers", range(2, 25))
def test_smart_always_finds_a_choice(layers):
    for count in range(1, layers):
        for seed in range(3):
            chosen = smart_layers(gains_of(layers, seed), count)
            assert len(set(chosen)) == count and list(chosen) == sorted(chosen)
            assert 0 <= chosen[0] and chosen[-1] < layers and spaced(chosen)


def test_one_layer_is_the_most_sensitive_of_all_and_ties_go_to_the_lower_index():
    assert smart_layers([0.1, 0.5, 0.9, 0.2], 1) == (2,)
    assert smart_layers([0.5, 0.5, 0.5, 0.5], 1) == (0,)
    assert smart_layers([0.0] * 8, 2) == (0, 4)
    assert smart_layers([0.0] * 7 + [1.0], 3) == (0, 3, 7)  # between two and three linear layers, and the other way round


def test_greedy_adds_the_best_beside_those_before_and_reports_the_way():
    """KL with interaction: 1 and 2 repair the same thing, so after 1 it is 4 that helps."""
    asked = []

    def kl(chosen: set[int]) -> float:
        return (
            5.0
            - 2.0 * bool(chosen & {1, 2})
            - 0.1 * (2 in chosen) * (1 not in chosen)
            - 0.7 * (4 in chosen)
            - 0.01 * len(chosen)
        )

    def measure(chosen: tuple[int, ...], candidates: list[int]) -> dict[int, float]:
        asked.append((chosen, candidates))
        return {layer: kl({*chosen, layer}) for layer in candidates}

    assert greedy_layers(5, 3, measure) == [2, 4, 0]
    assert asked == [((), [0, 1, 2, 3, 4]), ((2,), [0, 1, 3, 4]), ((2, 4), [0, 1, 3])]


def test_backward_gives_up_the_layer_that_costs_least_beside_those_left():
    """Two layers that stand in for each other: one of them goes early, the other stays to the end."""
    asked = []

    def loss(left: set[int]) -> float:
        return 5.0 - 2.0 * bool(left & {1, 2}) - 0.1 * (2 in left) - 0.7 * (4 in left) - 0.01 * (3 in left)

    def measure(left: tuple[int, ...], candidates: list[int]) -> dict[int, float]:
        asked.append((left, candidates))
        return {layer: loss({*left} - {layer}) for layer in candidates}

    assert backward_layers(5, 1, measure) == [0, 1, 3, 4]
    assert asked[:2] == [((0, 1, 2, 3, 4), [0, 1, 2, 3, 4]), ((1, 2, 3, 4), [1, 2, 3, 4])] and len(asked) == 4


def test_recall_per_nat_of_kl_is_none_where_a_layer_makes_the_kl_no_better():
    """By hand: 2 nats at the answers for one of KL, KL that grows, KL that stays, and a ratio of 100, cut to 50."""
    found = Selection(
        "smart", "both", "+GGG", [0], None, 2.0, None, [1.0, 2.5, 2.0, 1.99], 1.0, 1.0, 5.0, None, [3.0, 1.0, 1.0, 4.0], 3.0,
        64, 8, 5.0, 1.0,
    )  # fmt: skip
    assert found.recall_per_kl() == [2.0, None, None, 50.0]


@pytest.mark.parametrize("count", [-1, 0, 6, 7])
def test_a_count_that_leaves_nothing_to_choose_is_refused(count):
    with pytest.raises(ConfigError, match=f"must lie between 1 and 5, got {count}"):
        smart_layers([0.0] * 6, count)
    with pytest.raises(ConfigError, match=f"must lie between 1 and 5, got {count}"):
        greedy_layers(6, count, lambda *_: {})
    with pytest.raises(ConfigError, match=f"must lie between 1 and 5, got {count}"):
        backward_layers(6, count, lambda *_: {})
