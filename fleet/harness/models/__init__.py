"""Models in PyTorch, by architecture."""
