import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import nltk
import numpy as np
import pytest
from nltk.tokenize import sent_tokenize
from rouge_score.rouge_scorer import RougeScorer

from fleet.harness.benchmarks import summaries
from fleet.harness.benchmarks.summaries import Summaries, Summary, Task
from fleet.harness.interfaces import Generation
from tests.unit.harness.benchmarks.articles import byte_tokenizer, splitter_archive, write_log

# The official checker's patterns (ACC_PATTERN, mlcommons/inference b66003e1).
CHECKER = {
    "ROUGE1": r".*'rouge1':\s+'?([\d.]+)'?.*",
    "ROUGE2": r".*'rouge2':\s+'?([\d.]+)'?.*",
    "ROUGEL": r".*'rougeL':\s+'?([\d.]+)'?.*",
    "ROUGELSUM": r".*'rougeLsum':\s+'?([\d.]+)'?.*",
    "GEN_LEN": r".*'gen_len':\s([\d.]+).*",
}
PREDICTIONS = [
    "The mayor of Lorton resigned . He had been in office since 2009 . Dr. Hale follows him .",
    "Fires were burning; firemen came running!",
    "",
    "Nothing in common",
]
REFERENCES = [
    "Dr. Hale is the new mayor of Lorton. The old one resigned on Monday.",
    "Fire burns, a fireman runs.",
    "An answer was wanted.",
    "Somebody said otherwise.",
]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "model").mkdir()
    byte_tokenizer(300, 299).save(str(tmp_path / "model" / "tokenizer.json"))
    return Task(
        name="short",
        samples=len(REFERENCES),
        generation=Generation(beams=1, min_new_tokens=2, max_new_tokens=100, eos_token_ids=(299,), pad_token_id=299),
        dtype="<i4",
        vocabularies=(300,),
        config={"vocab_size": 300},
        model={},
        model_dir=tmp_path / "model",
    )


@pytest.fixture
def benchmark(task: Task, tmp_path: Path) -> Summaries:
    samples = [Summary(f"prompt {number}", text) for number, text in enumerate(REFERENCES)]
    summaries.write_dataset(tmp_path, samples, [[number, 7] for number in range(len(samples))])
    return Summaries(task, tmp_path, summaries.plain_sentences)


def responses(benchmark: Summaries, texts: Sequence[str]) -> list[tuple[int, bytes]]:
    tokenizer = byte_tokenizer(300, 299)
    return [(at, benchmark.response(np.array([*tokenizer.encode(text).ids, 299]))) for at, text in enumerate(texts)]


def test_rouge_is_rouge_score_s_mean_over_sentences_on_lines_of_their_own() -> None:
    found = summaries.rouge(PREDICTIONS, REFERENCES, lambda text: [text] if text else [])
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(reference, predicted) for reference, predicted in zip(REFERENCES, PREDICTIONS, strict=True)]
    for ours, theirs in (("ROUGE1", "rouge1"), ("ROUGE2", "rouge2"), ("ROUGEL", "rougeL")):
        assert found[ours] == round(100 * float(np.mean([score[theirs].fmeasure for score in scores])), 4)
        assert 0 < found[ours] < 100
    assert found["ROUGELSUM"] == found["ROUGEL"]  # one sentence each
    assert found["GEN_NUM"] == 4

    split = summaries.rouge(PREDICTIONS, REFERENCES, lambda text: text.replace(". ", ".\n").splitlines())
    per_line = RougeScorer(["rougeLsum"], use_stemmer=True)
    lines = [
        per_line.score(reference.replace(". ", ".\n"), predicted.replace(". ", ".\n"))["rougeLsum"].fmeasure
        for reference, predicted in zip(REFERENCES, PREDICTIONS, strict=True)
    ]
    assert split["ROUGELSUM"] == round(100 * float(np.mean(lines)), 4)
    assert split["ROUGELSUM"] > split["ROUGEL"]
    assert {name: split[name] for name in ("ROUGE1", "ROUGE2", "ROUGEL")} == {
        name: found[name] for name in ("ROUGE1", "ROUGE2", "ROUGEL")
    }


def test_gen_len_counts_characters_of_stripped_answers_with_one_newline_between_sentences() -> None:
    found = summaries.rouge(["  One.   Two. "], ["One."], summaries.plain_sentences())
    assert found["GEN_LEN"] == len("One.\nTwo.")


def test_the_splitter_is_nltk_s_sent_tokenize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splitter_archive(tmp_path / "punkt_tab.zip")
    with zipfile.ZipFile(tmp_path / "punkt_tab.zip") as archive:
        archive.extractall(tmp_path / "tokenizers")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    sentences = summaries.punkt(tmp_path / "punkt_tab.zip")
    text = 'Dr. Hale came to St. Louis at 5 p.m. Monday. "Why?" he asked. Mr. X. left! So did we.'
    assert sentences(text) == sent_tokenize(text)
    assert sentences(text) != summaries.plain_sentences()(text)
    assert sentences("Dr. Hale came.") == ["Dr. Hale came."]


