"""Fixtures of the tests of verbs."""

from tests.unit.cli.command import fleet

__all__ = ["fleet"]
