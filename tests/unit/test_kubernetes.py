"""deploy/kubernetes: valid by Kubernetes' own schemas, and naming only what the program has.

No cluster runs here, so each command, flag, port, path, probe and variable is looked up in the
program; `tests/integration/ test_deployment.py` runs the containers' commands as plain processes.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from api.app import create_app
from shared.settings import PREFIX, Settings, load_settings
from tests.unit.test_compose import check_command, environment

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
CRDS = json.loads((ROOT / "tests/data/crds/crds.json").read_text(encoding="utf-8"))
VERSION = "1.34"


def documents() -> list[tuple[str, dict[str, Any]]]:
    files = sorted(f for f in KUBERNETES.rglob("*.yaml") if f.name != "kustomization.yaml")
    return [
        (f"{f.parent.name}/{f.name}:{d['kind']}:{d['metadata']['name']}", d)
        for f in files
        for d in yaml.safe_load_all(f.read_text(encoding="utf-8"))
    ]


DOCUMENTS = documents()
NAMES = [name for name, _ in DOCUMENTS]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod spec), of whatever makes pods."""
    for name, d in DOCUMENTS:
        if d["kind"] in ("Deployment", "Job"):
            yield name, d["spec"]["template"]["spec"]
        elif d["kind"] == "ServingRuntime":
            yield name, {k: d["spec"][k] for k in ("containers", "volumes")}


def containers() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    return [(name, pod, c) for name, pod in pods() for c in pod["containers"]]


CONTAINERS = containers()
CONTAINER_NAMES = [name for name, _, _ in CONTAINERS]


def words(container: dict[str, Any]) -> list[str]:
    return [*container["command"], *container.get("args", ())]


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {
        e["name"]: e["value"] if "value" in e else _looked_up(e["valueFrom"], container)
        for e in container["env"]
    }


def _looked_up(source: dict[str, Any], container: dict[str, Any]) -> str:
    if "resourceFieldRef" in source:
        kind, name = source["resourceFieldRef"]["resource"].split(".")
        cores = str(container["resources"][kind][name])
        return str(math.ceil(int(cores[:-1]) / 1000 if cores.endswith("m") else float(cores)))
    secrets = {
        "database-url": "postgresql://u:p@h/d",
        **{
            f"database-url-{part}": f"postgresql://vdiff_{part}:p@h/d"
            for part in ("api", "worker", "deliver")
        },
        "redis-url": "redis://h/0",
        "api-key": "k",
        "secret-keys": "A" * 43 + "=",
    }
    return secrets[source["secretKeyRef"]["key"]]


@pytest.mark.parametrize(("name", "document"), DOCUMENTS, ids=NAMES)
def test_valid_by_its_schema(name: str, document: dict[str, Any]) -> None:
    kind = f"{document['apiVersion']}/{document['kind']}"
    if kind not in CRDS:
        kubernetes_validate.validate(document, VERSION, strict=True)
        return
    jsonschema.Draft202012Validator(CRDS[kind]).validate(document["spec"])
    for pod in (p for n, p in pods() if n == name):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
        kubernetes_validate.validate(as_pod, VERSION, strict=True)


def test_the_schemas_refuse_what_does_not_exist() -> None:
    deployment = next(d for _, d in DOCUMENTS if d["kind"] == "Deployment")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**deployment, "spec": {**deployment["spec"], "replicaz": 1}}, VERSION, strict=True
        )
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            {"predictor": {"modle": {}}}, CRDS["serving.kserve.io/v1beta1/InferenceService"]
        )


@pytest.mark.parametrize(("name", "pod", "container"), CONTAINERS, ids=CONTAINER_NAMES)
def test_command_and_settings_exist(
    name: str, pod: dict[str, Any], container: dict[str, Any]
) -> None:
    check_command([word.partition("=")[0] for word in words(container)])
    image = container["image"].partition(":")[0].removeprefix("vdiff-")
    given = {
        **environment(ROOT / f"deploy/docker/Dockerfile.{image.removesuffix('-gpu')}"),
        **variables(container),
    }
    settings = load_settings({k: v for k, v in given.items() if k.startswith(PREFIX)})
    assert settings.database_url
    flags = dict(word.split("=", 1) for word in words(container) if "=" in word)
    port = int(flags.get("--port", settings.port))
    host = flags.get("--host", settings.host)
    for shown in container.get("ports", ()):
        assert (shown["containerPort"], host) == (port, "0.0.0.0")
        assert settings.api_key is not None


