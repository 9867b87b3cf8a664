"""Greedy and beam search over any engine that computes the next token's logits, in numpy alone.

The rules are those of transformers' generate() without sampling, length penalty 1; tests/unit/harness/test_decoding.py
holds the tokens to it. Engines that have a search of their own (models.gptj, serving engines) do not need this.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fleet.harness.interfaces import Generation

Tokens = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

NEVER = np.float32(-1e9)
"""The score of what must not win, finite as in transformers' search: infinities would make NaN of differences."""


class Step(Protocol):
    """One pass of a decoder; a row is one text that is being written."""

    def __call__(
        self,
        tokens: Tokens,
        attention_mask: Tokens,
        position_ids: Tokens,
        cache: Any | None,
        reorder: Tokens | None,
    ) -> tuple[Scores, Any]:
        """The logits of the next token, float32 [rows, vocabulary], and the cache that the next call gets.

        `tokens` and `position_ids` are [rows, new]; `attention_mask` is [rows, total], 0 for the padding on the left
        and 1 for all other tokens, cached and new. The first call has the prompts, one row each, and no cache. Each
        later one has one token a row; `reorder` [rows] says which row of the call before each row continues, or is
        None when all continue themselves. It spreads a prompt over its beams after the first call, so that prompts
        are computed once, and leaves out the rows of finished prompts, so rows get fewer.
        """


def generate(step: Step, prompts: Sequence[Tokens], generation: Generation, *, vocab_size: int) -> list[Tokens]:
    """The new tokens int64 [count] of each prompt, an end token among them where one came, no padding.

    Raises ValueError for a prompt that is empty or of another vocabulary, and for logits of a wrong shape.
    """
    for prompt in prompts:
        if not len(prompt):
            raise ValueError("a prompt of no tokens")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            wrong = int(prompt.min() if prompt.min() < 0 else prompt.max())
            raise ValueError(f"token {wrong} is none of the model's {vocab_size}: vocabulary and weights do not match")
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    padding = longest - lengths
    tokens = np.full((len(prompts), longest), generation.pad_token_id, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, padding[row] :] = prompt
    mask = (np.arange(longest + generation.max_new_tokens) >= padding[:, None]).astype(np.int64)
    positions = np.maximum(np.arange(longest) - padding[:, None], 0)
    search: _Greedy | _BeamSearch
    search = _Greedy(len(prompts), generation) if generation.beams == 1 else _BeamSearch(len(prompts), generation)
    answers = [np.empty(0, dtype=np.int64) for _ in prompts]
    waiting = np.arange(len(prompts))
    rows, reorder, cache = waiting, None, None
    for made in range(generation.max_new_tokens if len(prompts) else 0):
        logits, cache = step(tokens, mask[rows, : longest + made], positions, cache, reorder)
        if logits.shape != (len(rows), vocab_size):
            raise ValueError(f"logits of shape {list(logits.shape)} where [{len(rows)}, {vocab_size}] were expected")
        parents, following, done = search.advance(logits.astype(np.float32, copy=False), made)
        for place in np.flatnonzero(done).tolist():
            answers[waiting[place]] = search.answer(place)
        going = ~done
        if not going.any():
            break
        search.keep(going)
        waiting = waiting[going]
        reorder = parents[going].reshape(-1)
        if np.array_equal(reorder, np.arange(len(rows))):
            reorder = None
        rows = np.repeat(waiting, generation.beams)
        tokens, positions = following[going].reshape(-1, 1), (lengths[rows] + made)[:, None]
    return answers


class _Greedy:
    """The likeliest token each time."""

    def __init__(self, prompts: int, generation: Generation) -> None:
        self._generation = generation
        self._ends = np.array(generation.eos_token_ids, dtype=np.int64)
        self._written = np.empty((prompts, 0), dtype=np.int64)

    def advance(self, logits: Scores, made: int) -> tuple[Tokens, Tokens, npt.NDArray[np.bool_]]:
        """From logits [rows, vocabulary]: rows to go on from and tokens [prompts, 1], and which prompts are done."""
        tokens = _without_ends(logits, self._ends, made < self._generation.min_new_tokens).argmax(axis=-1)[:, None]
        self._written = np.concatenate([self._written, tokens], axis=1)
        done = np.isin(tokens[:, 0], self._ends) | (made + 1 >= self._generation.max_new_tokens)
        return np.arange(len(tokens))[:, None], tokens, done

    def answer(self, place: int) -> Tokens:
        """What was written for a prompt that is done."""
        answer: Tokens = self._written[place].copy()
        return answer

    def keep(self, going: npt.NDArray[np.bool_]) -> None:
        """Drop the prompts that are done."""
        self._written = self._written[going]


