"""Families of networks: a factory of search spaces and the lowering of their blocks."""
