"""TensorRT's backend where neither library nor GPU is there: options, keys, absence; and our half over a stand-in."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness import assets, cuda_memory, export_onnx
from fleet.harness.benchmarks import tiny, tiny_gptj
from fleet.harness.interfaces import Features, Output

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx.reference")
pytest.importorskip("onnxruntime")

from fleet.harness.backends import pytorch, tensorrt  # noqa: E402 - not before torch is known to be there
from tests.unit.harness import tensorrt_stand_in  # noqa: E402
from tests.unit.harness.tensorrt_stand_in import Cuda, TensorRT  # noqa: E402

GPU = cuda_memory.Gpu("NVIDIA H200", "9.0", "13.0")
WANTED = tensorrt.Wanted("f00d", "float32", 128, 512, 0.0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyBert:
    folder = tmp_path_factory.mktemp("work")
    assets.prepare(folder, "tiny-bert", "tiny", "test")
    return tiny.open("tiny-bert", folder / "assets" / "tiny-bert")


@pytest.fixture(scope="module")
def given(bert: tiny.TinyBert) -> list[Features]:
    return sorted((bert.features(index) for index in range(0, 10_833, 300)), key=lambda one: len(one.input_ids))


@pytest.fixture(scope="module")
def theirs(bert: tiny.TinyBert, given: list[Features]) -> list[Output]:
    """The pytorch backend's logits."""
    return list(pytorch.open(bert, {"threads": 1, "device": "cpu"}).predict(given))


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TensorRT, Cuda]]:
    with tensorrt_stand_in.installed(monkeypatch) as found:
        yield found


def worst(one: Iterable[Output], other: Iterable[Output]) -> float:
    return float(max(np.abs(left - right).max() for left, right in zip(one, other, strict=True)))


def test_an_absent_library_is_named_with_the_next_command(bert: tiny.TinyBert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ValueError, match=r"needs NVIDIA's Python package tensorrt-cu13, .*; next: fleet provision"):
        tensorrt.open(bert, {})


