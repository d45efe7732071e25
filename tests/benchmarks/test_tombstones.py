"""`benchmarks.tombstones`: its ways find the same images, whatever they cost."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.tombstones import TombstoneOptions, main


def test_every_way_past_deleted_images_keeps_its_recall(tmp_path: Path) -> None:
    """Dropped or masked, dead rows cost no living neighbour, at every share of them."""
    out = tmp_path / "tombstones.json"
    main(TombstoneOptions(count=2_500, queries=16, singles=1, rounds=1, out=out))
    rows = json.loads(out.read_text())["cases"]
    assert {row["deleted"] for row in rows} >= {"1%", "60%", "nearest"}
    for row in rows:
        assert min(row["recall"][way] for way in ("search", "mask")) > 0.95, row
