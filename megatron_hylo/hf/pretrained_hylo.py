"""Base class of all HyLo models: capabilities that transformers asks for, saving with the code, new weights."""

import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .attention_hylo import HyloLatentAttention
from .cache_hylo import cache_nbytes, free_bytes
from .configuration_hylo import HyloConfig
from .quantised_hylo import check_declared, check_loaded, make_plain
from .recurrent_hylo import HyloGatedDeltaNet, HyloMamba2

logger = logging.get_logger(__name__)
AUTO_MAP = {
    "AutoConfig": "configuration_hylo.HyloConfig",
    "AutoModel": "modeling_hylo.HyloModel",
    "AutoModelForCausalLM": "modeling_hylo.HyloForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hylo.HyloForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hylo.HyloForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_hylo.HyloForQuestionAnswering",
}
FP32_PARAMETERS = {
    "*": (),
    "+": (),
    "M": ("A_log", "dt_bias", "D"),
    "G": ("A_log", "dt_bias"),
    "K": ("A_log", "dt_bias"),
    "W": (),
}


def length_warning(name: str, longest: int, tokens: int, new_tokens: int = 0) -> str:
    """Say what happens to a text of `tokens` and, where they are known, of `new_tokens` that a model goes on with."""
    text = f"the prompt's {tokens:,} and {new_tokens:,} new ones" if new_tokens else f"the text's {tokens:,}"
    return (
        f"{name} was trained for {longest:,} tokens; {text} go past it: nothing is cut off, positions count on, but what the "
        f"model says there may be poor"
    )


class HyloPreTrainedModel(PreTrainedModel):
    """Capabilities that transformers asks for, and the initialisation of new weights."""

    config_class = HyloConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # one attention for "sdpa" and "eager": torch's scaled_dot_product_attention
    _no_split_modules = ["HyloLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    has_warned_of_length = False
    write_code: Callable[[Path], Any] | None = None  # set where the code is part of a package, which a saved folder lacks

    def __init__(self, config: HyloConfig) -> None:
        """Check the layers that the configuration names.

        Raises:
            ValueError: unknown symbols in the layer pattern, or fewer layers there than num_hidden_layers.
        """
        super().__init__(config)
        check_declared(getattr(config, "quantization_config", None))
        _check_pattern(config)
        # transformers 4 refuses names that a model does not have
        kept = {name for mixer in set(config.mixers) for name in FP32_PARAMETERS[mixer]}
        self._keep_in_fp32_modules_strict = sorted(kept)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as other models do; a quantised folder's weights are dequantised into plain maps, and never read without scales.

        Raises:
            ValueError: the folder's weights are quantised in a way that is not read.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, found = loaded
        check_loaded(found["missing_keys"], found["unexpected_keys"])
        make_plain(model)
        return (model, found) if output_loading_info else model

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as other models do, with the modelling code beside the weights, so that the folder loads anywhere."""
        if self.write_code is not None:
            self.config.auto_map = AUTO_MAP
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.write_code is not None and Path(save_directory).is_dir():
            self.write_code(Path(save_directory))

    def _upload_modified_files(self, working_dir: str | PathLike, *args: Any, **kwargs: Any) -> Any:
        """Upload the modelling code too; `save_pretrained(..., push_to_hub=True)` uploads before it returns."""
        if self.write_code is not None:
            self.write_code(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def check_cache_fits(self, sequences: int, tokens: int, latents: str | None = None) -> None:
        """Refuse a cache of so many sequences of so many tokens that is larger than the free memory.

        Args:
            sequences: of the batch, copies for beams included.
            tokens: of each sequence, cached in the model's dtype.
            latents: 8-bit format of MLA's latents, or None.

        Raises:
            ValueError: it is.
        """
        one, smallest = (cache_nbytes(self.config, tokens, self.dtype.itemsize, kind) for kind in (latents, "fp8"))
        free, wanted = free_bytes(self.device), sequences * one
        if free is not None and wanted > free:
            raise ValueError(
                f"a cache of {tokens:,} tokens for {sequences:,} sequences takes {wanted / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB of the memory are free; use fewer sequences or tokens"
                + (", or latents='fp8'" if smallest < one else "")
            )

    def check_growth(self, sequences: int, prompt: int, longest: int) -> None:
        """Refuse a prompt whose cache is larger than the free memory; a warning where it may grow larger than that.

        Args:
            sequences: of the batch, copies for beams included.
            prompt: tokens of each sequence at first, padding included.
            longest: tokens of each at most.

        Raises:
            ValueError: the prompt's cache does not fit.
        """
        self.check_cache_fits(sequences, prompt)
        try:
            self.check_cache_fits(sequences, longest)
        except ValueError as error:
            logger.warning("texts that do not end before will fill the memory: %s", error)

    def warn_of_length(self, tokens: int, new_tokens: int = 0) -> None:
        """Warn, once a model, of a text that goes past what it was trained for.

        Args:
            tokens: of the longest sequence so far, padding included.
            new_tokens: that a prompt of `tokens` is to be continued with.
        """
        longest = self.config.max_position_embeddings
        said: Any = self.base_model  # shared by a backbone and the model around it
        if longest is not None and tokens + new_tokens > longest and not said.has_warned_of_length:
            logger.warning("%s", length_warning(self.name_or_path or "this model", longest, tokens, new_tokens))
            said.has_warned_of_length = True

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as other models do, in the description too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.hylo = self.config.hylo | {"vocab_size": embeddings.num_embeddings}
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (HyloMamba2, HyloGatedDeltaNet)):  # decay rates 1 .. heads, step size 0.01
            _fill(module.A_log, torch.arange(1, module.heads + 1).log())
            _fill(module.dt_bias, torch.tensor(math.log(math.expm1(0.01))))
        if isinstance(module, HyloMamba2):
            _fill(module.D, torch.tensor(1.0))
        new: Any = getattr(module, "new_weights", None)
        for parameter in new() if new is not None else ():  # of experts, which transformers draws in its own models alone
            parameter.normal_(0.0, self.config.initializer_range)
        if isinstance(module, HyloLatentAttention) and module.aligned_norm:
            _fill(module.k_norm.get_parameter("rotary_mix"), torch.tensor(1.0))


def _check_pattern(config: HyloConfig) -> None:
    """Refuse a layer pattern that is damaged, or shorter than num_hidden_layers; fewer layers than it has are a model too."""
    mixers, mlps = config.mixers, config.mlps
    known = set(mixers) <= set(FP32_PARAMETERS) and set(mlps) <= set("-E") and len(mixers) == len(mlps)
    if not known or config.num_hidden_layers > len(mixers):
        raise ValueError(
            f"config.json: hybrid_layer_pattern {config.hylo['hybrid_layer_pattern']!r} must have a mixer, one of "
            f"{''.join(FP32_PARAMETERS)}, and then an MLP, - or E, for each of num_hidden_layers {config.num_hidden_layers}; "
            f"export the model again"
        )


def _fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter that was not loaded from a file."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value)
