"""The model: Megatron-Core's HybridModel that stops at hidden states, so that losses can be computed in chunks."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_hylo.config import Fp8, ModelConfig, ParallelConfig, recomputed_layers
from megatron_hylo.config.layouts import pipeline_pattern
from megatron_hylo.models.fp8 import check_fp8, check_fp8_widths
from megatron_hylo.models.padded_vocabulary import clear_padding, padded_vocabulary, without_padding
from megatron_hylo.models.placement import weights_device
from megatron_hylo.models.recompute import FeedForwardLayer, MixerLayer
from megatron_hylo.models.specs import BackendName, get_backend, hybrid_stack_spec, megatron_pattern
from megatron_hylo.models.transformer_config import build_transformer_config
from megatron_hylo.parallel.context import group_of_one
from megatron_hylo.parallel.documents import EqualWindows, Packed, PackedDocuments, batch_first

VOCABULARY_PARAMETERS = ("embedding.word_embeddings.weight", "output_layer.weight")  # a row a token


class HyloModel(HybridModel):
    """One rank's chunk of a teacher or a hybrid."""

    def forward(self, input_ids: Tensor | None, documents: PackedDocuments | None = None, **_: object) -> Tensor:
        """Hidden states after the last norm (on the last pipeline stage), before the output head.

        Args:
            input_ids: int64 [batch, sequence]; needed on the first pipeline stage only.
            documents: of a packed sequence, batch 1.

        Returns:
            [sequence (/ TP with sequence parallelism), batch, hidden].
        """
        hidden: Tensor | None = None
        packed: Packed = documents
        if self.pre_process:
            assert input_ids is not None, "the first pipeline stage needs input_ids"
            hidden, packed = self.embed(input_ids, documents)
        out = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)
        return batch_first(out, packed).transpose(0, 1) if isinstance(packed, EqualWindows) else out

    def embed(self, input_ids: Tensor, documents: PackedDocuments | None = None) -> tuple[Tensor, Packed]:
        """Embed tokens; returns hidden states and the first layer's `packed_seq_params`.

        Windows are laid end to end where a rank has all tokens of each and all layers.

        Args:
            input_ids: int64 [batch, sequence].
            documents: of a packed sequence, batch 1.

        Returns:
            [sequence (/ TP with sequence parallelism), batch, hidden] or [batch * sequence, 1, hidden].
        """
        c = self.config
        packed: Packed = documents
        divided = c.sequence_parallel or c.context_parallel_size > 1 or c.pipeline_model_parallel_size > 1
        if documents is None and len(input_ids) > 1 and not divided:
            input_ids, packed = input_ids.flatten().unsqueeze(0), EqualWindows(len(input_ids))
        return self.embedding(input_ids=input_ids, position_ids=None), packed

    def head_weight(self) -> Tensor:
        """Output head's rows on this rank: [vocab / TP rounded up, hidden]; the embedding where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states: [sequence, batch, hidden] -> [batch, sequence, vocab]. For short inputs."""
        weight = self.head_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        whole = gather_from_tensor_model_parallel_region(logits)[..., : self.config.hylo.vocab_size]
        return whole.transpose(0, 1).contiguous()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Embedding and head without padding, so that any tensor-parallel size can load them."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in VOCABULARY_PARAMETERS:
            if (key := prefix + name) in state:
                state[key] = without_padding(state[key], self.config.hylo.vocab_size)
        return state

    def mixer_layers(self) -> list[tuple[MixerLayer, FeedForwardLayer]]:
        """Pairs (mixer layer, MLP layer) of this pipeline stage, in order."""
        layers = list(self.decoder.layers)
        return list(zip(layers[0::2], layers[1::2]))


def build_model(config: ModelConfig, parallel: ParallelConfig | None = None, **settings: Any) -> HyloModel:
    """Build a model that has one chunk on each rank (no virtual pipeline stages); arguments as of `build_chunks`."""
    (model,) = build_chunks(config, parallel, **settings)
    return model


def build_chunks(
    config: ModelConfig,
    parallel: ParallelConfig | None = None,
    params_dtype: torch.dtype = torch.float32,
    backend: BackendName = "auto",
    recompute: bool | str = False,
    fp8: Fp8 | None = None,
    initialize: bool = True,
) -> list[HyloModel]:
    """Build this rank's part of a model with random weights, a chunk a virtual pipeline stage; after `platform.initialize`.

    Args:
        config: architecture.
        parallel: sizes of the parallel groups, as given to `initialize`; with `context_parallel_size` 1 under more
            context-parallel ranks each of them reads sequences of its own.
        params_dtype: torch.float32 or torch.bfloat16; A_log, dt_bias and D stay fp32.
        backend: where linear maps and SwiGLU come from.
        recompute: compute activations again in the backward pass: of all layers, or of those with these symbols.
        fp8: linear maps compute in FP8: "e4m3" in a frozen model, "hybrid" in one that is trained; see models/fp8.py.
        initialize: draw the weights; False where all of them are loaded next, until when they hold what the memory held.

    Raises:
        ConfigError: heads that tensor parallelism does not divide; more pipeline stages than layers; a symbol of
            no layer; FP8 where it cannot run, or with widths it does not take.
    """
    if fp8:
        check_fp8(backend)
    parallel = parallel or ParallelConfig()
    chosen, pattern = get_backend(backend), pipeline_pattern(config, parallel.pipeline_stages, parallel.pipeline_layers)
    spec, fused = hybrid_stack_spec(chosen), chosen.activation is not None
    layers = recomputed_layers(recompute)
    transformer_config = build_transformer_config(config, parallel, params_dtype, layers, fp8, fused, initialize)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if parallel.context_parallel_size == 1 < groups.cp.size():
        groups.cp = group_of_one()
    chunks = []
    for index in range(parallel.virtual_pipeline_model_parallel_size):
        stage = index if parallel.virtual_pipeline_model_parallel_size > 1 else None
        chunk = HyloModel(
            transformer_config,
            spec,
            vocab_size=padded_vocabulary(config.vocab_size, parallel.tensor_model_parallel_size),
            max_sequence_length=config.max_position_embeddings,
            hybrid_layer_pattern=megatron_pattern(pattern),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
            position_embedding_type="none",
            pg_collection=groups,
            vp_stage=stage,
        )
        clear_padding([p for name, p in chunk.named_parameters() if name in VOCABULARY_PARAMETERS], config.vocab_size)
        chunks.append(chunk.cuda() if torch.cuda.is_available() and weights_device().type == "cuda" else chunk)
        if fp8:
            check_fp8_widths(chunk, fp8)
    return chunks
