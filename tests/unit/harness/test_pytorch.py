"""fleet's own BERT against transformers', on a tiny model with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.harness.interfaces import Features

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fleet.harness.backends import pytorch  # noqa: E402 - not before torch is known to be there
from fleet.harness.models import linear  # noqa: E402


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

    def __getattr__(self, name: str) -> Any:
        # Worker processes are sent a copy: what copying looks for is not there, like in any object.
        raise AttributeError(name) if name.startswith("__") else NotImplementedError(name)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder as Hugging Face writes it, and the model it holds."""
    torch.manual_seed(20260401)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=64, type_vocab_size=2, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForQuestionAnswering(config).eval()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, model


def samples(*lengths: int) -> list[Features]:
    chance = np.random.default_rng(7)
    return [
        Features(
            chance.integers(0, 97, length, dtype=np.int64),
            (np.arange(length) > length // 3).astype(np.int64),
        )
        for length in lengths
    ]


@pytest.mark.parametrize("lengths", [(17,), (9, 9, 9), (64, 1, 5, 33, 33, 2)])
def test_logits_are_those_of_transformers(reference: tuple[Path, Any], lengths: tuple[int, ...]) -> None:
    folder, model = reference
    backend = pytorch.open(Folder(folder), {"device": "cpu", "threads": 1})
    given = samples(*lengths)
    found = list(backend.predict(given))
    assert [output.shape for output in found] == [(length, 2) for length in lengths]
    for sample, output in zip(given, found, strict=True):
        with torch.inference_mode():
            expected = model(
                input_ids=torch.from_numpy(sample.input_ids)[None],
                token_type_ids=torch.from_numpy(sample.token_type_ids)[None],
            )
        both = torch.stack([expected.start_logits[0], expected.end_logits[0]], dim=-1).numpy()
        assert np.abs(output - both).max() < 1e-5
        assert np.abs(both).max() > 0.1


def test_a_wrong_token_type_would_be_seen(reference: tuple[Path, Any]) -> None:
    folder, _ = reference
    backend = pytorch.open(Folder(folder), {"device": "cpu"})
    (sample,) = samples(12)
    other = Features(sample.input_ids, 1 - sample.token_type_ids)
    assert np.abs(next(iter(backend.predict([sample]))) - next(iter(backend.predict([other])))).max() > 1e-2


def test_lower_precision_is_said_and_near(reference: tuple[Path, Any]) -> None:
    folder, _ = reference
    full = pytorch.open(Folder(folder), {"device": "cpu"})
    half = pytorch.open(Folder(folder), {"device": "cpu", "dtype": "bfloat16", "batch_size": 3})
    assert (full.model, half.model) == ({"weight_data_types": "fp32"}, {"weight_data_types": "bf16"})
    assert half.batch_size == 3
    given = samples(11)
    (exact,), (near,) = full.predict(given), half.predict(given)
    assert 0 < np.abs(exact - near).max() < 0.5
    assert near.dtype == np.float32
    assert full.versions()["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batchsize": 3}, "the pytorch backend has no option 'batchsize' for BERT; it has"),
        ({"dtype": "int4"}, "dtype 'int4': one of float32, bfloat16, float16"),
    ],
)
def test_unknown_options_are_refused(reference: tuple[Path, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pytorch.open(Folder(reference[0]), options)


def test_a_checkpoint_of_another_model_is_refused(reference: tuple[Path, Any], tmp_path: Path) -> None:
    _, model = reference
    transformers.BertModel(model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a BertForQuestionAnswering checkpoint"):
        pytorch.open(Folder(tmp_path), {"device": "cpu"})


def test_a_checkpoint_with_too_few_layers_is_refused(reference: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = reference
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.3\."):
        pytorch.open(Folder(tmp_path), {"device": "cpu"})


def test_missing_weights_are_said(reference: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((reference[0] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file; next: fleet provision"):
        pytorch.open(Folder(tmp_path), {"device": "cpu"})


def test_another_activation_is_refused(reference: tuple[Path, Any], tmp_path: Path) -> None:
    _, model = reference
    config = transformers.BertConfig.from_dict({**model.config.to_dict(), "hidden_act": "relu"})
    transformers.BertForQuestionAnswering(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="relu"):
        pytorch.open(Folder(tmp_path), {"device": "cpu"})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose matrices are as wide as oneDNN's int8 product wants them."""
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, type_vocab_size=2, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    transformers.BertForQuestionAnswering(config).eval().save_pretrained(folder)
    return folder


def logits(folder: Path, given: list[Features], **options: Any) -> Any:
    backend = pytorch.open(Folder(folder), {"device": "cpu", "threads": 1, **options})
    found = np.concatenate(list(backend.predict(given)))
    backend.close()
    return found


def test_int8_is_near_and_said(wide: Path) -> None:
    given = samples(64, 40, 17)
    exact, near = logits(wide, given), logits(wide, given, dtype="int8")
    assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.05
    told = pytorch.open(Folder(wide), {"device": "cpu", "dtype": "int8"}).model
    assert told == {"weight_data_types": "int8", "weight_transformations": "quantised to int8 when loaded"}


@pytest.mark.parametrize(("low", "high"), [(-0.17, 20.0), (-9.0, 2.0), (1.0, 3.0), (-3.0, -1.0), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_activations_are_rounded_to_the_nearest_of_254_steps_and_no_step_is_lost(
    low: float, high: float, dtype: Any
) -> None:
    width = 256
    product = linear.Int8(torch.eye(width), torch.zeros(width))  # what comes out is what went in, quantised
    rows = torch.linspace(low, high, 8 * width).view(8, width).to(dtype)
    added = torch.linspace(-1, 1, 8 * width).view(8, width).to(dtype)
    before = rows.clone()
    error = product(rows).float() - rows.float()
    step = (max(high, 0.0) - min(low, 0.0)) / 254
    coarse = max(abs(low), abs(high)) * 2**-8 if dtype == torch.bfloat16 else 0.0  # what comes out is rounded too
    assert error.abs().max() <= 0.51 * step + coarse
    assert abs(float(error.mean())) <= 0.05 * step  # neither up nor down on the whole
    assert torch.equal(rows, before)
    both = product(rows, added.clone()).float() - (rows.float() + added.float())
    assert both.abs().max() <= 0.51 * step + coarse + 2**-7 * (dtype == torch.bfloat16)


def test_micro_batches_change_nothing(wide: Path) -> None:
    given = samples(64, 40, 40, 17, 3)
    assert np.abs(logits(wide, given, tokens=50) - logits(wide, given)).max() < 1e-5


def test_several_workers_answer_in_order(wide: Path) -> None:
    given = sorted(samples(*range(5, 60)), key=lambda sample: len(sample.input_ids))
    assert np.abs(logits(wide, given, workers=2) - logits(wide, given)).max() < 1e-5


def test_a_worker_that_cannot_open_its_model_says_why(tmp_path: Path, wide: Path) -> None:
    (tmp_path / "config.json").write_text((wide / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match="no such file; next: fleet provision"):
        pytorch.open(Folder(tmp_path), {"device": "cpu", "workers": 2})


@pytest.mark.parametrize(
    "said",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("could not create a primitive"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_micro_batch_for_good(
    wide: Path, monkeypatch: pytest.MonkeyPatch, said: Exception
) -> None:
    given, tried = samples(30, 30, 20, 10), []
    compute = pytorch.BertBackend._compute

    def short(backend: Any, chunk: Any) -> Any:
        tried.append(sum(len(sample.input_ids) for sample in chunk))
        if tried[-1] > 45:
            raise said
        return compute(backend, chunk)

    expected = logits(wide, given)
    monkeypatch.setattr(pytorch.BertBackend, "_compute", short)
    assert np.abs(logits(wide, given) - expected).max() < 1e-5
    assert tried == [90, 30, 30, 30]


def test_another_error_is_not_taken_for_want_of_memory(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def wrong(_: Any, chunk: Any) -> Any:
        tried.append(len(chunk))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(pytorch.BertBackend, "_compute", wrong)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        logits(wide, samples(12, 12))
    assert tried == [2]


def test_out_of_memory_with_a_single_sample_is_an_answer(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pytorch.BertBackend, "_compute", never)
    with pytest.raises(ValueError, match="out of memory on cpu with a single sample of 12 tokens"):
        logits(wide, samples(12, 12))


def test_a_token_of_another_vocabulary_is_named(wide: Path) -> None:
    wrong = Features(np.array([1, 30521, 2]), np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match="token 30521 is none of the model's 97: vocabulary and weights do not match"):
        logits(wide, [wrong])


def test_a_sample_longer_than_the_model_is_named(wide: Path) -> None:
    with pytest.raises(ValueError, match="a sample of 65 tokens, the model has 64 positions"):
        logits(wide, samples(65))


def test_truncated_weights_are_named(tmp_path: Path, wide: Path) -> None:
    for path in wide.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: truncated or damaged .*delete it, then: fleet provision"
    ):
        logits(tmp_path, samples(5))


def test_shards_are_read(tmp_path: Path, wide: Path) -> None:
    model = transformers.BertForQuestionAnswering.from_pretrained(wide)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert np.abs(logits(tmp_path, samples(20)) - logits(wide, samples(20))).max() < 1e-6


def test_random_weights_need_no_checkpoint_and_are_labelled(tmp_path: Path, wide: Path) -> None:
    (tmp_path / "config.json").write_text((wide / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    backend = pytorch.open(Folder(tmp_path), {"device": "cpu", "weights": "random"})
    assert backend.labels == ("random weights",)
    assert np.isfinite(np.concatenate(list(backend.predict(samples(9))))).all()


@pytest.mark.parametrize(("dtype", "said"), [("float8", "needs an NVIDIA GPU"), ("int4", "one of float32")])
def test_a_precision_that_the_device_has_not_is_refused(wide: Path, dtype: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        logits(wide, samples(5), dtype=dtype)
