"""Named layouts against the released checkpoints' sizes (HyLo model cards), and the pattern algebra."""

import dataclasses
import json
import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest

from megatron_hylo.config import ConfigError, ModelConfig, ParallelConfig, RopeScaling, from_dict
from megatron_hylo.config.layouts import (
    BASES,
    LAYOUTS,
    expand_pattern,
    get_layout,
    hybrid_config,
    kv_bytes_per_token,
    kv_percent,
    parameter_count,
    pipeline_pattern,
    uniform_mixers,
)
from megatron_hylo.config.mixers import check_tensor_parallel, get_mixer
from megatron_hylo.config.train import TrainConfig

# parameters, KV % of the base, KV bytes a token: the seven released layouts, then their Mamba2 or GDN twins
RELEASED = {
    "llama3.2-1b-4mla12gdn": (1_673_797_776, 3.9, 1280),
    "llama3.2-1b-8mla8gdn": (1_613_437_024, 7.8, 2560),
    "llama3.2-3b-6mla22gdn": (4_267_821_452, 2.0, 2304),
    "llama3.2-3b-14mla14gdn": (3_971_381_500, 4.7, 5376),
    "qwen3-1.7b-7mla21gdn": (2_284_173_820, 3.9, 4480),
    "qwen3-1.7b-14mla14m2": (2_065_541_280, 7.8, 8960),
    "qwen3-1.7b-14mla14gdn": (2_182_902_440, 7.8, 8960),
}
TWINS = {
    "llama3.2-1b-4mla12m2": (1_548_369_024, 3.9, 1280),
    "llama3.2-1b-8mla8m2": (1_529_817_856, 7.8, 2560),
    "llama3.2-3b-6mla22m2": (3_783_594_544, 2.0, 2304),
    "llama3.2-3b-14mla14m2": (3_663_237_104, 4.7, 5376),
    "qwen3-1.7b-7mla21m2": (2_108_132_080, 3.9, 4480),
}
TEACHER_PARAMETERS = {"llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824, "smollm2-135m": 134_515_008,
                      "qwen3-30b-a3b": 30_532_122_624}  # fmt: skip


@pytest.mark.parametrize("name", [*RELEASED, *TWINS])
def test_layout_matches_released_checkpoint(name):
    config = LAYOUTS[name].config
    params, percent, kv_bytes = (RELEASED | TWINS)[name]
    assert parameter_count(config) == params
    assert round(kv_percent(config), 1) == percent
    assert kv_bytes_per_token(config) == kv_bytes


def test_only_layouts_of_the_135m_teacher_and_of_experts_are_not_of_the_paper():
    ours = set(LAYOUTS) - set(RELEASED) - set(TWINS)
    small = {f"smollm2-135m-8mla22{linear}{shapes}" for linear in ("gdn", "m2") for shapes in ("", "-teacher")}
    assert ours == small | {f"qwen3-30b-a3b-12mla36{linear}" for linear in ("gdn", "m2")}
    assert all(kv_percent(LAYOUTS[name].config) < 12 for name in LAYOUTS)


@pytest.mark.parametrize("base", TEACHER_PARAMETERS)
def test_base_matches_published_parameter_count(base):
    assert parameter_count(BASES[base]) == TEACHER_PARAMETERS[base]


def test_mixer_parameters_match_the_papers_25_2_million():
    assert get_mixer("G").parameters(LAYOUTS["llama3.2-1b-4mla12gdn"].config) == 25_215_500
    assert get_mixer("G").parameters(LAYOUTS["llama3.2-3b-6mla22gdn"].config) == 56_715_794
    assert get_mixer("*").parameters(BASES["llama3.2-1b"]) == 10_485_760


def test_hylo_layouts_json():
    command = [sys.executable, "-m", "megatron_hylo.cli", "layouts", "--json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert {row["name"]: row["params"] for row in rows if row["name"] in RELEASED} == {n: v[0] for n, v in RELEASED.items()}
    assert set(rows[0]) == {"name", "params", "kv_percent", "kv_bytes_per_token"}


def test_pattern_may_be_written_with_or_without_mlps():
    assert expand_pattern("G-+-G-", 3) == expand_pattern("G+G", 3) == "G+G"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("G+", "has 2 mixers, but the base model has 3 layers"), ("GXG", "holds 'X'"), ("G--+G-", "must be followed by its MLP")],
)
def test_bad_pattern_is_named(pattern, message):
    with pytest.raises(ConfigError, match=message):
        expand_pattern(pattern, 3)


def test_unknown_layout_lists_the_known_ones():
    with pytest.raises(ConfigError, match="llama3.2-1b-4mla12gdn"):
        get_layout("llama")


def test_too_large_rank_is_refused_with_the_largest_that_fits():
    with pytest.raises(ConfigError, match="kv_lora_rank 4096 is larger than 288"):
        hybrid_config(BASES["smollm2-135m"], "G" * 29 + "+", kv_lora_rank=4096)


def test_own_layout_needs_a_pattern_and_a_base_only():
    base = BASES["qwen3-8b"]
    config = hybrid_config(base, uniform_mixers(36, 9))
    assert config.mixers.count("+") == 9 and config.qk_layernorm
    assert kv_percent(config) < 10


def test_config_survives_json_and_refuses_unknown_keys():
    config = LAYOUTS["qwen3-1.7b-7mla21gdn"].config.replace(mla_rope_scaling=RopeScaling("yarn", 2.0, 32768))
    values = json.loads(json.dumps(config.to_dict()))
    assert from_dict(ModelConfig, values, "test") == config
    with pytest.raises(ConfigError, match="unknown key 'rank'"):
        from_dict(ModelConfig, values | {"rank": 3}, "test")
    with pytest.raises(ConfigError, match="unknown key 'beta'"):
        from_dict(ModelConfig, values | {"rope_scaling": {"beta": 3}}, "test")


