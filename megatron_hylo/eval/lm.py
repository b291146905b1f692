"""lm-eval's model class for any model of any stage, registered as "hylo".

Faster than lm-eval's own `hf` class where it counts here: prompts are read in batches and pieces, a prompt that several answers
share is read once and its cache copied, logits are computed where they are asked for alone, and decoding is batched.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.open_model import open_model
from megatron_hylo.eval.lm_batches import BatchRunner
from megatron_hylo.eval.lm_decode import Stopper, decode_greedily
from megatron_hylo.eval.lm_reader import PREFILL_TOKENS
from megatron_hylo.eval.lm_score import score_shared, score_tokens
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.platform.distributed import device as default_device

logger = logging.getLogger("megatron_hylo.eval")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
ROWS = {"cuda": 128, "cpu": 32}  # of a batch, at most
TOKENS_PER_GB, CPU_TOKENS = 4096, 16384  # of a batch: by the GPU's memory; on the CPU more is faster to decode alone
LOGITS = {"cuda": 2**28, "cpu": 2**25}  # elements in memory at a time


@dataclass(frozen=True)
class AnswerScore:
    """A model's score of a right answer, each token predicted from the prompt and the answer's tokens before it.

    Args:
        exact: every token is the most likely one, so that greedy decoding would give the answer.
        log_prob: of the answer, in nats.
        correct: by token, whether it is the most likely one.
        log_probs: by token, in nats.
    """

    exact: bool
    log_prob: float
    correct: tuple[bool, ...]
    log_probs: tuple[float, ...]


@register_model("hylo")
class HyloLM(TemplateLM):
    """A model folder, training checkpoint, Hugging Face folder or GGUF file in lm-eval.

    Args:
        pretrained: its path, or a causal LM of transformers.
        tokenizer: of transformers, where `pretrained` is a model.
        dtype: bf16, fp16 or fp32; by default bf16 on GPUs and fp32 on the CPU. A model that is given is taken as it is.
        max_length: tokens of prompt and answer; by default what the model was trained for.
        batch_size: sequences of a batch; "auto": by the memory, halved where it was too much.
        seed: of suites that draw examples.
        prefill_tokens: tokens of a sequence in one pass.
        track: progress display.
        device, max_batch_size: given by lm-eval's command line; the device is this rank's, a batch size stands for both.

    Raises:
        ConfigError: an unknown dtype or batch size, nothing that can be loaded, a model without a tokenizer.
    """

    def __init__(
        self,
        pretrained: str | Path | Any,
        tokenizer: Any = None,
        dtype: str = "auto",
        max_length: int | None = None,
        batch_size: int | str | None = "auto",
        seed: int = 1234,
        prefill_tokens: int = PREFILL_TOKENS,
        track: Track = no_progress,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, (str, Path)):
            here = default_device()
            self.model, self.tokenizer = open_model(pretrained, _dtype(dtype, here))
        else:
            self.model, self.tokenizer = pretrained, tokenizer
        if self.tokenizer is None:
            raise ConfigError("a model that is given needs its tokenizer as well")
        self._device = next(self.model.parameters()).device
        self.seed, self.track, self.prefill_tokens = seed, track, int(prefill_tokens)
        self.max_length: int = int(max_length or resolve_max_length(self.model.config, self.tokenizer))
        self.batch_size = batch_size
        kind = "cuda" if self._device.type == "cuda" else "cpu"
        rows, tokens = ROWS[kind], CPU_TOKENS
        if kind == "cuda":
            tokens = TOKENS_PER_GB * torch.cuda.get_device_properties(self._device).total_memory // 2**30
        if str(batch_size or "auto") != "auto":
            if not str(batch_size).isdecimal() or int(batch_size or 0) < 1:
                raise ConfigError(f"batch_size must be a number of at least 1 or auto, got {batch_size!r}")
            rows, tokens = int(batch_size or 0), 2**62
        self.runner, self.logits_at_once = BatchRunner(tokens, rows), LOGITS[kind]
        if torch.distributed.is_initialized():
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    # --- what lm-eval asks for ---

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text that has no prompt."""
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise text; special tokens as the tokenizer adds them, but none before text that begins with one."""
        if add_special_tokens is None:
            return self._tok_encode_all([string])[0]
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _tok_encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise many texts at once as `tok_encode` does by default, on all cores where the tokenizer can."""
        begun = self.tokenizer.decode(self.prefix_token_id)
        found: list[list[int]] = [[] for _ in texts]
        for special in (True, False):
            numbers = [number for number, text in enumerate(texts) if text.startswith(begun) != special]
            chosen = [texts[number] for number in numbers]
            ids = self.tokenizer(chosen, add_special_tokens=special).input_ids if chosen else []
            for number, row in zip(numbers, ids, strict=True):
                found[number] = row
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a chat in the tokenizer's template; a system's turn is left out where the template refuses it."""
        settings = dict(
            tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )
        try:
            return self.tokenizer.apply_chat_template(chat_history, **settings)
        except TemplateError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return self.tokenizer.apply_chat_template(turns, **settings)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (log-probability, whether greedy decoding gives it) of each continuation of its context."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows, counts = [], []
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)  # requests by what they have in common
        for number, (_, context, continuation) in enumerate(requests):
            row = (context + continuation)[-(self.max_length + 1) :]
            if len(continuation) >= len(row):
                raise ConfigError(
                    f"an answer of {len(continuation)} tokens leaves no room for its prompt in {self.max_length}; give a "
                    f"larger max_length"
                )
            rows.append(row)
            counts.append(len(continuation))
            groups[tuple(row[: -len(continuation)])].append(number)
        alone = [numbers[0] for numbers in groups.values() if len(numbers) == 1]
        found = score_tokens(self, [rows[n] for n in alone], [counts[n] for n in alone], "log-likelihoods")
        for number, (log_probs, greedy) in zip(alone, found):
            results[number] = (float(log_probs.sum()), bool(greedy.all()))
        shared = [(list(prompt), numbers) for prompt, numbers in groups.items() if len(numbers) > 1]
        for number, result in score_shared(self, shared, [row[-count:] for row, count in zip(rows, counts)]).items():
            results[number] = result
        for (text, _, _), result in zip(requests, results):
            if text is not None:  # windows of a long text have none
                self.cache_hook.add_partial("loglikelihood", text, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of each whole text, in windows as lm-eval cuts them."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            parts = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        scored = score_tokens(self, [c + t for _, c, t in windows], [len(t) for _, _, t in windows], "log-likelihoods of texts")
        for owner, (log_probs, _) in zip(owners, scored):
            totals[owner] += float(log_probs.double().sum())
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the greedy continuation of each prompt up to a stop string, the end-of-sequence token or a number of tokens.

        Raises:
            ConfigError: sampling is asked for, or the tokens to generate fill the whole window.
        """
        results = [""] * len(requests)
        limits: list[int] = []
        by_stop: dict[tuple[str, ...], list[int]] = defaultdict(list)  # tasks that stop alike are decoded together
        for number, request in enumerate(requests):
            settings: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], self.max_gen_toks))
            if settings.get("do_sample"):
                raise ConfigError("a task asks for sampling; this class decodes greedily: set do_sample to false")
            limits.append(settings["max_gen_toks"])
            by_stop[tuple(handle_stop_sequences(settings["until"], self.tokenizer.decode(self.eot_token_id)))].append(number)
        for stop, numbers in by_stop.items():
            prompts = self._tok_encode_all([requests[n].args[0] for n in numbers])
            texts = self.continuations(prompts, [limits[n] for n in numbers], list(stop))
            for number, text in zip(numbers, texts):
                results[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return results

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return all ranks' numbers, [ranks]."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor.reshape(-1)) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor.reshape(-1))
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return every rank's object on rank `dst`, None elsewhere."""
        if self.world_size == 1:
            return [obj]
        found: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()

    # --- what our own suites ask for as well ---

    def answers_correct(self, ids: list[list[int]], answer_lengths: list[int]) -> list[AnswerScore]:
        """Score right answers, each token predicted from the right ones before it: one pass over each sequence.

        Args:
            ids: tokens of prompt and answer.
            answer_lengths: how many of the last tokens are the answer.
        """
        return [
            AnswerScore(bool(greedy.all()), float(log_probs.double().sum()), tuple(greedy.tolist()), tuple(log_probs.tolist()))
            for log_probs, greedy in score_tokens(self, ids, answer_lengths, "answers")
        ]

    def token_log_probs(self, ids: list[list[int]]) -> list[Tensor]:
        """Return the log-probability of every token but the first of each sequence, fp32 [tokens - 1], on the CPU."""
        return [log_probs for log_probs, _ in score_tokens(self, ids, [len(row) - 1 for row in ids], "log-probabilities")]

    def continuations(self, prompts: Sequence[list[int]], max_new_tokens: int | Sequence[int], stop: list[str]) -> list[str]:
        """Continue prompts greedily.

        Args:
            prompts: token ids; of one that is too long the end is read, with a warning.
            max_new_tokens: at most, of all or of each.
            stop: texts that end a continuation, and are not part of it.

        Raises:
            ConfigError: the new tokens alone fill the window.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        rooms = [self.max_length - most for most in limits]
        if min(limits, default=1) < 1:
            raise ConfigError(f"need at least one new token a prompt, got {min(limits)}")
        if min(rooms, default=1) < 1:
            raise ConfigError(
                f"{max(limits)} new tokens leave no room for a prompt in {self.max_length}; give a larger max_length"
            )
        if longer := [most for prompt, room, most in zip(prompts, rooms, limits) if len(prompt) > room]:
            logger.warning(
                "%s of %s prompts are longer than %s tokens less %s new ones; their beginnings are cut off",
                len(longer), len(prompts), f"{self.max_length:,}", max(longer),
            )  # fmt: skip
        cut = [prompt[-room:] or [self.prefix_token_id] for prompt, room in zip(prompts, rooms)]
        results = [""] * len(cut)
        stopper = Stopper(self.tokenizer, self.model.generation_config.eos_token_id, stop)

        def work(batch: list[int]) -> None:
            """Continue the prompts of one batch and put the texts, cut at `stop`, in their places."""
            chosen, most = [cut[i] for i in batch], [limits[i] for i in batch]
            new = decode_greedily(self.model, chosen, most, stopper, self._device, self.prefill_tokens, self.track)
            for index, tokens in zip(batch, new):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                results[index] = postprocess_generated_text(text, stop, None)

        self.runner.run([len(prompt) for prompt in cut], work, self.track, "generate", new=limits)
        return results


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
