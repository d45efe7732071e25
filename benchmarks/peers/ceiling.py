"""What the encoder does in this process, without any server: the ceiling.

Prints JSON: per batch size images a second, and for one image at a time the median latency,
decoding included where requests are JPEGs. Run by `benchmarks.serve_peers` in a process of
its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.peers.encoder import PeerEncoder, Setting

BATCHES = (1, 8, 32)


def main(body: Path, seconds: float) -> dict[str, float]:
    """Encode a request of one image over and over, in several batch sizes."""
    encoder, content = PeerEncoder(Setting.read()), body.read_bytes()
    figures: dict[str, float] = {}
    for batch in BATCHES:
        latencies_s: list[float] = []
        encoder.encode([encoder.read(content)] * batch)
        cpu_s, until_s = time.process_time(), time.perf_counter() + seconds / len(BATCHES)
        while (started_s := time.perf_counter()) < until_s or len(latencies_s) < 2:
            encoder.encode([encoder.read(content) for _ in range(batch)])
            latencies_s.append(time.perf_counter() - started_s)
        images = batch * len(latencies_s)
        figures[f"images_per_s_in_batches_of_{batch}"] = images / sum(latencies_s)
        figures[f"cpu_ms_an_image_in_batches_of_{batch}"] = (
            1e3 * (time.process_time() - cpu_s) / images
        )
        if batch == 1:
            figures["p50_ms"] = 1e3 * statistics.median(latencies_s)
    rates = [value for name, value in figures.items() if name.startswith("images_per_s")]
    return figures | {"images_per_s": max(rates)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), float(sys.argv[2]))))
