"""What no container engine is needed for: the files parse, agree with each other and the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tyro
import yaml

from serve.config import ServeOptions
from serve.job import Embedded
from serve.lifecycle.sources import LoadStatistics
from serve.operation.metrics import Metrics
from serve.operation.observer import Call
from serve.operation.state import LOOP_TIMEOUT_S, ModelState
from serve.operation.tally import ModelTallies
from serve.reloading import ReloadStatistics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
PROMTOOL = shutil.which("promtool")
HANDBOOK = ROOT / "docs" / "operations.md"


def read_yaml(*parts: str):
    """A file of deploy/."""
    return yaml.safe_load(DEPLOY.joinpath(*parts).read_text())


def manifest(kind: str) -> dict:
    """The one Kubernetes object of a kind."""
    (found,) = [
        document
        for path in KUBERNETES
        for document in yaml.safe_load_all(path.read_text())
        if document["kind"] == kind
    ]
    return found


@pytest.fixture(scope="module")
def container():
    """The one container of the deployment."""
    (only,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    return only


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, lines joined."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines()]
    return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]


def arguments_of(name: str) -> str:
    """The arguments of the last instruction of a name."""
    return [rest for kind, rest in instructions() if kind == name][-1]


def entrypoint() -> list[str]:
    """The command that the image runs."""
    return json.loads(arguments_of("ENTRYPOINT"))


def options_of(*arguments: str) -> ServeOptions:
    """What the server makes of the image's options and more."""
    command = [*entrypoint(), *arguments]
    assert command[:3] == ["python", "-m", "serve"]
    return tyro.cli(ServeOptions, args=command[3:])


class Everything:
    """A state that makes every metric show."""

    def __init__(self, statistics) -> None:
        self._statistics = statistics

    def served(self):
        """One model."""
        return [("m", "1")]

    def models(self):
        """Its state."""
        return [
            ModelState(
                name="m",
                version="1",
                fingerprint="f",
                dim=4,
                alive=True,
                statistics=self._statistics,
            )
        ]

    def collections(self):
        """One."""
        return [("c", 3)]

    def loads(self):
        """It was loaded."""
        return {"model m": LoadStatistics(loads=1, last_load_s=0.5)}

    def reloads(self):
        """Something failed."""
        return ReloadStatistics(runs=2, failures={"keys": 1})

    def active(self):
        """None."""
        return 0

    def message_bytes(self):
        """None."""
        return 0

    def ready(self):
        """It is."""
        return True


@pytest.fixture(scope="module")
def metric_names() -> set[str]:
    """The name of every metric that the server can show, as PromQL knows it."""
    from serve.batching import Batcher

    batcher = Batcher(max_batch_images=1, max_held_images=1, max_held_bytes=1)
    state = Everything(batcher.statistics())
    models = ModelTallies(served=state.served)
    metrics = Metrics(state, models=models, keyed=True)
    embedded = Embedded(
        vectors_ND=np.zeros((1, 4), np.float32),
        errors=[None],
        decode_s=0.1,
        queue_s=0.1,
        inference_s=0.1,
    )
    models.watch_model("m", "1").answered(embedded, 1.0)
    metrics.answered(Call(method="Embed", arrived_s=0, client="key"), 0.1)
    lines = metrics.render().decode().splitlines()
    return {line.split()[2] for line in lines if line.startswith("# TYPE ")}


def test_the_image_runs_without_root_and_without_torch():
    """A numeric user, the engines' extra, and none of those that bring torch."""
    user, group = arguments_of("USER").split(":")
    assert min(int(user), int(group)) > 0
    assert {rest.split()[0] for kind, rest in instructions() if kind == "FROM"} == {"${BASE}"}
    (extras,) = [rest for kind, rest in instructions() if kind == "ARG" and "EXTRAS" in rest]
    wanted = extras.split("=")[1].split(",")
    assert ("cpu" in wanted) != ("gpu" in wanted)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in wanted:
        assert not any("torch" in line for line in known["optional-dependencies"][extra])
    assert not any("torch" in line for line in known["dependencies"])


def test_what_the_image_copies_is_there_and_not_ignored():
    """Every package that the wheel names, and nothing that the ignore file hides."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    packages = set(build["targets"]["wheel"]["packages"])
    copied = {
        name
        for kind, rest in instructions()
        if kind == "COPY" and "--from" not in rest
        for name in rest.split()[:-1]
    }
    assert packages <= copied
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


def test_the_images_command_is_one_that_the_server_understands(container):
    """On every interface, with the ports that the image and the manifests name."""
    options = options_of(*container["args"])
    assert options.host == "0.0.0.0"
    assert options.metrics.host == "0.0.0.0"
    assert options.log.log_format == "json"
    exposed = set(map(int, arguments_of("EXPOSE").split()))
    assert exposed == {options.port, options.metrics.port}
    assert f"'127.0.0.1', {options.metrics.port}, timeout" in arguments_of("HEALTHCHECK")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": options.port, "metrics": options.metrics.port}


def test_probes_ask_whether_it_serves_and_whether_it_lives(container):
    """The first by gRPC's health, the second by /healthz: not serving is no reason to restart.

    Prometheus asks the metrics port.
    """
    options = options_of(*container["args"])
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["grpc"] == {"port": options.port}
    liveness = container["livenessProbe"]
    assert "grpc" not in liveness
    assert liveness["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert liveness["timeoutSeconds"] > LOOP_TIMEOUT_S
    annotations = manifest("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(options.metrics.port)


def test_nobody_is_killed_while_it_drains(container):
    """Grace is longer than preStop, drain and closing together; compose's, too."""
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    command, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    closing_s = 10
    drain_s = options_of(*container["args"]).drain_s
    assert pod["terminationGracePeriodSeconds"] > float(pause_s) + drain_s + closing_s
    service = read_yaml("compose.yaml")["services"]["horace"]
    grace_s = float(service["stop_grace_period"].removesuffix("s"))
    assert grace_s > options_of(*service["command"]).drain_s + closing_s


