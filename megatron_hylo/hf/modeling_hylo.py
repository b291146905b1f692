"""HyLo models for transformers: attention `*`, MLA `+`, Mamba2 `M`, Gated DeltaNet `G` and KDA `K` layers.

Prefill may be cut anywhere, and padding may stand anywhere. An exported folder holds this file, those it imports and the
kernels' files beside its weights; it needs transformers and torch only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from megatron_hylo.kernels.elementwise import on_request
from megatron_hylo.kernels.rope import rope_cos_sin, rope_frequencies

from .attention_hylo import HyloRMSNorm, Rope
from .cache_hylo import HyloCache
from .configuration_hylo import HyloConfig
from .decode_hylo import decode_graph
from .generation_hylo import HyloGenerator
from .inputs_hylo import NO_PACKING, SequenceInputs, check_cache, sequence_inputs
from .layers_hylo import HyloLayer
from .pretrained_hylo import HyloPreTrainedModel
from .pytree_hylo import register_cache_pytree

logger = logging.get_logger(__name__)
register_cache_pytree()  # an input and an output of torch.export
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")  # of transformers' loss functions
fused_rope_cos_sin = on_request(rope_cos_sin)
UNUSED_ARGUMENTS = ("cache_position",)  # transformers 4 gives it in generate(); the cache knows its own length
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # of transformers' DataCollatorWithFlattening


def _check_keyword_arguments(given: dict[str, Any], used: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the `used` ones of a forward pass's other keyword arguments, and refuse unknown ones.

    Raises:
        TypeError: one that a HyLo model does not know, and that is not None.
    """
    unknown = sorted(name for name, value in given.items() if value is not None and name not in used + UNUSED_ARGUMENTS)
    if unknown:
        packed = [name for name in unknown if name in PACKING_ARGUMENTS]
        name, advice = (packed[0], NO_PACKING) if packed else (unknown[0], "leave it out")
        raise TypeError(f"a HyLo model does not use the argument {name}; {advice}")
    return {name: given[name] for name in used if name in given}


class HyloModel(HyloPreTrainedModel):
    """Backbone of a HyLo model: embedding, layers, final norm."""

    def __init__(self, config: HyloConfig) -> None:
        super().__init__(config)
        c = config.architecture()
        self.mixers = config.mixers
        latent = c.kv_channels if c.mla_rotary_pairs else c.qk_pos_emb_head_dim  # layers choose out of the base model's table
        whole = (c.kv_channels, c.rope_scaling)
        self.rotations = {"*": whole, "W": whole, "+": (latent, c.mla_rope_scaling)}
        self.rotary_base = c.rotary_base
        self.rotates_anew = {"+"} if c.qk_layernorm else set()  # layers whose cached keys are rotated in every pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HyloLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HyloRMSNorm(config.hidden_size, c.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.frequencies: dict[tuple[str, torch.device], Tensor] = {}  # of rotations, by layer symbol and device
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HyloCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute hidden states of the tokens after those in the cache; arguments as in `HyloForCausalLM.forward`.

        Returns:
            last_hidden_state [batch, new tokens, hidden], past_key_values, and with output_hidden_states the embeddings, what
            each layer but the last gives, and last_hidden_state; with output_attentions the probabilities of the attention and
            MLA layers, [batch, heads, new tokens, all tokens] each (recurrent and windowed layers have none).

        Raises:
            ValueError: both input_ids and inputs_embeds, or neither; a cache of another model.
            TypeError: an argument that a HyLo model does not use.
        """
        _check_keyword_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"give either input_ids or inputs_embeds, not {'neither' if input_ids is None else 'both'}")
        attends = self.config.output_attentions if output_attentions is None else output_attentions
        cache = self._choose_cache(past_key_values, self.config.use_cache if use_cache is None else use_cache)
        check_cache(cache, self.config)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if not torch.compiler.is_compiling():
            self.warn_of_length(x.shape[1] + (0 if cache is None else cache.length))
        inputs = sequence_inputs(x, attention_mask, position_ids, cache, every=bool(self.rotates_anew & set(self.mixers)))
        inputs.attentions = [] if attends else None
        collect = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states: list[Tensor] | None = [] if collect else None
        x = self.read(x, inputs, cache, hidden_states)
        collected: Any = None if hidden_states is None else tuple(hidden_states)
        attentions: Any = None if inputs.attentions is None else tuple(inputs.attentions)
        past: Any = cache  # no subclass of transformers' Cache
        last: Any = x
        return BaseModelOutputWithPast(
            last_hidden_state=last, past_key_values=past, hidden_states=collected, attentions=attentions
        )

    def read(
        self, x: Tensor, inputs: SequenceInputs, cache: HyloCache | None, hidden_states: list[Tensor] | None = None
    ) -> Tensor:
        """Apply all layers and the final norm to embeddings x: [batch, new tokens, hidden] -> the same shape.

        Args:
            x: embeddings.
            inputs: positions and padding; layers append attention probabilities where they are asked for.
            cache: continued.
            hidden_states: gets the embeddings, what each layer but the last gives, and the result.
        """
        ropes = self.ropes(inputs, x.shape[1])
        for symbol, layer in zip(self.mixers[: self.config.num_hidden_layers], self.layers):  # fewer: assistant_early_exit
            if hidden_states is not None:
                hidden_states.append(x)
            x = layer(x, inputs, position_embeddings=ropes.get(symbol), past_key_values=cache)
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x

    def ropes(self, inputs: SequenceInputs, new: int) -> dict[str, Rope]:
        """Compute cos and sin of this pass's positions for each kind of layer that rotates, by its symbol; `new` tokens."""
        return {symbol: self._rope(symbol, inputs.positions, new) for symbol in set(self.mixers) & set(self.rotations)}

    def _choose_cache(self, given: HyloCache | None, use_cache: bool) -> HyloCache | None:
        if self.gradient_checkpointing and self.training:
            if given is not None:
                raise ValueError(
                    "gradient checkpointing cannot continue a cache; leave past_key_values out or call model.eval()"
                )
            if use_cache:
                logger.warning_once("gradient checkpointing makes no cache: use_cache=True is taken for False while training")
            return None
        return HyloCache() if given is None and use_cache else given

    def _rope(self, symbol: str, positions: Tensor, new: int) -> Rope:
        channels, scaling = self.rotations[symbol]
        positions = positions if symbol in self.rotates_anew else positions[:, -new:]
        where = positions.device
        frequencies = self.frequencies.get((symbol, where))
        if frequencies is None:
            with torch.inference_mode(False):
                frequencies = rope_frequencies(channels, self.rotary_base, scaling, where)
            if where.type == "cuda" and not torch.compiler.is_compiling():
                self.frequencies[symbol, where] = frequencies  # a captured graph cannot copy them from the host
        return fused_rope_cos_sin(positions, frequencies, scaling.cos_sin_multiplier)


