"""MLCommons' GPT-J folder, made small: torch's shards, GPT-2's vocabulary files; and what `prepare` makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness import convert
from fleet.harness.benchmarks import gptj
from fleet.harness.interfaces import Features
from tests.unit.harness.benchmarks.articles import byte_tokenizer, splitter_archive, write_articles

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402 - not before torch is known to be there
from safetensors.torch import save_file  # noqa: E402

SIZES = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64, "rotary_dim": 4, "vocab_size": 300}
ARTICLES = [{"instruction": "Sum up:", "input": f"{place} is wet.", "output": "Rain ."} for place in ("Bath", "Ghent")]
SHARDS = [f"pytorch_model-0000{number}-of-00003.bin" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**gptj.CONFIG | SIZES))


def write_shards(source: Path, state: dict[str, Any]) -> None:
    """As save_pretrained of transformers 4.2x wrote them: masks among the parameters, and an index beside."""
    state = {**state}
    for layer in range(SIZES["n_layer"]):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    names = sorted(state)
    parts = [names[number::3] for number in range(3)]
    for shard, part in zip(SHARDS, parts, strict=True):
        torch.save({name: state[name] for name in part}, source / shard)
    index = {name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in part}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture
def assets(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gptj, "SAMPLES", len(ARTICLES))
    source = tmp_path / "source"
    source.mkdir()
    write_articles(source / "cnn_eval.json", ARTICLES)
    splitter_archive(source / "punkt_tab.zip")
    (source / "config.json").write_text(json.dumps(SIZES | {"model_type": "gptj"}))
    (source / "tokenizer.json").write_text(byte_tokenizer(50_257, gptj.END).to_str(), encoding="utf-8")
    write_shards(source, model.state_dict())
    return tmp_path


def converted(assets: Path) -> dict[str, Any]:
    index = json.loads((assets / "model" / convert.INDEX).read_text())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(assets / "model" / file, framework="pt") as tensors:
            found[name] = tensors.get_tensor(name)
    return found


def test_shards_become_safetensors_with_the_same_values(assets: Path, model: Any) -> None:
    gptj.prepare("gptj-99", assets)
    wanted, found = model.state_dict(), converted(assets)
    assert found.keys() == gptj.shapes(gptj.read_config(assets / "source" / "config.json")).keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert sorted(path.name for path in (assets / "model").glob("*.safetensors")) == [
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
    ]  # fmt: skip
    assert not list((assets / "model").glob("*.bin*"))


def test_transformers_and_our_backend_read_what_was_made_alike(assets: Path, model: Any) -> None:
    from fleet.harness.models import gptj as backend

    gptj.prepare("gptj-99", assets)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(assets / "model", local_files_only=True)
    prompt = np.arange(1, 9, dtype=np.int64)
    how = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = [
        loaded.generate(torch.tensor(prompt[None]), num_beams=1, **how)[0, len(prompt) :].tolist()
        for loaded in (theirs, model.eval())
    ]
    benchmark = gptj.open("gptj-99", assets)
    benchmark.generation = type(benchmark.generation)(
        beams=1, min_new_tokens=16, max_new_tokens=16, eos_token_ids=(299,), pad_token_id=299
    )
    made: Any = backend.open(benchmark, {"device": "cpu", "threads": 1})
    (ours,) = list(made.predict([Features(prompt, np.zeros_like(prompt))]))
    assert expected == [ours.tolist(), ours.tolist()]
    made.close()


def test_the_result_names_the_published_files(assets: Path) -> None:
    hashes = gptj.prepare("gptj-99", assets)
    assert set(SHARDS) <= hashes.keys()
    stated = gptj.open("gptj-99", assets).model
    assert stated["starting_weights_filename"] == ", ".join(SHARDS)
    assert len(stated["weights_sha256"]) == 64


def test_conversion_happens_once_and_again_for_other_shards(assets: Path, model: Any) -> None:
    def made() -> dict[str, int]:
        gptj.prepare("gptj-99", assets)
        return {path.name: path.stat().st_mtime_ns for path in (assets / "model").glob("model*")}

    first = made()
    assert made() == first
    (assets / "model" / "model-00002-of-00003.safetensors").unlink()
    again = made()
    assert again.keys() == first.keys()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    write_shards(assets / "source", state)
    assert made() != again
    assert all(torch.equal(tensor, state[name]) for name, tensor in converted(assets).items())


def test_safetensors_that_are_there_go_before_shards(assets: Path, model: Any) -> None:
    gptj.prepare("gptj-99", assets)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
              assets / "source" / "model.safetensors")  # fmt: skip
    assert "model.safetensors" in gptj.prepare("gptj-99", assets)
    left = sorted(path.name for path in (assets / "model").iterdir() if "model" in path.name)
    assert left == ["model.safetensors"]


def test_the_names_of_mlcommons_archive_are_read_too(assets: Path, model: Any) -> None:
    for number, shard in enumerate(SHARDS, 1):
        (assets / "source" / shard).rename(assets / "source" / f"{shard[:-4]}-00{4 - number}.bin")
    gptj.prepare("gptj-99", assets)
    assert converted(assets).keys() == model.state_dict().keys()


def test_a_state_dict_in_one_file_is_read_too(assets: Path, model: Any) -> None:
    for shard in SHARDS:
        (assets / "source" / shard).unlink()
    torch.save(model.state_dict(), assets / "source" / "pytorch_model.bin")
    gptj.prepare("gptj-99", assets)
    assert converted(assets).keys() == model.state_dict().keys()


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def resize(source: Path) -> None:
    (source / "config.json").write_text(json.dumps(SIZES | {"model_type": "gptj", "vocab_size": 301}))


def without_a_parameter(source: Path) -> None:
    state = torch.load(source / SHARDS[0], weights_only=True)
    torch.save({name: tensor for name, tensor in state.items() if name != min(state)}, source / SHARDS[0])


def code(source: Path) -> None:
    torch.save({"lm_head.bias": half}, source / SHARDS[1])


BAD: list[tuple[Callable[[Path], object], str]] = [
    (lambda source: (source / SHARDS[1]).unlink(), "source: shard 2 of 3 is missing"),
    (lambda source: half(source / SHARDS[2]), "00003-of-00003.bin: not a whole state dict"),
    (code, "00002-of-00003.bin: not a whole state dict of weights alone"),
    (lambda source: (source / SHARDS[0]).write_bytes((source / SHARDS[1]).read_bytes()), "is in .*00001.* too"),
    (lambda source: (source / "pytorch_model-00001-of-00002.bin").touch(), "no one set of shards"),
    (without_a_parameter, "the shards have no lm_head.bias"),
    (resize, r"is \[300.*\], config.json says \[301"),
    (lambda source: half(source / "config.json"), "config.json: not a whole configuration"),
    (lambda source: (source / "config.json").write_text('{"model_type": "llama"}'), "not the configuration of a GPT-J"),
]


@pytest.mark.parametrize(("spoil", "cause"), BAD)
def test_bad_shards_are_refused_by_name(assets: Path, spoil: Callable[[Path], object], cause: str) -> None:
    spoil(assets / "source")
    with pytest.raises(ValueError, match=cause):
        gptj.prepare("gptj-99", assets)
    assert not (assets / "model" / convert.INDEX).exists()


def test_masks_alone_are_no_parameters() -> None:
    # MLCommons' checkpoint has 50,401 tokens; nothing else differs from GPT-J-6B.
    found = gptj.shapes(gptj.CONFIG | {"vocab_size": 50_401})
    assert len(found) == 28 * 10 + 5
    assert sum(int(np.prod(shape)) for shape in found.values()) == 6_050_882_784 + 2 * 4096 + 1


def write_vocabulary(source: Path) -> None:
    """GPT-2's files with few merges, and what fine-tuning added."""
    (source / "tokenizer.json").unlink()
    small = byte_tokenizer(50_256, 0)
    words = {token: number for token, number in small.get_vocab().items() if number < 50_254}
    words |= {"he": 50_254, "\u0120t": 50_255, "<|endoftext|>": gptj.END}
    (source / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (source / "merges.txt").write_text("#version: 0.2\nh e\n\u0120 t\n", encoding="utf-8")
    added = {f"<|extratoken_{number}|>": 50_256 + number for number in range(1, 144)} | {"[PAD]": 50_400}
    (source / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")


def test_the_vocabulary_files_make_the_tokenizer_that_transformers_makes(assets: Path) -> None:
    source = assets / "source"
    write_vocabulary(source)
    theirs = transformers.GPT2TokenizerFast(vocab=str(source / "vocab.json"), merges=str(source / "merges.txt"))
    gptj.prepare("gptj-99", assets)
    benchmark = gptj.open("gptj-99", assets)
    from tokenizers import Tokenizer

    ours = Tokenizer.from_file(str(benchmark.model_dir / "tokenizer.json"))
    assert ours.get_vocab_size() == 50_400
    for text in ("the heat, the he<|endoftext|> they're\n\n  Łódź [PAD]", *(entry["input"] for entry in ARTICLES)):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    assert ours.encode("<|extratoken_7|>").ids == [50_263]
    assert {"he", "\u0120t"} < set(ours.encode(benchmark.features(0).text).tokens)


def test_a_vocabulary_that_is_cut_off_is_named(assets: Path) -> None:
    write_vocabulary(assets / "source")
    half(assets / "source" / "vocab.json")
    with pytest.raises(ValueError, match=r"vocab\.json, merges\.txt: not GPT-2's vocabulary"):
        gptj.prepare("gptj-99", assets)
