"""Model card of an export: README.md in the format of the Hugging Face Hub, out of what the folder's files already say."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layouts import kv_bytes_per_token
from megatron_hylo.config.mixers import get_mixer, tensor_parallel_sizes

SETTINGS = ("stage", "train_steps", "layout", "pattern", "init", "calibration_tokens", "sequential", "seed", "converted_from")
ROWS = 40  # of the table of results; results.json has all


def model_card(
    name: str,
    config: ModelConfig,
    parameters: int,
    provenance: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    quantisation: str | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        name: the model's.
        config: its description.
        parameters: how many it has.
        provenance: content of hylo_provenance.json.
        results: results.json of evaluations of this model.
        license: name as the Hub spells it, e.g. "apache-2.0".
        quantisation: what is quantised, and how; None for a folder that is not.
    """
    is_hybrid = not config.is_transformer
    scores = [(result, score) for result in results for score in result["scores"]]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        tags=["hylo", "hybrid", "linear-attention", "long-context"] if is_hybrid else None,
        model_name=name,
        eval_results=[_for_the_hub(score) for _, score in scores] or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        _architecture(config, parameters),
        "## Use",
        _use(is_hybrid, tensor_parallel_sizes(config), quantisation is not None),
        *([] if quantisation is None else ["## Quantisation", quantisation]),
        "## Method",
        "Oldest step first; `hylo_provenance.json` has every setting, with the SHA-256 of every input.",
        *_table(("step", "settings"), [(about["verb"], _settings(about)) for about in _steps(provenance)]),
        "## Data",
        _data(provenance),
        "## Results",
        *_results(scores),
        "## Limits",
        _limits(config, provenance),
        "## Licence",
        license or "Not stated. The weights derive from the base model, whose licence and terms apply to them.",
    ]
    return "\n\n".join(parts) + "\n"


def _architecture(config: ModelConfig, parameters: int) -> str:
    mixers = config.hybrid_layer_pattern.replace("|", "")[0::2]
    counts = ", ".join(f"{mixers.count(symbol)} {get_mixer(symbol).name}" for symbol in dict.fromkeys(mixers))
    text = f"{parameters:,} parameters, {len(mixers)} layers: {counts} (`{mixers}`)."
    if config.is_transformer:
        return text
    dense = config.with_mixers("*" * len(mixers))
    own, base = kv_bytes_per_token(config), kv_bytes_per_token(dense)
    return (
        f"{text} A hybrid made from a pretrained Transformer ([HyLo](https://arxiv.org/abs/2604.24715)). Its cache grows by "
        f"{own:,} bytes a token in bf16, {own / base:.1%} of the {base:,} that attention in every layer would need."
    )


def _use(is_hybrid: bool, sizes: Sequence[int], is_quantised: bool) -> str:
    trust = ", trust_remote_code=True" if is_hybrid else ""
    needs = "transformers, torch and compressed-tensors" if is_quantised else "transformers and torch alone"
    code = f"The modelling code is part of this folder and needs {needs}. " if is_hybrid else ""
    plugin = "`pip install megatron-hylo[serve]`, then " if is_hybrid else ""
    served = (
        ""
        if is_quantised
        else f"With vLLM: {plugin}`vllm serve FOLDER`; tensor-parallel sizes that work: {', '.join(map(str, sizes))}."
    )
    return f"""{code}FOLDER is this folder or its name on the Hub.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left", trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(FOLDER{trust}, dtype="auto")
inputs = tokenizer(["The sea is"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40))[0])
```

{served}""".rstrip()


def _steps(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the records that a model goes back to, the oldest first, each once."""
    inputs, seen = provenance.get("inputs", {}), []
    for about in inputs.values():
        for step in _steps(about.get("provenance", {})):
            if step not in seen:
                seen.append(step)
                yield step
    if "verb" in provenance:
        yield provenance


def _settings(step: Mapping[str, Any]) -> str:
    named = [f"{key} {step[key]}" for key in SETTINGS if step.get(key) not in (None, False)]
    read = [f"{key} `{Path(about['path']).name}`" for key, about in step.get("inputs", {}).items()]
    return "; ".join([*named, *read])


def _data(provenance: Mapping[str, Any]) -> str:
    found: dict[str, str] = {}
    for step in _steps(provenance):
        about = step.get("inputs", {}).get("data")
        if about is not None:
            found[Path(about["path"]).name] = about.get("content_sha256", "not hashed")
    lines = [f"- `{name}` (SHA-256 of its tokens `{digest}`)" for name, digest in found.items()]
    return "\n".join(lines) or "No training data is recorded: the model was not trained after its conversion."


def _for_the_hub(score: Mapping[str, Any]) -> EvalResult:
    name = " ".join(str(part) for part in (score["suite"], score["task"], score.get("length") or "") if part != "")
    return EvalResult(
        task_type="text-generation", dataset_type=score["suite"], dataset_name=name, metric_type=score["metric"],
        metric_value=score["value"],
    )  # fmt: skip


def _results(scores: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    if not scores:
        return ["None were given. `hylo eval` measures them; `hylo export --results FOLDER` puts them here."]
    rows = []
    for _, score in scores[:ROWS]:
        error = "" if score.get("stderr") is None else f" ± {score['stderr']:.3g}"
        length = score.get("length")
        rows.append((
            score["suite"], score["task"], "" if length is None else f"{length:,}", score["metric"],
            f"{score['value']:.4g}{error}", f"{score['examples']:,}", score.get("note", ""),
        ))  # fmt: skip
    runs = {f"`{result['run'].get('command')}`, commit {result['run'].get('commit')}" for result, _ in scores}
    left = [f"{len(scores) - ROWS} more are in the results folder."] if len(scores) > ROWS else []
    columns = ("suite", "task", "tokens", "metric", "value", "examples", "note")
    return [*_table(columns, rows), *left, "Measured by " + "; ".join(sorted(runs)) + "."]


def _limits(config: ModelConfig, provenance: Mapping[str, Any]) -> str:
    steps = sum(step.get("train_steps") or 0 for step in _steps(provenance))
    lines = [
        f"- {config.max_position_embeddings:,} tokens are the longest that the base model or a training stage was made for; "
        f"longer prompts run, with quality that was not measured.",
        f"- {steps:,} training steps followed the conversion." if steps else "- It was not trained after its conversion.",
        "- It has the base model's biases and gaps, and may repeat or invent facts; a low perplexity does not show recall over "
        "long distances.",
    ]
    if not config.is_transformer:
        lines.append("- Masks other than padding, packed documents and caches of other models are refused.")
    return "\n".join(lines)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return ["\n".join(lines)]
