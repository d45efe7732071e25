"""FAISS indexes: which kinds there are, their files, and their tuning to a measured recall."""
