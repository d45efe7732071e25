"""The parts of `benchmarks.ann` and `benchmarks.million`: tasks, peers, tuned collections."""
