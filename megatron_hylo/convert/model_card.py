"""Model card of an export: README.md in the format of the Hugging Face Hub, out of what the folder's files already say."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layouts import kv_bytes_per_token
from megatron_hylo.config.mixers import WINDOW_SYMBOL, get_mixer, tensor_parallel_sizes
from megatron_hylo.config.mlps import EXPERTS_SYMBOL
from megatron_hylo.convert.card_results import hub_result, results_tables, table
from megatron_hylo.convert.hf_config import TRANSFORMERS_VERSIONS, is_own
from megatron_hylo.hf import HyloConfig
from megatron_hylo.hf.cache_hylo import cache_nbytes

SETTINGS = (
    "stage",
    "sequence_length",
    "layout",
    "pattern",
    "init",
    "calibration_tokens",
    "sequential",
    "seed",
    "converted_from",
)
RECIPE = (  # settings of a run that its row names where they are not the defaults; hylo_provenance.json has all
    "trainable", "optimizer.name", "optimizer.lr", "optimizer.mixer_lr", "optimizer.adam_beta2", "recall.share",
    "recall.answer_weight", "recall.cross_entropy", "distil.kl_weight", "distil.ce_weight", "distil.kl_direction",
    "align.loss", "rope_scaling.rope_type", "rope_scaling.factor", "teacher_window.mode", "text.packing", "text.long_share",
    "packed_documents", "precision", "linear_precision", "seed",
)  # fmt: skip
STAGES = {  # objectives that a card explains
    "align": "align: each new layer learns the teacher's layer output.",
    "distil": "distil: the whole model learns the teacher's distribution of every next token, by the KL divergence.",
    "pretrain": "pretrain: the model learns the text itself, by cross-entropy, without a teacher.",
}
EXPLAINED = {  # settings of a recipe that a card explains
    "recall.share": (
        "recall.share: made-up facts, questions and answers take this part of the tokens, as exercises of recall in the text."
    ),
    "distil.ce_weight": "distil.ce_weight: cross-entropy on the text itself has this weight beside the KL divergence.",
    "recall.cross_entropy": "recall.cross_entropy answers: the exercises' facts and questions have no cross-entropy.",
}
HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
CHAT = """The tokenizer has a chat template:

```python
turns = [{"role": "user", "content": "Why is the sea salty?"}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
new = model.generate(**inputs, max_new_tokens=80, repetition_penalty=1.2)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(new, skip_special_tokens=True))
```

"""


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
    has_chat: bool = False,
) -> str:
    """Return the text of README.md.

    Args:
        name: the model's.
        config: its description.
        parameters: how many it has.
        provenance: content of hylo_provenance.json.
        facts: that are not in the provenance.
        quantisation: what is quantised, and how; None for a folder that is not.
        has_chat: whether the tokenizer has a chat template.
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
        eval_results=[hub_result(result, score) for result, score in scores] or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        _architecture(config, parameters, base_model),
        *_layout(config),
        "## Use",
        _use(is_hybrid, _served_sizes(config) if quantisation is None else [], quantisation is not None, has_chat),
        *([] if quantisation is None else ["## Quantisation", quantisation]),
        "## Method",
        "Oldest step first; `hylo_provenance.json` has every setting, with the SHA-256 of every input.",
        *table(("step", "settings"), _method(list(_steps(provenance)))),
        *_training(provenance),
        "## Data",
        _data(provenance, facts.datasets),
        "## Results",
        *results_tables(scores),
        "## Limits",
        _limits(config, provenance),
        "## Licence",
        _licence(facts.license, base_model),
    ]
    return "\n\n".join(parts) + "\n"


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of a Hugging Face folder has a chat template, in a file of its own or in its settings."""
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and bool(json.loads(settings.read_text()).get("chat_template"))
    )


def _architecture(config: ModelConfig, parameters: int, base_model: str | None) -> str:
    mixers = config.hybrid_layer_pattern.replace("|", "")[0::2]
    counts = ", ".join(f"{mixers.count(symbol)} {get_mixer(symbol).name}" for symbol in dict.fromkeys(mixers))
    text = f"{parameters:,} parameters, {len(mixers)} layers: {counts} (`{mixers}`)."
    if not is_own(config):
        return text
    dense = config.with_mixers("*" * len(mixers))
    own, base = kv_bytes_per_token(config), kv_bytes_per_token(dense)
    where = f" of a sequence of {config.max_position_embeddings:,}" if WINDOW_SYMBOL in config.mixers else ""
    unbounded = config.with_mixers(config.mixers.replace(WINDOW_SYMBOL, "*"))  # a window is counted with the tokens
    states = cache_nbytes(HyloConfig(hylo=unbounded.to_dict()), 0, 2)
    made = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a pretrained Transformer"
    return (
        f"{text} A hybrid made from {made} by [HyLo](https://arxiv.org/abs/2604.24715). Its cache takes {own:,} bytes a "
        f"token{where} in bf16, {own / base:.1%} of the {base:,} that attention in every layer would need"
        + (f", and its recurrent states {states / 1e6:,.1f} MB a sequence of any length." if states else ".")
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
    return table(("mixer", "layers, from 0", "sizes", "cache, bytes a token and layer"), rows)


def _base_on_hub(provenance: Mapping[str, Any]) -> str | None:
    """Name on the Hub of the model that everything goes back to, where it was read from the Hub's cache."""
    paths = [about.get("path", "") for step in _steps(provenance) for about in step.get("inputs", {}).values()]
    found = [HUB_CACHE.search(path) for path in paths]
    return next((f"{match[1]}/{match[2]}" for match in found if match), None)


