"""A Triton model that decodes JPEGs and encodes them: `model.py` of the JPEG cases.

It is copied into a repository; the encoder and the decoder are those of the other peers. An
instance decodes the images of a batch one after the other, then encodes them. A
JPEG comes as its bytes in a UINT8 tensor (N, L), the shorter ones filled up with zeros: this
server's Python backend misreads BYTES tensors under NumPy 2, and arrays but for DLPack.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("site-packages")))
sys.path.append(os.environ["PEER_ROOT"])

import numpy as np  # the paths come first
import onnxruntime as ort
import triton_python_backend_utils as pb_utils  # Triton's own, there alone

from models.preprocess import PreprocessSpec, preprocess


class TritonPythonModel:
    """The class that Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the encoder that lies beside this file."""
        parameters = json.loads(args["model_config"])["parameters"]
        self._spec = PreprocessSpec.from_json(
            json.loads(parameters["preprocessing"]["string_value"])
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(parameters["intra_op_thread_count"]["string_value"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self._session = ort.InferenceSession(
            graph.read_bytes(), options, providers=["CPUExecutionProvider"]
        )

    def execute(
        self, requests: list[pb_utils.InferenceRequest]
    ) -> list[pb_utils.InferenceResponse]:
        """Decode and encode a batch of requests."""
        tensors = [pb_utils.get_input_tensor_by_name(x, "images") for x in requests]
        files_NL = [np.from_dlpack(tensor) for tensor in tensors]
        images = [[preprocess(file.tobytes(), self._spec) for file in x] for x in files_NL]
        flat = np.stack([image for part in images for image in part])
        (vectors_ND,) = self._session.run(None, {"images": flat})
        ends = np.cumsum([len(part) for part in images])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("embeddings", part)])
            for part in np.split(vectors_ND, ends)
        ]
