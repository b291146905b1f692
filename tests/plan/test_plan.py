"""`hylo plan` of every recipe, bytes as ranks counted them, the search, and the recipe that it writes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import megatron_hylo
from megatron_hylo.cli.main import main
from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.config.layouts import BASES, get_layout, parameter_count, pipeline_layers
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.io import DamagedError
from megatron_hylo.plan.calibrate import measure_rates, write_rates
from megatron_hylo.plan.communication import traffic
from megatron_hylo.plan.flops import forward_flops_per_token
from megatron_hylo.plan.hardware import get_hardware, names, of_device
from megatron_hylo.plan.inference import dense_base, longest_context, serving
from megatron_hylo.plan.job import read_job, shape
from megatron_hylo.plan.memory import GIB, estimate_memory, in_flight
from megatron_hylo.plan.plan import describe
from megatron_hylo.plan.rates import get_rates
from megatron_hylo.plan.search import MARGIN, predict, search, settings_of
from megatron_hylo.plan.step import COMPUTE
from megatron_hylo.plan.write import with_settings

RECIPES = sorted((Path(__file__).parents[2] / "megatron_hylo" / "recipes").glob("*.yaml"))
HYBRID, MAMBA = "llama3.2-1b-4mla12gdn", "llama3.2-1b-4mla12m2"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_planned_as_it_is(file, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(file), "--no_search", "--json", "--price", "2"])
    found = json.loads(capsys.readouterr().out)
    one = found["as_given"]
    assert ended.value.code == 0 and one["fits"] and 5 < one["mfu_percent"] < 70
    assert one["peak_gib"] == pytest.approx(sum(term["value"] for term in one["memory_gib"].values()))
    assert one["step_seconds"] == pytest.approx(sum(term["value"] for term in one["seconds"].values()))
    assert one["price"] == pytest.approx(2 * one["gpu_hours"]) and one["gpu_hours"] == pytest.approx(8 * one["hours"])
    terms = [*one["memory_gib"].values(), *one["seconds"].values(), *one["received_gb"].values()]
    assert {term["source"] for term in terms} == {"MEASURED", "ESTIMATED", "COUNTED"} and found["assumptions"]


def test_graphs_are_planned_on_one_gpu_alone():
    job, gpu = read_job(HYBRID, "stage2_ctx8k"), get_hardware("h200-141gb")
    muon = replace(job.config.optimizer, name="muon", use_distributed_optimizer=False)
    job = replace(job, config=replace(job.config, cuda_graphs=True, recompute=False, optimizer=muon))
    with pytest.raises(ConfigError, match="cuda_graphs is for one GPU, got 2 ranks"):
        predict(job, job.config, 2, gpu)
    said = describe(predict(job, job.config, 1, gpu), job, 1, gpu)
    assert said["memory_gib"]["graphs"] == {"value": said["workspace_gib"]["update"], "source": "ESTIMATED"}
    assert said["peak_gib"] == pytest.approx(sum(term["value"] for term in said["memory_gib"].values()))
    assert not any(one.config.cuda_graphs for one in search(job, 2, gpu).best)


def test_a_plan_needs_no_torch():
    code = (
        "import sys; from megatron_hylo.cli.main import main\n"
        f"try: main(['plan', '{HYBRID}', '--no_search'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "forward GFLOP a token" in done.stdout


@pytest.mark.parametrize(
    ("layout", "tokens", "gpus", "groups", "recompute", "megabytes"),  # benchmarks/results/scaling.md, "received, MB"
    [
        (HYBRID, 65_536, 2, dict(context_parallel_size=2, cp_comm_type="a2a"), True, 8415),
        (HYBRID, 131_072, 4, dict(context_parallel_size=4), True, 2205),
        (HYBRID, 131_072, 8, dict(context_parallel_size=8), True, 2032),
        (HYBRID, 131_072, 8, dict(context_parallel_size=8), "GM-", 1415),
        (HYBRID, 131_072, 4, dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2), "GM-", 636),
        (MAMBA, 131_072, 4, dict(context_parallel_size=4, cp_comm_type="all_gather"), "GM-", 702),
        (MAMBA, 131_072, 4, dict(context_parallel_size=4, cp_comm_type="a2a"), "GM-", 7009),
        (MAMBA, 131_072, 8, dict(context_parallel_size=8, cp_comm_type="all_gather"), True, 922),
        ("llama3.2-3b-6mla22gdn", 131_072, 4, dict(context_parallel_size=4), "GM-", 2980),
    ],
)
def test_bytes_are_those_that_ranks_counted(layout, tokens, gpus, groups, recompute, megabytes):
    config = TrainConfig("distil", "-", "-", model="-", teacher="-", sequence_length=tokens, global_batch_size=1,
                         recompute=recompute, parallel=ParallelConfig(**groups))  # fmt: skip
    found = traffic(config, gpus, get_layout(layout).config, BASES["llama3.1-8b"], 1e9)
    assert found.context_forward / 1e6 == pytest.approx(megabytes, abs=1)


@pytest.fixture(scope="module")
def found():
    job = read_job(str(RECIPES[1]))
    return job, search(job, 4, get_hardware("h100-80gb"), fp8=False)


def test_the_search_returns_the_fastest_that_fit(found):
    job, result = found
    seconds = [one.time.seconds for one in result.best]
    assert len(seconds) > 3 and seconds == sorted(seconds) and result.too_large > 0
    assert result.tried == result.too_large + result.slower + len(result.best)
    assert all(one.memory.total <= MARGIN * get_hardware("h100-80gb").memory_gib * GIB for one in result.best)
    for one in result.best:  # what was found is what the settings predict
        again = predict(job, one.config, 4, get_hardware("h100-80gb"))
        assert (again.time.seconds, again.memory.total) == (one.time.seconds, one.memory.total)
    assert any("does not divide linear_num_heads 6" in reason for reason in result.refused)
    with pytest.raises(ConfigError, match="4 GPUs do not divide into groups of tensor 1 x pipeline 1 x context 3"):
        predict(job, replace(job.config, sequence_length=3 * 8192, parallel=ParallelConfig(context_parallel_size=3)), 4,
                get_hardware("h100-80gb"))  # fmt: skip


def test_a_written_recipe_has_the_chosen_settings_and_keeps_the_rest(found, tmp_path):
    job, result = found
    chosen = settings_of(result.best[-1].config) | {"teacher_offload": True, "optimizer.offload": True}
    before = RECIPES[1].read_text()
    (tmp_path / "made.yaml").write_text(with_settings(before, chosen))
    after = read_job(str(tmp_path / "made.yaml"), student=HYBRID, teacher="llama3.1-8b")
    assert settings_of(after.config) == chosen
    changed = set(before.splitlines()) - set((tmp_path / "made.yaml").read_text().splitlines())
    assert all(any(f"{name.split('.')[-1]}:" in line for name in chosen) for line in changed)
    assert replace(after.config, parallel=job.config.parallel, recompute=job.config.recompute, teacher_offload=False,
                   micro_batch_size=job.config.micro_batch_size, optimizer=job.config.optimizer) == job.config  # fmt: skip


def test_a_written_recipe_has_the_sizes_that_were_given(tmp_path, capsys):
    file = tmp_path / "new" / "made.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["plan", HYBRID, "--gpus", "2", "--global_batch_size", "6", "--sequence_length", "32768", "--keep_precision",
              "--write", str(file)])  # fmt: skip
    made = read_job(str(file), student=HYBRID).config
    assert ended.value.code == 0 and (made.global_batch_size, made.sequence_length) == (6, 32_768)


def test_a_division_that_cannot_be_is_counted_once():
    job = read_job(str(RECIPES[1]))
    refused = search(job, 3, get_hardware("h100-80gb")).refused
    assert refused == {
        "global_batch_size 32 is not divisible by 3 data-parallel ranks": 1,
        "3 tensor x context ranks do not divide 8192 tokens": 1,
        "tensor_model_parallel_size 3 does not divide ffn_hidden_size 8192": 1,
    }


@pytest.mark.parametrize(("offload", "precision"), [(False, "same"), (False, "fp8"), (True, "same")])
def test_a_teachers_memory_is_that_of_its_fullest_pipeline_rank(offload, precision):
    config = TrainConfig("distil", "-", "-", model="-", teacher="-", teacher_offload=offload, teacher_precision=precision,
                         parallel=ParallelConfig(pipeline_model_parallel_size=3))  # fmt: skip
    base = BASES["llama3.1-8b"]
    layer, head, number = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336), 128_256 * 4096, 1 if precision == "fp8" else 2
    first, middle, last = (2 if offload else count for count in pipeline_layers(base, 3))
    ranks = (2 * head + number * first * layer, number * middle * layer, 2 * head + number * last * layer)
    assert estimate_memory(config, 3, [get_layout(HYBRID).config], [base]).teacher == max(ranks)


def test_terms_match_arithmetic_by_hand():
    """Bytes of gradients and weights, an offloaded optimizer, energy, the bubble, a step of decoding."""
    job, gpu, rates = read_job(HYBRID, "stage2_ctx8k"), get_hardware("h100-80gb"), get_rates()
    count = parameter_count(job.student)
    config = replace(job.config, optimizer=replace(job.config.optimizer, offload=True), parallel=ParallelConfig())
    one = predict(job, config, 8, gpu)
    assert one.time.traffic.data == pytest.approx(7 / 8 * count * (4 + 2)), "fp32 gradients come, bf16 weights go back"
    assert one.time.terms["offload"] == pytest.approx(2 * 12 * count / 8 / (gpu.host_gb_s * 1e9 * rates.host))
    said = describe(one, job, 8, gpu)
    assert said["energy_kwh"] == pytest.approx(said["hours"] * 8 * 0.7) and gpu.watts == 700

    def pass_seconds(virtual: int, pipeline: int) -> tuple[float, float]:
        """Computing of the slowest rank for a micro-batch, bubble."""
        parallel = ParallelConfig(1, pipeline, virtual)
        time = predict(job, replace(config, parallel=parallel, recompute=False), pipeline, gpu).time
        return sum(time.terms[name] for name in COMPUTE) / time.micro_batches, time.terms["bubble"]

    whole, none = pass_seconds(1, 1)
    assert none == 0
    for virtual in (1, 2):
        slowest, bubble = pass_seconds(virtual, 4)
        assert 0.5 < bubble / ((whole - slowest) / virtual) <= 1 + 1e-9  # 1 where stages are even
    cache, states = 1280 * 8192, 12 * 4 * 6 * 256 * 512
    read = count - job.student.vocab_size * job.student.hidden_size  # an untied embedding is not
    bytes_read = 2 * read + cache + 2 * states  # states are read and written
    assert serving(job.student, gpu, [8192])[0].one == pytest.approx(
        gpu.memory_gb_s * 1e9 * rates.decode / bytes_read, rel=0.002
    )


def test_a_teacher_that_reads_windows_is_planned_so():
    """At 64K 15 windows of 8,192: 1.875 times the tokens, each with a window's attention; 68,200 tokens/s were measured."""
    job, gpu = read_job("smollm2-135m-8mla22gdn-teacher", "stage3_ctx64k"), get_hardware("h200-141gb")
    config = replace(job.config, parallel=ParallelConfig())
    assert config.teacher_window.mode == "windows"
    assert job.teacher is not None
    read = predict(job, config, 1, gpu).time
    assert 65_536 / sum(read.terms.values()) == pytest.approx(68_200, rel=0.08)
    whole = predict(job, replace(config, teacher_window=replace(config.teacher_window, mode="rope")), 1, gpu).time
    layers = [forward_flops_per_token(job.teacher, length, with_head=False) for length in (8_192, 65_536)]
    assert whole.flops - read.flops == pytest.approx(65_536 * (layers[1] - 1.875 * layers[0]))
    assert read.terms["attention"] < whole.terms["attention"] and read.terms["products"] > whole.terms["products"]


