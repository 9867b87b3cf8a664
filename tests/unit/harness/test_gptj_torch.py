"""fleet's own GPT-J and its beam search against transformers' generate(), on tiny models with random weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness.interfaces import RANDOM_WEIGHTS, Features, Generation

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fleet.harness.models import beam_search, gptj  # noqa: E402 - not before torch is known to be there

VOCABULARY, END = 90, 0
WANTED = Generation(beams=1, min_new_tokens=3, max_new_tokens=14, eos_token_ids=(END,), pad_token_id=END)
LENGTHS = (1, 2, 5, 5, 8, 13, 21, 22, 30, 31, 40, 49)


class Folder:
    """As much of a benchmark as a backend needs."""

    sample_count = 0
    model: dict[str, str] = {}  # noqa: RUF012 - shaped like Benchmark

    def __init__(self, model_dir: Path, generation: Generation | None = WANTED, **config: Any) -> None:
        self.model_dir = model_dir
        self.generation = generation
        self.config = json.loads((model_dir / "config.json").read_text()) | config

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def ending_often(model: Any) -> Any:
    """Random weights hardly ever choose the end by themselves."""
    with torch.no_grad():
        model.lm_head.weight[END] *= 1.4
        if model.lm_head.bias is not None:
            model.lm_head.bias[END] += 2.5
    return model.eval()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A GPT-J folder as Hugging Face writes it, in shards, and the model it holds."""
    torch.manual_seed(20260401)
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=2, rotary_dim=8,
        bos_token_id=END, eos_token_id=END, initializer_range=0.3,
    )  # fmt: skip
    model = ending_often(transformers.GPTJForCausalLM(config))
    folder = tmp_path_factory.mktemp("gptj")
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder, model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, bos_token_id=END, eos_token_id=END, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


def prompts(*lengths: int) -> list[Features]:
    chance = np.random.default_rng(11)
    return [Features(chance.integers(1, VOCABULARY, length), np.zeros(length, dtype=np.int64)) for length in lengths]


def expected(model: Any, sample: Features, wanted: Generation) -> list[int]:
    ids = torch.from_numpy(sample.input_ids)[None]
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
    return list(gptj.until_end(made[0, ids.shape[1] :].numpy(), wanted.eos_token_ids))


def opened(benchmark: Any, **options: Any) -> Any:
    return gptj.open(benchmark, {"device": "cpu", "threads": 1} | options)


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize(
    "changes",
    [
        {"beams": 1},
        {"beams": 4},
        {"beams": 4, "early_stopping": False},
        {"beams": 3, "min_new_tokens": 0, "eos_token_ids": (END, 5)},
        {"beams": 4, "min_new_tokens": 9, "max_new_tokens": 9},
        {"beams": 1, "min_new_tokens": 1, "max_new_tokens": 1},
    ],
)
def test_tokens_are_those_of_transformers(reference: tuple[Path, Any], changes: dict[str, Any], attention: str) -> None:
    folder, model = reference
    wanted = replace(WANTED, **changes)
    given = prompts(*LENGTHS)
    # Fewer slots than samples: answered ones must make room without a trace.
    backend = opened(Folder(folder, wanted), batch_size=5, attn_implementation=attention)
    found = [list(tokens) for tokens in backend.predict(given)]
    assert found == [expected(model, sample, wanted) for sample in given]
    if wanted.min_new_tokens < wanted.max_new_tokens:
        assert len({len(tokens) for tokens in found}) > 1, "answers of one length alone would show little"


def test_answers_do_not_depend_on_what_was_asked_before(reference: tuple[Path, Any]) -> None:
    backend = opened(Folder(reference[0], replace(WANTED, beams=4)), batch_size=4)
    given = prompts(*LENGTHS)
    once = [list(tokens) for tokens in backend.predict(given)]
    again = [list(next(iter(backend.predict([sample])))) for sample in reversed(given)]
    assert again[::-1] == once


