"""A Triton model that runs an encoder in ONNX Runtime: becomes `model.py` of a repository.

For servers that have Triton's Python backend and not its onnxruntime backend. It is copied
there as it is, and for GPUs `models.sized_sessions` beside it, under a name of its own. Triton has
batched the requests already; they are joined, encoded once, and shared out again.

Tensors come and go by DLPack: a Python backend that was built before NumPy 2 takes its arrays
for empty ones, without a word (seen in the server of nvidia-pytriton 0.7.0 with NumPy 2.4).

numpy and onnxruntime are taken from the directory `site-packages` beside this file where
there is one: the backend's interpreter heeds neither a virtual environment nor PYTHONPATH.

Shapes: N images of all requests, H x W pixels, C channels, D dimensions.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("site-packages")))

import numpy as np  # the path comes first
import onnxruntime as ort
import triton_python_backend_utils as pb_utils  # Triton's own, there alone

INPUT_NAME = "images"
OUTPUT_NAME = "embeddings"
CUDA = "CUDAExecutionProvider"


class TritonPythonModel:
    """The class that Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the encoder that lies beside this file, on the GPU of this instance if it has one.

        Raises:
            TritonModelException: there is no onnxruntime for the GPU; never silently on the CPU.
        """
        parameters = json.loads(args["model_config"])["parameters"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(parameters["intra_op_thread_count"]["string_value"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        is_on_gpu = args["model_instance_kind"] == "GPU"
        load = partial(ort.InferenceSession, graph.read_bytes(), sess_options=options)
        if is_on_gpu:
            sys.path.append(str(Path(__file__).parent))
            from horace_sized_sessions import (  # type: ignore[import-not-found]  # beside this
                CUDA_OPTIONS,
                SizedSessions,
            )

            ort.preload_dlls()  # of the directory beside this file
            gpu = (CUDA, {"device_id": args["model_instance_device_id"], **CUDA_OPTIONS})
            self._session = SizedSessions(partial(load, providers=[gpu, "CPUExecutionProvider"]))
        else:
            self._session = load(providers=["CPUExecutionProvider"])
        if is_on_gpu and self._session.get_providers()[0] != CUDA:
            raise pb_utils.TritonModelException(
                f"onnxruntime {ort.__version__} cannot use the GPU; give --site-packages with "
                "onnxruntime-gpu to train.export, or --device cpu"
            )

    def execute(
        self, requests: list[pb_utils.InferenceRequest]
    ) -> list[pb_utils.InferenceResponse]:
        """Encode a batch of requests; they fail together, as they are computed together."""
        tensors = [pb_utils.get_input_tensor_by_name(x, INPUT_NAME) for x in requests]
        images = [np.from_dlpack(tensor) for tensor in tensors]
        try:
            (vectors_ND,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: np.concatenate(images)})
        except Exception as error:  # ONNX Runtime raises classes of its own C++ side
            failure = pb_utils.TritonError(f"encoding failed: {error}")
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        ends = np.cumsum([len(batch) for batch in images])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack(OUTPUT_NAME, part)])
            for part in np.split(vectors_ND, ends)
        ]