def test_hardware_files_are_complete_and_found_by_a_drivers_name():
    assert {"a100-80gb", "h100-80gb", "h200-141gb", "b200-180gb", "mi300x-192gb"} <= set(names())
    drivers = {"h200-141gb": "NVIDIA H200", "a100-40gb": "NVIDIA A100-SXM4-40GB", "a100-80gb": "NVIDIA A100-SXM4-80GB"}
    assert {name: of_device(words) for name, words in drivers.items()} == {name: get_hardware(name) for name in drivers}
    assert of_device("NVIDIA GeForce RTX 4090") is None
    with pytest.raises(ConfigError, match="unknown GPU 'h300'; known: a100-40gb"):
        get_hardware("h300")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("watts: [700", "is not YAML"),
        ("watts: much", "watts of GPU mine must be a number above 0, got 'much'"),
        ("watts: -1", "got -1"),
        ("fast: 1", "unknown key 'fast'"),
    ],
)
def test_a_gpu_file_of_ones_own_is_checked(tmp_path, changed, words):
    text = (Path(megatron_hylo.__path__[0]) / "plan/hardware/h100-80gb.yaml").read_text()
    kept = re.sub("(?m)^watts:.*", "", text) if "watts" in changed else text
    (tmp_path / "mine.yaml").write_text(f"{kept}\n{changed}\n")
    with pytest.raises(ConfigError, match=words):
        get_hardware(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nowhere.yaml", "there is no recipe nowhere.yaml"),
        ("llama3.2-1b", "base model without a recipe"),
        ("x", "unknown layout 'x'"),
    ],
)
def test_what_cannot_be_planned_is_refused(what, words):
    with pytest.raises(ConfigError, match=words):
        read_job(what)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"model": 3}', '{"model": {"x": 1}}'])
