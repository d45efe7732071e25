"""Vectors at rest: collections, search and the evaluations made on them."""

from models.providers import INSTALL_AN_ENGINE

try:
    import faiss as _faiss  # noqa: F401  # each of its two builds is an extra
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.msg}; {INSTALL_AN_ENGINE}", name="faiss") from None
