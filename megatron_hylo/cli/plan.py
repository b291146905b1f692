"""`hylo plan`: what a run takes in memory, time and money, and the fastest settings that fit."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from megatron_hylo.cli.boundary import EXIT_FAILURE
from megatron_hylo.cli.console import console, print_json, results
from megatron_hylo.cli.types import PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from megatron_hylo.plan.hardware import Hardware


def plan(
    recipe: str,
    gpus: PositiveInt = 8,
    gpu: str = "h100-80gb",
    stage: str = "stage3_ctx64k",
    student: str | None = None,
    teacher: str | None = None,
    sequence_length: PositiveInt | None = None,
    global_batch_size: PositiveInt | None = None,
    train_tokens: PositiveInt | None = None,
    price: PositiveFloat | None = None,
    keep_precision: bool = False,
    no_search: bool = False,
    rates: Path | None = None,
    calibrate: bool = False,
    write: Path | None = None,
    json: bool = False,
) -> int:
    """Predict memory, time and cost of a run, and search for the fastest parallelism that fits; needs no GPU and no weights.

    The recipe as it is comes first, term by term, each MEASURED (its rate was measured on that kind of GPU), ESTIMATED, or
    COUNTED (exact). Then the ten fastest settings of tensor, pipeline, virtual pipeline, context and data parallelism,
    micro-batch, recomputation, offloading and FP8, and why the others fall out. Exits 1 where nothing fits.

    Args:
        recipe: recipe file, or a named layout, whose recipe of --stage is planned.
        gpus: number of GPUs.
        gpu: a100-40gb, a100-80gb, h100-80gb, h200-141gb, b200-180gb, mi300x-192gb, or a YAML file like those in
            megatron_hylo/plan/hardware.
        stage: recipe of a layout: stage1_ild, stage2_ctx8k, stage3_ctx32k, stage3_ctx64k or stage3_ctx128k.
        student: layout or model folder, where the recipe's name or paths do not say it.
        teacher: base model or model folder; by default the recipe's, else that of the layout's family.
        sequence_length: tokens a sequence, instead of the recipe's.
        global_batch_size: sequences a step, instead of the recipe's.
        train_tokens: tokens of the run, instead of the recipe's.
        price: of one GPU for an hour, in any currency.
        keep_precision: search no FP8 that the recipe does not have.
        no_search: only predict the recipe as it is.
        rates: YAML file of measured rates, in place of those that are assumed for the GPU.
        calibrate: measure this machine's matrix products, attention and copies first (a minute), into the file of --rates.
        write: recipe file to make (or replace) with the fastest settings.
        json: print all figures instead of tables.
    """
    from megatron_hylo.config import ConfigError
    from megatron_hylo.plan.hardware import get_hardware
    from megatron_hylo.plan.job import read_job, recipe_text
    from megatron_hylo.plan.plan import assumptions, describe, describe_inference, describe_job, describe_search
    from megatron_hylo.plan.rates import get_rates
    from megatron_hylo.plan.search import predict, search, settings_of
    from megatron_hylo.plan.write import with_settings, write_recipe

    given = dict(sequence_length=sequence_length, global_batch_size=global_batch_size, train_tokens=train_tokens)
    changes = {name: int(value) for name, value in given.items() if value is not None}  # plain numbers, which YAML writes
    if write and no_search:
        raise ConfigError("write needs the search's settings; leave no_search out")
    hardware, job = get_hardware(gpu), read_job(recipe, stage, student, teacher, **changes)
    if calibrate:
        _calibrate(hardware, rates)
    reached = get_rates(rates)
    found: dict[str, Any] = {"run": describe_job(job), "assumptions": assumptions(job, hardware, rates)}
    try:
        found["as_given"] = describe(predict(job, job.config, gpus, hardware, reached), job, gpus, hardware, price)
    except ConfigError as error:
        found["as_given_refused"] = str(error)
    best = None
    if not no_search:
        tried = search(job, gpus, hardware, fp8=not keep_precision, rates=reached)
        found["search"] = describe_search(tried, gpus, job)
        if tried.best:
            best = tried.best[0]
            found["fastest"] = describe(best, job, gpus, hardware, price)
    found["inference"] = describe_inference(job, hardware)
    if write:
        if best is None:
            raise ConfigError(f"nothing fits {gpus} x {gpu}, so {write} is not written; give more or larger GPUs")
        before = settings_of(job.config)
        chosen = {name: value for name, value in best.settings().items() if value != before[name]}
        text = with_settings(recipe_text(recipe, stage), changes | chosen)
        write_recipe(write, text)
        console.print(f"wrote {write}")
    if json:
        print_json(found)
    else:
        show(found)
    fits = found.get("as_given", {}).get("fits", False)
    return 0 if best or (no_search and fits) else EXIT_FAILURE


def _calibrate(hardware: "Hardware", file: Path | None) -> None:
    """Measure the machine's rates into a file."""
    import torch

    from megatron_hylo.config import ConfigError
    from megatron_hylo.plan.calibrate import measure_rates, write_rates
    from megatron_hylo.plan.hardware import of_device

    if file is None:
        raise ConfigError("calibrate needs --rates FILE, where what it measures is kept")
    if not torch.cuda.is_available():
        raise ConfigError("calibrate measures a GPU, and there is none here; run it on a node of the machine that you plan for")
    name = torch.cuda.get_device_name()
    if (known := of_device(name)) is not None and known.words != hardware.words:
        raise ConfigError(f"this GPU is a {name}, the plan is for {hardware.name}; give --gpu {known.name}")
    write_rates(file, measure_rates(hardware, torch.device("cuda")), name)
    console.print(f"wrote {file}")


