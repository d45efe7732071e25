"""What every encoder takes and gives under KServe v2: the names and datatypes of its tensors."""

from __future__ import annotations

import numpy as np

INPUT = "images"
"""The one input: UINT8 or FP32 pixels (N, H, W, C), or BYTES of N encoded images."""

EMBEDDINGS = "embeddings"
"""(N, D) vectors, as the encoder gives them; the parameter `dtype` may ask for another."""

EMBEDDINGS_FP16 = "embeddings_fp16"
EMBEDDINGS_INT8 = "embeddings_int8"

SCALES = "scales"
"""(N, 1) FP32: vector = int8 * scale."""

STATUS = "status"
"""(N, 1) INT32: what became of each image, an ItemCode of horace.v1; 0 is OK."""

MESSAGE = "message"
"""(N, 1) BYTES: the same for people; empty where OK."""

DATATYPES = {
    EMBEDDINGS: "FP32",
    EMBEDDINGS_FP16: "FP16",
    EMBEDDINGS_INT8: "INT8",
    SCALES: "FP32",
    STATUS: "INT32",
    MESSAGE: "BYTES",
}
"""Of the outputs, where no parameter says otherwise."""

VECTOR_DTYPES = {"FP32": "fp32", "FP16": "fp16", "INT8": "int8"}
"""What `models.vectors` calls the datatypes of vectors."""

ITEM_BYTES = {"UINT8": 1, "INT8": 1, "FP16": 2, "FP32": 4, "INT32": 4}

PRECISION_DTYPES: dict[str, np.dtype[np.generic]] = {
    "UINT8": np.dtype(np.uint8),
    "FP32": np.dtype("<f4"),
}
"""Datatypes of pixels."""
