"""Sampling of many documents at once: rows of one batch, each a stream of documents end to end, one token a step.

A row that has ended a document begins the next one in the next step: the cache's former tokens become padding, recurrent states
zero, positions count from 0 again. So no row waits for the longest document of its batch, and a step has fixed shapes, which
are captured as a CUDA graph. Prompts are read by the same steps, their tokens taking the place of sampled ones.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_hylo.hf import HyloCache, HyloForCausalLM
from megatron_hylo.hf.decode_hylo import DecodeGraph
from megatron_hylo.serve.text_prompts import Draft, Prompts

REPEATED_NGRAM = 8  # tokens; longer ones come twice in a text that repeats itself, seldom in another


def choose_tokens(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Sample one token a row from the most likely ones that hold `top_p` of the probability.

    A token is drawn from all, and kept where those more likely than it hold less than `top_p`; in the few rows where they do
    not it is drawn again from the sorted tokens. Both together are the distribution wanted, without sorting all rows.

    Args:
        logits: [rows, vocabulary].
        temperature: divides the logits; 0 takes the most likely token.
        top_p: above 0 and at most 1.
        generator: source of randomness.

    Returns:
        int64 [rows].
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    drawn = _draw(probabilities, generator)
    if top_p == 1:
        return drawn
    likelier = torch.where(probabilities > probabilities.gather(1, drawn[:, None]), probabilities, 0.0).sum(-1)
    outside = (likelier >= top_p).nonzero()[:, 0]
    if len(outside):
        ordered, ids = probabilities[outside].sort(dim=-1, descending=True, stable=True)
        kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
        drawn[outside] = ids.gather(1, _draw(kept, generator)[:, None])[:, 0]
    return drawn


def _draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index a row in proportion to weights [rows, choices]: the smallest of exponential times of these rates."""
    times = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / times).argmax(-1)


class RestartableRows:
    """One-token passes of a model over a batch whose rows begin anew one by one.

    Args:
        model: in eval mode; rows of its cache are tokens of any mixer, or states.
        rows: of the batch.
        columns: tokens that a row reads in all.
    """

    def __init__(self, model: HyloForCausalLM, rows: int, columns: int) -> None:
        self.model, self.cache = model, model.new_cache(rows, columns)
        self.first = torch.zeros(rows, dtype=torch.int64, device=model.device)  # column of the present document's first token
        self.graph: DecodeGraph | None = None

    @torch.no_grad()
    def read(self, tokens: np.ndarray, begin: np.ndarray) -> Tensor:
        """Read one token a row.

        Args:
            tokens: int64 [rows].
            begin: bool [rows], rows whose token is the first of a document.

        Returns:
            logits [rows, vocabulary], overwritten by the next call.
        """
        ids = torch.from_numpy(tokens).to(self.model.device)[:, None]
        if self.graph is None:
            logits = self.model(ids, past_key_values=self.cache).logits
            self.cache.padding = torch.ones_like(
                ids, dtype=torch.bool
            )  # a mask from the start: a captured pass keeps its shape
            assert self.cache.last_position is not None, "a token was read"
            self.cache.last_position = self.cache.last_position.expand(len(ids), 1).clone()
            self.graph = DecodeGraph(self.model, self.cache, compiles=False)
        else:
            if begin.any():
                self._restart(torch.from_numpy(begin).to(ids.device))
            logits = self.graph(ids)
        return logits[:, -1]

    def _restart(self, rows: Tensor) -> None:
        """Forget all that these rows, bool [rows], have read."""
        cache: HyloCache = self.cache
        assert cache.last_position is not None
        self.first = torch.where(rows, cache.length, self.first)
        cache.padding = torch.arange(cache.length, device=rows.device) >= self.first[:, None]
        cache.last_position = torch.where(rows[:, None], -1, cache.last_position)
        chosen = rows.nonzero()[:, 0]
        for states in cache.states.values():
            for state in states:
                state[chosen] = 0  # in place: a captured graph has their addresses


def sample_documents(
    model: HyloForCausalLM,
    prompts: Prompts,
    rows: int,
    columns: int,
    temperature: float,
    top_p: float,
    vocabulary: int,
    seed: tuple[int, ...],
    each_step: Callable[[int], None] = lambda step: None,
) -> Iterator[Draft]:
    """Sample documents until every row has read `columns` tokens; a function of its arguments, the device and its kernels.

    Args:
        model: in eval mode.
        prompts: what documents begin with.
        rows: of the batch.
        columns: tokens of a row, prompts and the token before each document included; no document is longer.
        temperature, top_p: as in `choose_tokens`.
        vocabulary: ids of the tokenizer; the model's further ones are not sampled.
        seed: decides prompts and tokens.
        each_step: called after each step with the number of steps done.

    Yields:
        Documents, row by row in the order they were begun in; the last of a row may be cut off.
    """
    random = np.random.default_rng(seed)
    generator = torch.Generator(model.device).manual_seed(int(np.random.default_rng([*seed, 1]).integers(2**62)))
    batch = RestartableRows(model, rows, columns)
    present = [prompts.begin(random) for _ in range(rows)]
    finished: list[list[Draft]] = [[] for _ in range(rows)]
    tokens = np.array([draft.forced.popleft() for draft in present])
    begin = np.ones(rows, bool)
    for column in range(columns):
        logits = batch.read(tokens, begin)[:, :vocabulary]
        begin = np.zeros(rows, bool)
        sampled = choose_tokens(logits, temperature, top_p, generator).tolist()
        for row, (draft, token) in enumerate(zip(present, sampled)):
            if not draft.forced and prompts.take(draft, token):
                finished[row].append(draft)
                draft = present[row] = prompts.begin(random)
                begin[row] = True
            tokens[row] = draft.forced.popleft() if draft.forced else token
        each_step(column + 1)
    for drafts, last in zip(finished, present):
        yield from drafts
        yield last


def repetition(ids: list[int]) -> float:
    """Part of a text's 8-grams that came before in it: 0 for one without repetition, nearly 1 for a loop."""
    if len(ids) <= REPEATED_NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(np.asarray(ids, np.uint64), REPEATED_NGRAM)
    hashes = grams @ np.random.default_rng(0).integers(2**64, size=REPEATED_NGRAM, dtype=np.uint64)  # modulo 2^64
    return 1 - len(np.unique(hashes)) / len(hashes)