def test_long_prompts_are_computed_in_parts(reference: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam_search, "PREFILL_TOKENS", 40)
    folder, model = reference
    given = prompts(*LENGTHS)
    found = [list(tokens) for tokens in opened(Folder(folder), batch_size=12).predict(given)]
    assert found == [expected(model, sample, WANTED) for sample in given]


@pytest.mark.parametrize("beams", [1, 4])
def test_another_decoder_is_run_by_transformers(llama: tuple[Path, Any], beams: int) -> None:
    folder, model = llama
    wanted = replace(WANTED, beams=beams)
    given = prompts(*LENGTHS)
    backend = opened(Folder(folder, wanted), batch_size=5)
    assert [list(tokens) for tokens in backend.predict(given)] == [expected(model, each, wanted) for each in given]
    assert backend.versions()["transformers"] == transformers.__version__
    assert backend.model["weight_data_types"] == "fp32"


def test_half_precision_stays_close(reference: tuple[Path, Any]) -> None:
    folder, model = reference
    backend = opened(Folder(folder, replace(WANTED, max_new_tokens=3)), dtype="bfloat16")
    given = prompts(*LENGTHS)
    found = [int(tokens[0]) for tokens in backend.predict(given)]
    exact = [expected(model, sample, WANTED)[0] for sample in given]
    assert sum(one == other for one, other in zip(found, exact, strict=True)) >= len(given) - 3
    assert backend.model["weight_data_types"] == "bf16"


def test_random_weights_are_labelled_and_the_same_every_time(reference: tuple[Path, Any]) -> None:
    benchmark = Folder(reference[0], n_layer=28)
    given = prompts(9, 17)
    answers = []
    for _ in range(2):
        backend = opened(benchmark, weights="random", layers=2)
        assert backend.labels == (RANDOM_WEIGHTS, "2 of 28 layers")
        assert backend.model["starting_weights_filename"] == "none"
        answers.append([list(tokens) for tokens in backend.predict(given)])
    assert answers[0] == answers[1]
    assert opened(Folder(reference[0]), weights="random", beams=4).labels == ("beam 4 instead of 1", RANDOM_WEIGHTS)
    assert opened(Folder(reference[0])).labels == ()


def test_random_weights_of_another_decoder_are_labelled(llama: tuple[Path, Any]) -> None:
    backend = opened(Folder(llama[0]), weights="random", layers=1)
    assert backend.labels == (RANDOM_WEIGHTS, "1 of 2 layers")
    assert all(3 <= len(tokens) <= 14 for tokens in backend.predict(prompts(4, 9)))


def short_of_memory(most: int, tried: list[int], kind: Callable[..., Any]) -> Callable[..., Any]:
    """`kind`, but as on a GPU that holds no more than `most` samples: only the device is imagined."""

    def limited(model: Any, slots: int, *rest: Any) -> Any:
        tried.append(slots)
        if slots > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return kind(model, slots, *rest)

    return limited


