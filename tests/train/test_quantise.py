"""Other precisions: what is quantised, what stays float, and that batches do not matter."""

from __future__ import annotations

import resource
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small

from models.bundle import ENCODER_FILE, PRECISION_FILES, Bundle, OutputSpec, write_bundle
from models.networks import ResNet
from models.preprocess import PreprocessSpec
from train.backbones import build_backbone
from train.config import NetworkOptions
from train.data.training_data import WatchedImages
from train.errors import ExportError
from train.export.graph import EncoderGraph, write_onnx
from train.export.parity import measure_parity, require_batch_invariance
from train.export.precisions import score_precisions, write_precisions
from train.export.quantise import write_fp16, write_int8
from train.export.readout import PooledReadout, WhitenedReadout
from train.export.whitening import FeatureMoments, Whitening

SPEC = PreprocessSpec(height=32, width=32, channels=3, resize=32)
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
NO_ROWS = np.empty(0, np.int64)
NOTHING_WATCHED = WatchedImages(images_NHWC=IMAGES[:0], labels_N=NO_ROWS, val=NO_ROWS, bank=NO_ROWS)


def write_encoder(file: Path, backbone: nn.Module, stage_dims: tuple[int, ...]) -> None:
    """Write a network with a whitened readout of its last stage."""
    pooled = PooledReadout(stage_dims, grid=2)
    graph = EncoderGraph(backbone, pooled, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    moments = FeatureMoments(pooled.dim)
    with torch.no_grad():
        moments.add(graph(torch.from_numpy(IMAGES)))
    graph.readout = WhitenedReadout(pooled, Whitening.fit(moments, dim=16, shrinkage=1e-2))
    write_onnx(graph, SPEC, file)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ResNet as ONNX."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("graphs") / "encoder.onnx"
    backbone = ResNet(layout="resnet10", width=8, zero_init_residual=False)
    write_encoder(file, backbone, backbone.stage_dims)
    return file


def make_draft(folder: Path, encoder: Path, **more: Path) -> Bundle:
    """Put an encoder and its other precisions, by their name in a bundle, into one."""
    (width,) = onnx.load(encoder).graph.output[0].type.tensor_type.shape.dim[1:]
    return write_bundle(
        folder / "draft",
        name="draft",
        files={ENCODER_FILE: encoder, **more},
        preprocessing=SPEC,
        output=OutputSpec(dim=width.dim_value),
        provenance={},
    )


def run(file: Path, images: np.ndarray) -> np.ndarray:
    """Run a graph on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images})[0])


def test_int8_quantises_the_backbone_and_nothing_else(encoder: Path, tmp_path: Path) -> None:
    """Every convolution of the backbone has int8 weights; pooling and whitening stay float."""
    file = tmp_path / "int8.onnx"
    write_int8(encoder, file, IMAGES)
    graph = onnx.load(file).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    weights = [makers.get(node.input[1]) for node in graph.node if node.op_type == "Conv"]
    # A stem, two a stage and three shortcuts; then the cells and the whitening.
    assert weights[:12] == ["DequantizeLinear"] * 12
    assert len(weights) == 14
    assert "DequantizeLinear" not in weights[12:]
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    assert makers[first.input[0]] == "Add"  # mean and deviation come before it, in float
    held = Counter(tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4)
    assert held[onnx.TensorProto.INT8] == 12


def test_int8_is_close_and_does_not_depend_on_the_batch(encoder: Path, tmp_path: Path) -> None:
    """Vectors are near those of fp32, and an image has the same bits in any company."""
    file = tmp_path / "int8.onnx"
    write_int8(encoder, file, IMAGES)
    parity = measure_parity(run(encoder, IMAGES), run(file, IMAGES))
    assert parity.mean_cosine > 0.9
    assert require_batch_invariance(lambda images: run(file, images), IMAGES[:16]) == 0


def test_int8_weights_leave_room_for_cpus_that_saturate(encoder: Path, tmp_path: Path) -> None:
    """Seven bits: two products of them and of bytes fit sixteen bits."""
    file = tmp_path / "int8.onnx"
    write_int8(encoder, file, IMAGES)
    for tensor in onnx.load(file).graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8:
            assert np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max() <= 64


def test_fp16_halves_the_file_and_keeps_its_edges(encoder: Path, tmp_path: Path) -> None:
    """uint8 in and float32 out, as before; directions agree to half precision."""
    file = tmp_path / "fp16.onnx"
    write_fp16(encoder, file)
    graph = onnx.load(file).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert file.stat().st_size < 0.6 * encoder.stat().st_size
    assert measure_parity(run(encoder, IMAGES), run(file, IMAGES)).min_cosine > 0.999


def test_means_stay_in_single_precision(tmp_path: Path) -> None:
    """CUDA adds 49 values of 5,000 up before it divides: in half precision that is infinite."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    spec = PreprocessSpec(height=9, width=9, channels=3, resize=9)
    file = tmp_path / "encoder.onnx"
    write_onnx(EncoderGraph(network, nn.Identity(), [0.5] * 3, [0.25] * 3), spec, file)
    write_fp16(file, tmp_path / "fp16.onnx")
    graph = onnx.load(tmp_path / "fp16.onnx").graph
    casts = {node.output[0]: node.attribute[0].i for node in graph.node if node.op_type == "Cast"}
    means = [node for node in graph.node if node.op_type in ("ReduceMean", "GlobalAveragePool")]
    assert means
    assert all(casts[mean.input[0]] == onnx.TensorProto.FLOAT for mean in means)


def test_another_kind_of_network_can_be_written_in_every_precision(tmp_path: Path) -> None:
    """Depthwise convolutions, hard swish and squeeze-and-excitation of torchvision's MobileNet."""

    class FirstBlocks(nn.Module):
        """The first blocks of a MobileNetV3."""

        def __init__(self) -> None:
            super().__init__()
            self.features = mobilenet_v3_small(weights=None).features[:5]

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self.features(x),)

    torch.manual_seed(0)
    file = tmp_path / "encoder.onnx"
    write_encoder(file, FirstBlocks(), (40,))
    write_int8(file, tmp_path / "int8.onnx", IMAGES)
    write_fp16(file, tmp_path / "fp16.onnx")
    for name in ("int8", "fp16"):
        assert run(tmp_path / f"{name}.onnx", IMAGES[:2]).shape == (2, 16)


