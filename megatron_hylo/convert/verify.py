"""`hylo verify`: a model folder against its Hugging Face source, tensor by tensor and logit by logit."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_hylo.convert.hf_reader import load_transformers_model, open_source
from megatron_hylo.convert.mapping import model_entries
from megatron_hylo.convert.to_hf import hf_tensors
from megatron_hylo.convert.to_megatron import Track, no_progress
from megatron_hylo.models.checkpoint import load_model


@dataclass
class Verification:
    """What was compared and where the two parted."""

    tensors: int = 0
    differing: list[str] = field(default_factory=list)  # Hugging Face names, with the largest difference
    max_logit_difference: float = float("nan")  # over `tokens` random tokens, both in fp32
    tokens: int = 0
    tolerance: float = 1e-4

    @property
    def ok(self) -> bool:
        """All tensors equal and the logits within tolerance (NaN never passes)."""
        return not self.differing and self.max_logit_difference <= self.tolerance


def verify_conversion(
    hugging_face: str | Path,
    megatron: str | Path,
    tokens: int = 128,
    tolerance: float = 1e-4,
    seed: int = 0,
    track: Track = no_progress,
) -> Verification:
    """Compare every tensor bit for bit, then the fp32 logits of random tokens with transformers.

    Args:
        hugging_face: Hugging Face folder or GGUF file.
        megatron: model folder.
        tokens: length of the random input, [1, tokens].
        tolerance: allowed max |delta logit|.
        seed: of the random tokens.
        track: progress display over an iterable.

    Raises:
        ConfigError: either cannot be read, or their configurations differ.
    """
    result = Verification(tokens=tokens, tolerance=tolerance)
    source = open_source(hugging_face)
    model = load_model(megatron, params_dtype=torch.float32, backend="local")
    config = model.config.hylo
    expected = [name for entry in model_entries(source.config) for name in entry.hugging_face]
    converted = dict(hf_tensors(model))
    result.differing += [f"{name}: missing on one side" for name in sorted(set(expected) ^ set(converted))]
    for name in track([n for n in expected if n in converted], "tensors"):
        ours, theirs = converted.pop(name), source.read(name).float()
        result.tensors += 1
        if ours.shape != theirs.shape:
            result.differing.append(f"{name}: shape {list(ours.shape)} against {list(theirs.shape)}")
        elif not torch.equal(ours, theirs):
            result.differing.append(f"{name}: max |delta| {(ours - theirs).abs().max().item():.3e}")
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    oracle = load_transformers_model(hugging_face)
    with torch.no_grad():
        theirs = oracle(ids, use_cache=False).logits
        ours = model.eval().logits(model(ids.to(next(model.parameters()).device))).cpu()
    result.max_logit_difference = (ours - theirs).abs().max().item()
    return result
