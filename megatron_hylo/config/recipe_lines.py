"""Lines of a recipe: every key of a stage's YAML with its value, unit and source."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layouts import BASES, NamedLayout
from megatron_hylo.config.mixers import MIXERS
from megatron_hylo.config.mlps import EXPERTS_SYMBOL, MLP_SYMBOL
from megatron_hylo.config.recipe_families import FAMILIES, SCRIPTED, STAGES, Family
from megatron_hylo.config.teacher_window import FAR, own_window

COMMENT_COLUMN = 36


def row(setting: str, comment: str) -> str:
    """One key with its comment, which begins at a fixed column where the key leaves room."""
    return f"{setting:<{COMMENT_COLUMN}}# {comment}" if len(setting) < COMMENT_COLUMN else f"{setting}  # {comment}"


def number(value: int) -> str:
    """An integer as YAML, with underscores from seven digits on."""
    return f"{value:_}" if value >= 1_000_000 else str(value)


def said(words: str, source: str) -> str:
    """Join words and their source: behind a semicolon, unless it is in brackets."""
    return f"{words}{' ' if source.startswith('[') else '; '}{source}"


@dataclass(frozen=True)
class Recipe:
    """One recipe, line by line.

    Args:
        layout: the hybrid.
        stage: a key of `STAGES`.
        name: of the recipe's file, without its stage.
    """

    layout: NamedLayout
    stage: str
    name: str

    @property
    def family(self) -> Family:
        """Hyperparameters of the base."""
        return FAMILIES[self.layout.base]

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        return STAGES[self.stage]

    @property
    def align(self) -> bool:
        """Whether this is stage 1."""
        return self.stage == "stage1_ild"

    @property
    def small(self) -> bool:
        """Whether sizes are those measured on one GPU rather than HyLo's on eight."""
        return self.family.gpus == 1

    @property
    def long(self) -> bool:
        """Whether this is stage 3."""
        return self.stage.startswith("stage3")

    @property
    def tensor_parallel(self) -> int:
        """Ranks that share each layer: two from 64K on, where that divides the heads of all its mixers."""
        config = self.layout.config
        counts = [n for m in set(config.mixers) for n in MIXERS[m].tensor_parallel_counts(config).values()]
        return 2 if self.length >= 65536 and not self.small and not any(n % 2 for n in counts) else 1

    @property
    def context_parallel(self) -> int:
        """Ranks that share each sequence: two from 64K on where tensor parallelism cannot."""
        return 2 if self.length >= 65536 and not self.small and self.tensor_parallel == 1 else 1

    @property
    def yarn_from(self) -> int:
        """Tokens that the student's YaRN stretches: with teacher shapes, which keep its frequencies, the base's window."""
        return own_window(self.base) if self.layout.shapes == "teacher" else self.family.yarn_from

    @property
    def base(self) -> ModelConfig:
        """Configuration of the base model."""
        return BASES[self.layout.base]

    @property
    def teacher_reads(self) -> int:
        """Tokens of the window of the teacher of stages 2 and 3."""
        return own_window(BASES[self.family.teacher[1]])

    def lines(self) -> Iterator[str]:
        """All lines of the file."""
        yield from self._head()
        yield ""
        yield from self._work()
        yield ""
        yield from self._learning()
        yield ""
        yield from self._where()
        yield ""
        yield from self._records()

    def _head(self) -> Iterator[str]:
        family, long = self.family, f"{self.length // 1024}K"
        each = f"{self.family.gpus} GPUs" if family.gpus > 1 else "One GPU"
        ranks = [f"{n} {what}" for n, what in ((self.tensor_parallel, "tensor"), (self.context_parallel, "context")) if n > 1]
        ranks += [f"{family.gpus // (self.tensor_parallel * self.context_parallel)} data parallel"] if ranks else []
        node = ("1 node of " if family.gpus > 1 else "") + each + (f": {' x '.join(ranks)}" if ranks else "")
        if self.align:
            loss = "layer alignment" if self.small else "Enhanced ILD"
            yield f"# Stage 1, {loss}, {family.title}: every mixer of a hybrid learns its teacher layer's output."
            yield f"# MODEL: `hylo upcycle` of the base (any layout). TEACHER: the base model itself. {node}."
        elif self.stage == "stage2_ctx8k":
            taught = "larger teacher's" if family.teacher[1] != self.layout.base else "teacher's"
            yield f"# Stage 2, distillation at 8K, {family.title} hybrid: the aligned student learns a {taught} distribution."
            yield f"# MODEL: result of stage 1. TEACHER: {family.teacher[0]}. {node}."
        elif self.length == 65536 and not self.small:
            yield f"# Stage 3, distillation at 64K, {family.title} hybrid."
            yield "# MODEL: result of stage 1: HyLo's 64K configuration reads the aligned models, not the 8K result. Its prose"
            yield "# says 2K -> 8K -> 64K; for that curriculum give stage 2's result instead."
            yield f"# TEACHER: {family.teacher[0]}. {node}."
        else:
            what = "HyLo's stage at one GPU's sizes" if self.small else "HyLo's 64K recipe at a length that it did NOT train"
            yield f"# Stage 3 at {long}, {family.title} hybrid: {what}."
            yield "# MODEL: result of a shorter stage."
            yield f"# TEACHER: {family.teacher[0]}. {node}."
        yield "# Sources: [HyLo] arXiv:2604.24715, its AMD ROCm blog of 22 Sep 2026 and the model cards amd/HyLo-*; [Zebra] the"
        yield "# code of its parent Zebra-Llama, which HyLo builds on; [recall] benchmarks/results/recall.md; else our choice."
        script = f" (slurm/{self.stage}.sh does)" if self.stage in SCRIPTED else ""
        yield f"# Paths are not here: give --model, --teacher, --data and --output{script}. Any key can be"
        yield "# overridden on the command line, e.g. --train_tokens 1000000 --optimizer.lr 1e-4."

    def _sequences(self) -> tuple[int, str]:
        """Sequences a step, and where the number comes from."""
        if self.small:
            few = (8, "16,384 tokens a step, as examples/smollm2/run.sh") if self.align else self.family.sequences_8k
            return few if self.length <= 8192 else (1, "the fewest; measured at 32K [recall]")
        if self.align:
            return 96, "HyLo does not state it, Zebra's is 12 on each of 8 GPUs"
        if self.length == 8192:
            return self.family.sequences_8k
        if self.length == 65536:
            return 8, "[HyLo], 1 on each of its 8 GPUs"
        return 8 * 65536 // self.length, "our choice: as many tokens a step as HyLo's 8 x 65536"

    def _work(self) -> Iterator[str]:
        if self.align:
            yield row("stage: align", "distances of layer and mixer outputs, each layer fed the teacher's state [HyLo]")
        else:
            whole = "KL(teacher || student), whole vocabulary, temperature 1 [HyLo], on all tokens [Zebra]"
            yield row("stage: distil", whole)
        yield ""
        paper = "[HyLo]" if self.length in (2048, 8192, 65536) else "our choice, HyLo's longest is 65536"
        yield row(f"sequence_length: {self.length}", said("tokens", paper))
        if not self.align:
            yield row("recall:", "facts and questions inserted in the text")
            past = self.length > self.teacher_reads
            share, weight, where, heavy = (0.3, 10.0, "past", "so much") if past else (0.2, 1.0, "inside", "10")
            best = f"as the best run at 135M {where} a teacher's window"
            yield row(f"  share: {share}", f"part of a window's tokens, {best} [recall]; HyLo: 0")
            yield row(
                f"  answer_weight: {weight}",
                f"of an answer token's cross-entropy; {heavy} is good past that window alone [recall]",
            )
            yield row("  kl_within: 0", "an answer has a KL where its fact is so near, in tokens; 0: none has, better [recall]")
        yield row("text:", "what a window is made of")
        if self.long:
            yield row("  packing: best_fit", "whole documents where they fit, so that few long ones are cut; our choice")
            yield row("  long_share: 0.5", "part of the windows of documents that fill one, where there are any; our choice")
        else:
            yield row("  packing: stream", "documents end to end and cut: TRL's constant-length packing [HyLo]")
            yield row("  long_share: null", "part of the windows of documents that fill one; null: as many as the text has")
        yield row("packed_documents: false", "documents of a window see each other [HyLo]")
        sequences, source = self._sequences()
        yield row(f"global_batch_size: {sequences}", said("sequences a step", source))
        if self.align:
            micro = sequences if self.small else 12
            yield row(
                f"micro_batch_size: {micro}", "sequences a forward pass of one rank [Zebra]; fewer: less memory, same result"
            )
        else:
            source = "[HyLo]" if self.length == 65536 else "our choice: least memory, same result"
            yield row("micro_batch_size: 1", said("sequences a forward pass of one rank", source))
        if self.small:
            tokens = 600_000 if self.align else {32768: 10_000_000, 65536: 14_000_000}.get(self.length, 4_000_000)
            source = "as examples/smollm2/run.sh" if self.align else "tokens, measured [recall]"
        elif self.align:
            tokens, source = 2_000_000_000, "HyLo: 20% of the mix; about 10 B overall, no split by stage: we take 20% of 10 B"
        elif self.length in (8192, 65536):
            tokens, source = 8_000_000_000, "tokens; HyLo: about 10 B overall, no split by stage: stage 1's 2 B + 8 B here"
        else:
            tokens, source = 8_000_000_000, "tokens; our choice: as at 64K (10 B overall, less stage 1's 2 B)"
        yield row(f"train_tokens: {number(tokens)}", source)

    def _learning(self) -> Iterator[str]:
        small = self.small
        yield row("trainable: all", "all or mixers; everything, MLPs included [Zebra]")
        yield row("optimizer:", "fp32 master weights; HyLo states lr and warmup, Zebra uses HF Trainer defaults")
        yield row("  name: adamw", "or muon, which needs use_distributed_optimizer: false; see docs/training.md")
        lr = self.family.lr
        if self.align:
            lr = ("1.0e-3", "as examples/smollm2/run.sh") if small else ("2.0e-4", "[HyLo] (for an 8B base 1e-4 [Zebra])")
        elif self.length > 65536 and not small:
            lr = (lr[0], "our choice: HyLo's at 64K, since a step has as many tokens")
        yield row(f"  lr: {lr[0]}", said("peak rate", lr[1]))
        if small:
            mixers = ("null", "null: lr") if self.align else ("7.0e-4", "measured [recall]")
        else:
            mixers = ("null", "null: lr, one rate for all [HyLo]")
        yield row(f"  mixer_lr: {mixers[0]}", f"peak rate of the token mixers alone; {mixers[1]}")
        if small:
            yield row("  min_lr_ratio: 0.05", "final / peak rate of the cosine [recall]")
            yield row("  warmup_ratio: 0.05", "part of the steps [recall]")
        else:
            yield row("  min_lr_ratio: 0.0", "final / peak rate; the cosine ends at 0 in Hugging Face's Trainer [Zebra]")
            yield row("  warmup_ratio: 0.01", "part of the steps [HyLo]")
        yield row("  weight_decay: 0.0", "Trainer default [Zebra]")
        yield row("  adam_beta1: 0.9", "Trainer default [Zebra]; HyLo does not state it")
        if small:
            yield (
                row("  adam_beta2: 0.95", "as examples/smollm2/run.sh")
                if self.align
                else row("  adam_beta2: 0.98", "for few steps [recall]")
            )
        else:
            yield row("  adam_beta2: 0.999", "Trainer default [Zebra]; HyLo does not state it")
        yield row("  adam_eps: 1.0e-8", "Trainer default [Zebra]")
        yield row("  clip_grad: 1.0", "largest global gradient norm; Trainer default [Zebra]")
        yield row("  use_distributed_optimizer: true", "state sharded over data-parallel ranks; for HyLo's FSDP FULL_SHARD")
        yield row("precision: bf16", "[HyLo]")
        yield from self._positions()
        if self.align:
            yield row("align:", "loss of stage align, see megatron_hylo/distill/alignment.py")
            if small:
                yield row("  loss: mse", "error of the mixers' outputs; or ild, sequential; as examples/smollm2/run.sh")
            else:
                yield row("  loss: ild", "Enhanced ILD [HyLo]; or mse, sequential: see megatron_hylo/distill/alignment.py")
                yield row("  hidden_weight: 1.0", "weight of the layer-output term; 1:1 [Zebra]")
                yield row("  mixer_weight: 1.0", "weight of the mixer-output term; 1:1 [Zebra]")
            yield row("loss_chunk_tokens: 1024", "tokens whose logits exist at a time, in evaluation only; our choice")
            yield row("recompute: false", "one layer's activations exist at a time anyway; our choice")
            return
        yield row("distil:", "loss of the output head, see megatron_hylo/distill/head_loss.py")
        best = "1.0 in the best run at 135M from 8K on [recall]"
        yield row("  ce_weight: 0.0", f"weight of cross-entropy, KL's is 1 [HyLo]; {best}")
        if self.long:
            yield row("loss_chunk_tokens: 1024", "tokens whose logits exist at a time; our choice: spares memory, same result")
        else:
            yield row("loss_chunk_tokens: 4096", "tokens whose logits exist at a time [HyLo, its chunked KL]")
        if small and self.length <= 32768:
            yield row("recompute: false", "recompute activations in the backward pass; our choice: they fit")
        elif self.long:
            spared = "layers that compute again in the backward pass, all but MLA [HyLo, at 64K: all]; our choice"
            yield row(f"recompute: GM{EXPERTS_SYMBOL if self.base.has_experts else MLP_SYMBOL}", spared)
        else:
            yield row("recompute: true", "recompute activations in the backward pass [HyLo, at 64K]")

    def _positions(self) -> Iterator[str]:
        """The student's YaRN, and how the teacher reads what is longer than its window."""
        original, teacher = self.yarn_from, self.teacher_reads
        calibrated = self.layout.shapes == "teacher"
        source = "our choice, for teacher shapes" if calibrated else "[HyLo]"
        if self.align and not calibrated and original == self.length:
            yield row("rope_scaling: null", "HyLo's YaRN factor is length / 2048 = 1; Llama-3's own scaling dropped [Zebra]")
        elif self.length <= original:
            yield row("rope_scaling: null", f"of MLA's rotary channels: none up to {original} tokens; {source}")
        else:
            yield row("rope_scaling:", "of MLA's rotary channels; linear layers have no positions")
            kept = f"base {self.base.rotary_base:.0f} kept"
            dropped = ", Llama-3's own scaling dropped [Zebra]" if "llama3" in self.layout.base else ""
            yield row("  rope_type: yarn", f"[HyLo]; {kept}{dropped}")
            rule = source if self.length in (8192, 65536) or calibrated else f"[HyLo]'s rule: length / {original}"
            yield row(f"  factor: {self.length / original:.1f}", said(f"{self.length} / {original}", rule))
            yield row(f"  original_max_position_embeddings: {original}", said("tokens", source))
            yield row("  beta_fast: 32.0", "rotations over the original length above which a frequency stays [Zebra]")
            yield row("  beta_slow: 1.0", "rotations below which it is divided by factor [Zebra]")
            yield row("  attention_factor: null", "multiplier of cos and sin; null: 0.1 ln(factor) + 1 [Zebra]")
        if self.align:
            return
        if self.length <= teacher:
            yield row("teacher_window:", f"how the teacher reads what is longer than its window of {teacher} tokens")
            yield row("  mode: none", "no sequence is longer; windows where one is [recall]")
            return
        yield row("teacher_window:", f"how the teacher reads more than its window of {teacher} tokens")
        stretched = "teach little" if self.length > FAR * teacher else "find no more passkeys"
        yield row("  mode: windows", f"overlapping ones; stretched positions (rope) {stretched} [recall]")
        yield row("  length: null", "tokens of one; null: the teacher's window")

    def _where(self) -> Iterator[str]:
        tensor, context = self.tensor_parallel, self.context_parallel
        yield row("parallel:", "ranks a copy of the model is divided over; what is left over is data parallel")
        if tensor > 1:
            heads = "; 4 and 8 do not divide the 6 GDN heads" if self.layout.config.linear_num_heads == 6 else ""
            why = f"our choice: halves activations{heads}"
        else:
            why = "our choice: the models fit one GPU" if self.align else "our choice: both models fit one GPU"
        yield row(f"  tensor_model_parallel_size: {tensor}", f"ranks; {why}")
        yield row("  pipeline_model_parallel_size: 1", "ranks that share the layers; our choice")
        yield row("  virtual_pipeline_model_parallel_size: 1", "parts of the layers on each of them, interleaved; our choice")
        yield row("  pipeline_layers: null", "layers of each part, e.g. [10, 6]; null: about as many weights in each")
        halves = "; our choice: halves activations, whatever the heads" if context > 1 else "; our choice"
        yield row(f"  context_parallel_size: {context}", f"ranks that share each sequence in equal parts{halves}")
        yield row("  cp_comm_type: auto", "what those ranks exchange: a2a, all_gather, or auto (docs/parallelism.md)")
        experts, why = (self.family.gpus, "; our choice: the fewest on each") if self.base.has_experts else (1, "")
        yield row(f"  expert_model_parallel_size: {experts}", f"ranks that have different experts of a mixture{why}")
        if tensor > 1:
            halves = "norms and residuals split over the sequence: halves what recompute keeps; our choice"
            yield row("  sequence_parallel: true", halves)
        else:
            yield row("  sequence_parallel: false", "norms and residuals split over the sequence; needs tensor parallelism")
        minutes = "our choice: hashing a teacher and autotuning kernels at the first step take minutes"
        yield row("  distributed_timeout_minutes: 30.0", minutes)
        yield row("backend: auto", "Transformer Engine where it is installed, else torch; our choice")

    def _records(self) -> Iterator[str]:
        every, windows = {"stage1_ild": (1000, 32), "stage2_ctx8k": (1000, 32), "stage3_ctx32k": (500, 32)}.get(
            self.stage, (500, 2**20 // self.length)
        )
        saved = 500 if self.align else 100 if self.long else 250
        if self.small:
            every, saved = 0, 25
        yield row("seed: 42", "decides the order of the data; Trainer default [Zebra]")
        yield row("max_skipped_steps: 3", "steps in a row, left out for NaN or infinity, before the run ends; our choice")
        yield row(f"eval_interval: {every}", "steps between held-out evaluations (0: only at the end); our choice")
        yield row(f"eval_windows: {windows}", "held-out windows of sequence_length tokens; our choice")
        yield row("checkpoint:", "written so that a stopped run can go on")
        yield row(f"  save_interval: {saved}", "steps between checkpoints, besides those at a stop signal; our choice")
        yield row("  keep: 2", "newest ones kept: a spare, should the newest be damaged later; our choice")
        yield row("  async_save: true", "write them while training goes on; takes host memory for a rank's part")
        yield row("logging:", "besides OUTPUT/metrics.jsonl")
        yield row(f"  log_interval: {5 if self.long else 10}", "steps between lines of the log; our choice")
        yield row("  tensorboard: true", "OUTPUT/tensorboard; our choice")
        yield row("  wandb: disabled", "disabled, offline or online; our choice: nothing leaves the cluster unasked")
        yield row("  wandb_project: megatron_hylo", "name of the project there; our choice")
        yield row("profile:", "of time on CPU and GPU, for Perfetto")
        yield row("  start_step: 10", "first step of a torch.profiler trace; our choice: kernels are compiled by then")
        yield row("  steps: 0", "steps of the trace, one file a rank in OUTPUT/profile; 0: none")