def test_a_transformer_can_be_had_in_half_precision(tmp_path: Path) -> None:
    """Its last bits change with the batch, in float16 by more than float32 is allowed."""
    torch.manual_seed(0)
    backbone = build_backbone(NetworkOptions(layout="timm:vit_tiny_patch16_224"), 3, 32)
    readout = PooledReadout(backbone.stage_dims)
    file = tmp_path / ENCODER_FILE
    write_onnx(EncoderGraph(backbone, readout, (0.5,) * 3, (0.25,) * 3), SPEC, file)
    draft = make_draft(tmp_path, file, **write_precisions(file, ["fp16"], IMAGES))
    scores = score_precisions(draft, NOTHING_WATCHED, IMAGES[:16])
    assert scores.keys() == {"fp32", "fp16"}


def test_a_graph_that_cannot_be_quantised_is_one_line(tmp_path: Path) -> None:
    """The export goes on without the precision."""
    file = tmp_path / "encoder.onnx"
    file.write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"the INT8 graph: expected .*; export without --int8"):
        write_int8(file, tmp_path / "int8.onnx", IMAGES)
    with pytest.raises(ExportError, match=r"the FP16 graph: expected .*; export without --fp16"):
        write_fp16(file, tmp_path / "fp16.onnx")


def test_a_disk_that_is_full_is_no_fault_of_the_graph(encoder: Path, tmp_path: Path) -> None:
    """It is left to the export, which says where room is needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (encoder.stat().st_size // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_int8(encoder, tmp_path / "int8.onnx", IMAGES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_precision_is_warned_of_where_chance_does_not_explain_its_loss(
    encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that sees nothing gets half of the images wrong; of eight that says little."""
    model, blind = onnx.load(encoder), tmp_path / "fp16.onnx"
    (weight,) = (x for x in model.graph.initializer if x.name == "backbone.conv1.weight")
    zeros = np.zeros(tuple(weight.dims), np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(zeros, weight.name))
    onnx.save(model, blind)
    draft = make_draft(tmp_path, encoder, **{PRECISION_FILES["fp16"]: blind})
    for n in (8, 40):
        labels_N = np.arange(2 + n) % 2
        watched = WatchedImages(
            images_NHWC=IMAGES[labels_N], labels_N=labels_N, val=np.arange(2, 2 + n),
            bank=np.arange(2),
        )  # fmt: skip
        scores = score_precisions(draft, watched, IMAGES[:16])
        assert scores["fp16"]["knn_delta"] == -0.5  # type: ignore[index,call-overload]  # JSON
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == [
        "fp16 loses 50.00 points of kNN accuracy on 40 held-out images: prefer fp32, or calibrate "
        "on images that are more like those to come"
    ]


def test_a_precision_that_overflows_is_refused_by_name(encoder: Path, tmp_path: Path) -> None:
    """It is not taken for one that mixes the images of a batch, and the way out is said."""
    model, overflowing = onnx.load(encoder), tmp_path / "fp16.onnx"
    (weight,) = (x for x in model.graph.initializer if x.name == "backbone.conv1.weight")
    too_large = np.full(tuple(weight.dims), np.inf, np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(too_large, weight.name))
    onnx.save(model, overflowing)
    draft = make_draft(tmp_path, encoder, **{PRECISION_FILES["fp16"]: overflowing})
    with pytest.raises(ExportError) as error:
        score_precisions(draft, NOTHING_WATCHED, IMAGES[:16])
    assert str(error.value) == (
        "precision fp16: expected vectors of finite numbers, found NaN or infinity in 16 of 16; "
        "export without --fp16"
    )
