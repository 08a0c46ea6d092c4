"""Attention behind one function, `attention.attention`, that picks the backend; `reference` is the definition."""
