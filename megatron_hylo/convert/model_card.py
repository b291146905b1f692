"""Model card of an export: README.md in the format of the Hugging Face Hub, out of what the folder's files already say."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.evaluation import NEEDS_TEXT
from megatron_hylo.config.layouts import kv_bytes_per_token
from megatron_hylo.config.mixers import WINDOW_SYMBOL, get_mixer, tensor_parallel_sizes
from megatron_hylo.config.mlps import EXPERTS_SYMBOL
from megatron_hylo.convert.hf_config import is_own

SETTINGS = ("stage", "layout", "pattern", "init", "calibration_tokens", "sequential", "seed", "converted_from")
RECIPE = (  # settings of a run that its row names where they are not the defaults; hylo_provenance.json has all
    "trainable", "optimizer.name", "optimizer.lr", "optimizer.mixer_lr", "optimizer.adam_beta2", "recall.share",
    "recall.answer_weight", "distil.kl_weight", "distil.ce_weight", "distil.kl_direction", "align.loss",
    "rope_scaling.rope_type", "rope_scaling.factor", "teacher_window.mode", "text.packing", "text.long_share",
    "packed_documents", "precision", "linear_precision", "seed",
)  # fmt: skip
HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
ROWS = 40  # of the table of results; results.json has all


@dataclass(frozen=True)
class CardFacts:
    """Facts of a model card that are not in the model's provenance.

    Args:
        results: results.json of evaluations of the model.
        license: of the model, as the Hub spells it, e.g. "apache-2.0".
        base_model: ORGANISATION/NAME on the Hub of what was converted; None: as its path in the Hub's cache says.
        datasets: names on the Hub of what it was trained on.
    """

    results: Sequence[Mapping[str, Any]] = ()
    license: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()


NO_FACTS = CardFacts()


def model_card(
    name: str,
    config: ModelConfig,
    parameters: int,
    provenance: Mapping[str, Any],
    facts: CardFacts = NO_FACTS,
    quantisation: str | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        name: the model's.
        config: its description.
        parameters: how many it has.
        provenance: content of hylo_provenance.json.
        facts: that are not in the provenance.
        quantisation: what is quantised, and how; None for a folder that is not.
    """
    base_model = facts.base_model or _base_on_hub(provenance)
    is_hybrid = is_own(config)
    scores = [(result, score) for result in facts.results for score in result["scores"] if score.get("depth") is None]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=facts.license,
        base_model=base_model,
        datasets=[*facts.datasets] or None,
        tags=_tags(config) if is_hybrid else None,
        model_name=name,
        eval_results=[_for_the_hub(result, score) for result, score in scores] or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        _architecture(config, parameters),
        *_layout(config),
        "## Use",
        _use(is_hybrid, _served_sizes(config) if quantisation is None else [], quantisation is not None),
        *([] if quantisation is None else ["## Quantisation", quantisation]),
        "## Method",
        "Oldest step first; `hylo_provenance.json` has every setting, with the SHA-256 of every input.",
        *_table(("step", "settings"), [(about["verb"], _settings(about)) for about in _steps(provenance)]),
        *_training(provenance),
        "## Data",
        _data(provenance, facts.datasets),
        "## Results",
        *_results(scores),
        "## Limits",
        _limits(config, provenance),
        "## Licence",
        _licence(facts.license, base_model),
    ]
    return "\n\n".join(parts) + "\n"


def _architecture(config: ModelConfig, parameters: int) -> str:
    mixers = config.hybrid_layer_pattern.replace("|", "")[0::2]
    counts = ", ".join(f"{mixers.count(symbol)} {get_mixer(symbol).name}" for symbol in dict.fromkeys(mixers))
    text = f"{parameters:,} parameters, {len(mixers)} layers: {counts} (`{mixers}`)."
    if not is_own(config):
        return text
    dense = config.with_mixers("*" * len(mixers))
    own, base = kv_bytes_per_token(config), kv_bytes_per_token(dense)
    where = f" of a sequence of {config.max_position_embeddings:,}" if WINDOW_SYMBOL in config.mixers else ""
    return (
        f"{text} A hybrid made from a pretrained Transformer ([HyLo](https://arxiv.org/abs/2604.24715)). Its cache takes "
        f"{own:,} bytes a token{where} in bf16, {own / base:.1%} of the {base:,} that attention in every layer would need."
    )


def _tags(config: ModelConfig) -> list[str]:
    """Tags of a hybrid, with its mixers' names."""
    names = [get_mixer(symbol).name.lower().replace(" ", "-") for symbol in dict.fromkeys(config.mixers)]
    return ["hylo", "hybrid", "linear-attention", "long-context", *names]


def _layout(config: ModelConfig) -> list[str]:
    """Table of the mixers: which layers have them, their sizes, what they keep."""
    if not is_own(config):
        return []
    rows, length = [], config.max_position_embeddings
    for symbol in dict.fromkeys(config.mixers):
        mixer = get_mixer(symbol)
        layers = [str(i) for i, other in enumerate(config.mixers) if other == symbol]
        sizes = ", ".join(f"{name} {getattr(config, name)}" for name in mixer.size_fields)
        rows.append(
            (
                f"`{symbol}` {mixer.name}",
                " ".join(layers),
                sizes,
                f"{round(2 * mixer.cached_numbers(config, length) / length):,}",
            )
        )
    return _table(("mixer", "layers, from 0", "sizes", "cache, bytes a token and layer"), rows)


