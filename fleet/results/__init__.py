"""Typed results, read from a session folder alone."""
