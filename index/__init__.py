"""Vectors at rest: collections, search and the evaluations made on them."""

from importlib.util import find_spec

from models.providers import INSTALL_AN_ENGINE

if find_spec("faiss") is None:  # it is looked for, not loaded: `serve` starts without
    raise ModuleNotFoundError(f"No module named 'faiss'; {INSTALL_AN_ENGINE}", name="faiss")
