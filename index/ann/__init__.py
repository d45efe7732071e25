"""FAISS indexes: which kinds there are, their files, and their tuning to a measured recall."""

from importlib.util import find_spec

from models.providers import INSTALL_AN_ENGINE

if find_spec("faiss") is None:
    raise ModuleNotFoundError(f"No module named 'faiss'; {INSTALL_AN_ENGINE}", name="faiss")
