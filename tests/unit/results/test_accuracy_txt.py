"""accuracy.txt in the shapes that the official checker matches, and in those it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import ResultsError
from fleet.results.accuracy import MAX_CHARS, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"exact_match": 83.67, "f1": 90.874}\n', {"exact_match": 83.67, "F1": 90.874}),
        ("{'exact_match': 83, 'f1': 90}", {"exact_match": 83.0, "F1": 90.0}),
        ('Reading …\n{"exact_match": 1.5, "f1": 2.5}\n\nhash=abc\n', {"exact_match": 1.5, "F1": 2.5}),
        ('{"exact_match": 1, "f1": 2}\n{"exact_match": 3, "f1": 4}', {"exact_match": 1.0, "F1": 2.0}),
        (
            "{'rouge1': 38.7, 'rougeL': '24.4', 'gen_len': 8167644}",
            {"ROUGE1": 38.7, "ROUGEL": 24.4, "GEN_LEN": 8167644},
        ),
        ("", {}),
        (' {"exact_match": 1, "f1": 2}', {}),
        ('{"exact_match": 1, "f1": 2, "n": 3}', {}),
        ('{"exact_match": nan, "f1": nan}', {}),
        ('{"exact_match": 1e1, "f1": 2e1}', {}),
    ],
)
def test_shapes(text: str, expected: dict[str, float]) -> None:
    assert parse(text) == expected


def test_far_too_long_is_refused() -> None:
    with pytest.raises(ResultsError, match="not an accuracy"):
        parse("x" * (MAX_CHARS + 1))


def test_a_number_beyond_floats_is_refused() -> None:
    with pytest.raises(ResultsError, match="finite"):
        parse('{"exact_match": 1, "f1": %s}' % ("9" * 400))


@given(st.text())
def test_any_text_gives_a_dict(text: str) -> None:
    assert isinstance(parse(text), dict)
