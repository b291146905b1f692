"""Verification of a Megatron model against transformers' loading of the same weights: tensors, layers, logits.

`hylo convert` ends with it, both ways, and `hylo verify` is it. Both models compute in float32; whatever its dtype, ours is
widened one layer at a time, and transformers' is read layer by layer where it is large (see oracle.py).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.folder_source import FolderSource
from megatron_hylo.convert.hf_reader import TensorSource, open_source
from megatron_hylo.convert.mapping import model_entries
from megatron_hylo.convert.oracle import Oracle, open_oracle
from megatron_hylo.data.tokenizer import vocabulary_difference
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.kernels.registry import untuned
from megatron_hylo.models.streamed import ModelParts
from megatron_hylo.models.weights_files import skeleton
from megatron_hylo.platform.distributed import device

TOKENS, TOLERANCE = 128, 1e-4
COMPARED = 2**24  # numbers of a tensor that are widened at a time
HEAD_ROWS = 8192  # of the output head at a time, in float32
logger = logging.getLogger("megatron_hylo.convert")


@dataclass
class Verification:
    """Result of a comparison: its extent and the differences found."""

    oracle: str  # how the other model was loaded
    tokens: int
    tolerance: float
    tensors: int = 0
    differing: list[str] = field(default_factory=list)  # Hugging Face names, with the largest difference
    layer_differences: list[float] = field(default_factory=list)  # of hidden states after each layer, relative by norm
    max_logit_difference: float = float("nan")  # over `tokens` random tokens
    max_logit: float = float("nan")  # of the other model, absolute
    tokenizer_difference: str | None = None  # in words; None where both have the same vocabulary, or the source none

    @property
    def allowed(self) -> float:
        """The largest |delta logit| that passes: the tolerance, relative to the largest logit where that is above 1."""
        return self.tolerance * max(1.0, self.max_logit)

    @property
    def ok(self) -> bool:
        """All tensors and tokens equal and the logits within tolerance (NaN never passes)."""
        return not self.differing and self.tokenizer_difference is None and self.max_logit_difference <= self.allowed

    def lines(self) -> list[str]:
        """Describe the result in words, the first difference first."""
        lines = [f"compared with {self.oracle}", f"tensors compared: {self.tensors}, differing: {len(self.differing)}"]
        lines += [f"  {line}" for line in self.differing]
        if not self.max_logit_difference <= self.allowed:
            apart = [layer for layer, difference in enumerate(self.layer_differences) if not difference <= self.tolerance]
            lines.append(f"hidden states part after layer {apart[0]}" if apart else "hidden states agree after every layer")
        lines.append(
            f"max |delta logit|: {self.max_logit_difference:.3e} over {self.tokens} tokens "
            f"(allowed {self.allowed:.1e}, largest logit {self.max_logit:.3g})"
        )
        lines.append(f"tokenizer: {self.tokenizer_difference or 'no difference'}")
        return lines


def verify_conversion(
    hugging_face: str | Path,
    megatron: str | Path,
    tokens: int = TOKENS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    track: Track = no_progress,
) -> Verification:
    """Compare a model folder with the Hugging Face folder or GGUF file that it was made from, or that was made from it.

    Args:
        hugging_face: Hugging Face folder or GGUF file.
        megatron: model folder.
        tokens, tolerance, seed, track: as in `compare`.

    Raises:
        ConfigError: either cannot be read.
    """
    if tokens < 1 or not tolerance >= 0:
        raise ConfigError(f"--tokens must be at least 1 and --tolerance at least 0, got {tokens} and {tolerance}")
    source = open_source(hugging_face)
    result = compare(FolderSource(megatron), source, hugging_face, tokens, tolerance, seed, track)
    result.tokenizer_difference = vocabulary_difference(hugging_face, megatron)
    return result


def require_equal(weights: FolderSource, source: TensorSource, path: str | Path, track: Track = no_progress) -> None:
    """Run `compare` at the end of a conversion and refuse a difference.

    Raises:
        ConfigError: the two differ.
    """
    result = compare(weights, source, path, track=track)
    if not result.ok:
        shown = result.lines()
        shown = [*shown[:6], f"  ... {len(shown) - 7} more", shown[-1]] if len(shown) > 8 else shown
        raise ConfigError(
            "the converted model is not the one that transformers loads, and nothing was written; --no_verify writes it all "
            f"the same. {'; '.join(line.strip() for line in shown)}"
        )
    delta = result.max_logit_difference
    logger.info("%s tensors are equal and logits within %.1e of %s", result.tensors, delta, result.oracle)


def compare(
    weights: FolderSource,
    source: TensorSource,
    path: str | Path,
    tokens: int = TOKENS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    track: Track = no_progress,
) -> Verification:
    """Compare every tensor bit for bit, then hidden states and logits of random tokens, in float32.

    Args:
        weights: the model folder, opened; each part is widened to float32 while it computes.
        source: what `path` holds, opened.
        path: the Hugging Face folder or GGUF file that transformers loads.
        tokens: length of the random input, [1, tokens]; no more than the model has positions.
        tolerance: allowed max |delta logit|, relative to the largest logit where that is above 1.
        seed: of the random tokens.
        track: progress display over an iterable.

    Raises:
        ConfigError: transformers cannot load the folder as a whole.
    """
    config = weights.config
    model = skeleton(config, torch.float32)
    tokens = min(tokens, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    with open_oracle(source, path) as oracle, torch.no_grad(), untuned():  # fast kernels round fp32 products
        result = Verification(oracle.description, tokens, tolerance)
        _compare_tensors(weights, oracle, result, track)
        if oracle.model.config.vocab_size != config.vocab_size:
            result.differing.append(f"vocabulary: {config.vocab_size} tokens against {oracle.model.config.vocab_size}")
            return result
        logger.info("comparing hidden states and logits of %s tokens in float32", tokens)
        with _outputs(oracle.model.model.layers) as theirs:
            their_logits = oracle.model(ids, use_cache=False).logits[0].cpu()
        widened = ModelParts(model, weights.parameter).streaming(keep_ends=False)
        with _outputs([mlp for _, mlp in model.mixer_layers()]) as ours, widened:
            our_logits = _logits(weights, model.eval()(ids.to(device())))
    # ours: [sequence, 1, hidden], theirs: [1, sequence, hidden]
    pairs = [(x.flatten(0, 1), y.flatten(0, 1)) for x, y in zip(ours, theirs)]
    result.layer_differences = [((x - y).norm() / y.norm()).item() for x, y in pairs]
    result.max_logit = their_logits.abs().max().item()
    result.max_logit_difference = (our_logits - their_logits).abs().max().item()
    return result


def _compare_tensors(weights: FolderSource, oracle: Oracle, result: Verification, track: Track) -> None:
    config = weights.config
    unseen = oracle.names() - (set() if config.untie_embeddings_and_output_weights else {"lm_head.weight"})
    for entry in track(model_entries(config), "compare tensors"):
        for name in entry.hugging_face:
            ours = weights.read(name)
            if name not in unseen:
                result.differing.append(f"{name}: missing in the other model")
                continue
            unseen.discard(name)
            theirs = oracle.tensor(name).cpu()
            result.tensors += 1
            if ours.shape != theirs.shape:
                result.differing.append(f"{name}: shape {list(ours.shape)} against {list(theirs.shape)}")
            elif not _equal(ours, theirs):
                result.differing.append(f"{name}: max |delta| {(ours.float() - theirs.float()).abs().max().item():.3e}")
    result.differing += [f"{name}: missing in the converted model" for name in sorted(unseen)]


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether all values are equal, a part at a time in float32."""
    parts = zip(ours.reshape(-1).split(COMPARED), theirs.reshape(-1).split(COMPARED))
    return all(torch.equal(a.float(), b.float()) for a, b in parts)


@contextmanager
def _outputs(layers: list[nn.Module] | nn.ModuleList) -> Iterator[list[Tensor]]:
    """Capture the outputs of layers, in float32 on the CPU."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple) -> None:
        """Forward hook: keep a copy of the output."""
        kept.append((output[0] if isinstance(output, tuple) else output).float().cpu())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _logits(weights: FolderSource, hidden: Tensor) -> Tensor:
    """Compute logits, [sequence, 1, hidden] -> [sequence, vocab], in float32 on the CPU."""
    tied = not weights.config.untie_embeddings_and_output_weights
    head = weights.read("model.embed_tokens.weight" if tied else "lm_head.weight")
    return torch.cat([(hidden[:, 0] @ part.to(hidden.device).float().T).cpu() for part in head.split(HEAD_ROWS)], dim=1)
