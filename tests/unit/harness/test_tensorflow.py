"""TensorFlow's backend against the pytorch one and transformers; graphs in the forms that others publish."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness import assets
from fleet.harness.benchmarks import tiny, tiny_gptj
from fleet.harness.interfaces import Features

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# Before TensorFlow: it may bring Triton, and that aborts when TensorFlow's LLVM is there first.
pytest.importorskip("torch._dynamo")

tf = pytest.importorskip("tensorflow")

from fleet.harness.backends import pytorch, tensorflow  # noqa: E402 - not before both are known to be there


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    assets.prepare(folder, "tiny-bert", "tiny", "test")
    assets.prepare(folder, "tiny-gptj", "tiny_gptj", "test")
    return folder / "assets"


class Folder:
    """As much of a benchmark as a backend needs."""

    sample_count = 0
    generation = None
    model: dict[str, str] = {}  # noqa: RUF012 - shaped like Benchmark

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir

    @property
    def config(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.model_dir / "config.json").read_text(encoding="utf-8"))
        return data


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=64, type_vocab_size=2, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForQuestionAnswering(config).eval()
    folder = tmp_path_factory.mktemp("small") / "model"
    model.save_pretrained(folder)
    return folder, model


def samples(*lengths: int) -> list[Features]:
    chance = np.random.default_rng(7)
    return [
        Features(chance.integers(0, 97, length, dtype=np.int64), (np.arange(length) > length // 3).astype(np.int64))
        for length in lengths
    ]


def logits(folder: Path, given: list[Features], **options: Any) -> list[Any]:
    backend = tensorflow.open(Folder(folder), {"threads": 1, **options})  # type: ignore[arg-type]
    return list(backend.predict(given))


def test_tiny_berts_logits_are_those_of_the_pytorch_backend(work: Path) -> None:
    benchmark = tiny.open("tiny-bert", work / "tiny-bert")
    given = sorted((benchmark.features(index) for index in range(0, 10_833, 300)), key=lambda one: len(one.input_ids))
    ours = tensorflow.open(benchmark, {"threads": 1})
    theirs = pytorch.open(benchmark, {"threads": 1, "device": "cpu"})
    pairs = list(zip(ours.predict(given), theirs.predict(given), strict=True))
    assert len(pairs) == len(given)
    assert max(np.abs(one - other).max() for one, other in pairs) < 1e-4
    assert ours.versions()["tensorflow"] == tf.__version__
    assert ours.labels == ()


def test_tiny_gptjs_tokens_are_those_of_the_pytorch_backend(work: Path) -> None:
    benchmark = tiny_gptj.open("tiny-gptj", work / "tiny-gptj")
    given = [benchmark.features(index) for index in range(0, 5000, 250)]
    for beams in (1, 4):
        options = {"threads": 1, "beams": beams}
        ours = tensorflow.open(benchmark, options).predict(given)
        theirs = pytorch.open(benchmark, options).predict(given)
        assert [one.tolist() for one in ours] == [other.tolist() for other in theirs]


def test_logits_are_those_of_transformers_at_every_length(small: tuple[Path, Any]) -> None:
    folder, model = small
    given = samples(64, 1, 5, 33, 33, 2)
    for sample, found in zip(given, logits(folder, given), strict=True):
        with torch.inference_mode():
            expected = model(
                input_ids=torch.from_numpy(sample.input_ids)[None],
                token_type_ids=torch.from_numpy(sample.token_type_ids)[None],
            )
        both = torch.stack([expected.start_logits[0], expected.end_logits[0]], dim=-1).numpy()
        assert np.abs(found - both).max() < 1e-4
        assert np.abs(both).max() > 0.1


def graph_of(folder: Path, names: tuple[str, str, str]) -> Any:
    """The small model as a TensorFlow function of inputs by these names."""
    from fleet.harness.models import tf_bert

    model = tf_bert.Bert(Folder(folder).config, folder)
    specs = [tf.TensorSpec([None, None], tf.int32, name=name) for name in names]

    @tf.function(input_signature=specs)  # type: ignore[untyped-decorator]
    def call(ids: Any, mask: Any, types: Any) -> Any:
        return {"logits": tf.identity(model._compute(ids, mask, types), name="logits")}

    return call


@pytest.fixture(scope="module")
def frozen(small: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GraphDef with its weights in it and Google's names, as MLPerf publishes one."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    call = graph_of(small[0], ("input_ids", "input_mask", "segment_ids"))
    path: Path = tmp_path_factory.mktemp("frozen") / "model.pb"
    path.write_bytes(
        convert_variables_to_constants_v2(call.get_concrete_function()).graph.as_graph_def().SerializeToString()
    )
    return path


def test_a_frozen_graph_and_a_saved_model_say_the_same(small: tuple[Path, Any], frozen: Path, tmp_path: Path) -> None:
    given = samples(20, 20, 9)
    expected = logits(small[0], given)
    module = tf.Module()
    module.call = graph_of(small[0], ("input_ids", "attention_mask", "token_type_ids"))
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures={"serving_default": module.call})
    for path in (frozen, tmp_path / "saved"):
        for found, wanted in zip(logits(small[0], given, model=str(path)), expected, strict=True):
            assert np.abs(found - wanted).max() < 1e-4


def test_a_graph_that_is_not_berts_is_named_with_what_it_has(small: tuple[Path, Any], tmp_path: Path) -> None:
    graph = tf.Graph()
    with graph.as_default():
        tf.identity(tf.compat.v1.placeholder(tf.float32, [None], name="pixels"), name="logits")
    (tmp_path / "other.pb").write_bytes(graph.as_graph_def().SerializeToString())
    with pytest.raises(ValueError, match=r"no input input_ids; it has pixels"):
        logits(small[0], samples(3), model=str(tmp_path / "other.pb"))
    (tmp_path / "cut.pb").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(ValueError, match="truncated or no frozen graph"):
        logits(small[0], samples(3), model=str(tmp_path / "cut.pb"))


def test_truncated_weights_and_a_missing_parameter_are_named(small: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder, _ = small
    (tmp_path / "config.json").write_text((folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        logits(tmp_path, samples(3))
    weights = load_file(folder / "model.safetensors")
    del weights["qa_outputs.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"qa_outputs\.bias"):
        logits(tmp_path, samples(3))


def test_random_weights_are_labelled(small: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((small[0] / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    backend = tensorflow.open(Folder(tmp_path), {"weights": "random", "threads": 1})  # type: ignore[arg-type]
    assert backend.labels == ("random weights",)
    assert all(np.isfinite(output).all() for output in backend.predict(samples(7, 9)))


def test_an_unknown_option_is_answered_with_those_there_are(small: tuple[Path, Any]) -> None:
    with pytest.raises(ValueError, match=r"no option 'thread'.*threads"):
        logits(small[0], samples(3), thread=1)
