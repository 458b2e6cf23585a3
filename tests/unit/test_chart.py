"""deploy/helm: with its values as they are the standalone files, with others what they promise;
what does not exist is refused.

Rendered without Helm (`chart.py`); `test_helm.py` holds that to Helm itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from shared.settings import PREFIX, load_settings
from tests.unit import chart
from tests.unit.test_kubernetes import CONTAINERS, CRDS, KUBERNETES, ROOT, VERSION, variables

SCHEMA = json.loads((chart.CHART / "values.schema.json").read_text(encoding="utf-8"))
PLACED = {
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {
        "podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "kubernetes.io/hostname"}
            ]
        }
    },
}
TOKEN = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
LEVEL = {"name": "VDIFF_LOG_LEVEL", "value": "DEBUG"}
PARTS = ("api", "deliver", "migrate", "worker")


def made_of(**changed: Any) -> dict[str, list[Any]]:
    """Documents by the template's name, of values that the schema takes."""
    given = chart.values(**changed)
    jsonschema.validate(given, SCHEMA)
    return {name: list(yaml.safe_load_all(text)) for name, text in chart.render(given).items()}


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """Names of values; what is empty, or has a schema of Kubernetes', is one."""
    if not isinstance(node, dict) or not node or path.endswith(".resources"):
        yield path
        return
    for key, inner in node.items():
        yield from leaves(inner, f"{path}.{key}" if path else key)


@pytest.mark.parametrize(("cores", "threads"), [("2000m", 2), ("1.5", 2), ("16", 16)])
def test_a_worker_takes_the_threads_that_it_asks_cores_for(cores: str, threads: int) -> None:
    (container,) = made_of(worker={"resources": {"requests": {"cpu": cores}}})["worker.yaml"][0][
        "spec"
    ]["template"]["spec"]["containers"]
    given = {k: v for k, v in variables(container).items() if k.startswith(PREFIX)}
    assert load_settings(given).num_threads == threads


def test_the_charts_workers_get_the_time_that_their_draining_takes() -> None:
    pod = made_of(worker={"drainSeconds": 600})["worker.yaml"][0]["spec"]["template"]["spec"]
    assert variables(pod["containers"][0])["VDIFF_DRAIN_SECONDS"] == "600"
    assert pod["terminationGracePeriodSeconds"] == 630


def test_the_charts_monitor_is_the_standalone_one() -> None:
    given = chart.values(podMonitor={"enabled": True, "labels": {"release": "prometheus"}})
    jsonschema.validate(given, SCHEMA)
    made = yaml.safe_load(chart.render(given)["monitoring.yaml"])
    assert made["metadata"].pop("labels") == {"release": "prometheus"}
    assert made == yaml.safe_load(
        (KUBERNETES / "monitoring/standalone.yaml").read_text(encoding="utf-8")
    )


def test_the_chart_renders_to_the_standalone_files() -> None:
    standalone = (KUBERNETES / "standalone").glob("*.yaml")
    files = {
        f.name: f.read_text(encoding="utf-8") for f in standalone if f.name != "kustomization.yaml"
    }
    assert chart.render(chart.values()) == files
    assert set(leaves(chart.values())) == chart.used(), "every value is used"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_chart_runs_where_and_with_what_it_is_told(part: str) -> None:
    resources = {"limits": {"cpu": "3", "nvidia.com/gpu": 1}}
    mine = {**PLACED, "extraEnv": [TOKEN, LEVEL], "resources": resources}
    given = chart.values(**{part: mine, "image": {"pullSecrets": [{"name": "registry"}]}})
    jsonschema.validate(given, SCHEMA)
    for name, text in chart.render(given).items():
        for document in yaml.safe_load_all(text):
            if document["apiVersion"] not in {kind.rpartition("/")[0] for kind in CRDS}:
                kubernetes_validate.validate(document, VERSION, strict=True)
            if document["kind"] not in ("Deployment", "Job"):
                continue
            pod = document["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            assert pod["imagePullSecrets"] == [{"name": "registry"}]
            assert ({key: pod.get(key) for key in PLACED} == PLACED) == (name == f"{part}.yaml")
            assert (container["env"][-2:] == [TOKEN, LEVEL]) == (name == f"{part}.yaml")
            if name == f"{part}.yaml":
                limits = container["resources"]["limits"]
                assert (limits["cpu"], limits["nvidia.com/gpu"]) == ("3", 1) and limits[
                    "memory"
                ].endswith("i")
            else:
                assert not set(PLACED) & set(pod)


def test_the_chart_without_keda_and_policies() -> None:
    made = made_of(
        keda={"enabled": False}, networkPolicies={"enabled": False}, worker={"minReplicas": 3}
    )
    assert set(made) == {"api.yaml", "deliver.yaml", "migrate.yaml", "worker.yaml"}
    assert made["worker.yaml"][0]["spec"]["replicas"] == 3
    assert "replicas" not in made_of()["worker.yaml"][0]["spec"], "KEDA's"


def test_the_charts_workers_may_share_a_volume_and_do_without_a_spare_gpu() -> None:
    spec = made_of(worker={"modelsClaim": "models", "maxSurge": 0, "maxUnavailable": 1})[
        "worker.yaml"
    ][0]["spec"]
    kubernetes_validate.validate(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x"},
            "spec": spec["template"]["spec"],
        },
        VERSION,
        strict=True,
    )
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    volumes = {v["name"]: v for v in spec["template"]["spec"]["volumes"]}
    assert volumes["models"] == {"name": "models", "persistentVolumeClaim": {"claimName": "models"}}


