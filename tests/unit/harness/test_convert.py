import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertForQuestionAnswering

from fleet.harness import convert

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 11,
    "type_vocab_size": 2,
    "vocab_size": 20,
}
"""More than ten layers: layer_10 is not layer_1."""
TENSORFLOW = {
    "bert.embeddings.word_embeddings.weight": "bert/embeddings/word_embeddings",
    "bert.embeddings.position_embeddings.weight": "bert/embeddings/position_embeddings",
    "bert.embeddings.token_type_embeddings.weight": "bert/embeddings/token_type_embeddings",
    "bert.embeddings.LayerNorm.weight": "bert/embeddings/LayerNorm/gamma",
    "bert.embeddings.LayerNorm.bias": "bert/embeddings/LayerNorm/beta",
    "qa_outputs.weight": "cls/squad/output_weights",
    "qa_outputs.bias": "cls/squad/output_bias",
}
"""Hugging Face's names to those of google-research/bert's checkpoints, outside the encoder."""
LAYER = {
    "attention.self.query.weight": "attention/self/query/kernel",
    "attention.self.query.bias": "attention/self/query/bias",
    "attention.self.key.weight": "attention/self/key/kernel",
    "attention.self.key.bias": "attention/self/key/bias",
    "attention.self.value.weight": "attention/self/value/kernel",
    "attention.self.value.bias": "attention/self/value/bias",
    "attention.output.dense.weight": "attention/output/dense/kernel",
    "attention.output.dense.bias": "attention/output/dense/bias",
    "attention.output.LayerNorm.weight": "attention/output/LayerNorm/gamma",
    "attention.output.LayerNorm.bias": "attention/output/LayerNorm/beta",
    "intermediate.dense.weight": "intermediate/dense/kernel",
    "intermediate.dense.bias": "intermediate/dense/bias",
    "output.dense.weight": "output/dense/kernel",
    "output.dense.bias": "output/dense/bias",
    "output.LayerNorm.weight": "output/LayerNorm/gamma",
    "output.LayerNorm.bias": "output/LayerNorm/beta",
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(5)
    made = BertForQuestionAnswering(BertConfig(**SIZES)).eval()
    with torch.no_grad():
        # Fresh biases and norms are zeros and ones: mixed up, they would go unnoticed.
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def state(model: Any) -> dict[str, npt.NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def to_tensorflow(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """As a checkpoint of google-research/bert, fine-tuned, has them: with the optimiser's variables."""
    names = dict(TENSORFLOW)
    for layer in range(SIZES["num_hidden_layers"]):
        names |= {f"bert.encoder.layer.{layer}.{h}": f"bert/encoder/layer_{layer}/{t}" for h, t in LAYER.items()}
    made = {}
    for name, array in arrays.items():
        theirs = names[name]
        made[theirs] = array.T if theirs.endswith("kernel") else array
        made[f"{theirs}/adam_m"] = made[f"{theirs}/adam_v"] = np.zeros_like(made[theirs])
    return made | {
        "global_step": np.array(5474),
        "bert/pooler/dense/kernel": np.zeros((8, 8), np.float32),
        "bert/pooler/dense/bias": np.zeros(8, np.float32),
        "cls/predictions/output_bias": np.zeros(20, np.float32),
    }


def assert_same_logits(model: Any, path: Path) -> None:
    """A model made anew of `path` answers like `model`."""
    again = BertForQuestionAnswering(BertConfig(**SIZES)).eval()
    again.load_state_dict({name: torch.from_numpy(array) for name, array in load_file(path).items()})
    ids = torch.arange(14).reshape(2, 7)
    types = (ids % 7 > 3).long()
    with torch.no_grad():
        first, second = (one(input_ids=ids, token_type_ids=types) for one in (model, again))
    assert torch.equal(first.start_logits, second.start_logits)
    assert torch.equal(first.end_logits, second.end_logits)
    assert first.start_logits.std() > 0.01


def test_the_parameters_are_those_of_transformers(model: Any) -> None:
    assert convert.shapes(SIZES) == {name: array.shape for name, array in state(model).items()}


def test_tensorflow_s_names_come_back_as_hugging_face_s(model: Any) -> None:
    arrays = state(model)
    theirs = to_tensorflow(arrays)
    renamed = convert.from_tensorflow_names(theirs)
    assert renamed.keys() == {*arrays, "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert all(np.array_equal(renamed[name], array) for name, array in arrays.items())
    # Variables of TensorFlow 2 end in :0; names that are Hugging Face's stay, old ones of its norms do not.
    tagged = convert.from_tensorflow_names({f"{name}:0": array for name, array in theirs.items()})
    assert tagged.keys() == renamed.keys()
    assert convert.from_tensorflow_names(arrays).keys() == arrays.keys()
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): a for name, a in arrays.items()}
    assert old.keys() != arrays.keys()
    assert convert.from_tensorflow_names(old).keys() == arrays.keys()


@pytest.mark.parametrize("file", ["model.npz", "model.safetensors"])
def test_tensorflow_s_arrays_answer_like_the_model_they_are(file: str, model: Any, tmp_path: Path) -> None:
    theirs = {name: np.ascontiguousarray(array) for name, array in to_tensorflow(state(model)).items()}
    if file.endswith(".npz"):
        save_npz(tmp_path / file, theirs)
    else:
        save_file(theirs, tmp_path / file)
    assert convert.find(tmp_path) == ([tmp_path / file], True)
    convert.to_safetensors(tmp_path / file, tmp_path / "out.safetensors", SIZES)
    assert_same_logits(model, tmp_path / "out.safetensors")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
def test_the_official_state_dict_answers_like_the_model_it_is(zipped: bool, model: Any, tmp_path: Path) -> None:
    # What torch 1 and transformers 2 saved: a buffer of positions and the unused pooler beside the parameters.
    saved = dict(model.state_dict())
    saved["bert.embeddings.position_ids"] = torch.arange(16)[None]
    saved["bert.pooler.dense.weight"], saved["bert.pooler.dense.bias"] = torch.zeros(8, 8), torch.zeros(8)
    torch.save(saved, tmp_path / "model.pytorch", _use_new_zipfile_serialization=zipped)
    assert convert.find(tmp_path) == ([tmp_path / "model.pytorch"], True)
    convert.to_safetensors(tmp_path / "model.pytorch", tmp_path / "out.safetensors", SIZES)
    assert_same_logits(model, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*.partial"))


def test_bfloat16_of_a_pickle_becomes_float32(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([0.5, -3.0], dtype=torch.bfloat16)}, tmp_path / "pytorch_model.bin")
    read = convert.read(tmp_path / "pytorch_model.bin")
    assert read["a"].dtype == np.float32
    assert read["a"].tolist() == [0.5, -3.0]


def test_safetensors_of_hugging_face_come_first_and_stay(model: Any, tmp_path: Path) -> None:
    save_file(state(model), tmp_path / "model.safetensors")
    (tmp_path / "model.pytorch").write_bytes(b"")
    assert convert.find(tmp_path) == ([tmp_path / "model.safetensors"], False)
    found = convert.headers([tmp_path / "model.safetensors"])
    assert found["qa_outputs.weight"] == ("F32", (2, 8))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.pytorch").unlink()
    assert convert.find(tmp_path) == ([], False)


def test_broken_checkpoints_are_refused_by_name(model: Any, tmp_path: Path) -> None:
    pickled = tmp_path / "model.pytorch"
    torch.save(model.state_dict(), pickled)
    whole = pickled.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        pickled.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pytorch: not a whole state dict of weights alone, fetch it"):
            convert.read(pickled)
    torch.save([1, 2], pickled)
    with pytest.raises(ValueError, match=r"model\.pytorch: not a state dict"):
        convert.read(pickled)
    for name in ("model.npz", "model.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and no more")
        with pytest.raises(ValueError, match=rf"{name}: not a whole"):
            convert.read(tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="not an index of shards"):
            convert.find(tmp_path)


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harm()}, "model.pytorch")
    with pytest.raises(ValueError, match="not a whole state dict of weights alone"):
        convert.read(Path("model.pytorch"))
    assert not Path("harmed").exists()


def test_a_missing_or_foreign_parameter_is_named(model: Any, tmp_path: Path) -> None:
    arrays = state(model)
    source, target = tmp_path / "model.npz", tmp_path / "model.safetensors"
    save_npz(source, {name: array for name, array in arrays.items() if name != "qa_outputs.bias"})
    with pytest.raises(ValueError, match=r"model\.npz: no qa_outputs\.bias, not a BERT checkpoint for question ans"):
        convert.to_safetensors(source, target, SIZES)
    save_npz(source, arrays)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight is \[20, 8\], the configuration says \[21, 8\]"):
        convert.to_safetensors(source, target, SIZES | {"vocab_size": 21})
    assert not target.exists()


def test_without_torch_a_pickle_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"only torch reads: install torch, or bring model\.safetensors in its place"):
        convert.read(tmp_path / "model.pytorch")
