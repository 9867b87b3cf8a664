"""Beam search for GPT-J on the device: slots, a cache that is never copied, and a step for all slots at once."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from fleet.harness.interfaces import Generation
from fleet.harness.models.gptj_layers import GptJ

PREFILL_TOKENS = 16_384
"""Prompt tokens computed at once: enough for full speed, few enough for little memory."""
NEVER = -1e9
"""The score of what must not win, finite as in transformers' search: infinities would make NaN of differences."""

Tokens = npt.NDArray[np.int64]


class Cache:
    """Keys and values of as many samples as there are slots, each layer's [slots, heads, columns, size].

    Before column `start` lie the generated tokens, latest first, one column for each step and beam; from there on the
    prompt. So the columns in use are always one range, whatever the slots' ages and lengths.
    """

    def __init__(self, model: GptJ, slots: int, start: int, prompt: int) -> None:
        self.slots, self.start, self.prompt = slots, start, prompt
        shape = (slots, model.heads, start + prompt, model.size)
        # Zeros: what a mask leaves out still gets multiplied, and 0 times an old NaN is NaN.
        both = [[torch.zeros(shape, device=model.device, dtype=model.dtype) for _ in range(2)] for _ in model.layers]
        self.keys, self.values = [keys for keys, _ in both], [values for _, values in both]


class Search:
    """Beam search over slots, each at its own step; one beam is greedy search.

    The rules are those of transformers' _beam_search (length penalty 1): of the best candidates, those that end are
    finished if they are among the best `beams`, the others go on; finished ones are ranked by their score per token.
    """

    def __init__(self, slots: int, generation: Generation, device: torch.device) -> None:
        beams, steps = generation.beams, generation.max_new_tokens
        self._generation = generation
        self._ends = torch.tensor(generation.eos_token_ids, dtype=torch.int64, device=device)
        self._kept = max(2, 1 + len(generation.eos_token_ids)) * beams
        self.step = torch.zeros(slots, dtype=torch.int64, device=device)
        self.tokens = torch.zeros((slots, beams), dtype=torch.int64, device=device)
        self._scores = torch.zeros((slots, beams), device=device)
        self._written = torch.zeros((slots, beams, steps), dtype=torch.int64, device=device)
        self._finished = torch.zeros((slots, beams), dtype=torch.bool, device=device)
        self._finished_scores = torch.zeros((slots, beams), device=device)
        self._finished_lengths = torch.zeros((slots, beams), dtype=torch.int64, device=device)
        self._finished_written = torch.zeros_like(self._written)

    def begin(self, slots: Tensor, last_tokens: Tensor) -> None:
        """Take new samples, whose prompts end in `last_tokens`."""
        self.step[slots] = 0
        self.tokens[slots] = last_tokens[:, None]
        self._scores[slots] = NEVER
        self._scores[slots, 0] = 0.0  # all beams are one as yet
        self._finished[slots] = False
        self._finished_scores[slots] = NEVER

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """From logits [slots, beams, vocabulary]: the beams each goes on from [slots, beams], and who is done."""
        wanted, (slots, beams) = self._generation, self._scores.shape
        scores = F.log_softmax(logits, dim=-1)
        if wanted.min_new_tokens and len(self._ends):
            early = (self.step < wanted.min_new_tokens)[:, None, None]
            scores[..., self._ends] = scores[..., self._ends].masked_fill(early, -math.inf)
        # The best of all beams are among the best of each: a short row is sorted instead of a long one.
        scores, tokens = scores.topk(min(self._kept, logits.shape[-1]), dim=-1)
        each = scores.shape[-1]
        best, chosen = (scores + self._scores[..., None]).view(slots, -1).topk(min(self._kept, beams * each), dim=-1)
        parents, tokens = chosen // each, tokens.reshape(slots, -1).gather(1, chosen)
        length = self.step + 1
        last = length >= wanted.max_new_tokens
        ending = torch.isin(tokens, self._ends) | last[:, None]
        written = self._written.gather(1, parents[..., None].expand(-1, -1, wanted.max_new_tokens))
        written.scatter_(
            2, self.step.clamp(max=wanted.max_new_tokens - 1)[:, None, None].expand(*tokens.shape, 1), tokens[..., None]
        )
        self._finish(best[:, :beams] / length[:, None], written[:, :beams], ending[:, :beams], length)
        self._scores, going = torch.where(ending, best + NEVER, best).topk(beams, dim=-1)
        self._written = written.gather(1, going[..., None].expand(-1, -1, wanted.max_new_tokens))
        self.tokens = tokens.gather(1, going)
        self.step = length
        done = self._finished.all(dim=1)
        if not wanted.early_stopping:
            done &= self._scores[:, 0] / length <= self._finished_scores.amin(dim=1)
        return parents.gather(1, going), done | last

    def _finish(self, scores: Tensor, written: Tensor, ending: Tensor, length: Tensor) -> None:
        if self._generation.early_stopping:
            ending = ending & ~self._finished.all(dim=1, keepdim=True)
        merged = torch.cat([self._finished_scores, torch.where(ending, scores, NEVER)], dim=1)
        self._finished_scores, kept = merged.topk(scores.shape[1], dim=-1)
        self._finished = torch.cat([self._finished, ending], dim=1).gather(1, kept)
        lengths = length[:, None].expand_as(scores)
        self._finished_lengths = torch.cat([self._finished_lengths, lengths], dim=1).gather(1, kept)
        wide = kept[..., None].expand(-1, -1, written.shape[-1])
        self._finished_written = torch.cat([self._finished_written, written], dim=1).gather(1, wide)

    def answers(self, slots: list[int]) -> list[Tokens]:
        """The best finished answers; ends as tokens are part of them."""
        written = self._finished_written[slots, 0].cpu().numpy()
        lengths = self._finished_lengths[slots, 0].tolist()
        return [row[:length].copy() for row, length in zip(written, lengths, strict=True)]