def test_policies_let_out_what_the_settings_name() -> None:
    def ports(policy: dict[str, Any]) -> set[int]:
        return {p["port"] for rule in policy["spec"]["egress"] for p in rule["ports"]}

    usual = {d["metadata"]["name"]: ports(d) for d in made_of()["network.yaml"]}
    assert usual == {
        "vdiff-api": {53, 5432, 6379, 4318},
        "vdiff-worker": {53, 5432, 6379, 4318, 443},
        "vdiff-deliver": {53, 443, 1024},
    }
    moved = made_of(fileStorePort=443, databasePort=6432, redisPort=6380, tracesPort=4319)[
        "network.yaml"
    ]
    assert ports(moved[0]) == {53, 6432, 6380, 4319, 443}
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    table = page[page.index("**Ports of the NetworkPolicies.**") :].partition("\n\nOther ports")[0]
    for port in set().union(*usual.values()):
        assert str(port) in table.replace("1,024", "1024"), port


def test_the_schema_of_the_values_knows_them_all_and_no_other() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(chart.values(), SCHEMA)
    properties = SCHEMA["properties"]
    for name, value in chart.values().items():
        if isinstance(value, dict):
            told = properties[name]
            told = (
                SCHEMA["definitions"][told["$ref"].rpartition("/")[2]] if "$ref" in told else told
            )
            assert set(told["properties"]) == set(value) and not told["additionalProperties"]
    assert set(properties) == {*chart.values(), "global"}


def test_the_example_of_the_page_on_operations_is_good() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    (example,) = [
        yaml.safe_load(block)
        for block in re.findall(r"```yaml\n(.*?)```", page, re.S)
        if "image:" in block
    ]
    jsonschema.validate(chart.values(**example), SCHEMA)
    (worker, _) = yaml.safe_load_all(chart.render(chart.values(**example))["worker.yaml"])
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    settings = load_settings(
        {k: v for k, v in variables(container).items() if k.startswith(PREFIX)}
    )
    assert (settings.device, settings.model) == ("cuda", settings.served_model_name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": {}},
        {"worker": {"gpu": 1}},
        {"worker": {"device": "gpu"}},
        {"worker": {"servedModelName": "x' OR 'a'='a"}},
        {"worker": {"model": "GSAI-ML/LLaDA-8B-Instruct"}},  # which would be served as vdiff-tiny
        {"api": {"replicas": "two"}},
        {"api": {"port": 80}},  # which user 10001 may not listen on everywhere
        {"api": {"extraEnv": {"VDIFF_LOG_LEVEL": "DEBUG"}}},
        {"api": {"extraEnv": [{"name": "VDIFF_MAX_QUEUED", "value": 5}]}},
        {"api": {"nodeSelector": {"gpu": True}}},
        {"api": {"tolerations": {}}},
        {"deliver": {"affinity": {"nodeAfinity": {}}}},
        {"migrate": {"resources": {"limit": {}}}},
        {"image": {"pullSecrets": ["registry"]}},
        {"worker": {"maxSurge": 0}},  # and maxUnavailable 0: Kubernetes refuses both
        {"keda": {"enabled": "no"}},
        {"worker": {"resources": {"requests": None}}},  # no cores, no threads
    ],
)
def test_the_schema_of_the_values_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(chart.values(**wrong), SCHEMA)


def test_the_chart_has_the_programs_version() -> None:
    from vdiff.version import __version__

    told = yaml.safe_load((chart.CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert told["appVersion"] == __version__ and told["apiVersion"] == "v2"
    assert told["kubeVersion"] == ">=1.30.0-0"  # the first with `preStop.sleep`
    for _, _, container in CONTAINERS:
        assert container["image"].endswith(f":{__version__}")