def test_the_pods_are_confined(container):
    """Not root, no privileges, nothing to write to but /tmp, limits that the budget reads."""
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == (
        arguments_of("USER")
    )
    confined = container["securityContext"]
    assert confined["readOnlyRootFilesystem"] is True
    assert confined["allowPrivilegeEscalation"] is False
    assert confined["capabilities"]["drop"] == ["ALL"]
    assert container["resources"]["limits"]["cpu"] == container["resources"]["requests"]["cpu"]


def test_the_manifests_select_the_same_pods(metric_names):
    """Service, budget and autoscaler name the deployment's pods; it scales on what there is."""
    deployment = manifest("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert manifest("Service")["spec"]["selector"] == labels
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    scaler = manifest("HorizontalPodAutoscaler")["spec"]
    assert "replicas" not in deployment["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    names = {m["pods"]["metric"]["name"] for m in scaler["metrics"] if m["type"] == "Pods"}
    assert names
    assert names <= metric_names
    (port,) = manifest("Service")["spec"]["ports"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert port["targetPort"] in {known["name"] for known in container["ports"]}
    listed = manifest("Kustomization")["resources"]
    optional = {"kustomization.yaml", "podmonitor.yaml"}
    assert {path.name for path in KUBERNETES} == {*listed, *optional}


def test_the_manifests_are_scraped_under_the_job_that_the_alarms_ask_for():
    """By the operator: the pods' label names the job, as compose's configuration does."""
    monitor = manifest("PodMonitor")["spec"]
    pod = manifest("Deployment")["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"] == labels
    (job,) = read_yaml("prometheus", "prometheus.yml")["scrape_configs"]
    assert labels[monitor["jobLabel"]] == job["job_name"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    (container,) = pod["spec"]["containers"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}
    asked = {name for rule in alerts() for name in re.findall(r'job="(\w+)"', rule["expr"])}
    assert asked == {job["job_name"]}


def test_what_the_deployment_has_commented_out_fits_together():
    """Its options exist, each file of theirs lies on a volume, and the volumes are there."""
    text = (DEPLOY / "kubernetes" / "deployment.yaml").read_text()
    pod = yaml.safe_load(re.sub(r"(?m)^( +)# - ", r"\1- ", text))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = options_of(*container["args"])
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    files = (*options.bundle, *options.collection, options.keys.file)
    for file in (*files, options.tls.cert, options.tls.key):
        assert str(Path(file).parent) in mounts
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}


def test_prometheus_scrapes_what_compose_runs():
    """The target is the service's name and the metrics port; the files are mounted."""
    services = read_yaml("compose.yaml")["services"]
    config = read_yaml("prometheus", "prometheus.yml")
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert services[name]["build"]["dockerfile"] == "deploy/Dockerfile"
    assert port in services[name]["expose"]
    for rules in config["rule_files"]:
        assert (DEPLOY / "prometheus" / rules).exists()


def alerts() -> list[dict]:
    """Every alert."""
    (group,) = read_yaml("prometheus", "alerts.yml")["groups"]
    return group["rules"]


def test_alerts_ask_for_metrics_that_there_are(metric_names):
    """A renamed metric would silence its alert for ever."""
    known = metric_names | {f"{name}_bucket" for name in metric_names} | {"up"}
    for alert in alerts():
        asked = set(re.findall(r"\b(?:horace|nv|process)_\w+|\bup\b", alert["expr"]))
        assert asked, alert
        assert asked <= known, alert["alert"]


def test_each_alert_sounds_in_the_tests_of_the_rules():
    """Over series made for it, which `promtool` evaluates."""
    tests = read_yaml("prometheus", "alerts_test.yml")["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    sounding = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert sounding == {alert["alert"] for alert in alerts()}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool comes with Debian's package prometheus")
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
)
def test_prometheus_own_tool_accepts_the_files_and_the_alerts_sound(command):
    """Where it is installed: syntax, and alerts over series made for them."""
    done = subprocess.run(
        [PROMTOOL, *command],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_handbook_knows_every_alert_and_every_metric(metric_names):
    """Who is woken finds the name in docs/operations.md; who draws a graph, too."""
    text = HANDBOOK.read_text()
    for alert in alerts():
        assert f"### {alert['alert']}" in text
    for name in metric_names - {n for n in metric_names if n.startswith("process_")}:
        assert f"`{name}`" in text, name


def test_options_that_the_handbook_names_exist():
    """What it says to type can be typed."""
    from contextlib import redirect_stdout
    from io import StringIO

    shown = StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit):
        tyro.cli(ServeOptions, args=["--help"])
    known = set(re.findall(r"--[a-z][a-z0-9.-]+", shown.getvalue())) | {"--debug"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", HANDBOOK.read_text()))
    others = {
        "--build",
        "--build-arg",
        "--concurrency",
        "--file",
        "--images-per-request",
        "--previous",
        "--seconds",
        "--server",
        "--strict",
        "--sync",
    }  # of other commands
    assert named - known - others == set()
