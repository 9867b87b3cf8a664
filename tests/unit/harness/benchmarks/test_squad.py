import itertools
import json
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from fleet.harness.benchmarks import squad

ANSWERS = st.text(alphabet="aAbthen .,'-1$ \u00e9\u2019\u00a0\t", max_size=12)
ANY = st.one_of(
    ANSWERS, st.text(max_size=12), st.lists(st.sampled_from(["the", "a", "An", "cat", "B.", "$5"])).map(" ".join)
)


def dataset() -> dict[str, Any]:
    def question(name: str) -> dict[str, Any]:
        return {"id": name, "question": f"{name}?", "answers": [{"text": "Bonn", "answer_start": 0}]}

    first = {"context": "Bonn lies on the Rhine.", "qas": [question("q1"), question("q2")]}
    second = {"context": " Two\tspaces  and\u202fa\u00a0narrow one\n", "qas": [question("q3")]}
    return {
        "version": "1.1",
        "data": [{"title": "One", "paragraphs": [first]}, {"title": "Two", "paragraphs": [second]}],
    }


def write(folder: Path, data: Any) -> Path:
    path = folder / "dev-v1.1.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_the_file_is_read_in_its_order(tmp_path: Path) -> None:
    read = squad.read(write(tmp_path, dataset()))
    assert read.paragraphs == [
        ["Bonn", "lies", "on", "the", "Rhine."],
        ["Two", "spaces", "and", "a\u00a0narrow", "one"],
    ]
    assert [question.identifier for question in read.questions] == ["q1", "q2", "q3"]
    assert [question.paragraph for question in read.questions] == [0, 0, 1]
    assert read.questions[2] == squad.Question("q3", "q3?", 1, ("Bonn",))


def lose(*path: Any) -> Any:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def put(value: Any, *path: Any) -> Any:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


ARTICLE = ("data", 1, "paragraphs", 0)
BAD = [
    (lose("version"), r"the dataset has no 'version'"),
    (lose("data"), r"the dataset has no 'data'"),
    (put([], "data"), r"no questions"),
    (lose("data", 1, "paragraphs"), r"article 2 has no 'paragraphs'"),
    (lose(*ARTICLE, "context"), r"article 2 paragraph 1 has no 'context'"),
    (lose(*ARTICLE, "qas"), r"article 2 paragraph 1 has no 'qas'"),
    (lose(*ARTICLE, "qas", 0, "id"), r"article 2 paragraph 1 question 1 has no 'id'"),
    (lose(*ARTICLE, "qas", 0, "question"), r"article 2 paragraph 1 question 1 \(q3\) has no 'question'"),
    (lose(*ARTICLE, "qas", 0, "answers"), r"question 1 \(q3\) has no 'answers'"),
    (put([], *ARTICLE, "qas", 0, "answers"), r"question 1 \(q3\) has no answer: fetch"),
    (lose(*ARTICLE, "qas", 0, "answers", 0, "text"), r"question 1 \(q3\) answer 1 has no 'text'"),
    (put("q1", *ARTICLE, "qas", 0, "id"), r"article 2 paragraph 1 question 1: id q1 is there twice"),
    (put("v2.0", "version"), r"SQuAD version 'v2.0', this benchmark is defined on 1.1: fetch dev-v1.1.json"),
    (put("", *ARTICLE, "qas", 0, "is_impossible"), r"\(q3\) has 'is_impossible': this is SQuAD v2.0"),
    (put("text", *ARTICLE), r"article 2 paragraph 1 has no 'context'"),
]


@pytest.mark.parametrize(("change", "cause"), BAD, ids=[cause for _, cause in BAD])
def test_a_bad_dataset_is_refused_with_the_place(change: Any, cause: str, tmp_path: Path) -> None:
    data = dataset()
    change(data)
    with pytest.raises(ValueError, match=rf"dev-v1\.1\.json: .*{cause}"):
        squad.read(write(tmp_path, data))


def test_a_truncated_or_missing_dataset_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, dataset())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole JSON file, fetch it again"):
        squad.read(path)
    with pytest.raises(ValueError, match="is missing: run `fleet provision`"):
        squad.read(tmp_path / "none.json")


