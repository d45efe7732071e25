"""Runs a bundle's ONNX graph here, under ONNX Runtime: on the CPU, or on a GPU if asked.

Rules:
    Threads come from the caller or the CPU budget, never from ONNX Runtime's own guess,
    which is the host's cores whatever the container may use (onnxruntime#29510).
    Waiting threads do not spin: decoding shares the same CPUs.
    A batch is computed on all threads, or in a lane: on the calling thread alone, by a session
    of its own, since one session's threads help every caller and get in each other's way.
    The bytes that run are the bytes whose hash was checked: the file is read once.
    What is asked to run on a GPU runs there or is refused; see `models.providers`. It needs one
    CPU thread, and has no lanes. On CUDA batches have few sizes: `models.sized_sessions`.
"""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle, Precision, check_sha256, read_bundle, split_precision
from models.cpu import cpu_budget
from models.errors import BundleError, EncoderError, reason_of
from models.preprocess import PreprocessSpec, check_batch, preprocess
from models.providers import (
    INSTALL_AN_ENGINE,
    ON_CPU,
    Placement,
    ProviderOptions,
    refuse_precision,
    require_loaded,
    require_provider,
    session_providers,
)
from models.sized_sessions import SizedSessions

try:
    import onnxruntime as ort
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.msg}; {INSTALL_AN_ENGINE}", name="onnxruntime") from None


LOG_SEVERITY = 3
"""Of ONNX Runtime: errors, and not its advice."""

_MISSING_GPU = re.compile(r"Invalid device ID|no CUDA-capable device")
_NO_MEMORY = re.compile(r"bad_alloc|Failed to allocate memory|out of memory")
_GPU_FAULT = re.compile(r"(?:CUDA failure|CUDNN|CUBLAS)[^;]*")