def _served_sizes(config: ModelConfig) -> list[int]:
    """Tensor-parallel sizes that vLLM serves a model with; none where the plugin refuses it (serve/vllm/config.py)."""
    refused = is_own(config) and {WINDOW_SYMBOL, EXPERTS_SYMBOL} & set(config.hybrid_layer_pattern)
    return [] if refused else tensor_parallel_sizes(config)


def _use(is_hybrid: bool, sizes: Sequence[int], is_quantised: bool, has_chat: bool) -> str:
    trust = ", trust_remote_code=True" if is_hybrid else ""
    needs = "torch and compressed-tensors" if is_quantised else "torch alone"
    versions = "{} to {}".format(*TRANSFORMERS_VERSIONS)
    code = (
        f"The modelling code is part of this folder and needs transformers ({versions} were tested) and {needs}. "
        if is_hybrid
        else ""
    )
    plugin = "`pip install '.[serve]'` in a checkout of megatron_hylo, then " if is_hybrid else ""
    chat = "" if not has_chat else CHAT
    served = (
        ""
        if not sizes
        else f"With vLLM: {plugin}`vllm serve FOLDER`; tensor-parallel sizes that work: {', '.join(map(str, sizes))}."
    )
    return f"""{code}FOLDER is this folder or its name on the Hub.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left"{trust})
model = AutoModelForCausalLM.from_pretrained(FOLDER{trust}, dtype="auto")
inputs = tokenizer(["The sea is"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40, repetition_penalty=1.2))[0])
```

{chat}On a GPU add `.to("cuda")` to the model and to the inputs. `generate(..., prefill_chunk_size=8192)` reads a long prompt in
pieces, which bounds the memory. Greedy text of a small model repeats itself, hence the penalty.

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


def _method(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Rows (step, settings); an input that an earlier step made is named by it, since folders are called alike."""
    rows: list[tuple[str, str]] = []
    for step in steps:
        named = [f"{key} {step[key]}" for key in SETTINGS if step.get(key) not in (None, False)]
        for key, about in step.get("inputs", {}).items():
            made = about.get("provenance")
            source = f"of step {steps.index(made) + 1}" if made in steps else f"`{Path(about['path']).name}`"
            named.append(f"{key} {source}")
        rows.append((f"{len(rows) + 1} {step['verb']}", "; ".join(named)))
    return rows


def _training(provenance: Mapping[str, Any]) -> list[str]:
    """Table of the training stages: tokens, length, recipe; nothing where none is recorded."""
    steps = [step for step in _steps(provenance) if step.get("train_steps")]
    rows: list[tuple[str, ...]] = []
    for step in steps:
        recipe = step.get("recipe", {}) | {"seed": step.get("seed")}
        named = [f"{name} {recipe[name]}" for name in RECIPE if recipe.get(name) is not None]
        numbers = [f"{step[name]:,}" if name in step else "" for name in ("tokens", "sequence_length", "train_steps")]
        rows.append((step.get("stage", ""), *numbers, "; ".join(named)))
    if not rows:
        return []
    total = sum(step.get("tokens", 0) for step in steps)
    told = f"{total:,} training tokens in all." if all("tokens" in step for step in steps) else ""
    stages = [STAGES[name] for name in dict.fromkeys(step.get("stage", "") for step in steps) if name in STAGES]
    stages += [said for name, said in EXPLAINED.items() if any(step.get("recipe", {}).get(name) for step in steps)]
    found = table(("stage", "tokens", "sequence length", "steps", "recipe"), rows)
    return ["## Training", *found, " ".join([*([told] if told else []), *stages])]


def _licence(license: str | None, base_model: str | None) -> str:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "the base model"
    return f"{license or 'Not stated'}. The weights derive from {base}, whose licence and terms apply to them."


def _data(provenance: Mapping[str, Any], datasets: Sequence[str]) -> str:
    found: dict[str, str] = {}
    for step in _steps(provenance):
        about = step.get("inputs", {}).get("data")
        if about is not None:
            size = f"{about['documents']:,} documents of {about['tokens']:,} tokens, " if "documents" in about else ""
            found[Path(about["path"]).name] = f"{size}SHA-256 of its tokens `{about.get('content_sha256', 'not known')}`"
    lines = [f"- `{name}` ({text})" for name, text in found.items()]
    lines += [f"- [{name}](https://huggingface.co/datasets/{name})" for name in datasets]
    return "\n".join(lines) or "No training data is recorded: the model was not trained after its conversion."


def _limits(config: ModelConfig, provenance: Mapping[str, Any]) -> str:
    steps = sum(step.get("train_steps") or 0 for step in _steps(provenance))
    quantised = {name for step in _steps(provenance) if (name := step.get("converted_from", "")).endswith(".gguf")}
    lines = [
        f"- {config.max_position_embeddings:,} tokens are the longest that the base model or a training stage was made for; "
        f"longer prompts run, with a warning and with quality that was not measured.",
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