def test_out_of_memory_halves_the_batch_for_good(
    reference: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = reference
    tried: list[int] = []
    monkeypatch.setattr(gptj, "Cache", short_of_memory(3, tried, beam_search.Cache))
    backend = opened(Folder(folder), batch_size=12)
    given = prompts(*LENGTHS)
    found = [list(tokens) for tokens in backend.predict(given)]
    assert found == [expected(model, sample, WANTED) for sample in given]
    assert tried == [12, 6, 3]
    assert "out of memory with 6 samples at once: going on with 3" in capsys.readouterr().out
    list(backend.predict(given))
    assert tried == [12, 6, 3]


def test_out_of_memory_in_the_middle_loses_and_repeats_no_answer(
    reference: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = reference
    given, calls = prompts(*LENGTHS), 0
    step = beam_search.Batch.step

    def failing(batch: Any) -> list[bool]:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(batch)

    monkeypatch.setattr(beam_search.Batch, "step", failing)
    found = [list(tokens) for tokens in opened(Folder(folder), batch_size=4).predict(given)]
    assert found == [expected(model, sample, WANTED) for sample in given]
    assert calls > 20


def test_out_of_memory_with_one_sample_is_an_answer(
    reference: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptj, "Cache", short_of_memory(0, [], beam_search.Cache))
    backend = opened(Folder(reference[0], replace(WANTED, beams=4)), batch_size=8)
    with pytest.raises(ValueError, match="out of memory with one prompt of 49 tokens and 4 beams; take a host with"):
        list(backend.predict(prompts(*LENGTHS)))


def test_several_workers_give_the_same_tokens(reference: tuple[Path, Any]) -> None:
    folder, model = reference
    given = prompts(*LENGTHS)
    backend = opened(Folder(folder), batch_size=4, workers=2)
    try:
        assert backend.versions()["workers"] == "2"
        assert [list(tokens) for tokens in backend.predict(given)] == [expected(model, each, WANTED) for each in given]
    finally:
        backend.close()


@pytest.mark.parametrize(
    "short",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_transformers_batches_are_halved_too(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, short: Exception
) -> None:
    folder, model = llama
    backend = opened(Folder(folder), batch_size=8)
    generate, tried = backend._loaded.generate, list[int]()

    def limited(ids: Any, **rest: Any) -> Any:
        tried.append(len(ids))
        if len(ids) > 2:
            raise short
        return generate(ids, **rest)

    monkeypatch.setattr(backend._loaded, "generate", limited)
    given = prompts(3, 9, 9, 20)
    assert [list(tokens) for tokens in backend.predict(given)] == [expected(model, each, WANTED) for each in given]
    assert tried == [4, 2, 2]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"batchsize": 3}, "has no option 'batchsize'; it has"),
        ({"dtype": "int3"}, "dtype 'int3': one of float32"),
        ({"weights": "none"}, "weights 'none': `random`"),
        ({"layers": 2}, "goes with `weights: random` only"),
        ({"layers": 9, "weights": "random"}, "layers 9: the model has 1 to 3"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"beams": 0}, "beams 0"),
        ({"attn_implementation": "eager"}, "attn_implementation 'eager': one of sdpa, matmul"),
    ],
)
def test_wrong_options_are_named(reference: tuple[Path, Any], options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        opened(Folder(reference[0]), **options)


def test_a_benchmark_that_generates_nothing_is_refused(reference: tuple[Path, Any]) -> None:
    with pytest.raises(ValueError, match="generates no text"):
        opened(Folder(reference[0], None))


@pytest.mark.parametrize("family", ["reference", "llama"])
def test_prompts_that_the_model_cannot_read_are_refused(request: pytest.FixtureRequest, family: str) -> None:
    backend = opened(Folder(request.getfixturevalue(family)[0]))
    for length in (51, 0):
        with pytest.raises(ValueError, match=f"a prompt of {length} tokens: this model reads 1 to 50 of them"):
            list(backend.predict(prompts(3, length)))
    foreign = Features(np.array([1, VOCABULARY]), np.zeros(2, dtype=np.int64))
    with pytest.raises(ValueError, match="token 90 is none of the model's 90: vocabulary and weights do not match"):
        list(backend.predict([foreign]))


def test_broken_weights_are_named(reference: tuple[Path, Any], llama: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, model = reference
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"model-00001-of-.*: no such file, run `fleet provision`"):
        opened(Folder(tmp_path))
    for path in folder.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or no safetensors file, fetch it again"):
        opened(Folder(tmp_path))

    (tmp_path / "model.safetensors.index.json").unlink()
    whole = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "embed_positions" not in name}
    short = dict(whole)
    del short["transformer.h.2.mlp.fc_in.bias"]
    save_file(short, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"the weights have no transformer.h.2.mlp.fc_in.bias: not a GPTJForCausalLM"):
        opened(Folder(tmp_path))
    save_file(whole | {"lm_head.bias": torch.zeros(7)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.bias has shape \(7,\), config.json says \(90,\)"):
        opened(Folder(tmp_path))

    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_bytes((llama[0] / "config.json").read_bytes())
    weights = load_file(llama[0] / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights have no model.norm.weight"):
        opened(Folder(other))
