"""The versions of what decides an index, for manifests and reports."""

from __future__ import annotations

import platform

import faiss
import numpy as np
import pyarrow as pa


def library_versions() -> dict[str, str]:
    """Name the versions of what writes."""
    return {
        "faiss": faiss.__version__,
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
        "python": platform.python_version(),
    }
