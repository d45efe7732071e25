"""Between an encoder's tensors and KServe's messages, as Triton and Horace write them.

Source: Triton's grpc_service.proto and model_config.proto, as the wheel of tritonclient has
them; `train.export.triton` writes the configurations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2

from models.errors import EncoderError, HoraceError
from models.preprocess import PreprocessSpec

INPUT_NAME = "images"
OUTPUT_NAME = "embeddings"


@dataclass(frozen=True, kw_only=True)
class TritonModel:
    """What a model's configuration says.

    Attributes:
        fingerprint: of the encoder.
        preprocessing: how images become its input.
        dim: length of its vectors.
        max_batch_size: images of one request.
    """

    fingerprint: str
    preprocessing: PreprocessSpec
    dim: int
    max_batch_size: int


def write_request(name: str, images_NHWC: NDArray[np.uint8]) -> Any:
    """Write the request for a batch."""
    tensor = service_pb2.ModelInferRequest.InferInputTensor(
        name=INPUT_NAME, datatype="UINT8", shape=images_NHWC.shape
    )
    return service_pb2.ModelInferRequest(
        model_name=name, inputs=[tensor], raw_input_contents=[images_NHWC.tobytes()]
    )


def read_reply(reply: Any, images: int, dim: int, label: str) -> NDArray[np.float32]:
    """Give the vectors of a reply.

    Raises:
        EncoderError: it has none, or of another shape.
    """
    for tensor, raw in zip(reply.outputs, reply.raw_output_contents, strict=False):
        if tensor.name == OUTPUT_NAME and tensor.datatype == "FP32":
            if tuple(tensor.shape) == (images, dim) and len(raw) == 4 * images * dim:
                return np.frombuffer(raw, "<f4").reshape(images, dim)
            found = f"{list(tensor.shape)} in {len(raw)} bytes"
            break
    else:
        found = "none"
    expected = f"{OUTPUT_NAME!r} FP32 of shape [{images}, {dim}]"
    raise EncoderError(f"reply of {label}", expected=expected, found=found)


def read_config(config: Any, label: str) -> TritonModel:
    """Read a model's configuration, Triton's or Horace's own.

    Args:
        config: Triton's message `ModelConfig`.
        label: what the model is called in errors.

    Raises:
        EncoderError: it does not say which encoder this is, or is not laid out as one.
    """
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    missing = [name for name in ("fingerprint", "preprocessing") if not parameters.get(name)]
    if missing:
        raise EncoderError(
            f"configuration of {label}",
            expected="the parameters fingerprint and preprocessing",
            found=f"no {' and no '.join(missing)}",
            mend="lay the model out with `python -m train.export.triton BUNDLE --out REPOSITORY`",
        )
    try:
        spec = PreprocessSpec.from_json(json.loads(parameters["preprocessing"]))
    except (ValueError, HoraceError) as error:
        raise EncoderError(
            f"preprocessing of {label}",
            expected="one that this version of Horace can do",
            found=str(error) if isinstance(error, HoraceError) else "no JSON",
        ) from error
    pixels = [spec.height, spec.width, spec.channels]
    inputs = [(each.name, each.data_type, list(each.dims)) for each in config.input]
    outputs = {each.name: each for each in config.output}
    vector = outputs.get(OUTPUT_NAME)
    if (
        inputs != [(INPUT_NAME, model_config_pb2.TYPE_UINT8, pixels)]
        or vector is None
        or vector.data_type != model_config_pb2.TYPE_FP32
        or len(vector.dims) != 1
        or vector.dims[0] < 1
        or config.max_batch_size < 1
    ):
        raise EncoderError(
            f"configuration of {label}",
            expected=f"batches of {INPUT_NAME} UINT8 {pixels} in, {OUTPUT_NAME} FP32 [D] out",
            found=f"inputs {[name for name, *_ in inputs]}, outputs "
            f"{[f'{name} {list(each.dims)}' for name, each in outputs.items()]}, "
            f"max_batch_size {config.max_batch_size}",
            mend="lay the model out with `python -m train.export.triton BUNDLE --out REPOSITORY`",
        )
    return TritonModel(
        fingerprint=parameters["fingerprint"],
        preprocessing=spec,
        dim=vector.dims[0],
        max_batch_size=config.max_batch_size,
    )
