"""The servers that `benchmarks.serve_peers` compares, and what calls them."""
