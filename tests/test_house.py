"""The walls of the house, held from outside: imports, generated code, start-up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command in the root."""
    return subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True, **options)


TORCHLESS = (
    "serve.__main__", "serve.client",
    "index.build", "index.search", "index.evaluate", "index.verify", "index.duplicates",
    "index.outliers", "index.map", "index.select",
    "models.images", "models.preprocess", "models.encoder", "models.runtime", "models.remote",
)  # fmt: skip


def test_serving_and_searching_load_no_torch():
    """The base install has no torch, so nothing there may import it."""
    modules = ", ".join(TORCHLESS)
    code = f"import sys, {modules}; print(sorted(m for m in sys.modules if m.startswith('torch')))"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_the_client_loads_no_engine():
    """An application that only calls a server pays for neither ONNX Runtime nor faiss."""
    code = "import sys, serve.client; print({'onnxruntime', 'faiss', 'pyarrow'} & set(sys.modules))"
    assert run(sys.executable, "-c", code).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("engine", "module"),
    [("faiss", "index.search"), ("faiss", "index.build"), ("onnxruntime", "models.runtime")],
)
def test_an_engine_that_is_not_installed_is_named_with_what_installs_it(engine, module):
    """Both are extras, of which a base install has neither."""
    code = f"import sys; sys.modules['{engine}'] = None; import {module}"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(sys.executable, "-c", code)
    assert "faiss by `pip install '.[cpu]'`, on NVIDIA GPUs by '.[gpu]'" in failed.value.stderr


def test_layers_hold():
    """`train` and `serve` never meet, `index` and `serve` never see torch."""
    out = run(str(Path(sys.executable).parent / "lint-imports"))
    assert "0 broken" in out.stdout


def test_generated_code_is_that_of_the_contract(tmp_path):
    """`make protos` after an edit of the contract is not forgotten."""
    flags = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    run(sys.executable, "-m", "grpc_tools.protoc", "-I.", *flags, "protos/horace.proto")
    for name in ("horace_pb2.py", "horace_pb2.pyi", "horace_pb2_grpc.py"):
        assert (tmp_path / "protos" / name).read_text() == (ROOT / "protos" / name).read_text()


def test_the_runtime_reports_to_nobody():
    """ONNX Runtime's telemetry is off before it starts: no word of it where it cannot store."""
    environment = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key}
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"), "/dev/null/nowhere")
    code = "import os, models.runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = run(sys.executable, "-c", code, env=environment | nowhere)
    assert (done.stdout.strip(), done.stderr) == ("1", "")
