"""The rules of MLPerf Inference as data, and the types that read them."""
