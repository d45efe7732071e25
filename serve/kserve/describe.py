"""What is served, in KServe's messages: server, models, their configuration and statistics.

Rules:
    The shapes of metadata begin with -1, and the configuration always is there with a
    max_batch_size: perf_analyzer takes a model apart by them.
    max_batch_size is what a request may bring: what is larger than a batch is split.
    Input and output are listed as what comes unasked: UINT8 pixels and FP32 vectors, as in
    `train.export.triton`. perf_analyzer asks for every output that is listed, and would
    measure what nobody wants; the parameter `optional_outputs` names the others.
    The configuration's other parameters are those that `train.export.triton` writes, so that
    `triton://` opens this server as it opens Triton.
    Times are in nanoseconds, and what is not measured is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tritonclient.grpc import model_config_pb2 as config_pb
from tritonclient.grpc import service_pb2 as kserve

from models.files import canonical_json
from serve.catalog import ServedModel
from serve.kserve.tensors import DATATYPES, EMBEDDINGS, INPUT
from serve.operation.tally import VersionCounts
from serve.tickets import LOWEST_PRIORITY

SERVER_NAME = "horace"
PLATFORM = "horace_encoder"
EXTENSIONS = (
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
)


def server_metadata(version: str) -> Any:
    """Describe the server."""
    return kserve.ServerMetadataResponse(name=SERVER_NAME, version=version, extensions=EXTENSIONS)


def model_metadata(model: ServedModel, versions: Iterable[str]) -> Any:
    """Describe a model's tensors."""
    spec = model.encoder.preprocessing
    tensor = kserve.ModelMetadataResponse.TensorMetadata
    image = tensor(name=INPUT, datatype="UINT8", shape=[-1, spec.height, spec.width, spec.channels])
    vector = tensor(name=EMBEDDINGS, datatype="FP32", shape=[-1, model.encoder.dim])
    return kserve.ModelMetadataResponse(
        name=model.name,
        versions=list(versions),
        platform=PLATFORM,
        inputs=[image],
        outputs=[vector],
    )


def model_config(model: ServedModel, *, max_images: int, max_batch_images: int) -> Any:
    """Describe a model as Triton's configuration does."""
    spec = model.encoder.preprocessing
    image = config_pb.ModelInput(
        name=INPUT,
        data_type=config_pb.TYPE_UINT8,
        dims=[spec.height, spec.width, spec.channels],
    )
    vector = config_pb.ModelOutput(
        name=EMBEDDINGS, data_type=config_pb.TYPE_FP32, dims=[model.encoder.dim]
    )
    config = config_pb.ModelConfig(
        name=model.name,
        backend="horace",
        platform=PLATFORM,
        max_batch_size=max_images,
        input=[image],
        output=[vector],
        dynamic_batching=config_pb.ModelDynamicBatching(
            preferred_batch_size=[max_batch_images],
            priority_levels=LOWEST_PRIORITY,
            default_priority_level=2,
        ),
        instance_group=[config_pb.ModelInstanceGroup(count=model.engine.instances)],
    )
    config.parameters["fingerprint"].string_value = model.encoder.fingerprint
    config.parameters["preprocessing"].string_value = canonical_json(spec.to_json()).decode()
    others = ",".join(name for name in DATATYPES if name != EMBEDDINGS)
    config.parameters["optional_outputs"].string_value = others
    return config


def model_statistics(model: ServedModel, counts: VersionCounts | None) -> Any:
    """Give what was counted of a model; nothing changes it meanwhile."""
    statistics = kserve.ModelStatistics(name=model.name, version=model.version)
    if counts is None:
        return statistics
    statistics.last_inference = round(counts.last_s * 1e3)
    statistics.inference_count = counts.images
    statistics.execution_count = counts.batches.total()
    of = statistics.inference_stats
    _note(of.fail, counts.failures.total(), counts.failed_s)
    for message, seconds in (
        (of.success, counts.request_s),
        (of.queue, counts.queue_s),
        (of.compute_input, counts.decode_s),
        (of.compute_infer, counts.inference_s),
        (of.compute_output, counts.output_s),
    ):
        _note(message, counts.requests, seconds)
    for size, count in sorted(counts.batches.items()):
        batches = statistics.batch_stats.add(batch_size=size)
        _note(batches.compute_infer, count, counts.batches_s[size])
    return statistics


def _note(message: Any, count: int, seconds: float) -> None:
    """Fill in how often something was done, and how long it took in all, in nanoseconds."""
    message.count = count
    message.ns = round(seconds * 1e9)