class HyloForCausalLM(HyloGenerator, GenerationMixin):  # by name, which transformers' own tests ask for
    """A HyLo model with its output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HyloConfig) -> None:
        super().__init__(config)
        self.model = HyloModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HyloCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits of the tokens after those in the cache.

        Args:
            input_ids: int64 [batch, new tokens].
            attention_mask: [batch, cached + new tokens], 1 at tokens and 0 at padding, on either side or between; None: no
                padding.
            position_ids: int64 [batch or 1, new tokens], rising along a sequence; by default counted, padding left out.
            past_key_values: continued and changed in place.
            inputs_embeds: [batch, new tokens, hidden], in place of input_ids.
            labels: int64 [batch, new tokens], -100 where ignored; asks for the loss of predicting them, shifted by one.
            use_cache: make and return a cache where none is given; the configuration's by default.
            output_attentions: return the probabilities of the attention and MLA layers, computed without a fused kernel.
            output_hidden_states: return the hidden states of all layers.
            logits_to_keep: only the last so many tokens' logits, 0 for all; or their indices.
            kwargs: `return_dict`, and what transformers' loss function takes (`num_items_in_batch`).

        Returns:
            logits [batch, kept tokens, vocabulary], past_key_values, loss, hidden_states, attentions. At padding they mean
            nothing.

        Raises:
            ValueError: what `sequence_inputs` refuses; a cache of another kind.
            TypeError: an unknown argument.
        """
        loss_arguments = _check_keyword_arguments(kwargs, LOSS_ARGUMENTS)
        if (
            labels is None
            and inputs_embeds is None
            and input_ids is not None
            and not output_attentions
            and not output_hidden_states
        ):
            graph = decode_graph(self, input_ids, attention_mask, position_ids, past_key_values)
            if graph is not None:
                self.warn_of_length(graph.cache.length + 1)
                return CausalLMOutputWithPast(logits=graph(input_ids).clone(), past_key_values=past_key_values)  # type: ignore[arg-type]
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class HyloForSequenceClassification(GenericForSequenceClassification, HyloPreTrainedModel):
    """A HyLo model with scores of each sequence, from its last token that is no padding (reward models, classifiers)."""

    accepts_loss_kwargs = False  # read by Trainer: the loss is the batch's mean, without a number of items over batches

    def __init__(self, config: HyloConfig) -> None:
        HyloPreTrainedModel.__init__(self, config)  # transformers' own would look for the backbone by an Auto class
        self.num_labels: int = config.num_labels or 1
        self.model = HyloModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class HyloForTokenClassification(GenericForTokenClassification, HyloPreTrainedModel):
    """A HyLo model with scores of each token (taggers, process reward models); `classifier_dropout` is .1 by default."""

    accepts_loss_kwargs = False

    def __init__(self, config: HyloConfig) -> None:
        HyloPreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels or 1
        self.model = HyloModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class HyloForQuestionAnswering(GenericForQuestionAnswering, HyloPreTrainedModel):
    """A HyLo model with scores of each token as the first and as the last one of an answer in the text."""

    accepts_loss_kwargs = False

    def __init__(self, config: HyloConfig) -> None:
        HyloPreTrainedModel.__init__(self, config)
        self.model = HyloModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
