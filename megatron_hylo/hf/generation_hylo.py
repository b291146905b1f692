"""Hooks by which transformers' `generate()` makes, checks and continues the cache of a HyloModel."""

import functools
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

from .cache_hylo import HyloCache
from .inputs_hylo import check_cache
from .pretrained_hylo import HyloPreTrainedModel


class HyloGenerator(HyloPreTrainedModel, GenerationMixin):
    """Base class of HyLo models that generate text."""

    decodes_with_fixed_shapes = False  # on a CPU too, where nothing is captured: for tests

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Generate as other models do; the number of layers is restored where `assistant_early_exit` ends in an error."""
        layers = self.config.num_hidden_layers
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.config.num_hidden_layers = layers

    def new_cache(self, batch_size: int = 1, max_cache_len: int | None = None, latents: str | None = None) -> HyloCache:
        """Make a cache for `past_key_values`, checked against the memory that is free.

        Args:
            batch_size: sequences that will use it.
            max_cache_len: tokens of a sequence; None for a cache that grows.
            latents: "int8" or "fp8" keeps MLA's latents in 8 bits; None: the model's dtype.

        Raises:
            ValueError: it would be larger than the free memory, or as for `HyloCache`.
        """
        cache = HyloCache(max_cache_len, latents)
        if max_cache_len is not None:
            self.check_cache_fits(batch_size, max_cache_len, latents)
        return cache

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate() looks at its parameters
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Drop positions that transformers 4 counts over padding, and the tokenizer of stop strings, before each pass."""
        kwargs.pop("tokenizer", None)
        positions, columns = kwargs.get("position_ids"), kwargs.get("cache_position")
        if positions is not None and columns is not None and torch.equal(positions, columns[None]):
            kwargs["position_ids"] = None  # they are counted from the mask then
        return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' continuous batching (`generate_batch`), whose pages hold keys and values alone.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "generate_batch and continuous batching page keys and values, but a HyLo model has latents and recurrent states; "
            "use generate() with padding on the left, `hylo generate --batch` or vLLM"
        )

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """Leave transformers' reminder of the trained length out; `warn_of_length` says what happens."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria

    # transformers 4 and 5 hand over different arguments after the first three
    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int, *_: Any
    ) -> None:
        """Make a HyloCache; called by generate() before the first pass, in place of transformers' own cache."""
        check_cache(model_kwargs.get("past_key_values"), self.config)
        mask = model_kwargs.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or not mask.shape[1]):
            raise ValueError(
                f"generate() takes prompts [batch, tokens] of a token at least, with an attention_mask of the same shape; the "
                f"mask, which is made of the prompts where none is given, is {list(mask.shape)}"
            )
        if mask is not None and not mask[:, -1].all():
            raise ValueError(
                "a prompt ends in padding, but generate() continues after the last position; pad on the left "
                "(tokenizer.padding_side = 'left'), and give an attention_mask where a prompt itself ends in the padding token"
            )
        if mask is not None:
            self.warn_of_length(mask.shape[1])  # before it is read in pieces
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic", "dynamic_full", "static"):
            raise ValueError(
                f"cache_implementation {wanted!r} is not supported; use 'static', or leave it out for a cache that grows"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            sequences = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            longest = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            if wanted != "static":
                self.check_growth(sequences, 0 if mask is None else mask.shape[1], longest)
            model_kwargs["past_key_values"] = self.new_cache(sequences, longest if wanted == "static" else None)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and (generation_config.is_assistant or mode == GenerationMode.ASSISTED_GENERATION):
            cache.activate_past_recording()  # rejected tokens are taken out