def test_a_damaged_model_folder_is_named(tmp_path, text):
    (tmp_path / "hylo.json").write_text(text)
    with pytest.raises((ConfigError, DamagedError), match=f"^{re.escape(str(tmp_path / 'hylo.json'))}"):
        shape(str(tmp_path))


def test_activations_in_flight_are_those_of_the_schedules():
    assert in_flight(1, 1, 8) == 1 and in_flight(4, 1, 8) == 1 and in_flight(4, 1, 2) == 0.5
    assert in_flight(2, 2, 8) == 5 / 4  # interleaved: two of warm-up, a model chunk each, two more and the one that runs


def test_inference_of_a_hybrid_beside_its_dense_base():
    shape, gpu = get_layout(HYBRID).config, get_hardware("h200-141gb")
    assert longest_context(shape, gpu) > 20 * longest_context(dense_base(shape), gpu)
    for ours, dense in zip(serving(shape, gpu)[2:], serving(dense_base(shape), gpu)[2:]):
        assert ours.batch > dense.batch and ours.all > dense.all and ours.prefill_seconds < dense.prefill_seconds
    assert longest_context(shape.replace(hybrid_layer_pattern="G-" * 16), gpu) is None


def test_measured_rates_replace_those_of_the_file(tmp_path):
    """Rates of this CPU as shares of an invented data sheet; a plan with them takes as long as they say."""
    gpu = replace(get_hardware("h100-80gb"), bf16_tflops=0.1)
    measured = measure_rates(gpu, torch.device("cpu"), size=64, tokens=64)
    assert set(measured) == {"products", "attention_forward", "attention_backward"} and measured["products"] > 0
    write_rates(tmp_path / "rates.yaml", {"products": get_rates().products / 2}, "a machine")
    job, slower = read_job(HYBRID), get_rates(tmp_path / "rates.yaml")
    here, there = (predict(job, job.config, 8, get_hardware("h100-80gb"), rates).time.terms for rates in (None, slower))
    assert there["products"] == pytest.approx(2 * here["products"]) and there["attention"] == here["attention"]
    (tmp_path / "rates.yaml").write_text("speed: 1")
    get_rates.cache_clear()
    with pytest.raises(ConfigError, match="unknown key 'speed'; known keys: products"):
        get_rates(tmp_path / "rates.yaml")