def test_a_value_that_is_no_name_of_its_field_is_refused():
    """Also in groups and lists, as in settings given to `megatron_hylo.train`; None where the field may have it."""
    given = {"stage": "distil", "data": "data", "output": "out", "model": "model", "teacher": "teacher"}
    with pytest.raises(ConfigError, match="train.recall.cross_entropy must be one of 'all', 'answers', got 'answer'"):
        from_dict(TrainConfig, given | {"recall": {"share": 0.1, "cross_entropy": "answer"}}, "train")
    with pytest.raises(ConfigError, match="train.stage must be one of .*'distil'.*, got 'distill'"):
        from_dict(TrainConfig, given | {"stage": "distill"}, "train")
    with pytest.raises(ConfigError, match=r"train.recall.tasks\[1\] must be one of 'key_value', .*, got 'passkeys'"):
        from_dict(TrainConfig, given | {"recall": {"tasks": ["counting", "passkeys"]}}, "train")
    named = [f.name for f in dataclasses.fields(TrainConfig) if Literal in map(get_origin, (f.type, *get_args(f.type)))]
    assert {"stage", "precision"} <= set(named)
    config = from_dict(TrainConfig, given, "train")
    assert from_dict(TrainConfig, given | {name: getattr(config, name) for name in named}, "train") == config
    assert from_dict(TrainConfig, dataclasses.asdict(config), "train") == config


@dataclasses.dataclass
class Chosen:
    """Fields of several names, of names in lists, and of names beside numbers."""

    several: list[Literal["a", "b"]] = dataclasses.field(default_factory=list)
    perhaps: list[Literal["a", "b"]] | None = None
    mixed: Literal["auto"] | int | None = None


def test_names_in_lists_and_beside_other_types_are_read():
    values = {"several": ["b", "a"], "perhaps": ["a"], "mixed": 3}
    assert from_dict(Chosen, values, "x") == Chosen(**values)
    assert from_dict(Chosen, {"perhaps": None, "mixed": "auto"}, "x") == Chosen(mixed="auto")
    with pytest.raises(ConfigError, match=r"x.several\[1\] must be one of 'a', 'b', got 'c'"):
        from_dict(Chosen, {"several": ["a", "c"]}, "x")
    with pytest.raises(ConfigError, match=r"x.perhaps\[0\] must be one of 'a', 'b', got 'c'"):
        from_dict(Chosen, {"perhaps": ["c"]}, "x")
    with pytest.raises(ConfigError, match="x.mixed must be one of 'auto', got 'never'"):
        from_dict(Chosen, {"mixed": "never"}, "x")


@pytest.mark.parametrize("stages", [1, 2, 4, 7])
def test_pipeline_pattern_is_the_best_of_all_splits(stages):
    config = BASES["smollm2-135m"].replace(hybrid_layer_pattern="*-" * 8)
    pattern = pipeline_pattern(config, stages)
    assert pattern.replace("|", "") == config.hybrid_layer_pattern
    layer = get_mixer("*").parameters(config) + 3 * config.hidden_size * config.ffn_hidden_size
    ends = config.vocab_size * config.hidden_size
    costs = [layer] * 8
    costs[0] += ends
    costs[-1] += ends

    def largest(split):
        edges = [0, *split, 8]
        return max(sum(costs[a:b]) for a, b in zip(edges, edges[1:]))

    import itertools

    best = min(largest(split) for split in itertools.combinations(range(1, 8), stages - 1))
    counts = list(itertools.accumulate(part.count("-") for part in pattern.split("|")))
    assert largest(counts[:-1]) == best


def test_tensor_parallel_sizes_that_do_not_divide_are_refused_with_those_that_do():
    teacher, hybrid = BASES["smollm2-135m"], LAYOUTS["llama3.2-1b-4mla12gdn"].config
    check_tensor_parallel(teacher, 3)
    with pytest.raises(ConfigError, match=r"size 2 does not divide num_attention_heads 9; .* for this model: 1, 3$"):
        check_tensor_parallel(teacher, 2)
    with pytest.raises(ConfigError, match=r"size 4 does not divide linear_num_heads 6; .* for this model: 1, 2$"):
        check_tensor_parallel(hybrid, 4)
    check_tensor_parallel(teacher.replace(vocab_size=100), 3)  # padded


def test_a_split_of_ones_own_is_taken_or_refused():
    config = BASES["smollm2-135m"].replace(hybrid_layer_pattern="*-" * 8)
    assert pipeline_pattern(config, 3, [1, 5, 2]) == "*-|*-*-*-*-*-|*-*-"
    with pytest.raises(ConfigError, match=r"pipeline_layers \[1, 5\] are 6 layers, the model has 8"):
        pipeline_pattern(config, 2, [1, 5])
    with pytest.raises(ConfigError, match=r"pipeline_layers \[8\] must be 2 numbers"):
        ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=[8])
    with pytest.raises(ConfigError, match="9 pipeline stages .* more than the model's 8 layers"):
        pipeline_pattern(config, 9)
    with pytest.raises(ConfigError, match="virtual_pipeline_model_parallel_size 2 needs pipeline_model_parallel_size > 1"):
        ParallelConfig(virtual_pipeline_model_parallel_size=2)


def test_parallelism_that_a_verb_lacks_is_named():
    ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2).check_tensor_parallel_alone("calibrate")
    split = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True)
    with pytest.raises(ConfigError, match="calibrate .* alone, got context_parallel_size 2 and sequence_parallel True; leave"):
        split.check_tensor_parallel_alone("calibrate")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASES["llama3.2-1b"].hidden_size = 1