class _BeamSearch:
    """Beam search as transformers' _beam_search.

    Of the best candidates those that end are finished if they are among the best `beams`, the others go on; finished
    ones are ranked by their score per token.
    """

    def __init__(self, prompts: int, generation: Generation) -> None:
        beams = generation.beams
        self._generation = generation
        self._ends = np.array(generation.eos_token_ids, dtype=np.int64)
        # Enough that `beams` go on even when the others end.
        self._kept = max(2, 1 + len(self._ends)) * beams
        self._scores = np.full((prompts, beams), NEVER)
        self._scores[:, 0] = 0.0  # all beams are one as yet
        self._written = np.zeros((prompts, beams, generation.max_new_tokens), dtype=np.int64)
        self._finished = np.zeros((prompts, beams), dtype=np.bool_)
        self._finished_scores = np.full((prompts, beams), NEVER)
        self._finished_lengths = np.zeros((prompts, beams), dtype=np.int64)
        self._finished_written = np.zeros_like(self._written)

    def advance(self, logits: Scores, made: int) -> tuple[Tokens, Tokens, npt.NDArray[np.bool_]]:
        """As _Greedy's, with [prompts, beams]; the first logits have one row a prompt."""
        wanted, (prompts, beams) = self._generation, self._scores.shape
        scores = _without_ends(_log_softmax(logits), self._ends, made < wanted.min_new_tokens)
        # The best of all beams are among the best of each: short rows are sorted instead of a long one.
        tokens = _best(scores, self._kept)
        scores = np.take_along_axis(scores, tokens, axis=-1)
        each = tokens.shape[-1]
        shape = (prompts, beams, each)
        rows = len(logits) // prompts
        tokens = np.broadcast_to(tokens.reshape(prompts, rows, each), shape).reshape(prompts, -1)
        scores = (np.broadcast_to(scores.reshape(prompts, rows, each), shape) + self._scores[..., None]).reshape(
            prompts, -1
        )
        chosen = _best(scores, self._kept)
        best, tokens = np.take_along_axis(scores, chosen, axis=1), np.take_along_axis(tokens, chosen, axis=1)
        parents = chosen // each
        length = made + 1
        last = length >= wanted.max_new_tokens
        ending = np.isin(tokens, self._ends) | last
        written = np.take_along_axis(self._written, parents[..., None], axis=1)
        written[..., made] = tokens
        self._finish(best[:, :beams] / np.float32(length), written[:, :beams], ending[:, :beams], length)
        scores = np.where(ending, best + NEVER, best)
        going = _best(scores, beams)
        self._scores = np.take_along_axis(scores, going, axis=1)
        self._written = np.take_along_axis(written, going[..., None], axis=1)
        done: npt.NDArray[np.bool_] = np.asarray(self._finished.all(axis=1) | last)
        if not wanted.early_stopping:
            done &= self._scores[:, 0] / np.float32(length) <= self._finished_scores.min(axis=1)
        parents = np.take_along_axis(parents, going, axis=1)
        first = np.arange(prompts)[:, None] * rows
        return first + np.minimum(parents, rows - 1), np.take_along_axis(tokens, going, axis=1), done | last

    def _finish(self, scores: Scores, written: Tokens, ending: npt.NDArray[np.bool_], length: int) -> None:
        merged = np.concatenate([self._finished_scores, np.where(ending, scores, NEVER)], axis=1)
        kept = _best(merged, scores.shape[1])
        self._finished_scores = np.take_along_axis(merged, kept, axis=1)
        self._finished = np.take_along_axis(np.concatenate([self._finished, ending], axis=1), kept, axis=1)
        lengths = np.concatenate([self._finished_lengths, np.full(scores.shape, length)], axis=1)
        self._finished_lengths = np.take_along_axis(lengths, kept, axis=1)
        both = np.concatenate([self._finished_written, written], axis=1)
        self._finished_written = np.take_along_axis(both, kept[..., None], axis=1)

    def answer(self, place: int) -> Tokens:
        """The best finished answer of a prompt that is done."""
        answer: Tokens = self._finished_written[place, 0, : self._finished_lengths[place, 0]].copy()
        return answer

    def keep(self, going: npt.NDArray[np.bool_]) -> None:
        """Drop the prompts that are done."""
        for name in ("_scores", "_written", "_finished", "_finished_scores", "_finished_lengths", "_finished_written"):
            setattr(self, name, getattr(self, name)[going])


def _without_ends(scores: Scores, ends: Tokens, early: bool) -> Scores:
    """`scores` [rows, vocabulary] with no chance for `ends` where it is too early for them."""
    if early and len(ends):
        scores = scores.copy()
        scores[:, ends] = -np.inf
    return scores


def _log_softmax(logits: Scores) -> Scores:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: Scores = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _best(scores: Scores, count: int) -> Tokens:
    """Where the `count` highest scores of each row are, highest first; all where a row has no more."""
    count = min(count, scores.shape[-1])
    found = np.argpartition(scores, scores.shape[-1] - count, axis=-1)[..., -count:]
    order = np.argsort(-np.take_along_axis(scores, found, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(found, order, axis=-1)
