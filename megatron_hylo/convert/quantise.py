"""Quantised export of a hybrid: linear maps of mixers and MLPs in FP8, int8 or int4, in compressed-tensors' format.

| format | weights | scales | activations, in engines with such products |
|---|---|---|---|
| fp8 | e4m3 | a power of two a row | e4m3, a scale a token |
| int8 | 8-bit integers | bf16 a row | the model's dtype |
| int4 | 4-bit integers | bf16 a group of 128, 64 or 32 columns | the model's dtype |

With text the layers are rounded in turn by GPTQ, each on what the rounded layers before it give. Embeddings, the output head,
norms, convolutions, gates and MLA's kv_b_proj keep their dtype; with integers its q_a_proj too, which a conversion makes the
identity. The packing is compressed-tensors' own; transformers loads it.
"""

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from megatron_hylo.config import ConfigError, ModelConfig, from_dict
from megatron_hylo.config.layouts import parameter_count
from megatron_hylo.config.mlps import EXPERTS_SYMBOL
from megatron_hylo.convert.gptq import FORMATS, Format, quantise
from megatron_hylo.convert.hf_reader import load_transformers_model
from megatron_hylo.convert.model_card import NO_FACTS, CardFacts, has_chat_template, model_card
from megatron_hylo.convert.open_model import open_model
from megatron_hylo.convert.streaming import SHARD_BYTES
from megatron_hylo.convert.to_hf import add_files
from megatron_hylo.convert.token_ids import save_tokenizer
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.data.tokenizer import check_dataset, check_ids
from megatron_hylo.hf import HyloForCausalLM
from megatron_hylo.hf.inputs_hylo import sequence_inputs
from megatron_hylo.hf.quantised_hylo import QUANTISED, quantised_linears
from megatron_hylo.io import atomic_directory, check_free, read_json, write_json
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.io.provenance import EXPORTED, made_by
from megatron_hylo.kernels.registry import untuned

logger = logging.getLogger("megatron_hylo.convert")
FormatName = Literal["fp8", "int8", "int4"]
CALIBRATION_TOKENS, WINDOW = 65536, 1024
TOKENS_AT_ONCE = 8192  # that pass through a layer together
INSTALL = "--quantize needs compressed-tensors, which is not installed; pip install 'megatron-hylo[quantize]'"


