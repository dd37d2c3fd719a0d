"""Bounded memories beside softmax: speed and memory against length, and what models learn with them."""