@given(tokens=st.integers(0, 200), room=st.integers(5, 60), stride=st.integers(1, 30))
def test_windows_cover_the_text_a_stride_apart(tokens: int, room: int, stride: int) -> None:
    spans = squad.windows(tokens, room, stride)
    # A window begins at every stride, or one window further if it is shorter, as long as the last one does not reach
    # the end; told from the text's side, without following the loop.
    count = 0 if tokens == 0 else 1 if tokens <= room else 1 + -(-(tokens - room) // min(room, stride))
    assert [start for start, _ in spans] == [min(room, stride) * number for number in range(count)]
    assert all(length == min(room, tokens - start) for start, length in spans)
    assert not spans or sum(spans[-1]) == tokens


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 800), room=st.integers(5, 400), stride=st.integers(20, 200))
@example(tokens=390, room=380, stride=128)  # of the last two windows one is so much longer that it wins by that
def test_a_token_belongs_to_the_window_with_most_context_around_it(tokens: int, room: int, stride: int) -> None:
    spans = squad.windows(tokens, room, stride)
    owners = squad.owners(spans, tokens).tolist()
    for token in range(tokens):
        scored = {
            number: min(token - start, start + length - 1 - token) + 0.01 * length
            for number, (start, length) in enumerate(spans)
            if start <= token < start + length
        }
        assert owners[token] == min(scored, key=lambda number: (-scored[number], number))


def plain_best(
    logits: npt.NDArray[np.float32], context: npt.NDArray[np.bool_], starts: npt.NDArray[np.bool_], length: int
) -> tuple[int, int, float] | None:
    """The n-best search written down pair by pair."""
    padded = [[float(value) for value in column] + [-10000.0] * (length - len(logits)) for column in logits.T]
    likeliest = [sorted(range(length), key=lambda place: (-column[place], place))[:20] for column in padded]
    found = []
    for first, last in itertools.product(*likeliest):
        if first >= len(logits) or last >= len(logits) or not starts[first] or not context[last]:
            continue
        if first <= last < first + 30:
            found.append((first, last, padded[0][first] + padded[1][last]))
    return max(found, key=lambda answer: answer[2]) if found else None


@st.composite
def window(draw: st.DrawFn) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    seed, length = draw(st.integers(0, 2**32 - 1)), draw(st.integers(3, 60))
    spread, low = draw(st.sampled_from([1, 3, 50])), draw(st.sampled_from([0, -10000]))
    random = np.random.default_rng(seed)
    logits = (random.integers(-spread, spread, (length, 2)) + low).astype(np.float32)
    if draw(st.booleans()):
        logits += random.normal(0, 1, (length, 2)).astype(np.float32)
    context = np.arange(length) >= draw(st.integers(0, length - 1))
    context[-1] = False
    return logits, context, context & (random.random(length) < draw(st.sampled_from([1.0, 0.5, 0.05])))


@settings(max_examples=150, deadline=None)
@given(windows=st.lists(window(), min_size=1, max_size=4))
def test_the_best_answer_is_that_of_the_plain_search(windows: list[Any]) -> None:
    logits, context, starts = (list(part) for part in zip(*windows, strict=True))
    spans = squad.best_spans(logits, context, starts, 64)
    for row, (one, inside, beginnings) in enumerate(windows):
        expected = plain_best(one, inside, beginnings, 64)
        if expected is None:
            assert spans.score[row] == -np.inf
        else:
            # As Python's numbers: singles would be compared as singles.
            assert (int(spans.first[row]), int(spans.last[row]), float(spans.score[row])) == expected


@pytest.mark.parametrize(("better", "score"), [(19, 1.0), (20, -np.inf)])
def test_the_twentieth_likeliest_start_is_the_last_that_counts(better: int, score: float) -> None:
    logits = np.zeros((60, 2), np.float32)
    logits[:better, 0] = 2
    logits[40, 0] = 1
    inside = np.arange(60) >= 40
    found = squad.best_spans([logits - [[0, 5]] * (np.arange(60) < 40)[:, None]], [inside], [inside], 64)
    assert found.score.tolist() == [score]


def test_more_windows_than_one_chunk_are_each_answered() -> None:
    count = 1100
    logits = [np.zeros((50, 2), np.float32) for _ in range(count)]
    for row, one in enumerate(logits):
        one[row % 45 + 1, 0] = one[row % 45 + 3, 1] = 5
    inside = [np.arange(50) > 0] * count
    spans = squad.best_spans(logits, inside, inside, 64)
    assert spans.first.tolist() == [row % 45 + 1 for row in range(count)]
    assert spans.last.tolist() == [row % 45 + 3 for row in range(count)]
    assert set(spans.score.tolist()) == {10.0}


