"""ONNX Runtime's backend against the pytorch one: our own export, int8, and graphs with MLPerf's names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness import assets, export_onnx
from fleet.harness.benchmarks import tiny, tiny_gptj
from fleet.harness.interfaces import Features

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from fleet.harness.backends import onnxruntime, pytorch  # noqa: E402 - not before both are known to be there


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where exports go, the same for all tests."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    assets.prepare(folder, "tiny-bert", "tiny", "test")
    assets.prepare(folder, "tiny-gptj", "tiny_gptj", "test")
    return folder / "assets"


@pytest.fixture(scope="module")
def bert(work: Path) -> tiny.TinyBert:
    return tiny.open("tiny-bert", work / "tiny-bert")


@pytest.fixture(scope="module")
def given(bert: tiny.TinyBert) -> list[Features]:
    return sorted((bert.features(index) for index in range(0, 10_833, 300)), key=lambda one: len(one.input_ids))


class Elsewhere:
    """tiny-bert with its model in another folder."""

    generation = None

    def __init__(self, bert: tiny.TinyBert, model_dir: Path) -> None:
        self.config, self.model_dir = bert.config, model_dir


def worst(one: Iterator[Any], other: Iterator[Any]) -> float:
    return float(max(np.abs(left - right).max() for left, right in zip(one, other, strict=True)))


def test_tiny_berts_logits_are_those_of_the_pytorch_backend(bert: tiny.TinyBert, given: list[Features]) -> None:
    ours = onnxruntime.open(bert, {"threads": 1})
    theirs = pytorch.open(bert, {"threads": 1, "device": "cpu"})
    assert worst(iter(ours.predict(given)), iter(theirs.predict(given))) < 1e-4
    assert ours.versions()["provider"] == "cpu"
    assert ours.labels == ()


def test_tiny_gptjs_tokens_are_those_of_the_pytorch_backend(work: Path) -> None:
    benchmark = tiny_gptj.open("tiny-gptj", work / "tiny-gptj")
    prompts = [benchmark.features(index) for index in range(0, 5000, 250)]
    for beams in (1, 4):
        ours = onnxruntime.open(benchmark, {"threads": 1, "beams": beams}).predict(prompts)
        theirs = pytorch.open(benchmark, {"threads": 1, "beams": beams}).predict(prompts)
        assert [one.tolist() for one in ours] == [other.tolist() for other in theirs]


def test_int8_answers_nearly_every_question_alike(bert: tiny.TinyBert, given: list[Features]) -> None:
    backend = onnxruntime.open(bert, {"threads": 1, "dtype": "int8"})
    assert backend.model["weight_data_types"] == "int8"
    exact = onnxruntime.open(bert, {"threads": 1}).predict(given)
    pairs = list(zip(backend.predict(given), exact, strict=True))
    assert any(np.abs(near - full).max() > 1e-3 for near, full in pairs)
    same = sum((near.argmax(axis=0) == full.argmax(axis=0)).all() for near, full in pairs)
    assert same >= 0.9 * len(pairs)


def test_an_export_is_made_once(bert: tiny.TinyBert, cache: Path) -> None:
    first = export_onnx.exported(bert.config, bert.model_dir, cache)
    made = first.stat().st_mtime_ns
    assert export_onnx.exported(bert.config, bert.model_dir, cache).stat().st_mtime_ns == made
    assert export_onnx.exported(bert.config, None, cache) != first


def test_a_given_graph_with_mlperfs_names_says_the_same(
    bert: tiny.TinyBert, given: list[Features], cache: Path, tmp_path: Path
) -> None:
    model = onnx.load(export_onnx.exported(bert.config, bert.model_dir, cache))
    names = {"attention_mask": "input_mask", "token_type_ids": "segment_ids"}
    for part in model.graph.input:
        part.name = names.get(part.name, part.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=False)
    ours = onnxruntime.open(bert, {"threads": 1, "model": str(tmp_path / "model.onnx")})
    assert worst(iter(ours.predict(given)), iter(onnxruntime.open(bert, {"threads": 1}).predict(given))) < 1e-5
    assert ours.model["starting_weights_filename"] == "model.onnx"
    assert len(ours.model["weights_sha256"]) == 64


def test_a_graph_that_is_not_berts_is_named_with_what_it_has(bert: tiny.TinyBert, tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["pixels"], ["logits"])
    graph = onnx.helper.make_graph([node], "other", [value], [out])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="no input input_ids; it has pixels"):
        onnxruntime.open(bert, {"model": str(tmp_path / "other.onnx")})
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "other.onnx").read_bytes()[:20])
    with pytest.raises(ValueError, match=r"cut\.onnx: ONNX Runtime cannot use it"):
        onnxruntime.open(bert, {"model": str(tmp_path / "cut.onnx")})


def test_truncated_weights_and_a_missing_parameter_are_named(bert: tiny.TinyBert, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    (tmp_path / "config.json").write_text(json.dumps(bert.config), encoding="utf-8")
    data = (bert.model_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        onnxruntime.open(Elsewhere(bert, tmp_path), {})  # type: ignore[arg-type]
    weights = load_file(bert.model_dir / "model.safetensors")
    del weights["qa_outputs.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"qa_outputs\.bias"):
        onnxruntime.open(Elsewhere(bert, tmp_path), {})  # type: ignore[arg-type]


def test_random_weights_are_labelled(bert: tiny.TinyBert, given: list[Features], tmp_path: Path) -> None:
    backend = onnxruntime.open(Elsewhere(bert, tmp_path), {"weights": "random", "threads": 1})  # type: ignore[arg-type]
    assert backend.labels == ("random weights",)
    assert backend.model["starting_weights_filename"] == "none"
    assert all(np.isfinite(output).all() for output in backend.predict(given[:3]))


def test_out_of_memory_halves_the_batch_for_good(
    bert: tiny.TinyBert, given: list[Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = onnxruntime.open(bert, {"threads": 1})
    expected = list(backend.predict(given))
    whole, tried = backend._outputs, []  # type: ignore[attr-defined]

    def short(samples: list[Features]) -> Any:
        tried.append(len(samples))
        if len(samples) > 2:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
        return whole(samples)

    monkeypatch.setattr(backend, "_outputs", short)
    assert worst(iter(backend.predict(given)), iter(expected)) < 1e-4
    assert tried[:3] == [8, 4, 2]
    assert set(tried[3:]) <= {1, 2}


def test_a_provider_that_is_not_there_is_answered_with_those_that_are(bert: tiny.TinyBert) -> None:
    with pytest.raises(ValueError, match=r"provider cuda: this ONNX Runtime has cpu; .*pip install onnxruntime-gpu"):
        onnxruntime.open(bert, {"provider": "cuda"})
    with pytest.raises(ValueError, match=r"provider 'rocm': one of tensorrt, cuda, cpu"):
        onnxruntime.open(bert, {"provider": "rocm"})


def test_an_unknown_option_is_answered_with_those_there_are(bert: tiny.TinyBert) -> None:
    with pytest.raises(ValueError, match=r"no option 'thread' for bert; it has .*threads"):
        onnxruntime.open(bert, {"thread": 1})
