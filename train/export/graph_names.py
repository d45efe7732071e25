"""What the exported graph's parts are called; without torch, for those that only read it."""

INPUT_NAME = "images"
OUTPUT_NAME = "embeddings"
BATCH_NAME = "N"
BACKBONE_PREFIX = "backbone."
"""What the names of the backbone's weights begin with, here and in checkpoints."""
