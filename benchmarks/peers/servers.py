"""The servers that are compared, each set up for throughput as its documentation advises.

Rules:
    All run the same ONNX file in the same version of ONNX Runtime, whose threads do not spin: in
    one instance with as many threads as there are CPUs, or, where the name ends in `_lanes`, in
    an instance of one thread for each CPU. Batches are at most 64 images, of whole requests,
    and 32 for Horace; where a server waits for a fuller batch it waits 1 ms at most. Horace and
    Triton wait for nothing: they batch what comes while the encoder is busy.
    Triton is its Python backend, the only one in the wheel that brings the server.
    Python-served peers have an environment of their own, made once under artifacts/.
    Horace is as `python -m serve` starts it, but for the bundle and the port.
"""

from __future__ import annotations

import http.client
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import grpc
from google.protobuf import text_format
from tritonclient.grpc import InferenceServerClient, model_config_pb2
from tritonclient.utils import InferenceServerException

from benchmarks.peers.encoder import Setting
from benchmarks.peers.processes import running
from benchmarks.served import free_port
from models.cpu import cpu_budget

ROOT = Path(__file__).parents[2]
MODEL = "encoder"
MAX_BATCH_IMAGES = 64
PEERS = {"mosec": "0.9.8", "litserve": "0.2.19", "bentoml": "1.4.40"}
NEEDS = ("numpy", "onnxruntime", "pillow", "simplejpeg")
PYTRITON = "0.7.0"
LANES = "_lanes"
"""How the name of a server ends that has an instance of one thread for each CPU."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that answers.

    Attributes:
        pid: of the process that everything else of it descends from.
        url: host and port.
    """

    pid: int
    url: str


def kind_of(name: str) -> str:
    """Say what a server is, however many instances it has."""
    return name.removesuffix(LANES)


