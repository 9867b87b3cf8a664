"""The search held to transformers' generate(), on tiny GPT-J models with random weights."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fleet.harness import decoding
from fleet.harness.interfaces import Generation

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY, END = 61, 0
WANTED = Generation(beams=4, min_new_tokens=3, max_new_tokens=12, eos_token_ids=(END,), pad_token_id=END)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(seed: int, ending: float = 2.5) -> Any:
    """Random weights hardly ever choose the end by themselves: `ending` is added to its logit."""
    torch.manual_seed(seed)
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_positions=48, n_embd=24, n_layer=2, n_head=2, rotary_dim=4,
        bos_token_id=END, eos_token_id=END, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.GPTJForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias[END] += ending
    return model.eval()


class Steps:
    """transformers' forward pass as a decoding.Step; remembers what it was called with."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[int] = []
        self.reorders: list[Any] = []

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def __call__(
        self, tokens: Any, attention_mask: Any, position_ids: Any, cache: Any, reorder: Any
    ) -> tuple[Any, Any]:
        assert tokens.shape == position_ids.shape
        assert {part.dtype for part in (tokens, attention_mask, position_ids)} == {np.dtype(np.int64)}
        self.rows.append(len(tokens))
        self.reorders.append(reorder)
        if reorder is not None:
            cache.reorder_cache(torch.from_numpy(reorder))
        made = self.model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(attention_mask),
            position_ids=torch.from_numpy(position_ids),
            past_key_values=cache,
            use_cache=True,
        )
        return made.logits[:, -1].numpy(), made.past_key_values


def prompts_of(seed: int, *lengths: int) -> list[Any]:
    chance = np.random.default_rng(seed)
    return [chance.integers(1, VOCABULARY, length) for length in lengths]


def expected(model: Any, prompts: list[Any], wanted: Generation) -> list[list[int]]:
    """Each prompt alone, so that its padding cannot matter."""
    found = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=wanted.beams,
            early_stopping=wanted.early_stopping and wanted.beams > 1,
            min_new_tokens=wanted.min_new_tokens or None,
            max_new_tokens=wanted.max_new_tokens,
            eos_token_id=list(wanted.eos_token_ids),
            pad_token_id=wanted.pad_token_id,
            do_sample=False,
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beams": 1},
        {"beams": 2, "min_new_tokens": 0},
        {"early_stopping": False},
        {"beams": 3, "eos_token_ids": (END, 5)},
        {"min_new_tokens": 12},
        {"max_new_tokens": 1, "min_new_tokens": 1},
    ],
)
def test_tokens_are_those_of_transformers(seed: int, changes: dict[str, Any]) -> None:
    wanted = replace(WANTED, **changes)
    model = model_of(seed)
    prompts = prompts_of(seed, 1, 2, 3, 5, 8, 13, 13, 21)
    found = decoding.generate(Steps(model), prompts, wanted, vocab_size=VOCABULARY)
    assert [row.dtype for row in found] == [np.dtype(np.int64)] * len(prompts)
    assert [row.tolist() for row in found] == expected(model, prompts, wanted)


def test_answers_end_early_late_and_never_before_the_least_length() -> None:
    model = model_of(1)
    prompts = prompts_of(2, *[6] * 40)
    found = decoding.generate(Steps(model), prompts, WANTED, vocab_size=VOCABULARY)
    lengths = [len(row) for row in found]
    assert min(lengths) >= WANTED.min_new_tokens + 1
    assert max(lengths) == WANTED.max_new_tokens
    assert len(set(lengths)) > 3
    assert all(END not in row[:-1] for row in found)
    assert any(row[-1] == END for row in found)


def test_prompts_are_computed_once_and_finished_ones_drop_out() -> None:
    steps = Steps(model_of(1))
    prompts = prompts_of(2, *[6] * 40)
    decoding.generate(steps, prompts, WANTED, vocab_size=VOCABULARY)
    assert steps.rows[:2] == [40, 160]
    assert steps.reorders[0] is None
    assert steps.reorders[1].tolist() == sorted([*range(40)] * 4)
    assert steps.rows[-1] < 160
    assert steps.rows[1:] == sorted(steps.rows[1:], reverse=True)


def test_greedy_rows_that_all_go_on_are_not_moved() -> None:
    steps = Steps(model_of(1, ending=-100.0))
    wanted = replace(WANTED, beams=1)
    decoding.generate(steps, prompts_of(2, 4, 7), wanted, vocab_size=VOCABULARY)
    assert steps.rows == [2] * wanted.max_new_tokens
    assert steps.reorders == [None] * wanted.max_new_tokens


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (np.array([], dtype=np.int64), "a prompt of no tokens"),
        (np.array([3, VOCABULARY]), f"token {VOCABULARY} is none of the model's {VOCABULARY}"),
        (np.array([-1, 3]), "token -1 is none"),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused(prompt: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decoding.generate(Steps(model_of(0)), [np.array([3]), prompt], WANTED, vocab_size=VOCABULARY)


def test_logits_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \[1, 61\] where \[1, 70\] were expected"):
        decoding.generate(Steps(model_of(0)), prompts_of(0, 3), WANTED, vocab_size=70)


def test_no_prompts_have_no_answers() -> None:
    assert decoding.generate(Steps(model_of(0)), [], WANTED, vocab_size=VOCABULARY) == []
