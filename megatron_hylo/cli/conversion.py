"""`hylo convert`, `hylo verify` and `hylo export`: between Hugging Face folders and Megatron's."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from megatron_hylo.cli.console import console, print_json, track
from megatron_hylo.cli.types import PositiveFloat, PositiveInt
from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.convert.source_path import check_model, check_source
from megatron_hylo.data.dataset_path import check_indexed_dataset
from megatron_hylo.io import check_free, is_launched_first
from megatron_hylo.io.provenance import hash_ahead
from megatron_hylo.io.start_up import model_imports, reuse_memory
from megatron_hylo.models.description import read_description


def convert(
    source: Path,
    output: Path,
    to: Literal["megatron", "hf"] = "megatron",
    overwrite: bool = False,
    no_verify: bool = False,
    shard_gb: PositiveFloat = 2.0,
    json: bool = False,
) -> None:
    """Convert a Hugging Face folder or GGUF file to a Megatron model folder, or back.

    No weight is rounded: FP8 and int8 ones are dequantised to float32. Ends with a comparison of all tensors and of fp32 logits
    with transformers' own loading, layer by layer above 1B parameters; a model that differs is not written. One tensor is in
    memory at a time. The same command goes on at the shard where a killed one was.

    Args:
        source: Hugging Face folder (Llama, Mistral, Qwen2.5, Qwen3, Qwen3-MoE, our exports), .gguf file, or model folder.
        output: folder to make; it appears only when it is complete.
        to: the format to make.
        overwrite: replace what is there.
        no_verify: leave out the comparison.
        shard_gb: largest size of a file of weights, GB.
        json: print {output, format, mixers, parameters, verified}.
    """
    check_free(output, overwrite, [source])
    if to == "megatron":
        check_source(source)
    else:
        read_description(source)
    reuse_memory()
    if to == "megatron" and is_launched_first():
        hash_ahead(source)
    with model_imports():
        from megatron_hylo.convert.to_hf import convert_megatron_to_hf
        from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
        from megatron_hylo.platform.distributed import session

    with session():
        function = convert_hf_to_megatron if to == "megatron" else convert_megatron_to_hf
        function(source, output, overwrite, track, verify=not no_verify, shard_bytes=int(shard_gb * 1e9))
        config = read_description(output if to == "megatron" else source)[0]
    _wrote(output, to, config, not no_verify, json)


def verify(
    hf_dir: Path,
    megatron_dir: Path,
    quick: bool = False,
    tokens: PositiveInt = 128,
    tolerance: float = 1e-4,
    json: bool = False,
) -> int:
    """Compare a Hugging Face checkpoint with its conversion: every tensor bit for bit, and the logits.

    Both models run layer by layer where they are larger than a billion parameters.

    Args:
        hf_dir: Hugging Face folder or .gguf file.
        megatron_dir: the model folder made from it, or that it was exported from.
        quick: compare names and hashes of tensors and files alone, and compute nothing.
        tokens: length of the random input that logits are compared on.
        tolerance: largest |delta logit| that passes, fp32; relative to the largest logit where that is above 1.
        json: print the comparison as JSON.
    """
    check_source(hf_dir)
    read_description(megatron_dir)
    reuse_memory()
    with model_imports():
        from megatron_hylo.convert.verify import Verification, verify_conversion
        from megatron_hylo.convert.verify_hashes import HashVerification, verify_hashes
        from megatron_hylo.platform.distributed import session

    result: HashVerification | Verification
    with session():
        if quick:
            result = verify_hashes(hf_dir, megatron_dir, track)
        else:
            result = verify_conversion(hf_dir, megatron_dir, tokens, tolerance, track=track)
    if json:
        print_json(asdict(result) | {"ok": result.ok})
    else:
        print("\n".join([*result.lines(), "verified" if result.ok else "NOT verified"]))
    return 0 if result.ok else 1


def export(
    model: Path,
    output: Path,
    results: list[Path] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    overwrite: bool = False,
    no_verify: bool = False,
    shard_gb: PositiveFloat = 2.0,
    quantize: Literal["fp8", "int8", "int4"] | None = None,
    calibration_data: Path | None = None,
    calibration_tokens: PositiveInt = 65536,
    json: bool = False,
) -> None:
    """Export a model folder or checkpoint for Hugging Face: config, safetensors, tokenizer, modelling code, model card.

    Ends with a comparison of all tensors and of logits with transformers' loading of the folder. The same command goes on at
    the shard where a killed one was, without quantize.

    Args:
        model: model folder or training checkpoint; with quantize an exported folder as well.
        output: Hugging Face folder to make.
        results: results folders of `hylo eval` of this model, for its card; by default those of it that lie in its run's folder
            or beside that.
        license: of the model, as the Hugging Face Hub spells it (apache-2.0), for its card; the base model's terms bind it.
        base_model: of what was converted, ORGANISATION/NAME on the Hub, for the card; by default as the Hub's cache has it.
        datasets: that the model was trained on, ORGANISATION/NAME on the Hub, for the card.
        overwrite: replace what is there.
        no_verify: leave out the comparison.
        shard_gb: largest size of a file of weights, GB.
        quantize: store a hybrid's linear maps in FP8, or in integers of 8 or 4 bits, for transformers, not for vLLM.
        calibration_data: dataset folder whose training text decides how weights are rounded; without, to the nearest value.
        calibration_tokens: of that text.
        json: print {output, format, mixers, parameters, verified}.
    """
    from megatron_hylo.eval.results import read_results

    if calibration_data is not None and quantize is None:
        raise ConfigError("--calibration_data decides how weights are rounded; give --quantize fp8, int8 or int4 with it")
    check_free(output, overwrite, [model, calibration_data])
    check_model(model) if quantize else read_description(model)
    if calibration_data is not None:
        check_indexed_dataset(calibration_data / "train")
    given = {folder: read_results(folder) for folder in results or ()}
    reuse_memory()
    with model_imports():
        from megatron_hylo.convert.model_card import CardFacts
        from megatron_hylo.convert.quantise import export_quantised
        from megatron_hylo.convert.to_hf import convert_megatron_to_hf
        from megatron_hylo.eval.lm_facts import foreign_results, results_of
        from megatron_hylo.platform.distributed import session

    found = results_of(model) if results is None else given
    for folder in found if results is None else ():
        console.print(f"results for the card: {folder}", markup=False, soft_wrap=True)
    for folder in foreign_results(found, model) if results is not None else ():
        console.print(
            f"warning: {folder} was measured on {found[folder].model.get('path')}, whose weights are not those of {model} by "
            f"their hash; its figures stand in the card all the same", markup=False, soft_wrap=True,
        )  # fmt: skip
    facts = CardFacts([result.to_dict() for result in found.values()], license, base_model, datasets or ())
    size = int(shard_gb * 1e9)
    with session():
        if quantize is None:
            convert_megatron_to_hf(model, output, overwrite, track, not no_verify, facts, size)
            config = read_description(model)[0]
        else:
            config = export_quantised(
                model, output, quantize, calibration_data, calibration_tokens, overwrite, track, not no_verify, facts, size
            )
    _wrote(output, "hf", config, not no_verify, json)


def _wrote(output: Path, to: str, config: ModelConfig, verified: bool, json: bool) -> None:
    """Say what a conversion made."""
    from megatron_hylo.config.layouts import parameter_count

    console.print(f"wrote {output}")
    if json:
        about = {"mixers": config.mixers, "parameters": parameter_count(config), "verified": verified}
        print_json({"output": str(output), "format": to} | about)