def _base_on_hub(provenance: Mapping[str, Any]) -> str | None:
    """Name on the Hub of the model that everything goes back to, where it was read from the Hub's cache."""
    paths = [about.get("path", "") for step in _steps(provenance) for about in step.get("inputs", {}).values()]
    found = [HUB_CACHE.search(path) for path in paths]
    return next((f"{match[1]}/{match[2]}" for match in found if match), None)


def _served_sizes(config: ModelConfig) -> list[int]:
    """Tensor-parallel sizes that vLLM serves a model with; none where the plugin refuses it (serve/vllm/config.py)."""
    refused = is_own(config) and {WINDOW_SYMBOL, EXPERTS_SYMBOL} & set(config.hybrid_layer_pattern)
    return [] if refused else tensor_parallel_sizes(config)


def _use(is_hybrid: bool, sizes: Sequence[int], is_quantised: bool) -> str:
    trust = ", trust_remote_code=True" if is_hybrid else ""
    needs = "transformers, torch and compressed-tensors" if is_quantised else "transformers and torch alone"
    code = f"The modelling code is part of this folder and needs {needs}. " if is_hybrid else ""
    plugin = "`pip install '.[serve]'` in a checkout of megatron_hylo, then " if is_hybrid else ""
    served = (
        ""
        if not sizes
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


def _training(provenance: Mapping[str, Any]) -> list[str]:
    """Table of the training stages: tokens, length, recipe; nothing where none is recorded."""
    rows, steps = [], [step for step in _steps(provenance) if step.get("train_steps")]
    for step in steps:
        recipe = step.get("recipe", {}) | {"seed": step.get("seed")}
        named = [f"{name} {recipe[name]}" for name in RECIPE if recipe.get(name) is not None]
        numbers = [f"{step[name]:,}" if name in step else "" for name in ("tokens", "sequence_length", "train_steps")]
        rows.append((step.get("stage", ""), *numbers, "; ".join(named)))
    if not rows:
        return []
    total = sum(step.get("tokens", 0) for step in steps)
    told = f"{total:,} training tokens in all." if all("tokens" in step for step in steps) else ""
    return ["## Training", *_table(("stage", "tokens", "sequence length", "steps", "recipe"), rows), *([told] if told else [])]


def _licence(license: str | None, base_model: str | None) -> str:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "the base model"
    return f"{license or 'Not stated'}. The weights derive from {base}, whose licence and terms apply to them."


def _data(provenance: Mapping[str, Any], datasets: Sequence[str]) -> str:
    found: dict[str, str] = {}
    for step in _steps(provenance):
        about = step.get("inputs", {}).get("data")
        if about is not None:
            found[Path(about["path"]).name] = about.get("content_sha256", "not hashed")
    lines = [f"- `{name}` (SHA-256 of its tokens `{digest}`)" for name, digest in found.items()]
    lines += [f"- [{name}](https://huggingface.co/datasets/{name})" for name in datasets]
    return "\n".join(lines) or "No training data is recorded: the model was not trained after its conversion."


def _for_the_hub(result: Mapping[str, Any], score: Mapping[str, Any]) -> EvalResult:
    parts = [score["task"], str(score.get("length") or ""), _text(result, score)]
    config = " ".join(part for part in parts if part)  # what the Hub tells entries of one dataset type apart by
    return EvalResult(
        task_type="text-generation", dataset_type=score["suite"], dataset_name=f"{score['suite']} {config}",
        dataset_config=config, metric_type=score["metric"], metric_name=score["metric"], metric_value=score["value"],
    )  # fmt: skip


def _text(result: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    """Name of the dataset folder that a score of a suite on held-out text was measured on; empty of others."""
    data = result["run"].get("settings", {}).get("data") if score["suite"] in NEEDS_TEXT else None
    return Path(data).name if data else ""


def _results(scores: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    if not scores:
        return ["None were given. `hylo eval` measures them; `hylo export --results FOLDER` puts them here."]
    rows = []
    for result, score in scores[:ROWS]:
        error = "" if score.get("stderr") is None else f" ± {score['stderr']:.3g}"
        length = score.get("length")
        rows.append((
            score["suite"], score["task"], _text(result, score), "" if length is None else f"{length:,}", score["metric"],
            f"{score['value']:.4g}{error}", f"{score['examples']:,}", score.get("note", ""),
        ))  # fmt: skip
    runs = {f"`{result['run'].get('command')}`, commit {result['run'].get('commit')}" for result, _ in scores}
    left = [f"{len(scores) - ROWS} more are in the results folder."] if len(scores) > ROWS else []
    columns = ("suite", "task", "text", "tokens", "metric", "value", "examples", "note")
    return [*_table(columns, rows), *left, "Measured by " + "; ".join(sorted(runs)) + "."]


def _limits(config: ModelConfig, provenance: Mapping[str, Any]) -> str:
    steps = sum(step.get("train_steps") or 0 for step in _steps(provenance))
    quantised = {name for step in _steps(provenance) if (name := step.get("converted_from", "")).endswith(".gguf")}
    lines = [
        f"- {config.max_position_embeddings:,} tokens are the longest that the base model or a training stage was made for; "
        f"longer prompts run, with quality that was not measured.",
        f"- {steps:,} training steps followed the conversion." if steps else "- It was not trained after its conversion.",
        *(
            f"- Its base model's weights were dequantised from `{name}`, so they are not the original ones."
            for name in quantised
        ),
        "- It has the base model's biases and gaps, and may repeat or invent facts; a low perplexity does not show recall over "
        "long distances.",
    ]
    if is_own(config):
        lines.append("- Masks other than padding, packed documents and caches of other models are refused.")
    return "\n".join(lines)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return ["\n".join(lines)]