@pytest.mark.parametrize("damage", ["missing", "cut off", "without a file", "a broken line"])
def test_a_broken_splitter_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "punkt_tab.zip"
    if damage != "missing":
        splitter_archive(path, leave_out="sent_starters.txt" if damage == "without a file" else "",
                         collocations="one\ttwo\tthree" if damage == "a broken line" else "")  # fmt: skip
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"punkt_tab\.zip: NLTK's sentence splitter is missing or broken"):
        summaries.punkt(path)


def test_clean_up_is_transformers_own() -> None:
    transformers = pytest.importorskip("transformers")
    text = "It 's theirs , is n't it ? We 've said \" so \" ! They 're ' here ' . I 'm ."
    base = transformers.PreTrainedTokenizerBase
    assert summaries.clean_up(text) == base.clean_up_tokenization(None, text)
    assert summaries.clean_up(text).endswith("I'm.")


def test_the_whole_log_is_scored_whatever_its_order(benchmark: Summaries, tmp_path: Path) -> None:
    texts = [PREDICTIONS[0], PREDICTIONS[1], " ", PREDICTIONS[3]]
    log = write_log(tmp_path / "log.json", responses(benchmark, texts)[::-1])
    found = benchmark.evaluate(log, 4)
    cleaned = [summaries.clean_up(text) for text in texts]
    assert found == summaries.rouge(cleaned, REFERENCES, summaries.plain_sentences())
    assert found["GEN_LEN"] < sum(len(text) for text in texts)  # " ." became "."
    assert benchmark.evaluate(write_log(tmp_path / "log.json", responses(benchmark, REFERENCES)), 4)["ROUGE2"] == 100.0


def test_padding_and_the_end_token_are_no_text(benchmark: Summaries, tmp_path: Path) -> None:
    padded = [(index, data + 5 * data[-4:]) for index, data in responses(benchmark, REFERENCES)]
    assert benchmark.evaluate(write_log(tmp_path / "log.json", padded), 4) == benchmark.evaluate(
        write_log(tmp_path / "log.json", responses(benchmark, REFERENCES)), 4
    )


def test_the_first_samples_can_be_evaluated_alone(benchmark: Summaries, tmp_path: Path) -> None:
    found = benchmark.evaluate(write_log(tmp_path / "log.json", responses(benchmark, REFERENCES[:2])), 2)
    assert found["ROUGE1"] == 100.0
    assert found["GEN_NUM"] == 2
    with pytest.raises(ValueError, match="not between 1 and 4"):
        benchmark.evaluate(tmp_path / "log.json", 5)


def test_a_repeated_sample_must_agree(benchmark: Summaries, tmp_path: Path) -> None:
    right = responses(benchmark, REFERENCES)
    assert benchmark.evaluate(write_log(tmp_path / "log.json", [*right, right[1]]), 4)["ROUGE1"] == 100.0
    with pytest.raises(ValueError, match=r"log\.json: sample 1 was answered twice, differently"):
        benchmark.evaluate(write_log(tmp_path / "log.json", [*right, (1, right[0][1])]), 4)


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        (b"", "0 bytes are not 1 to 100 tokens of 4 bytes"),
        (b"\1\0\0", "3 bytes"),
        (b"\1\0\0\0" * 101, "404 bytes"),
        (np.array([5, 300], "<i4").tobytes(), "token 300 is none of the model's 300"),
        (np.array([-1, 5], "<i4").tobytes(), "token -1"),
    ],
    ids=["empty", "half a token", "too many", "too large", "negative"],
)
def test_a_broken_response_is_named(benchmark: Summaries, tmp_path: Path, response: bytes, problem: str) -> None:
    log = write_log(tmp_path / "log.json", [*responses(benchmark, REFERENCES)[:3], (3, response)])
    with pytest.raises(ValueError, match=rf"log\.json: sample 3: .*{problem}"):
        benchmark.evaluate(log, 4)


def test_missing_and_foreign_samples_are_named(benchmark: Summaries, tmp_path: Path) -> None:
    right = responses(benchmark, REFERENCES)
    with pytest.raises(ValueError, match="1 of 4 samples missing, first 2"):
        benchmark.evaluate(write_log(tmp_path / "log.json", right[:2] + right[3:]), 4)
    with pytest.raises(ValueError, match="sample 2 is not one of the 2"):
        benchmark.evaluate(write_log(tmp_path / "log.json", right), 2)