@contextmanager
def serve(name: str, bundle: Path, payload: str, *, images: int, home: Path) -> Iterator[Running]:
    """Run a server for requests of `images` images, until the block ends.

    Raises:
        BenchmarkError: it does not come up.
    """
    port = free_port()
    instances = cpu_budget() if name.endswith(LANES) else 1
    setting = Setting(
        bundle=bundle,
        payload=payload,
        port=port,
        instances=instances,
        threads=max(1, cpu_budget() // instances),
        max_requests=max(1, MAX_BATCH_IMAGES // images),
    )
    url = f"127.0.0.1:{port}"
    argv, environment = COMMANDS[kind_of(name)](setting, home)
    try:
        with running(
            argv,
            log=home / f"{name}.log",
            environment=environment,
            answers=ANSWERS[kind_of(name)](url),
        ) as pid:
            yield Running(pid=pid, url=url)
    finally:  # a Triton that was killed leaves its backends' memory behind
        for region in Path("/dev/shm").glob(regions_of(port) + "*"):
            region.unlink(missing_ok=True)


def regions_of(port: int) -> str:
    """Say how the names of a Triton's shared memory begin."""
    return f"horace-{port}-"


def horace(setting: Setting, home: Path) -> tuple[list[str], dict[str, str]]:
    """Say how Horace is started."""
    argv = [
        sys.executable, "-m", "serve", "--port", str(setting.port),
        "--bundle", f"{MODEL}={setting.bundle}",
    ]  # fmt: skip
    return argv, {"PYTHONPATH": str(ROOT)}


def horace_grpcio(setting: Setting, home: Path) -> tuple[list[str], dict[str, str]]:
    """Say how Horace is started on grpcio, to show what its front end is worth."""
    argv, environment = horace(setting, home)
    return [*argv, "--frontend", "grpcio"], environment


def horace_http(setting: Setting, home: Path) -> tuple[list[str], dict[str, str]]:
    """Say how Horace is started for callers over HTTP."""
    argv, environment = horace(replace(setting, port=0), home)
    return [*argv, "--http.port", str(setting.port)], environment


def triton(setting: Setting, home: Path) -> tuple[list[str], dict[str, str]]:
    """Lay out a repository, and say how Triton is started."""
    wheel = fetch_triton(home)
    server = wheel / "pytriton" / "tritonserver"
    backends, repository = home / "backends", home / "repository"
    shutil.rmtree(backends, ignore_errors=True)
    shutil.copytree(server / "backends" / "python", backends / "python")
    stubs = server / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(stubs, backends / "python", dirs_exist_ok=True)
    for file in (server / "bin" / "tritonserver", backends / "python/triton_python_backend_stub"):
        file.chmod(0o755)
    write_repository(setting, repository)
    argv = [
        str(server / "bin" / "tritonserver"), f"--model-repository={repository}",
        f"--backend-directory={backends}", f"--grpc-port={setting.port}",
        "--grpc-address=127.0.0.1", "--allow-http=false", "--allow-metrics=false",
        f"--backend-config=python,shm-region-prefix-name={regions_of(setting.port)}",
    ]  # fmt: skip
    return argv, {
        "LD_LIBRARY_PATH": str(wheel / "nvidia_pytriton.libs"),
        "PEER_ROOT": str(ROOT),
    }


def write_repository(setting: Setting, repository: Path) -> None:
    """Write the model as `train.export.triton` does; for JPEGs one that decodes, too."""
    shutil.rmtree(repository, ignore_errors=True)
    argv = [
        sys.executable, "-m", "train.export.triton", str(setting.bundle), "--out", str(repository),
        "--name", MODEL, "--backend", "python", "--threads", str(setting.threads),
        "--instances", str(setting.instances),
        "--max-batch-size", str(MAX_BATCH_IMAGES),
        "--site-packages", str(Path(grpc.__file__).parents[1]),
    ]  # fmt: skip
    subprocess.run(argv, check=True, capture_output=True, cwd=ROOT)
    if setting.payload == "jpeg":
        path = repository / MODEL / "config.pbtxt"
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        config.input[0].dims[:] = [-1]  # of bytes
        path.write_text(text_format.MessageToString(config))
        model = Path(__file__).with_name("triton_jpeg_model.py")
        shutil.copyfile(model, repository / MODEL / "1" / "model.py")


def fetch_triton(home: Path) -> Path:
    """Install the wheel with Triton's binary, whole or not at all; give its directory."""
    target = home.parent / f"nvidia-pytriton-{PYTRITON}"
    if not target.is_dir():
        temporary = target.with_name(".tmp-" + target.name)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        wheel = f"nvidia-pytriton=={PYTRITON}"
        subprocess.run([*pip, "--target", str(temporary), wheel], check=True)
        temporary.rename(target)
    return target


def peer(name: str, *argv: str) -> Callable[[Setting, Path], tuple[list[str], dict[str, str]]]:
    """Say how a Python-served peer is started in an environment of its own."""

    def command(setting: Setting, home: Path) -> tuple[list[str], dict[str, str]]:
        folder = make_environment(name, home.parent)
        words = {"PORT": str(setting.port), "BIN": str(folder / "bin")}
        environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        return [word.format(**words) for word in argv], environment | setting.environment()

    return command


def make_environment(name: str, home: Path) -> Path:
    """Make a peer's environment, whole or not at all; our versions of what both have."""
    folder = home / f"{name}-{PEERS[name]}"
    done = folder / ".installed"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        ours = [f"{package}=={version(package)}" for package in NEEDS]
        pip = [str(folder / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([*pip, f"{name}=={PEERS[name]}", *ours], check=True)
        done.touch()
    return folder


def answers_grpc(url: str) -> Callable[[], bool]:
    """Make a function that asks whether a KServe server is ready."""

    def ask() -> bool:
        with InferenceServerClient(url) as client:
            try:
                return bool(client.is_server_ready() and client.is_model_ready(MODEL))
            except InferenceServerException:
                return False

    return ask


def answers_http(url: str) -> Callable[[], bool]:
    """Make a function that asks whether an HTTP server listens and its workers do."""

    def ask() -> bool:
        connection = http.client.HTTPConnection(url, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status in (
                200,
                404,
            )  # mosec and Horace have no such page
        except OSError:
            return False
        finally:
            connection.close()

    return ask


COMMANDS: dict[str, Callable[[Setting, Path], tuple[list[str], dict[str, str]]]] = {
    "horace": horace,
    "horace_grpcio": horace_grpcio,
    "horace_http": horace_http,
    "triton": triton,
    "mosec": peer("mosec", "{BIN}/python", str(ROOT / "benchmarks/peers/mosec_server.py")),
    "litserve": peer("litserve", "{BIN}/python", str(ROOT / "benchmarks/peers/litserve_server.py")),
    "bentoml": peer(
        "bentoml", "{BIN}/bentoml", "serve", "benchmarks.peers.bentoml_service:EncoderService",
        "--port", "{PORT}", "--host", "127.0.0.1", "--working-dir", str(ROOT),
    ),
}  # fmt: skip

ANSWERS: dict[str, Callable[[str], Callable[[], bool]]] = {
    "horace": answers_grpc,
    "horace_grpcio": answers_grpc,
    "horace_http": answers_http,
    "triton": answers_grpc,
    "mosec": answers_http,
    "litserve": answers_http,
    "bentoml": answers_http,
}


def count_answered(url: str) -> Callable[[], int]:
    """Make a function that asks a KServe server how many requests it has answered."""

    def ask() -> int:
        with InferenceServerClient(url) as client:
            (model,) = client.get_inference_statistics(MODEL).model_stats
            return int(model.inference_stats.success.count)

    return ask