@pytest.mark.parametrize(
    ("tokens", "words", "answer"),
    [
        (["steve", "smith"], ["Steve", "Smith's"], "Steve Smith"),
        (["1895"], ["(1895-1943)."], "1895"),
        (["un", "##aff", "##able"], ["Unaffable,"], "Unaffable"),
        (["zur", "##ich"], ["Z\u00fcrich."], "Z\u00fcrich"),
        (["u", ".", "s"], ["U.S.A."], "U.S"),
        (["s", ".", "a", "."], ["U.S.A."], "S.A."),
        (["[UNK]"], ["\u2603x"], "\u2603x"),  # cannot be found again: the whole words
        (["\u03c3", "##\u03bf", "##\u03c3"], ["\u03a3\u039f\u03a3!"], "\u03a3\u039f\u03a3!"),  # Python's final sigma
        (["nive"], ["nai\u0308ve"], "nai\u0308ve"),
        (["naive"], ["nai\u0308ve,"], "nai\u0308ve,"),  # one character became none: they cannot be aligned
        (["\u5317"], ["\u5317\u4eac"], "\u5317"),
        (["a", "b"], ["a", "b,"], "a b"),
    ],
)
def test_an_answer_is_cut_out_of_the_text(tokens: list[str], words: list[str], answer: str) -> None:
    assert squad.answer_text(tokens, words) == answer


@settings(max_examples=300)
@given(
    text=st.text(
        alphabet="aZ\u00e9\u0301\u00df\u0130\ufb01 \t\n\u00a0\u202f\u3000.,-$^\u2019\u2013\u5317\ud55c\u0000\u200b\u00ad\ufffd\u00bd",
        max_size=20,
    )
)
def test_words_are_split_as_bert_does(text: str) -> None:
    # The tokenizers library's own implementation, on characters where it does not differ.
    normal = BertNormalizer(lowercase=True).normalize_str(text)
    assert squad.basic_tokens(text) == [token for token, _ in BertPreTokenizer().pre_tokenize_str(normal)]


def plain_scores(predictions: list[str], answers: list[list[str]]) -> dict[str, float]:
    """The official definition: precision and recall, each step a string again."""

    def normal(text: str) -> str:
        for mark in string.punctuation:
            text = text.lower().replace(mark, "")
        return " ".join(re.sub(r"\b(the|an|a)\b", " ", text).split())

    def f1(left: str, right: str) -> float:
        have, want = normal(left).split(), normal(right).split()
        same = sum((Counter(have) & Counter(want)).values())
        if same == 0:
            return 0.0
        precision, recall = same / len(have), same / len(want)
        return 2 * precision * recall / (precision + recall)

    pairs = list(zip(predictions, answers, strict=True))
    exact = sum(max(float(normal(one) == normal(truth)) for truth in truths) for one, truths in pairs)
    overlap = sum(max(f1(one, truth) for truth in truths) for one, truths in pairs)
    return {"F1": 100 * overlap / len(pairs), "exact_match": 100 * exact / len(pairs)}


@settings(max_examples=400)
@given(pairs=st.lists(st.tuples(ANY, st.lists(ANY, min_size=1, max_size=4)), min_size=1, max_size=6))
@example(pairs=[("the a an", ["The"]), ("", ["x"])])
@example(pairs=[("a-the", ["the a"]), ("B b b", ["b. B"]), ("An apple", ["a pear", "apple"])])
def test_scores_are_the_official_ones(pairs: list[tuple[str, list[str]]]) -> None:
    predictions, answers = [one for one, _ in pairs], [truths for _, truths in pairs]
    assert squad.scores(predictions, answers) == pytest.approx(plain_scores(predictions, answers), abs=1e-9)


def test_scores_by_hand() -> None:
    # "cat sat" of "cat sat down" by two words in common: precision 1, recall 2/3; then an exact match; then nothing.
    found = squad.scores(["The cat sat", "Bonn!", "empty"], [["A cat, sat down"], ["Berlin", "the bonn"], ["x"]])
    assert found == {"F1": pytest.approx(100 * (0.8 + 1) / 3), "exact_match": pytest.approx(100 / 3)}
    with pytest.raises(ValueError, match="no answers to score"):
        squad.scores([], [])


@pytest.mark.parametrize("content", ["[{", "[{}]", '[{"qsl_idx": 1, "data": "zz"}]', "{}x", "[3]"])
def test_a_broken_log_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "mlperf_log_accuracy.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a whole accuracy log, LoadGen may have been stopped"):
        list(squad.read_log(path))
