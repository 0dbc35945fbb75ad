"""Search over a space, on integer matrices."""
