"""The parts of `benchmarks.serve_changes`: callers, a server that changes, scenarios."""
