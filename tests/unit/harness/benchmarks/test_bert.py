import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from fleet.harness import convert
from fleet.harness.benchmarks import bert
from fleet.mlperf.rules import load_benchmark

CHECKER = re.compile(r"^\{[\"\']exact_match[\"\']\:\s*[\d\.]+,\s*[\"\']f1[\"\']\:\s*([\d\.]+)\}")
"""The official submission checker's pattern for F1."""
LETTERS = "abcdefghij"
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *"?.,'-",
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *(left + right for left in LETTERS for right in LETTERS[:4]),
    *(f"##{left}{right}" for left in LETTERS[:5] for right in LETTERS[5:]),
]
CONFIG = {
    "model_type": "bert",
    "hidden_size": 4,
    "intermediate_size": 8,
    "max_position_embeddings": 384,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "type_vocab_size": 2,
    "vocab_size": len(VOCABULARY),
}


def write_words(random_: random.Random, count: int) -> list[str]:
    """Words of every kind: in pieces, unknown, accented, with punctuation, of nothing that remains."""
    odd = ["Caf\u00e9", "x", "a\u00a0b", "[SEP]", "\u200b", "d'e.f", "\u5317a", "a" * 101, "C\u0301D"]
    return [
        random_.choice(odd) if random_.random() < 0.1 else "".join(random_.choices(LETTERS, k=random_.randint(1, 5)))
        for _ in range(count)
    ]


def make_dataset(lengths: list[int], questions: int = 3) -> dict[str, Any]:
    random_ = random.Random(11)
    paragraphs = []
    for number, length in enumerate(lengths):
        words = write_words(random_, length)
        qas = []
        for count in range(questions):
            plain = [n for n in range(length - 1) if set("".join(words[n : n + 2])) <= set(LETTERS)]
            start = random_.choice(plain)
            asked = " ".join(write_words(random_, 70 if count == 2 else 5)) + "?"
            answers = [{"text": " ".join(words[start : start + 2]), "answer_start": 0}, {"text": "nothing"}]
            qas.append({"id": f"{number}-{count}", "question": asked, "answers": answers})
        paragraphs.append({"context": random_.choice([" ", "\n", "\u202f", "  "]).join(words), "qas": qas})
    return {"version": "1.1", "data": [{"title": "One", "paragraphs": paragraphs}]}


