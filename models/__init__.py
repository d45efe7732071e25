"""What an image encoder is, and how to run one anywhere."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
"""ONNX Runtime (seen in 1.32) reports its use to its makers, from a thread of its own, unless it is
told before it is loaded. Whoever wants that sets the variable to 0."""