@pytest.mark.parametrize("kept", [0, 1, 100, -3], ids=["empty", "bracket", "cut in an entry", "cut at the end"])
def test_a_log_cut_off_by_a_crash_is_named(benchmark: Summaries, tmp_path: Path, kept: int) -> None:
    log = write_log(tmp_path / "log.json", responses(benchmark, REFERENCES))
    log.write_bytes(log.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"log\.json: not a whole accuracy log"):
        benchmark.evaluate(log, 4)


def test_the_checker_reads_every_metric_of_accuracy_txt(benchmark: Summaries) -> None:
    metrics = {"ROUGE1": 42.9865, "ROUGE2": 20.1235, "ROUGEL": 29.9881, "ROUGELSUM": 0.0001, "GEN_LEN": 4016878.0}
    text = benchmark.accuracy_text({**metrics, "GEN_NUM": 13368.0})
    for name, pattern in CHECKER.items():
        match = re.match(pattern, text)
        assert match is not None
        assert float(match[1]) == metrics[name]
    assert "'gen_len': 4016878, 'gen_num': 13368}" in text
    assert text.count("\n") == 1


def test_features_are_tokens_without_padding_and_the_prompt(benchmark: Summaries) -> None:
    features = benchmark.features(2)
    assert features.input_ids.dtype == features.token_type_ids.dtype == np.int64
    assert features.input_ids.tolist() == [2, 7]
    assert features.token_type_ids.tolist() == [0, 0]
    assert features.text == "prompt 2"
    with pytest.raises(IndexError):
        benchmark.features(4)


@pytest.mark.parametrize("name", ["input_ids.npy", "rows.npy", "samples.jsonl"])
def test_a_damaged_dataset_is_named(benchmark: Summaries, task: Task, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="run `fleet provision`"):
        Summaries(task, tmp_path, summaries.plain_sentences).features(0)
    assert benchmark.sample_count == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"input": "a", "output": "b"}, {"input": "c"}]', "entry 1 has no 'output'"),
        ('[{"input": "a", "output": "b"}, {"input": null, "output": "d"}]', "entry 1: 'input' is NoneType"),
        ('[{"input": "a", "output": "b"}, "text"]', "entry 1 has no 'input'"),
        ('[{"input": "a", "output": "b"}, {"input": "c", "outp', "not whole JSON"),
        ('[{"input": "a", "output": "b"}]', "1 articles instead of 2"),
        ('{"input": "a"}', "no list of articles but dict"),
        (None, "no such file; name a folder"),
    ],
    ids=["missing field", "null field", "no entry", "truncated", "too few", "no list", "no file"],
)
def test_bad_articles_are_named(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "cnn_eval.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"cnn_eval\.json: {problem}"):
        summaries.read_articles(path, 2, {"input": str, "output": str})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [("missing", "no such file"), ("another", "290 tokens, the one of short has 300"), ("cut off", "not a tokenizer")],
)
def test_a_foreign_tokenizer_is_named(task: Task, damage: str, problem: str) -> None:
    path = task.model_dir / "tokenizer.json"
    if damage == "missing":
        path.unlink()
    elif damage == "another":
        byte_tokenizer(290, 289).save(str(path))
    else:
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {problem}"):
        summaries.read_tokenizer(task)


def test_weights_are_hashed_once_and_again_when_they_change(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "articles.json").write_text("[]", encoding="utf-8")

    def make() -> tuple[list[Summary], list[list[int]]]:
        return [Summary("a", "b")], [[1]]

    def prepare() -> dict[str, str]:
        return summaries.prepare_once(tmp_path, [source / "articles.json"], sorted(source.glob("*.safetensors")), make)

    assert set(prepare()) == {"input_ids.npy", "rows.npy", "samples.jsonl"}
    assert summaries.weights_of(tmp_path) == {"starting_weights_filename": "none", "weights_sha256": ""}
    (source / "model.safetensors").write_bytes(b"one")
    digest = hashlib.sha256(b"one").hexdigest()
    assert prepare()["model.safetensors"] == digest
    assert summaries.weights_of(tmp_path) == {
        "starting_weights_filename": "model.safetensors",
        "weights_sha256": digest,
    }
    (source / "model.safetensors").write_bytes(b"three")
    (source / "more.safetensors").write_bytes(b"two")
    hashes = prepare()
    assert hashes["model.safetensors"] == hashlib.sha256(b"three").hexdigest()
    lines = "".join(f"{hashes[name]}  {name}\n" for name in ("model.safetensors", "more.safetensors"))
    assert summaries.weights_of(tmp_path)["weights_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / "prepared.json").write_text(json.dumps([1]), encoding="utf-8")
    assert prepare() == hashes
