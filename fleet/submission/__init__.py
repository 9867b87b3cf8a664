"""One submission tree for all hosts, and what would fail in it."""