class OnnxEncoder:
    """A bundle's graph in one ONNX Runtime session; `encode` may run in several threads.

    Attributes:
        bundle: what the graph belongs to.
        fingerprint: of the encoder that the graph is.
        threads: CPU threads of the session.
        placement: where it computes.
        lanes: batches that `encode_in_lane` takes at once; 0 where it was not opened for that.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        graph: Path,
        threads: int | None = None,
        placement: Placement = ON_CPU,
        with_lanes: bool = False,
    ) -> None:
        """Load `graph`, one of the bundle's ONNX files, with `threads` CPU threads.

        With lanes it is loaded twice, unless there is one thread: for all threads, and for one.

        Raises:
            BundleError: the file does not match the hash that the bundle records.
            EncoderError: ONNX Runtime refuses the file, or its input and output are not
                the ones that the bundle describes, or it does not compute where asked to.
        """
        self.bundle = bundle
        self.fingerprint = bundle.fingerprint_of(graph.name)
        is_on_cpu = placement.provider == "cpu"
        self.threads = (threads or cpu_budget()) if is_on_cpu else 1
        self.placement = placement
        if not is_on_cpu:
            ort.set_default_logger_severity(LOG_SEVERITY)
            ort.preload_dlls()
        require_provider(str(bundle.path), placement.provider, ort.get_available_providers())
        providers = session_providers(placement, fingerprint=self.fingerprint)
        content = _read_checked(bundle, graph)
        load = partial(_load_session, graph, content, placement, providers)
        self._session: ort.InferenceSession | SizedSessions
        if placement.provider == "cuda":
            self._session = SizedSessions(partial(load, self.threads))
        else:
            self._session = load(self.threads)
        require_loaded(str(bundle.path), placement.provider, self._session.get_providers())
        self._input, self._output = _check_signature(self._session, bundle, graph)
        self.lanes = self.threads if with_lanes else 0
        self._lane = self._session
        if self.lanes > 1:
            self._lane = load(1)

    def __repr__(self) -> str:
        provider = self.placement.provider
        place = "" if provider == "cpu" else f"on {provider} "
        return (
            f"<OnnxEncoder {self.name} dim={self.dim} {place}threads={self.threads} "
            f"fingerprint={self.fingerprint[:12]}>"
        )

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self.bundle.name

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.bundle.dim

    @property
    def preprocessing(self) -> PreprocessSpec:
        """How bytes become the graph's input."""
        return self.bundle.preprocessing

    def preprocess(self, data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Decode and fit one image to (H, W, C) uint8.

        Raises:
            ImageError: this image cannot be used.
        """
        return preprocess(data, self.bundle.preprocessing)

    def encode(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed (N, H, W, C) uint8 as (N, D) float32; N may be 0.

        Raises:
            EncoderError: the shape or dtype is wrong, or ONNX Runtime failed.
        """
        return self._run(self._session, images_NHWC)

    def encode_in_lane(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed as `encode` does, on the calling thread alone; see `LaneEncoder`.

        Raises:
            EncoderError: likewise.
        """
        assert self.lanes, "open it with lanes"
        return self._run(self._lane, images_NHWC)

    def _run(
        self, session: ort.InferenceSession | SizedSessions, images_NHWC: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        """Check a batch and compute it in one of the sessions."""
        check_batch(images_NHWC, self.bundle.preprocessing)
        if len(images_NHWC) == 0:
            return np.empty((0, self.dim), np.float32)
        try:
            (vectors_ND,) = session.run([self._output], {self._input: images_NHWC})
        except Exception as error:  # ONNX Runtime raises classes of its own C++ side
            if _NO_MEMORY.search(str(error)):
                where, is_on_gpu = self.placement, self.placement.provider != "cpu"
                raise EncoderError(
                    f"encoding with {self.name!r}",
                    expected=f"memory for {len(images_NHWC)} images",
                    found=f"too little on GPU {where.device}" if is_on_gpu else "too little",
                    mend="see nvidia-smi for what else is on it" if is_on_gpu else None,
                ) from error
            raise EncoderError(f"encoding with {self.name!r} failed: {error}") from error
        return np.asarray(vectors_ND, dtype=np.float32)

    def close(self) -> None:
        """Drop the sessions and with them their threads and memory."""
        del self._session, self._lane


def open_bundle(
    path: Path,
    *,
    threads: int | None = None,
    precision: Precision | None = None,
    placement: Placement = ON_CPU,
    with_lanes: bool = False,
) -> OnnxEncoder:
    """Open an encoder of a bundle; its graph is checked against its hash.

    Args:
        path: the bundle's directory, or the file of one of its encoders.
        threads: CPU threads for inference; the CPU budget where None.
        precision: which of the bundle's encoders; the one that `path` names where None.
        placement: where it computes.
        with_lanes: whether `encode_in_lane` is wanted.

    Raises:
        BundleError: the bundle is missing or damaged, or has no such precision.
        EncoderError: ONNX Runtime refuses the graph, or cannot compute where asked to.
        UsageError: the precision is not for that provider.
    """
    bundle = read_bundle(path, verify=False)
    chosen = precision or split_precision(path)[1]
    refuse_precision(chosen, placement.provider)
    graph = bundle.path_of(chosen)
    return OnnxEncoder(
        bundle, graph=graph, threads=threads, placement=placement, with_lanes=with_lanes
    )


def open_random_twin(
    path: Path, *, threads: int | None = None, placement: Placement = ON_CPU
) -> OnnxEncoder | None:
    """Open the bundle's untrained twin, the random-encoder baseline; None where it has none.

    Its fingerprint is its own, so its vectors cannot pass for the encoder's.
    """
    bundle = read_bundle(path, verify=False)
    if bundle.random_path is None:
        return None
    return OnnxEncoder(bundle, graph=bundle.random_path, threads=threads, placement=placement)


def _read_checked(bundle: Bundle, graph: Path) -> bytes:
    """Read a graph and hold it against the recorded hash."""
    try:
        content = graph.read_bytes()
    except OSError as error:
        raise BundleError(
            str(graph), expected="a file that can be read", found=reason_of(error)
        ) from error
    check_sha256(
        graph, expected=bundle.files[graph.name], found=hashlib.sha256(content).hexdigest()
    )
    return content


def _load_session(
    graph: Path,
    content: bytes,
    placement: Placement,
    providers: list[tuple[str, ProviderOptions]],
    threads: int,
) -> ort.InferenceSession:
    """Make a session with exactly `threads` threads that sleep while they wait."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = LOG_SEVERITY
    try:
        return ort.InferenceSession(
            content, sess_options=options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime raises classes of its own C++ side
        raise _cannot_load(graph, placement, str(error)) from error


def _cannot_load(graph: Path, placement: Placement, said: str) -> EncoderError:
    """Say whether the graph, the memory or the GPU is at fault."""
    found = said.splitlines()[0]
    if placement.provider != "cpu" and (fault := _gpu_fault(placement, said)) is not None:
        expected, found, mend = fault
        return EncoderError(
            f"{graph} on {placement.provider}", expected=expected, found=found, mend=mend
        )
    if _NO_MEMORY.search(said):
        return EncoderError(
            str(graph),
            expected="memory for this graph",
            found=found,
            mend="give this process more memory",
        )
    return EncoderError(
        str(graph),
        expected="an ONNX graph that ONNX Runtime loads",
        found=found,
        mend="export the bundle again",
    )


def _gpu_fault(placement: Placement, said: str) -> tuple[str, str, str] | None:
    """Say what is expected of a GPU, what was found, and what mends it; None if it is sound."""
    gpu = f"GPU {placement.device}"
    if _MISSING_GPU.search(said):
        lists = "nvidia-smi -L lists them, of which CUDA_VISIBLE_DEVICES may leave some out"
        return gpu, "none of that number", lists
    if _NO_MEMORY.search(said):
        mend = "see nvidia-smi for what else is on it, or name another by device=N"
        return f"memory on {gpu} for this graph", "too little", mend
    if fault := _GPU_FAULT.search(said):
        mend = "see nvidia-smi for the driver and what else uses it"
        return f"{gpu}, and a driver that this ONNX Runtime can use", fault[0].strip(), mend
    return None


def _check_signature(session: ort.InferenceSession, bundle: Bundle, graph: Path) -> tuple[str, str]:
    """Hold the graph's input and output against the bundle; give their names."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    spec = bundle.preprocessing
    shape = [spec.height, spec.width, spec.channels]
    sound = (
        len(inputs) == 1
        and len(outputs) == 1
        and inputs[0].type == "tensor(uint8)"
        and list(inputs[0].shape[1:]) == shape
        and outputs[0].type == "tensor(float)"
        and list(outputs[0].shape[1:]) == [bundle.dim]
    )
    if not sound:
        found = ", ".join(f"{x.name} {x.type} {x.shape}" for x in (*inputs, *outputs))
        raise EncoderError(
            str(graph),
            expected=f"uint8 (N, {shape}) to float32 (N, {bundle.dim})",
            found=found,
            mend="the graph is not the one that bundle.json describes: export it again",
        )
    return inputs[0].name, outputs[0].name