@dataclass(frozen=True)
class Rounded:
    """A rounded weight, on the CPU."""

    values: Tensor  # float32 [rows, columns]
    scales: Tensor  # float32 [rows, groups]

    def weight(self) -> Tensor:
        """Return the weight that values and scales stand for, float32 [rows, columns]."""
        return self.values * self.scales.repeat_interleave(self.values.shape[1] // self.scales.shape[1], 1)


def export_quantised(
    source: str | Path,
    output: str | Path,
    quantize: FormatName,
    calibration_data: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    overwrite: bool = False,
    track: Track = no_progress,
    verify: bool = True,
    facts: CardFacts = NO_FACTS,
    shard_bytes: int = SHARD_BYTES,
) -> ModelConfig:
    """Export a hybrid with quantised weights for transformers; the model is in memory as a whole.

    Args:
        source: model folder, training checkpoint or exported Hugging Face folder.
        output: the Hugging Face folder to make; it appears when it is complete.
        quantize: "fp8", "int8" or "int4".
        calibration_data: dataset folder made by `hylo preprocess`, whose training text decides the rounding; None: each
            weight is rounded to its nearest value.
        calibration_tokens: of that text.
        overwrite: replace what is there.
        track: progress display over an iterable.
        verify: load the folder through transformers and compare all weights and logits, before it appears.
        facts: for its card.
        shard_bytes: largest size of a file of weights.

    Returns:
        The model's configuration.

    Raises:
        ConfigError: no hybrid or one with experts, widths that no group divides, too little text or text of another
            tokenizer, compressed-tensors not installed, or transformers reads another model in what was written.
    """
    check_free(output, overwrite, [source, calibration_data])
    if quantize not in FORMATS:
        raise ConfigError(f"quantize {quantize!r} is no format; use one of {', '.join(FORMATS)}")
    form = FORMATS[quantize]
    compressor = Compressor(form)
    model, _ = open_model(source)
    if not isinstance(model, HyloForCausalLM):
        raise ConfigError(f"{source} is a plain Transformer; --quantize is for hybrids, other tools quantise what vLLM knows")
    if EXPERTS_SYMBOL in model.config.hylo["hybrid_layer_pattern"]:
        raise ConfigError(f"{source} has layers with experts, which are not quantised yet; export it without --quantize")
    group = choose_group(model, form)
    windows = None
    if calibration_data is not None:
        windows = calibration_windows(calibration_data, source, model.config.vocab_size, calibration_tokens)
    rounded = round_weights(model, form, group, windows, track)
    config: ModelConfig = from_dict(ModelConfig, model.config.hylo, "model")
    with atomic_directory(output, overwrite, [source, calibration_data]) as folder, tempfile.TemporaryDirectory() as scratch:
        weights = compressor.state_dict(model, rounded, group)
        save_torch_state_dict(weights, folder, max_shard_size=shard_bytes)
        tokenizer = Path(source) / "tokenizer"
        if not (Path(source) / "hylo.json").is_file():
            tokenizer = Path(scratch) / "tokenizer"
            save_tokenizer(Path(source), tokenizer)
        add_files(config, model.dtype, folder, tokenizer)
        declared = {"quantization_config": compressor.declaration(model, group)}
        write_json(folder / "config.json", read_json(folder / "config.json") | declared)
        used = None if windows is None else windows.numel()
        provenance = made_by(
            "export", {"model": source, "calibration_data": calibration_data}, quantize=quantize, calibration_tokens=used
        )
        write_json(folder / EXPORTED, provenance)
        about = _about(form, group, used)
        card = model_card(
            Path(output).name, config, parameter_count(config), provenance, facts, about, has_chat_template(folder)
        )
        (folder / "README.md").write_text(card)
        if verify:
            _require_equal(model, folder)
    return config


def choose_group(model: nn.Module, form: Format) -> int | None:
    """Return the format's first group that divides the rows of all weights; None where a scale is a row's.

    Raises:
        ConfigError: none does.
    """
    if not form.groups:
        return None
    widths = {name: linear.in_features for name, linear in quantised_linears(model, form.keeps).items()}
    for group in form.groups:
        if all(width % group == 0 for width in widths.values()):
            return group
    name, width = next((n, w) for n, w in widths.items() if w % form.groups[-1])
    raise ConfigError(
        f"{form.name} has one scale for {', '.join(map(str, form.groups))} neighbouring weights, but {name} has rows of "
        f"{width}; use --quantize int8 or fp8, which have one scale a row"
    )


def calibration_windows(data: str | Path, model: str | Path, vocab_size: int, tokens: int) -> Tensor:
    """Read windows of a dataset's training text, in an order that is always the same.

    Args:
        data: dataset folder.
        model: folder of the model, whose tokenizer the text must have.
        vocab_size: of the model.
        tokens: to read, rounded up to whole windows.

    Returns:
        int64 [windows, WINDOW].

    Raises:
        ConfigError: too little text, or text of another tokenizer.
    """
    dataset = PackedDataset(f"{data}/train", WINDOW, seed=1234)
    wanted = math.ceil(tokens / WINDOW)
    if wanted > dataset.windows_per_epoch:
        raise ConfigError(
            f"{data} has {dataset.windows_per_epoch} windows of {WINDOW} tokens, --calibration_tokens {tokens} needs {wanted}; "
            f"give more text or ask for at most {dataset.windows_per_epoch * WINDOW}"
        )
    windows = torch.stack([dataset[i] for i in range(wanted)])[:, :-1]
    check_ids(windows, vocab_size, data, model)
    check_dataset(data, model, vocab_size)
    return windows


@torch.no_grad()
def round_weights(
    model: HyloForCausalLM, form: Format, group: int | None, windows: Tensor | None = None, track: Track = no_progress
) -> dict[str, Rounded]:
    """Round the weights of mixers and MLPs in place, a layer after the other, each computed in float32.

    Args:
        model: the hybrid; its weights become the rounded ones, in their dtype.
        form: the format.
        group: columns with one scale; None: all.
        windows: int64 [windows, tokens] of calibration text; None rounds each weight to its nearest value.
        track: progress display over an iterable.

    Returns:
        Values and scales by the map's name in the model.
    """
    rounded: dict[str, Rounded] = {}
    backbone, device = model.model, model.device
    size = 1 if windows is None else max(1, TOKENS_AT_ONCE // windows.shape[1])
    states = [] if windows is None else [
        backbone.embed_tokens(ids.to(device)).float().cpu() for ids in windows.split(size)
    ]  # fmt: skip
    with untuned():  # fast kernels round fp32 products
        for number, layer in enumerate(track(list(backbone.layers), f"quantise layers to {form.name}")):
            dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
            layer.float()
            linears = quantised_linears(layer, form.keeps)
            with _moments(linears) as moments:
                for state in states:
                    _run(model, number, state)
            for name, linear in linears.items():
                values, scales = quantise(linear.weight, form, group, moments.get(name))
                found = Rounded(values.cpu(), scales.cpu())
                rounded[f"model.layers.{number}.{name}"] = found
                linear.weight.copy_(found.weight().to(dtypes[f"{name}.weight"]))
            states = [_run(model, number, state) for state in states]
            for name, parameter in layer.named_parameters():
                parameter.data = parameter.data.to(dtypes[name])
    return rounded


def _run(model: HyloForCausalLM, number: int, state: Tensor) -> Tensor:
    """Apply a layer to hidden states [windows, tokens, hidden], which are kept on the CPU."""
    backbone = model.model
    x = state.to(model.device)
    inputs = sequence_inputs(x, None, None, None, every=False)
    rope = backbone.ropes(inputs, x.shape[1]).get(backbone.mixers[number])
    return backbone.layers[number](x, inputs, position_embeddings=rope).cpu()


@contextmanager
def _moments(linears: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Add up x x^T of each map's inputs x, float32 [columns, columns]; maps of the same input share theirs."""
    found: dict[str, Tensor] = {}
    last: list[Any] = [None, ""]  # input, and the map that counted it

    def counting(name: str) -> Any:
        """Make the hook that adds up the inputs of the map of this name."""

        def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            """Forward pre-hook: add x^T x of the input's rows [..., columns], unless the map before it had the same input."""
            if inputs[0] is last[0]:
                found[name] = found[last[1]]
                return
            last[:] = inputs[0], name
            x = inputs[0].flatten(0, -2)
            total = x.T @ x
            found[name] = found[name].add_(total) if name in found else total

        return count

    handles = [linear.register_forward_pre_hook(counting(name)) for name, linear in linears.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Compressor:
    """compressed-tensors' packing of one format.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, form: Format) -> None:
        try:
            from compressed_tensors.compressors import BaseCompressor
        except ImportError as error:
            raise ConfigError(INSTALL) from error
        self.form = form
        self.stored = "float-quantized" if form.is_float else "pack-quantized"
        self.compressor: Any = BaseCompressor.get_value_from_registry(self.stored)

    def scheme(self, group: int | None) -> Any:
        """Describe weights and activations."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        kind: Any = "float" if self.form.is_float else "int"
        strategy: Any = "group" if group else "channel"
        weights = QuantizationArgs(num_bits=self.form.bits, type=kind, symmetric=True, strategy=strategy, group_size=group)
        token: Any = "token"
        activations = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy=token, dynamic=True, observer=None)
        return QuantizationScheme(
            targets=["Linear"], weights=weights, input_activations=activations if self.form.is_float else None
        )

    def declaration(self, model: HyloForCausalLM, group: int | None) -> dict[str, Any]:
        """Return config.json's quantization_config; maps that keep their dtype are named in it."""
        import compressed_tensors
        from compressed_tensors.quantization import QuantizationConfig

        names = (name.rpartition(".")[2] for name, m in model.model.named_modules() if isinstance(m, nn.Linear))
        kept = sorted(set(names) - (QUANTISED - self.form.keeps))
        ignore = ["lm_head", "score", *([rf"re:.*\.({'|'.join(kept)})$"] if kept else [])]
        config = QuantizationConfig(
            config_groups={"group_0": self.scheme(group)}, ignore=ignore, format=self.stored, quantization_status="compressed"
        )
        return {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}

    def state_dict(self, model: HyloForCausalLM, rounded: Mapping[str, Rounded], group: int | None) -> dict[str, Tensor]:
        """Return all tensors of the folder, on the CPU, by the names that compressed-tensors reads.

        Args:
            model: with its weights.
            rounded: by the name of the linear map.
            group: columns with one scale; None: all.
        """
        left_out = {f"{name}.weight" for name in rounded} | ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
        # copies: a tensor may be a part of another's storage
        tensors = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items() if name not in left_out}
        scheme = self.scheme(group)
        for name, found in rounded.items():
            scales = found.scales.to(torch.bfloat16)
            packed = self.compressor.compress({"weight": found.weight(), "weight_scale": scales}, scheme)
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in packed.items()}
        return tensors


def _about(form: Format, group: int | None, tokens: int | None) -> str:
    """Say in the card what is quantised, and how."""
    weights = {"fp8": "FP8 (e4m3)", "int8": "8-bit integers", "int4": "4-bit integers"}[form.name]
    scales = f"a scale for {group} columns" if group else "a scale a row"
    how = "each rounded to its nearest value" if tokens is None else f"rounded by GPTQ on {tokens:,} tokens of text"
    kept = "Embeddings, output head, norms, convolutions, gates, MLA's `kv_b_proj`, which decoding absorbs,"
    if form.keeps:
        kept = f"{kept} and {', '.join(f'`{name}`' for name in sorted(form.keeps))}, near the identity,"
    activations = (
        " An engine with FP8 products is told to round activations, too, with a scale a token." if form.is_float else ""
    )
    return (
        f"Weights of mixers and MLPs are {weights} with {scales}, {how}, in compressed-tensors' format "
        f"(`pip install compressed-tensors`). {kept} are not quantised. "
        f"transformers dequantises the weights as it loads them.{activations}"
    )


@torch.no_grad()
def _require_equal(model: HyloForCausalLM, folder: Path) -> None:
    """Load a folder through transformers and compare it with the rounded model in memory, every weight and some logits.

    Raises:
        ConfigError: they differ.
    """
    loaded, found = load_transformers_model(folder, output_loading_info=True, quantization_config=None)
    ours, theirs = model.state_dict(), loaded.state_dict()
    wrong = sorted(ours.keys() ^ theirs.keys()) + [
        name for name, tensor in ours.items() if name in theirs and not torch.equal(tensor.cpu(), theirs[name].to(tensor.dtype))
    ]
    if wrong or found["missing_keys"]:
        raise ConfigError(f"transformers reads other weights in what was written: {wrong[0]} and {len(wrong) - 1} more")
    logger.info("transformers loads all %s weights as they were rounded", len(ours))
