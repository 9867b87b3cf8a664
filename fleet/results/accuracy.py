"""accuracy.txt -> metric to value, by the lines that the official checker recognises. The text is not trusted."""

import math
import re

from fleet.errors import ResultsError

MAX_CHARS = 1_000_000
"""A real accuracy.txt has a few hundred; the reference scripts' chatter stays far below this."""

_NUMBER = r"(\d+(?:\.\d+)?)"  # no sign and no exponent: the checker would not see such a number
_F1 = re.compile(rf"""^\{{["']exact_match["']:[ \t]*{_NUMBER},[ \t]*["']f1["']:[ \t]*{_NUMBER}\}}""", re.MULTILINE)
_ROUGE = re.compile(rf"'(rouge1|rouge2|rougeL|rougeLsum|gen_len)':\s'?{_NUMBER}'?")
_NAMES = {"rouge1": "ROUGE1", "rouge2": "ROUGE2", "rougeL": "ROUGEL", "rougeLsum": "ROUGELSUM", "gen_len": "GEN_LEN"}


def parse(text: str) -> dict[str, float]:
    """Metric, spelt as the checker spells it (F1, ROUGE1 …, and exact_match), to value; first line wins.

    An accuracy.txt without a known metric gives an empty dict: the caller says so beside the unit.
    Source of the shapes: ACC_PATTERN of the checker at mlcommons/inference b66003e1.
    Raises ResultsError when the text is far too long to be an accuracy.txt or a number is not finite.
    """
    if len(text) > MAX_CHARS:
        raise ResultsError(f"accuracy.txt: {len(text)} characters, more than {MAX_CHARS}: not an accuracy.txt")
    found: dict[str, float] = {}
    if match := _F1.search(text):
        found |= {"exact_match": float(match[1]), "F1": float(match[2])}
    for name, number in _ROUGE.findall(text):
        found.setdefault(_NAMES[name], float(number))
    if any(not math.isfinite(value) for value in found.values()):
        raise ResultsError("accuracy.txt: a metric is not a finite number")
    return found
