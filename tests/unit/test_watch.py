"""What people are told, in words."""

import pytest

from fleet import watch


@pytest.mark.parametrize(
    ("minutes", "words"), [(0.2, "1 min"), (89, "89 min"), (120, "2.0 h"), (60 * 35, "35.0 h"), (60 * 48, "2.0 days")]
)
def test_durations_in_words(minutes: float, words: str) -> None:
    assert watch.duration(minutes) == words
