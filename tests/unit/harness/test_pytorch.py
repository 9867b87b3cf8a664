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
        raise NotImplementedError(name)


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
    assert (full.batch_size, half.batch_size) == (32, 3)
    given = samples(11)
    difference = np.abs(full.predict(given)[0] - half.predict(given)[0]).max()
    assert 0 < difference < 0.5
    assert half.predict(given)[0].dtype == np.float32
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
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        pytorch.open(Folder(tmp_path), {"device": "cpu"})


def test_another_activation_is_refused(reference: tuple[Path, Any], tmp_path: Path) -> None:
    _, model = reference
    config = transformers.BertConfig.from_dict({**model.config.to_dict(), "hidden_act": "relu"})
    transformers.BertForQuestionAnswering(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="relu"):
        pytorch.open(Folder(tmp_path), {"device": "cpu"})
