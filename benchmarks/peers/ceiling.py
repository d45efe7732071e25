"""What the encoder does in this process, without any server: the ceiling.

Prints JSON: images a second and CPU an image, per batch size, in three manners: a batch on all
threads, a batch on each thread, and as many batches at once that share all threads; and for one
image at a time the median latency. Decoding is included where requests are JPEGs. Run by
`benchmarks.serve_peers` in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.encoder import PeerEncoder, Setting

BATCHES = (1, 8, 32)


def main(body: Path, seconds: float) -> dict[str, float]:
    """Encode a request of one image over and over, in several batch sizes, in every manner."""
    setting, content = Setting.read(), body.read_bytes()
    together = PeerEncoder(setting)
    manners = {
        "": (together, 1),
        "_at_once": (together, setting.threads),
        "_a_thread": (PeerEncoder(replace(setting, threads=1)), setting.threads),
    }
    figures: dict[str, float] = {}
    for manner, (encoder, callers) in manners.items():
        for batch in BATCHES:
            part_s = seconds / len(BATCHES) / len(manners)
            latencies_s, wall_s, cpu_s = encode_for(encoder, content, batch, callers, part_s)
            images = batch * len(latencies_s)
            figures[f"images_per_s_in_batches_of_{batch}{manner}"] = images / wall_s
            figures[f"cpu_ms_an_image_in_batches_of_{batch}{manner}"] = 1e3 * cpu_s / images
            if batch == 1 and not manner:
                figures["p50_ms"] = 1e3 * statistics.median(latencies_s)
    rates = [value for name, value in figures.items() if name.startswith("images_per_s")]
    return figures | {"images_per_s": max(rates)}


def encode_for(
    encoder: PeerEncoder, content: bytes, batch: int, callers: int, seconds: float
) -> tuple[list[float], float, float]:
    """Encode on several threads; give all latencies, the time it took and the CPU time."""
    latencies_s: list[float] = []

    def call() -> None:
        for n in range(sys.maxsize):
            started_s = time.perf_counter()
            if started_s > until_s and n >= 2:
                return
            encoder.encode([encoder.read(content) for _ in range(batch)])
            latencies_s.append(time.perf_counter() - started_s)

    encoder.encode([encoder.read(content)] * batch)
    threads = [threading.Thread(target=call) for _ in range(callers)]
    cpu_s, began_s = time.process_time(), time.perf_counter()
    until_s = began_s + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies_s, time.perf_counter() - began_s, time.process_time() - cpu_s


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), float(sys.argv[2]))))