def test_a_library_without_its_parts_is_told_from_an_absent_one(
    bert: tiny.TinyBert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tensorrt"
    package.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    (package / "__init__.py").write_text("import tensorrt_bindings_of_no_one\n", encoding="utf-8")
    with pytest.raises(ValueError, match="tensorrt_bindings_of_no_one is missing; next: fleet provision"):
        tensorrt.open(bert, {})
    why = "libnvinfer.so.11: cannot open shared object file"
    (package / "__init__.py").write_text(f"raise ImportError({why!r})\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"does not load: {why}; next: fleet check"):
        tensorrt.open(bert, {})


def test_an_absent_gpu_is_named(bert: tiny.TinyBert, both: tuple[TensorRT, Cuda]) -> None:
    both[1].gpus = 0
    with pytest.raises(ValueError, match=r"no NVIDIA GPU can be used here .*no CUDA-capable device"):
        tensorrt.open(bert, {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"provider": "cuda"},
            r"no option 'provider'; it has \['batch_size', 'cache', 'dtype', 'weights', 'workspace'\]",
        ),
        ({"dtype": "int8"}, "dtype 'int8': one of float32, float16, bfloat16"),
        ({"weights": "mine"}, "weights 'mine': leave it out, or `random`"),
        ({"workspace": "4 GB"}, "workspace '4 GB': a number of GiB"),
        ({"batch_size": -1}, "batch_size -1: a whole number"),
    ],
)
def test_wrong_options_are_answered_before_the_library_is_asked(
    bert: tiny.TinyBert, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        tensorrt.open(bert, options)


def test_a_model_that_generates_is_refused(tmp_path: Path) -> None:
    assets.prepare(tmp_path, "tiny-gptj", "tiny_gptj", "test")
    with pytest.raises(ValueError, match="runs bert, not gptj: take pytorch, onnxruntime or openai"):
        tensorrt.open(tiny_gptj.open("tiny-gptj", tmp_path / "assets" / "tiny-gptj"), {})


def test_the_key_follows_gpu_version_weights_types_profiles_and_workspace() -> None:
    others: list[dict[str, Any]] = [
        {"graph": "beef"}, {"dtype": "float16"}, {"rows": 64}, {"longest": 384}, {"workspace": 4},
    ]  # fmt: skip
    keys = [
        WANTED.key(GPU, "11.4.0"),
        WANTED.key(GPU, "10.14.1"),
        WANTED.key(replace(GPU, name="NVIDIA H100"), "11.4.0"),
        WANTED.key(replace(GPU, capability="9.1"), "11.4.0"),
        *(replace(WANTED, **other).key(GPU, "11.4.0") for other in others),
    ]
    assert len(set(keys)) == len(keys)
    assert WANTED.key(replace(GPU, cuda="13.1"), "11.4.0") == keys[0]


def test_profiles_are_of_one_sample_and_of_several() -> None:
    assert WANTED.profiles == [((1, 1), (1, 192), (1, 512)), ((2, 1), (128, 192), (128, 512))]
    assert replace(WANTED, rows=1, longest=128).profiles == [((1, 1), (1, 128), (1, 128))]


def test_an_engine_is_kept_and_a_damaged_one_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "deep" / "one.engine"
    assert tensorrt.stored(place) is None
    tensorrt.keep(place, b"an engine")
    assert bytes(tensorrt.stored(place) or b"") == b"an engine"
    assert [path.name for path in place.parent.iterdir()] == ["one.engine"]
    whole = place.read_bytes()
    for damaged in (whole[:-1], whole[:10], b"", whole[:-1] + b"x"):
        place.write_bytes(damaged)
        assert tensorrt.stored(place) is None
        assert "is damaged and is built anew" in capsys.readouterr().out


def test_logits_are_those_of_the_pytorch_backend(
    bert: tiny.TinyBert, given: list[Features], theirs: list[Output], both: tuple[TensorRT, Cuda], tmp_path: Path
) -> None:
    backend = tensorrt.open(bert, {"cache": str(tmp_path), "batch_size": 8, "workspace": 0.5})
    assert worst(backend.predict(given), theirs) < 1e-4
    assert worst(backend.predict(given[:1]), theirs[:1]) < 1e-4
    library, cuda = both
    assert [rows for rows, _ in library.shapes] == [8, 8, 8, 8, 5, 1]
    assert all(length % tensorrt.STEP == 0 for _, length in library.shapes)
    assert list(library.pools.values()) == [2**29]
    assert backend.versions()["gpu"] == "Stand-in"
    assert backend.labels == ()
    assert backend.batch_size == 64
    backend.close()
    assert (cuda.held, cuda.used) == ({}, 0)


@pytest.mark.usefixtures("both")
def test_outputs_that_nobody_fetched_do_not_mix_with_the_next(
    bert: tiny.TinyBert, given: list[Features], theirs: list[Output], tmp_path: Path
) -> None:
    backend = tensorrt.open(bert, {"cache": str(tmp_path), "batch_size": 4})
    abandoned = iter(backend.predict(given))
    first = next(abandoned)
    assert worst(backend.predict(given[20:]), theirs[20:]) < 1e-4
    assert np.abs(first - theirs[0]).max() < 1e-4


def test_an_engine_is_built_once_for_a_version_and_again_when_it_is_damaged(
    bert: tiny.TinyBert, given: list[Features], theirs: list[Output], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def built(version: str) -> int:
        with tensorrt_stand_in.installed(monkeypatch, version=version) as (library, _):
            backend = tensorrt.open(bert, {"cache": str(tmp_path)})
            assert worst(backend.predict(given), theirs) < 1e-4
            return library.built

    assert [built("11.4.0"), built("11.4.0"), built("10.14.1"), built("11.4.0")] == [1, 0, 1, 0]
    engines = sorted((tmp_path / "tensorrt").iterdir())
    assert len(engines) == 2
    for engine in engines:
        engine.write_bytes(engine.read_bytes()[:-7])
    assert [built("11.4.0"), built("11.4.0")] == [1, 0]


def test_an_engine_that_the_library_refuses_is_built_anew(
    bert: tiny.TinyBert, both: tuple[TensorRT, Cuda], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensorrt.open(bert, {"cache": str(tmp_path)})
    (place,) = (tmp_path / "tensorrt").iterdir()
    told = json.loads(bytes(tensorrt.stored(place) or b""))
    tensorrt.keep(place, json.dumps(["9.0", *told[1:]]).encode())
    tensorrt.open(bert, {"cache": str(tmp_path)})
    assert both[0].built == 2
    assert "cannot load the engine: the engine is another version's; it is built anew" in capsys.readouterr().out


def test_memory_short_at_the_start_means_an_engine_for_fewer(
    bert: tiny.TinyBert, given: list[Features], theirs: list[Output], both: tuple[TensorRT, Cuda], tmp_path: Path
) -> None:
    _, cuda = both
    cuda.limit = 500_000  # 128 tokens take 4 KiB a sample, and there are two slots
    backend = tensorrt.open(bert, {"cache": str(tmp_path), "batch_size": 256})
    assert backend.batch_size == 32 * tensorrt.AHEAD
    assert worst(backend.predict(given), theirs) < 1e-4
    backend.close()
    assert (cuda.held, cuda.used) == ({}, 0)
    cuda.limit = 1000
    with pytest.raises(ValueError, match="out of memory on Stand-in with one sample of 128 tokens"):
        tensorrt.open(bert, {"cache": str(tmp_path), "batch_size": 4})
    assert (cuda.held, cuda.used) == ({}, 0)


def test_memory_short_in_the_middle_means_fewer_from_there_on(
    bert: tiny.TinyBert, given: list[Features], theirs: list[Output], both: tuple[TensorRT, Cuda], tmp_path: Path
) -> None:
    backend = tensorrt.open(bert, {"cache": str(tmp_path), "batch_size": 16})
    answers = iter(backend.predict(given))
    found = [next(answers)]
    both[0].rows = 3  # two batches of 16 are under way, 5 samples are left
    found += list(answers)
    assert worst(found, theirs) < 1e-4
    assert backend.batch_size == 2 * tensorrt.AHEAD
    both[0].rows = 0
    with pytest.raises(ValueError, match=r"out of memory on Stand-in with one sample of \d+ tokens"):
        list(backend.predict(given))


def test_a_graph_that_cannot_be_read_is_a_named_cause(
    bert: tiny.TinyBert, both: tuple[TensorRT, Cuda], tmp_path: Path
) -> None:
    export_onnx.exported(bert.config, bert.model_dir, tmp_path).write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"TensorRT 11\.4\.0 cannot read .*model\.onnx: this is no graph"):
        tensorrt.open(bert, {"cache": str(tmp_path)})
    assert both[1].held == {}


def test_random_weights_are_labelled(
    bert: tiny.TinyBert, given: list[Features], both: tuple[TensorRT, Cuda], tmp_path: Path
) -> None:
    backend = tensorrt.open(bert, {"cache": str(tmp_path), "weights": "random"})
    assert both[0].built == 1
    assert backend.labels == ("random weights",)
    assert backend.model["starting_weights_filename"] == "none"
    assert all(np.isfinite(output).all() for output in backend.predict(given[:3]))


def test_a_foreign_token_and_a_long_sample_are_named(
    bert: tiny.TinyBert, both: tuple[TensorRT, Cuda], tmp_path: Path
) -> None:
    backend = tensorrt.open(bert, {"cache": str(tmp_path)})
    for ids, said in ((np.full(4, 9999), "token 9999 is none of"), (np.zeros(129, int), "a sample of 129 tokens")):
        with pytest.raises(ValueError, match=said):
            list(backend.predict([Features(ids, np.zeros_like(ids))]))
    assert both[0].shapes == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_export_for_another_type_is_a_sound_graph(
    bert: tiny.TinyBert, given: list[Features], theirs: list[Output], tmp_path: Path, dtype: str
) -> None:
    path = export_onnx.exported(bert.config, bert.model_dir, tmp_path, dtype)
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    kind = onnx.TensorProto.FLOAT16 if dtype == "float16" else onnx.TensorProto.BFLOAT16
    products = [node.output[0] for node in graph.node if node.op_type in {"MatMul", "LayerNormalization", "Gelu"}]
    assert {types[name] for name in products} == {kind}
    assert {types[node.output[0]] for node in graph.node if node.op_type == "Softmax"} == {onnx.TensorProto.FLOAT}
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    evaluate = onnx.reference.ReferenceEvaluator(str(path))
    for sample, wanted in zip(given[10:14], theirs[10:14], strict=True):
        ids, segments = sample.input_ids[None], sample.token_type_ids[None]
        (found,) = evaluate.run(
            None, {"input_ids": ids, "token_type_ids": segments, "attention_mask": np.ones_like(ids)}
        )
        assert (found[0].argmax(axis=0) == wanted.argmax(axis=0)).all()
        assert 1e-4 < np.abs(found[0] - wanted).max() < 2  # of logits to 13; it adds up in the short type


def test_cuda_without_a_driver_says_so() -> None:
    """The real bindings; where a GPU is, it is named."""
    pytest.importorskip("cuda.bindings")
    try:
        found = cuda_memory.gpu()
    except ValueError as error:
        assert "no NVIDIA GPU can be used here" in str(error)  # noqa: PT017 - both outcomes are right, by machine
    else:
        assert found.name