def show(found: dict[str, Any]) -> None:
    """Print a plan as tables.

    Args:
        found: run, as_given, search, fastest, inference, assumptions, as `--json` has them.
    """
    _show_run(found["run"])
    if "as_given" in found:
        _show_terms("as the recipe has it", found["as_given"])
    else:
        results.print(f"\nas the recipe has it: {found['as_given_refused']}", markup=False, highlight=False)
    if "search" in found:
        _show_search(found["search"])
        if "fastest" in found:
            _show_terms("the fastest that fits", found["fastest"])
    _show_inference(found["inference"])
    results.print()
    for sentence in found["assumptions"]:
        results.print(f"- {sentence}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _show_run(run: dict[str, Any]) -> None:
    sizes, active = run["parameters"], run["active_parameters"]
    told = {name: f"{size / 1e9:.2f} G parameters" for name, size in sizes.items()}
    told |= {name: f"{told[name]}, {active[name] / 1e9:.2f} G of them a token" for name in told if active[name] < sizes[name]}
    teacher = f", teacher {run['teacher']} ({told['teacher']})" if "teacher" in sizes else ""
    results.print(
        f"{run['recipe']}: {run['stage']}, {run['student']} ({told['student']}){teacher}, "
        f"{run['global_batch_size']} x {run['sequence_length']:,} tokens a step, {run['tokens']:,} in all",
        markup=False,
        highlight=False,
    )
    results.print(
        f"cache {run['kv_bytes_per_token']:,} bytes a token ({run['kv_percent']:.1f} % of attention's) and "
        f"{run['state_bytes_per_sequence'] / 2**20:.1f} MiB a sequence",
        markup=False,
        highlight=False,
    )
    flops = run["forward_flops_per_token"]["student"]
    kinds = [name for name in next(iter(flops.values())) if name != "total"]
    table = _table("forward GFLOP a token of the student", *kinds, "total")
    for length, row in flops.items():
        table.add_row(f"{int(length):,} tokens", *(f"{row[name] / 1e9:.2f}" for name in (*kinds, "total")))
    results.print()
    results.print(table)


def _show_terms(title: str, one: dict[str, Any]) -> None:
    results.print()
    results.print(
        f"{title}, {one['gpus']} x {one['gpu']}: {_settings(one['settings'], one['data_parallel'])}", style="bold", markup=False
    )
    table = _table("", "", "")
    for term, entry in one["memory_gib"].items():
        table.add_row(f"memory, {term}", f"{entry['value']:.1f} GiB", entry["source"])
    for part, name in (
        ("layer", "a layer's backward pass"),
        ("loss", "the loss"),
        ("teacher", "the teacher's pass, before"),
        ("update", "Muon's update, after"),
    ):
        if value := one["workspace_gib"][part]:
            table.add_row(Text(f"  {name}", "dim"), Text(f"{value:.1f} GiB", "dim"))
    table.add_row("peak memory of a GPU", Text(f"{one['peak_gib']:.1f} GiB", "bold"), "fits" if one["fits"] else "DOES NOT FIT")
    for term, entry in one["received_gb"].items():
        if entry["value"]:
            table.add_row(f"received a step, {term}", f"{entry['value']:.2f} GB", entry["source"])
    for term, entry in one["seconds"].items():
        if entry["value"]:
            table.add_row(f"time, {term}", f"{entry['value']:.3f} s", entry["source"])
    table.add_row("step", Text(f"{one['step_seconds']:.3f} s", "bold"))
    results.print(table)
    price = f", price {one['price']:,.0f}" if "price" in one else ""
    results.print(
        f"{one['tokens_per_second']:,.0f} tokens/s, MFU {one['mfu_percent']:.1f} %, bubble {one['bubble_percent']:.1f} %; "
        f"{one['steps']:,} steps: {one['hours']:,.1f} hours, {one['gpu_hours']:,.0f} GPU-hours, "
        f"{one['energy_kwh']:,.0f} kWh{price}",
        markup=False,
        highlight=False,
    )


def _settings(chosen: dict[str, Any], data_parallel: int) -> str:
    """Settings in a line: the groups larger than one, and what is not off."""
    sizes = {
        "TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size",
        "VPP": "virtual_pipeline_model_parallel_size", "CP": "context_parallel_size", "EP": "expert_model_parallel_size",
    }  # fmt: skip
    words = [f"{short}{chosen[f'parallel.{name}']}" for short, name in sizes.items() if chosen[f"parallel.{name}"] > 1]
    words += [f"DP{data_parallel}"] if data_parallel > 1 else []
    words = [" x ".join(words) or "one rank"]
    words += ["all-gather"] if chosen["parallel.cp_comm_type"] == "all_gather" else []
    words += [f"micro-batch {chosen['micro_batch_size']}"] if chosen["micro_batch_size"] > 1 else []
    words += [f"recompute {chosen['recompute']}"] if chosen["recompute"] else []
    words += [
        f"{name} offloaded" for name in ("teacher", "optimizer") if chosen.get(f"{name}_offload", chosen.get(f"{name}.offload"))
    ]
    words += [
        f"{who} in FP8" for who, key in (("teacher", "teacher"), ("student", "linear")) if chosen[f"{key}_precision"] == "fp8"
    ]
    return ", ".join(words)


def _show_search(found: dict[str, Any]) -> None:
    results.print()
    if found["best"]:
        table = _table("fastest settings", "s / step", "tokens/s", "hours", "peak GiB")
        for one in found["best"]:
            figures = (
                f"{one['step_seconds']:.3f}",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['hours']:,.1f}",
                f"{one['peak_gib']:.1f}",
            )
            table.add_row(_settings(one["settings"], one["data_parallel"]), *figures)
        results.print(table)
    else:
        results.print("nothing fits", style="bold")
    reasons = []
    if found["too_large"]:
        least = found["smallest_too_large_gib"]
        reasons.append(f"{found['too_large']:,} do not fit the memory (the smallest of them has {least:.1f} GiB)")
    if found["slower"]:
        reasons.append(f"{found['slower']:,} take longer than {found['slower_than_seconds']:.3f} s a step")
    reasons += [f"{count:,} way{'s' * (count > 1)} to divide: {why}" for why, count in found["refused"].items()]
    results.print(f"of {found['tried']:,} settings tried:", style="dim")
    for reason in reasons:
        results.print(f"  {reason}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _show_inference(found: dict[str, Any]) -> None:
    table = _table(
        "inference on one GPU (ESTIMATED)",
        "batch",
        "tokens/s alone",
        "all",
        "read, s",
        "dense: batch",
        "alone",
        "all",
        "read, s",
    )
    for ours, dense in zip(found["hybrid"]["by_length"], found["dense"]["by_length"]):
        cells = [
            cell
            for row in (ours, dense)
            for cell in (f"{row['batch']:,}", f"{row['one']:,.0f}", f"{row['all']:,.0f}", f"{row['prefill_seconds']:,.1f}")
        ]
        table.add_row(f"{ours['length']:,} tokens", *cells)
    results.print()
    results.print(table)
    longest = {name: entry["longest_context"] for name, entry in found.items()}
    said = {name: "any" if value is None else f"{value:,} tokens" for name, value in longest.items()}
    results.print(f"longest context: {said['hybrid']}; dense {said['dense']}", markup=False, highlight=False)