@pytest.mark.parametrize(("name", "pod", "container"), CONTAINERS, ids=CONTAINER_NAMES)
def test_container_is_unprivileged_and_writes_only_where_it_may(
    name: str, pod: dict[str, Any], container: dict[str, Any]
) -> None:
    security = {**pod.get("securityContext", {}), **container["securityContext"]}
    assert (
        security["runAsNonRoot"]
        and security["readOnlyRootFilesystem"]
        and security["runAsUser"] == 10001
    )
    assert security["seccompProfile"] == {
        "type": "RuntimeDefault"
    }  # Kubernetes' "restricted" wants it
    assert security["allowPrivilegeEscalation"] is False and security["capabilities"] == {
        "drop": ["ALL"]
    }
    mounted = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert set(mounted) == {v["name"] for v in pod["volumes"]} and "/tmp" in mounted.values()
    if cache := variables(container).get("HF_HOME"):
        assert cache in mounted.values()
    assert container["resources"]["limits"]["memory"]


def served_paths() -> set[str]:
    app = create_app(
        load_settings({}, database_url="postgresql://nowhere/x", redis_url="redis://nowhere/0")
    )
    return set(app.openapi()["paths"])


@pytest.mark.parametrize(("name", "pod", "container"), CONTAINERS, ids=CONTAINER_NAMES)
def test_probes_exist(name: str, pod: dict[str, Any], container: dict[str, Any]) -> None:
    paths = served_paths()
    ports = {p.get("name", p["containerPort"]) for p in container.get("ports", ())} | {
        p["containerPort"] for p in container.get("ports", ())
    }
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = container.get(kind)
        if probe is None:
            assert "migrate" in name, f"{name} has no {kind}"
        elif "exec" in probe:
            check_command(probe["exec"]["command"])
        else:
            assert probe["httpGet"]["path"] in paths and probe["httpGet"]["port"] in ports


def test_a_pod_gets_the_time_that_loading_takes() -> None:
    """No probe that can end it asks before its own loop turns, and that is after the model is
    loaded.
    """
    loading = [(n, c) for n, _, c in CONTAINERS if words(c)[1] in ("worker", "up")]
    assert len(loading) == 3
    for name, container in loading:
        probe = container["startupProbe"]
        assert probe["exec"]["command"] == ["vdiff", "health", "worker", "--local"], name
        allowed = probe["periodSeconds"] * probe["failureThreshold"]
        assert allowed >= 1800, name
        for document in (d for n, d in DOCUMENTS if n == name and d["kind"] == "Deployment"):
            assert document["spec"]["progressDeadlineSeconds"] >= 2 * allowed, name


def test_a_pod_gets_the_time_that_draining_takes() -> None:
    for name, pod in pods():
        for container in pod["containers"]:
            if words(container)[1] in ("worker", "up") and "terminationGracePeriodSeconds" in pod:
                settings = variables(container)
                drain = float(
                    settings.get(
                        "VDIFF_DRAIN_SECONDS", Settings.model_fields["drain_seconds"].default
                    )
                )
                assert pod["terminationGracePeriodSeconds"] > drain + 10, name


def test_a_sender_gets_the_time_that_an_attempt_takes() -> None:
    (longest,) = [
        m.le for m in Settings.model_fields["webhook_timeout_seconds"].metadata if hasattr(m, "le")
    ]
    (pod,) = [pod for name, pod in pods() if words(pod["containers"][0])[1] == "deliver"]
    assert pod["terminationGracePeriodSeconds"] >= longest + 30


def test_webhooks_are_sent_wherever_jobs_run() -> None:
    """`vdiff deliver` sends them, or `vdiff up`, which starts it."""
    for folder in ("standalone", "kserve", "llmd"):
        commands = {words(c)[1] for name, _, c in CONTAINERS if name.startswith(folder)}
        assert commands & {"deliver", "up"}, folder
    source = (ROOT / "vdiff/up.py").read_text(encoding="utf-8")
    assert '"deliver"' in source
    assert any(
        d["metadata"]["labels"]["app.kubernetes.io/component"] == "deliver"
        for _, d in DOCUMENTS
        if d["kind"] == "NetworkPolicy"
    )


def test_selectors_and_references_meet() -> None:
    labels = [
        d["spec"]["template"]["metadata"]["labels"]
        for _, d in DOCUMENTS
        if d["kind"] in ("Deployment", "Job")
    ]
    deployments = {d["metadata"]["name"] for _, d in DOCUMENTS if d["kind"] == "Deployment"}
    runtimes = {d["metadata"]["name"] for _, d in DOCUMENTS if d["kind"] == "ServingRuntime"}
    for name, d in DOCUMENTS:
        spec = d["spec"]
        found = spec.get("selector") or spec.get("podSelector")
        if found is not None and d["kind"] != "PodMonitor":
            wanted = found.get("matchLabels", found if d["kind"] == "Service" else {})
            assert any(wanted.items() <= of.items() for of in labels), name
        if d["kind"] == "PodMonitor" and "kserve" not in name:
            assert any(spec["selector"]["matchLabels"].items() <= of.items() for of in labels), name
        if d["kind"] == "ScaledObject":
            assert spec["scaleTargetRef"]["name"] in deployments
        if d["kind"] == "InferenceService":
            assert spec["predictor"]["model"]["runtime"] in runtimes
    listed = yaml.safe_load((KUBERNETES / "standalone/kustomization.yaml").read_text())["resources"]
    assert set(listed) == {f.name for f in (KUBERNETES / "standalone").glob("*.yaml")} - {
        "kustomization.yaml"
    }


