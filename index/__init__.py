"""Vectors at rest: collections, search and the evaluations made on them."""
