"""The images that a run learns from, in memory or streamed."""