def test_monitors_scrape_a_port_that_serves_metrics_and_say_who_they_are() -> None:
    monitors = {name.partition(":")[0]: d for name, d in DOCUMENTS if d["kind"] == "PodMonitor"}
    served = {
        "standalone": "standalone/api.yaml",
        "llmd": "llmd/deployment.yaml",
        "kserve": "kserve/serving-runtime.yaml",
    }
    assert set(monitors) == {f"monitoring/{folder}.yaml" for folder in served}
    for folder, file in served.items():
        (endpoint,) = monitors[f"monitoring/{folder}.yaml"]["spec"]["podMetricsEndpoints"]
        (container,) = [c for name, _, c in CONTAINERS if name.startswith(file)]
        (port,) = container["ports"]
        assert (
            endpoint.get("port") == port.get("name")
            or endpoint["portNumber"] == port["containerPort"]
        )
        assert endpoint["path"] in served_paths()
        (key,) = [
            e["valueFrom"]["secretKeyRef"] for e in container["env"] if e["name"] == "VDIFF_API_KEY"
        ]
        assert endpoint["authorization"] == {"credentials": key}
        # The rules: `up{job="vdiff"}`, and a maximum over what differs between pods, which may be
        # `instance` and `job` alone.
        relabelings = endpoint["relabelings"]
        assert {"targetLabel": "job", "replacement": "vdiff"} in relabelings
        assert {"action": "labeldrop", "regex": "pod|container|endpoint"} in relabelings
    (service,) = [d["metadata"]["name"] for _, d in DOCUMENTS if d["kind"] == "InferenceService"]
    assert monitors["monitoring/kserve.yaml"]["spec"]["selector"]["matchLabels"] == {
        "serving.kserve.io/inferenceservice": service
    }


def test_the_rules_are_a_resource_of_prometheus_operator_by_the_pages_command() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^(\(cat <<EOF.*?^\)) \| kubectl apply -f -$", page, re.S | re.M)
    done = subprocess.run(
        ["bash", "-ec", command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    made = yaml.safe_load(done.stdout)
    jsonschema.validate(made["spec"], CRDS[f"{made['apiVersion']}/{made['kind']}"])
    assert made["spec"] == yaml.safe_load(
        (ROOT / "deploy/prometheus/rules.yml").read_text(encoding="utf-8")
    )


def test_every_process_hears_of_a_collector_of_traces() -> None:
    for name, _, container in CONTAINERS:
        hears = {"configMapRef": {"name": "vdiff-otel", "optional": True}} in container.get(
            "envFrom", ()
        )
        assert hears != ("migrate" in name), name


def test_a_disruption_of_the_only_pod_is_allowed() -> None:
    """A budget that keeps one of one would hold up every drain of its node."""
    for name, d in DOCUMENTS:
        if d["kind"] == "PodDisruptionBudget":
            assert d["spec"]["maxUnavailable"] == 1 and "minAvailable" not in d["spec"], name


def test_the_page_on_operations_builds_every_image() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    built = {
        tag: (file, rest)
        for file, tag, rest in re.findall(r"^docker build -f (\S+) -t (\S+)(.*) \.$", page, re.M)
    }
    assert set(built) == {c["image"] for _, _, c in CONTAINERS}
    for tag, (file, rest) in built.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        assert file.endswith(tag.partition(":")[0].removeprefix("vdiff-").removesuffix("-gpu"))
        assert ("-gpu" in tag) == (" --build-arg TORCH_INDEX_URL=" in rest) and (
            not rest or "ARG TORCH_INDEX_URL" in text
        )


def test_no_pod_is_told_of_services_in_variables() -> None:
    """VDIFF_API_PORT and the like, of a Service called vdiff-api: settings that do not exist stop a
    process.
    """
    linked = {name: pod for name, pod in pods() if "ServingRuntime" not in name}
    assert len(linked) == 5 and all(pod["enableServiceLinks"] is False for pod in linked.values())
    (predictor,) = [d["spec"]["predictor"] for _, d in DOCUMENTS if d["kind"] == "InferenceService"]
    assert predictor["enableServiceLinks"] is False


def test_who_asks_for_a_gpu_names_the_device_and_an_image_that_has_cuda() -> None:
    """`auto` would run the model on the CPU of a GPU node without a word."""
    on_gpu = [c for name, _, c in CONTAINERS if name.startswith(("kserve/", "llmd/"))]
    assert {c["image"] for c in on_gpu} == {"vdiff-worker-gpu:0.1.0"}
    for container in on_gpu:
        assert (
            "--device=cuda" in container.get("args", ())
            or variables(container)["VDIFF_DEVICE"] == "cuda"
        )
