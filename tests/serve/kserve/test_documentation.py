"""What docs/kserve.md shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[3]


def test_the_client_of_the_documentation(start_server, tmp_path, monkeypatch):
    """Pixels, files, and what comes of a file that is no image."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/kserve.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.new("L", (40, 30)).save("image.png")
    names: dict[str, object] = {}
    exec(code.replace("127.0.0.1:50051", start_server().address), names)
    vectors, status = names["vectors"], names["status"]
    assert isinstance(vectors, np.ndarray)
    assert vectors.shape == (2, 128)
    assert np.isclose(np.linalg.norm(vectors[0]), 1)
    assert np.isnan(vectors[1]).all()
    assert isinstance(status, np.ndarray)
    assert (status.ravel() == 0).tolist() == [True, False]
    names["client"].close()  # type: ignore[attr-defined]  # Triton's