class Batch:
    """Samples being answered together, one in each slot."""

    def __init__(self, model: GptJ, generation: Generation, cache: Cache, slots: int, attention: str) -> None:
        self._model, self._cache, self._attention = model, cache, attention
        self._beams = generation.beams
        self.search = Search(slots, generation, model.device)
        self._slots = torch.arange(slots, device=model.device)
        self._lengths = torch.ones(slots, dtype=torch.int64, device=model.device)
        self._ages, self._prompts = [0] * slots, [1] * slots
        mask = {"device": model.device, "dtype": model.dtype}
        self._ancestry = torch.full((slots, generation.beams, cache.start), -math.inf, **mask)
        self._prompt_mask = torch.full((slots, cache.prompt), -math.inf, **mask)

    def begin(self, slots: Sequence[int], prompts: Sequence[Tokens]) -> None:
        """Put prompts into free slots; all of a prompt but its last token, with which the first step begins."""
        device = self._model.device
        where = torch.tensor(slots, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._lengths[where] = lengths
        for slot, prompt in zip(slots, prompts, strict=True):
            self._ages[slot], self._prompts[slot] = 0, len(prompt)
        self._ancestry[where] = -math.inf
        columns = torch.arange(self._cache.prompt, device=device)
        hidden = columns[None] >= (lengths - 1)[:, None]
        self._prompt_mask[where] = torch.zeros_like(self._prompt_mask[where]).masked_fill(hidden, -math.inf)
        self.search.begin(where, torch.tensor([int(prompt[-1]) for prompt in prompts], device=device))
        first, tokens = 0, 0
        for number, prompt in enumerate(prompts):
            tokens += len(prompt)
            if tokens >= PREFILL_TOKENS or number == len(prompts) - 1:
                self._prefill(where[first : number + 1], [one[:-1] for one in prompts[first : number + 1]])
                first, tokens = number + 1, 0

    def _prefill(self, slots: Tensor, prompts: Sequence[Tokens]) -> None:
        model, start = self._model, self._cache.start
        longest = max(len(prompt) for prompt in prompts)
        if not longest:
            return
        tokens = torch.from_numpy(np.concatenate(prompts)).to(model.device)
        row = torch.from_numpy(np.repeat(np.arange(len(prompts)), [len(one) for one in prompts])).to(model.device)
        column = torch.from_numpy(np.concatenate([np.arange(len(one)) for one in prompts])).to(model.device)

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            shape = (3, len(prompts), model.heads, longest, model.size)
            padded = torch.zeros(shape, device=model.device, dtype=model.dtype)
            for kind, new in enumerate((query, key, value)):
                padded[kind][row, :, column] = new
            # No mask beside causality: padding comes after the tokens, which never look ahead.
            context = F.scaled_dot_product_attention(padded[0], padded[1], padded[2], is_causal=True)
            self._cache.keys[number][slots, :, start : start + longest] = padded[1]
            self._cache.values[number][slots, :, start : start + longest] = padded[2]
            return context.transpose(1, 2)[row, column].reshape(len(tokens), model.width)

        model.hidden(tokens, column, attend)

    def step(self) -> list[bool]:
        """One more token for every slot; who is done by it."""
        model, search, cache, beams = self._model, self.search, self._cache, self._beams
        slots = len(self._slots)
        # Slots that wait for a sample go on with what they had, to no end; their age stays in range.
        age = search.step.clamp(max=cache.start // beams - 1)
        columns = cache.start - beams * (age[:, None] + 1) + torch.arange(beams, device=model.device)
        self._ancestry.scatter_(2, columns[..., None], 0.0)
        # Multiples of 8: the attention kernels read masks in blocks of 16 bytes.
        first = max(0, cache.start - beams * (max(self._ages) + 1)) // 8 * 8
        last = min(cache.prompt, (max(self._prompts) + 7) // 8 * 8)
        prompt_mask = self._prompt_mask[:, None, :last].expand(-1, beams, -1)
        mask = torch.cat([self._ancestry[..., first:], prompt_mask], dim=-1)[:, None]
        seen = slice(first, cache.start + last)

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.keys[number][:slots], cache.values[number][:slots]
            keys[self._slots[:, None], :, columns] = key.view(slots, beams, model.heads, model.size)
            values[self._slots[:, None], :, columns] = value.view(slots, beams, model.heads, model.size)
            query = query.view(slots, beams, model.heads, model.size).transpose(1, 2)
            if self._attention == "sdpa":
                context = F.scaled_dot_product_attention(query, keys[:, :, seen], values[:, :, seen], attn_mask=mask)
            else:
                context = _by_matmul(query, keys[:, :, seen], values[:, :, seen], mask)
            return context.transpose(1, 2).reshape(slots * beams, model.width)

        positions = (self._lengths - 1 + age)[:, None].expand(-1, beams).reshape(-1)
        hidden = model.hidden(search.tokens.view(-1), positions.clamp(max=model.positions - 1), attend)
        parents, done = search.advance(model.logits(hidden).view(slots, beams, -1))
        self._ancestry = self._ancestry.gather(1, parents[..., None].expand_as(self._ancestry))
        self._ages = [min(age + 1, cache.start // beams - 1) for age in self._ages]
        finished: list[bool] = done.tolist()
        return finished

    def release(self, slots: Sequence[int]) -> None:
        """Nothing waits for these: they no longer widen what attention reads."""
        for slot in slots:
            self._prompts[slot] = 1


def _by_matmul(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of few queries over many keys as two batched products, the scores in float32."""
    slots, heads, beams, size = query.shape
    flat = query.reshape(slots * heads, beams, size)
    turned = keys.reshape(slots * heads, -1, size).transpose(1, 2)
    if query.is_cuda and query.dtype != torch.float32:
        scores = torch.bmm(flat, turned, out_dtype=torch.float32)
    else:
        scores = torch.bmm(flat, turned).float()
    scores = scores.view(slots, heads, beams, -1).mul_(size**-0.5).add_(mask)
    weights = scores.softmax(dim=-1).to(values.dtype).view(slots * heads, beams, -1)
    return torch.bmm(weights, values.reshape(slots * heads, -1, size)).view(slots, heads, beams, size)