def make_source(assets: Path, dataset: dict[str, Any] | None = None) -> Path:
    source = assets / "source"
    source.mkdir(parents=True)
    (source / "dev-v1.1.json").write_text(json.dumps(dataset or make_dataset([20, 300, 7, 500])), encoding="utf-8")
    (source / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (source / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return source


def weights() -> dict[str, npt.NDArray[Any]]:
    random_ = np.random.default_rng(3)
    return {name: random_.normal(size=shape).astype(np.float32) for name, shape in convert.shapes(CONFIG).items()}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert-99")
    source = make_source(folder)
    save_file(weights(), source / "model.safetensors")
    bert.prepare("bert-99", folder)
    return folder


@pytest.fixture(scope="module")
def benchmark(assets: Path) -> bert.Bert:
    return bert.open("bert-99", assets)


def plain_pieces(word: str) -> list[str]:
    """Word pieces, greedily the longest one first; of what these tests' words hold."""
    plain = word.lower().replace("\u0301", "").replace("\u00e9", "e").replace("\u200b", "").replace("\u00a0", " ")
    split = re.sub(r"([?.,'\u5317-])", r" \1 ", plain)
    pieces = []
    for part in re.split(r"(\[sep\])|\s+", split):
        if part == "[sep]":
            pieces.append("[SEP]")
            continue
        rest, found = part or "", list[str]()
        while rest and len(part) <= 100:
            known = [
                rest[:end] for end in range(1, len(rest) + 1) if ("##" if found else "") + rest[:end] in VOCABULARY
            ]
            if not known:
                break
            found.append(("##" if found else "") + known[-1])
            rest = rest[len(known[-1]) :]
        pieces += ["[UNK]"] if rest else found
    return pieces


def plain_windows(dataset: dict[str, Any]) -> Iterator[tuple[str, list[str], list[int | None], list[bool]]]:
    """Question id, tokens, word of each token, and where answers may begin: token by token, window by window."""
    for paragraph in dataset["data"][0]["paragraphs"]:
        words, space = list[str](), True
        for character in paragraph["context"]:
            if character in " \t\r\n\u202f":
                space = True
            else:
                words[len(words) if space else -1 :] = [character if space else words[-1] + character]
                space = False
        tokens = [(piece, number) for number, word in enumerate(words) for piece in plain_pieces(word)]
        for qa in paragraph["qas"]:
            question = [piece for word in qa["question"].split(" ") for piece in plain_pieces(word)][:64]
            room, begins = 384 - len(question) - 3, [0]
            while begins[-1] + room < len(tokens):
                begins.append(begins[-1] + 128)
            inside = [range(begin, min(begin + room, len(tokens))) for begin in begins]
            for number, window in enumerate(inside):
                may_begin = []
                for token in window:
                    context = [
                        (min(token - other[0], other[-1] - token) + 0.01 * len(other), -place)
                        for place, other in enumerate(inside)
                        if token in other
                    ]
                    may_begin.append(-max(context)[1] == number)
                before = len(question) + 2
                yield (
                    qa["id"],
                    ["[CLS]", *question, "[SEP]", *(tokens[token][0] for token in window), "[SEP]"],
                    [*[None] * before, *(tokens[token][1] for token in window), None],
                    [*[False] * before, *may_begin, False],
                )


def test_windows_are_those_of_the_reference_s_algorithm(assets: Path, benchmark: bert.Bert) -> None:
    dataset = json.loads((assets / "source" / "dev-v1.1.json").read_text(encoding="utf-8"))
    expected = list(plain_windows(dataset))
    ids = [qa["id"] for paragraph in dataset["data"][0]["paragraphs"] for qa in paragraph["qas"]]
    assert benchmark.sample_count == len(expected) > 1.5 * len(ids)
    questions, words = np.load(assets / "questions.npy"), np.load(assets / "words.npy")
    starts, rows = np.load(assets / "starts.npy"), np.load(assets / "rows.npy")
    for index, (identifier, tokens, places, may_begin) in enumerate(expected):
        features = benchmark.features(index)
        part = slice(rows[index], rows[index + 1])
        assert ids[questions[index]] == identifier
        assert [VOCABULARY[token] for token in features.input_ids] == tokens
        assert [None if word < 0 else word for word in words[part].tolist()] == places
        assert starts[part].tolist() == may_begin
        # The first [SEP] may be in the question's own text.
        context = next(number for number, word in enumerate(places) if word is not None)
        assert features.token_type_ids.tolist() == [0] * context + [1] * (len(tokens) - context)
        assert features.input_ids.dtype == features.token_type_ids.dtype == np.int64
    assert max(len(tokens) for _, tokens, _, _ in expected) == 384
    for index in (-1, len(expected)):
        with pytest.raises(IndexError):
            benchmark.features(index)


def test_a_paragraph_of_nothing_has_no_window(tmp_path: Path) -> None:
    dataset = make_dataset([5, 5], questions=1)
    dataset["data"][0]["paragraphs"][0]["context"] = " \u200b "
    make_source(tmp_path, dataset)
    bert.prepare("bert-99", tmp_path)
    benchmark = bert.open("bert-99", tmp_path)
    assert benchmark.sample_count == 1
    log = write_log(tmp_path / "log.json", [(0, right(benchmark, tmp_path, 0))])
    assert benchmark.evaluate(log, 1) == {"F1": 50, "exact_match": 50}


def write_log(path: Path, responses: list[tuple[int, bytes]]) -> Path:
    """A log as LoadGen writes it."""
    entries = [{"seq_id": n, "qsl_idx": i, "data": data.hex().upper()} for n, (i, data) in enumerate(responses)]
    path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n", encoding="utf-8")
    return path


def right(benchmark: bert.Bert, assets: Path, index: int, certainty: float = 9) -> bytes:
    """Certain of the first answer that people gave, in the window that owns its first token."""
    rows = np.load(assets / "rows.npy")
    part = slice(rows[index], rows[index + 1])
    words, starts = np.load(assets / "words.npy")[part], np.load(assets / "starts.npy")[part]
    examples = json.loads((assets / "examples.json").read_text(encoding="utf-8"))
    question = examples["questions"][np.load(assets / "questions.npy")[index]]
    text = examples["paragraphs"][question["paragraph"]]
    wanted = question["answers"][0].split(" ")
    place = next(n for n in range(len(text)) if text[n : n + len(wanted)] == wanted)
    logits = np.full((len(words), 2), -5, np.float32)
    first = np.flatnonzero((words >= place) & (words < place + len(wanted)) & starts)
    last = np.flatnonzero((words >= place) & (words < place + len(wanted)))
    if len(first) and first[0] == last[0]:
        logits[first[0], 0] = logits[last[-1], 1] = certainty
    return benchmark.response(logits)


@pytest.fixture
def perfect(benchmark: bert.Bert, assets: Path) -> list[tuple[int, bytes]]:
    return [(index, right(benchmark, assets, index)) for index in range(benchmark.sample_count)]


def test_right_logits_in_any_order_score_everything(
    benchmark: bert.Bert, perfect: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    metrics = benchmark.evaluate(write_log(tmp_path / "log", perfect[::-1]), len(perfect))
    # Normalised, some answers of these words are empty: an exact match, without a word in common.
    assert metrics["exact_match"] == 100
    assert metrics["F1"] > 90
    found = CHECKER.match(benchmark.accuracy_text(metrics))
    assert found
    assert float(found.group(1)) == pytest.approx(metrics["F1"], abs=1e-6)


def test_the_likeliest_window_of_a_question_answers_it(benchmark: bert.Bert, assets: Path, tmp_path: Path) -> None:
    questions = np.load(assets / "questions.npy")
    windows = np.flatnonzero(questions == questions[-1])
    assert len(windows) > 2
    responses = [(index, right(benchmark, assets, index)) for index in range(benchmark.sample_count)]
    whole = benchmark.evaluate(write_log(tmp_path / "log", responses), benchmark.sample_count)
    wrong = next(index for index in windows if max(np.frombuffer(responses[index][1], "<f4")) < 0)
    logits = np.full((len(responses[wrong][1]) // 8, 2), -5, np.float32)
    logits[
        np.flatnonzero(np.load(assets / "starts.npy")[slice(*np.load(assets / "rows.npy")[wrong : wrong + 2])])[0]
    ] = 50
    responses[wrong] = (int(wrong), benchmark.response(logits))
    spoilt = benchmark.evaluate(write_log(tmp_path / "log", responses), benchmark.sample_count)
    assert whole["exact_match"] - spoilt["exact_match"] == pytest.approx(100 / (questions[-1] + 1))


def test_a_part_of_the_samples_scores_the_questions_it_covers(
    benchmark: bert.Bert, assets: Path, perfect: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    questions = np.load(assets / "questions.npy")
    # The fourth question has several windows: cut within them, three questions are left, all of them right; and the
    # windows of the fourth do not count, whatever they say.
    cut = int(np.flatnonzero(questions == 3)[0]) + 1
    assert questions[cut] == 3
    length = len(perfect[cut - 1][1])
    log = write_log(tmp_path / "log", [*perfect[: cut - 1], (cut - 1, bytes(length))])
    assert benchmark.evaluate(log, cut)["exact_match"] == 100
    empty = [(index, bytes(len(data))) for index, data in perfect[: cut - 1]]
    log = write_log(tmp_path / "log", [perfect[0], *empty[1:]])
    assert benchmark.evaluate(log, cut - 1)["exact_match"] == pytest.approx(100 / 3)


def test_fewer_samples_than_one_question_has_are_refused(tmp_path: Path) -> None:
    make_source(tmp_path, make_dataset([600], questions=1))
    bert.prepare("bert-99", tmp_path)
    benchmark = bert.open("bert-99", tmp_path)
    log = write_log(tmp_path / "log", [(0, right(benchmark, tmp_path, 0))])
    with pytest.raises(ValueError, match=rf"1 samples do not cover one question: take {benchmark.sample_count} or"):
        benchmark.evaluate(log, 1)
    for count in (0, benchmark.sample_count + 1):
        with pytest.raises(ValueError, match=rf"sample count {count} is not between 1 and"):
            benchmark.evaluate(log, count)


def test_without_a_possible_answer_the_text_is_the_reference_s(tmp_path: Path) -> None:
    dataset = make_dataset([60], questions=1)
    dataset["data"][0]["paragraphs"][0]["qas"][0]["answers"] = [{"text": "Empty."}]
    make_source(tmp_path, dataset)
    bert.prepare("bert-99", tmp_path)
    benchmark = bert.open("bert-99", tmp_path)
    # All of the twenty likeliest ends lie before all of the twenty likeliest starts.
    logits = np.zeros((len(benchmark.features(0).input_ids), 2), np.float32)
    logits[:20, 1] = logits[-20:, 0] = 3
    log = write_log(tmp_path / "log", [(0, benchmark.response(logits))])
    assert benchmark.evaluate(log, 1) == {"F1": 100, "exact_match": 100}


BadLog = Callable[[list[tuple[int, bytes]]], object]
BAD_LOGS: list[tuple[BadLog, str]] = [
    (lambda entries: entries.pop(2), r"1 of \d+ samples missing, first 2"),
    (lambda entries: entries.append((999, b"")), r"sample 999 is not one of the \d+ of this run"),
    (lambda entries: entries.__setitem__(1, (1, entries[1][1][:-4])), r"sample 1: \d+ bytes instead of \d+"),
    (lambda entries: entries.__setitem__(1, (1, entries[1][1] + bytes(8))), r"sample 1: \d+ bytes instead of \d+"),
    (lambda entries: entries.__setitem__(1, (1, b"")), r"sample 1: 0 bytes instead of \d+"),
    (
        lambda entries: entries.__setitem__(4, (4, np.float32(np.nan).tobytes() + entries[4][1][4:])),
        r"sample 4: logits are not finite",
    ),
    (
        lambda entries: entries.__setitem__(4, (4, entries[4][1][:-4] + np.float32(np.inf).tobytes())),
        r"sample 4: logits are not finite",
    ),
    (lambda entries: entries.append((0, bytes(len(entries[0][1])))), r"sample 0 was answered twice, differently"),
]


@pytest.mark.parametrize(("spoil", "cause"), BAD_LOGS)
def test_a_bad_answer_is_refused(
    spoil: BadLog, cause: str, benchmark: bert.Bert, perfect: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    count = len(perfect)
    spoil(perfect)
    with pytest.raises(ValueError, match=rf"accuracy\.json: {cause}"):
        benchmark.evaluate(write_log(tmp_path / "accuracy.json", perfect), count)


def test_a_truncated_log_is_refused(benchmark: bert.Bert, perfect: list[tuple[int, bytes]], tmp_path: Path) -> None:
    log = write_log(tmp_path / "accuracy.json", perfect)
    log.write_bytes(log.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"accuracy\.json: not a whole accuracy log"):
        benchmark.evaluate(log, len(perfect))


def test_a_sample_may_be_answered_twice_with_other_last_bits(
    benchmark: bert.Bert, perfect: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    again = np.frombuffer(perfect[0][1], "<f4") * np.float32(1.0001)
    log = write_log(tmp_path / "log", [*perfect, (0, again.tobytes())])
    assert benchmark.evaluate(log, len(perfect))["exact_match"] == 100


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_prepare_twice_changes_nothing(assets: Path) -> None:
    before = stamps(assets)
    hashes = bert.prepare("bert-99", assets)
    assert stamps(assets) == before
    assert set(hashes) == {*bert._ARRAYS, "examples.json", "model/config.json"}
    assert not list(assets.rglob("*.partial"))


def test_prepare_is_done_again_for_other_inputs_and_damaged_files(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    first = bert.prepare("bert-99", tmp_path)
    (tmp_path / "words.npy").write_bytes(b"half")
    with pytest.raises(ValueError, match="dataset is missing or broken, run `fleet provision`"):
        bert.open("bert-99", tmp_path)
    assert bert.prepare("bert-99", tmp_path) == first
    bert.open("bert-99", tmp_path)
    (source / "dev-v1.1.json").write_text(json.dumps(make_dataset([9])), encoding="utf-8")
    assert bert.prepare("bert-99", tmp_path)["rows.npy"] != first["rows.npy"]
    assert bert.open("bert-99", tmp_path).sample_count == 3
    (tmp_path / "prepared.json").write_text("{")
    before = (tmp_path / "rows.npy").read_bytes()
    bert.prepare("bert-99", tmp_path)
    assert (tmp_path / "rows.npy").read_bytes() == before


def test_a_hugging_face_checkpoint_is_taken_as_it_is(assets: Path, benchmark: bert.Bert) -> None:
    assert benchmark.model_dir == assets / "model"
    link = assets / "model" / "model.safetensors"
    assert link.is_symlink()
    assert load_file(link).keys() == weights().keys()
    assert benchmark.config == CONFIG | {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
    assert benchmark.generation is None
    assert benchmark.model["starting_weights_filename"] == "model.safetensors"
    assert benchmark.model["weights_sha256"] == bert._sha256(assets / "source" / "model.safetensors")
    assert benchmark.model["weight_data_types"] == "fp32"


def test_shards_are_taken_as_they_are(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    arrays = {name: array.astype(np.float16) for name, array in weights().items()}
    names = sorted(arrays)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, inside in parts.items():
        save_file({name: arrays[name] for name in inside}, source / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    bert.prepare("bert-99", tmp_path)
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {*parts, "model.safetensors.index.json"}
    model = bert.open("bert-99", tmp_path).model
    assert model["starting_weights_filename"] == "model.safetensors.index.json"
    assert model["weight_data_types"] == "fp16"
    (source / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors is missing, which model\.safetensors\.index\.json names"):
        bert.prepare("bert-99", tmp_path)


def test_arrays_of_numpy_are_converted_once(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    arrays: dict[str, Any] = {"cls/squad/output_weights": weights()["qa_outputs.weight"], "global_step": np.array(5474)}
    arrays |= {name: array for name, array in weights().items() if name != "qa_outputs.weight"}
    np.savez(source / "model.npz", **arrays)
    hashes = bert.prepare("bert-99", tmp_path)
    made = load_file(tmp_path / "model" / "model.safetensors")
    assert all(np.array_equal(made[name], array) for name, array in weights().items())
    assert hashes["model/model.safetensors"] == bert._sha256(tmp_path / "model" / "model.safetensors")
    before = stamps(tmp_path)
    assert bert.prepare("bert-99", tmp_path) == hashes
    assert stamps(tmp_path) == before
    # A checkpoint of Hugging Face's that comes later takes its place; without any, nothing of it is left.
    save_file(weights(), source / "model.safetensors")
    bert.prepare("bert-99", tmp_path)
    assert (tmp_path / "model" / "model.safetensors").is_symlink()
    for path in (source / "model.safetensors", source / "model.npz"):
        path.unlink()
    bert.prepare("bert-99", tmp_path)
    assert not (tmp_path / "model" / "model.safetensors").is_symlink()


def test_other_forms_of_the_model_are_found_in_its_folder(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    for name in ("model.onnx", "model.pb"):
        (source / name).write_bytes(name.encode())
    bert.prepare("bert-99", tmp_path)
    assert (tmp_path / "model" / "model.onnx").read_bytes() == b"model.onnx"
    assert (tmp_path / "model" / "model.pb").read_bytes() == b"model.pb"


def test_without_a_checkpoint_it_is_bert_large_and_says_so(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    (source / "config.json").unlink()
    words = [*VOCABULARY, *(f"unused{number}" for number in range(30522 - len(VOCABULARY)))]
    (source / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    bert.prepare("bert-99.9", tmp_path)
    benchmark = bert.open("bert-99.9", tmp_path)
    assert benchmark.config == bert.BERT_LARGE
    sizes = [benchmark.config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
    assert sizes == [24, 1024, 16]
    assert sum(np.prod(shape) for shape in convert.shapes(benchmark.config).values()) == 334_094_338
    assert "random weights" in benchmark.model["starting_weights_filename"]
    assert all(benchmark.model.values())


def test_torch_is_not_needed_without_a_pickle(tmp_path: Path) -> None:
    save_file(weights(), make_source(tmp_path) / "model.safetensors")
    code = (
        "import sys; from pathlib import Path; from fleet.harness.benchmarks import bert;"
        "bert.prepare('bert-99', Path(sys.argv[1])); bert.open('bert-99', Path(sys.argv[1])).features(0);"
        "print([name for name in ('torch', 'transformers', 'tensorflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        text = (source / name).read_text(encoding="utf-8")
        (source / name).write_text(change(text), encoding="utf-8")

    return apply


BAD_SOURCES: list[tuple[Callable[[Path], object], str]] = [
    (lambda source: (source / "dev-v1.1.json").unlink(), r"dev-v1\.1\.json is missing: run `fleet provision`"),
    (lambda source: (source / "vocab.txt").unlink(), r"vocab\.txt is missing: run `fleet provision`"),
    (lambda source: truncate(source / "dev-v1.1.json"), r"dev-v1\.1\.json: not a whole JSON file"),
    (lambda source: truncate(source / "vocab.txt"), r"vocab\.txt: \d+ tokens, the model has \d+: bring the checkpoint"),
    (rewrite("vocab.txt", lambda text: text + "more\n"), r"vocab\.txt: \d+ tokens, the model has \d+"),
    (rewrite("vocab.txt", lambda text: text.replace("[CLS]", "<s>")), r"vocab\.txt: no \[CLS\], not BERT's vocabulary"),
    (rewrite("vocab.txt", lambda text: text.replace("\nb\n", "\na\n")), r"vocab\.txt: 'a' is there twice"),
    (lambda source: (source / "vocab.txt").write_bytes(b"\xff\xfe\n"), r"vocab\.txt: not UTF-8 text"),
    (lambda source: truncate(source / "config.json"), r"config\.json: not a whole configuration"),
    (rewrite("config.json", lambda _: "[]"), r"config\.json: not a whole configuration"),
    (rewrite("config.json", lambda text: text.replace("hidden_size", "n_embd")), r"config\.json: no hidden_size"),
    (rewrite("config.json", lambda text: text.replace("384", "128")), r"a model of 128 positions, 384 are needed"),
    (lambda source: truncate(source / "model.safetensors"), r"model\.safetensors: not a whole safetensors file"),
    (
        rewrite("config.json", lambda text: text.replace('"hidden_size": 4', '"hidden_size": 6')),
        r"word_embeddings\.weight is \[\d+, 4\], the configuration says \[\d+, 6\]: put the checkpoint's own config",
    ),
    (
        lambda source: save_file({"qa_outputs.weight": np.zeros((2, 4))}, source / "model.safetensors"),
        r"no bert\.embeddings\.word_embeddings\.weight, not a BERT checkpoint for question answering",
    ),
]


@pytest.mark.parametrize(("spoil", "cause"), BAD_SOURCES)
def test_bad_files_are_refused_by_name(spoil: Callable[[Path], object], cause: str, tmp_path: Path) -> None:
    source = make_source(tmp_path)
    save_file(weights(), source / "model.safetensors")
    spoil(source)
    with pytest.raises(ValueError, match=cause):
        bert.prepare("bert-99", tmp_path)
    with pytest.raises(ValueError, match="run `fleet provision`"):
        bert.open("bert-99", tmp_path)


@pytest.mark.parametrize("name", ["bert-99", "bert-99.9"])
def test_the_rules_name_this_module_and_its_files(name: str) -> None:
    rule = load_benchmark(name)
    assert (rule.module, rule.official) == ("bert", name)
    assert set(rule.sources) == {bert._DATASET, bert._VOCABULARY, convert.PICKLES[0]}
    assert [file for file, source in rule.sources.items() if source.weights] == [convert.PICKLES[0]]
