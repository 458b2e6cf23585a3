"""docker-compose.yml and the Dockerfiles: valid by the published schema, and naming only what the
program has.

Docker itself cannot run here, so everything that a container is told (commands, variables, ports,
probes, files to copy) is looked up in the program.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import tomllib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shared.settings import PREFIX, Settings, load_settings
from vdiff.cli import app

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("Dockerfile.*"))
OURS = ("migrate", "api", "deliver", "worker", "flower")
_REFERENCE = re.compile(r"\$\{(\w+)(:[?-])?([^}]*)\}")


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile."""
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def environment(file: Path) -> dict[str, str]:
    pairs = [
        part.split("=", 1)
        for word, rest in instructions(file)
        if word == "ENV"
        for part in shlex.split(rest)
    ]
    return dict(pairs)


def dockerfile_of(service: str) -> Path:
    return ROOT / SERVICES[service]["build"]["context"] / SERVICES[service]["build"]["dockerfile"]


def filled_in(value: Any) -> str:
    """A value as Compose interpolates it when required variables are `secret`."""
    return _REFERENCE.sub(lambda m: m.group(3) if m.group(2) == ":-" else "secret", str(value))


def check_command(words: list[str]) -> None:
    """A command of ours, in a group or not, with options that it has."""
    assert words[0] == "vdiff", words
    command, rest = typer.main.get_command(app), words[1:]
    while commands := getattr(command, "commands", None):
        assert rest and rest[0] in commands, words
        command, rest = commands[rest[0]], rest[1:]
    options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    assert {word for word in rest if word.startswith("-")} <= options, words


def test_compose_is_valid_by_its_schema() -> None:
    """The schema of github.com/compose-spec/compose-spec, as the package check-jsonschema carries
    it.
    """
    folder = resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [f"{list(e.absolute_path)}: {e.message}" for e in validator.iter_errors(COMPOSE)] == []
    wrong = {**COMPOSE, "services": {"x": {"image": "x", "helthcheck": {}}}}
    assert list(validator.iter_errors(wrong)), "the schema must refuse what does not exist"


def test_all_parts_are_there() -> None:
    assert set(SERVICES) == {
        "postgres",
        "roles",
        "redis",
        *OURS,
        "worker-gpu",
        "prometheus",
        "grafana",
    }


def test_the_gpu_worker_is_the_worker_with_a_gpu() -> None:
    given = SERVICES["worker-gpu"]
    assert (
        given["extends"] == {"service": "worker"}
        and given["gpus"] == "all"
        and given["profiles"] == ["gpu"]
    )
    assert "/cu" in given["build"]["args"]["TORCH_INDEX_URL"]
    assert given["environment"] == {
        "VDIFF_DEVICE": "cuda"
    }  # `auto` would run on the CPU without a word
    assert given["image"] != SERVICES["worker"]["image"]  # else one build would replace the other


def test_mounted_files_exist() -> None:
    for name, given in SERVICES.items():
        for volume in given.get("volumes", ()):
            if volume.startswith("./"):
                assert (ROOT / volume.split(":")[0]).exists() and volume.endswith(":ro"), name


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_service_is_pinned_and_unprivileged(service: str) -> None:
    given = {
        **SERVICES[SERVICES[service].get("extends", {}).get("service", service)],
        **SERVICES[service],
    }
    image = filled_in(given["image"])
    assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", image), "an image needs a version for a tag"
    assert given["user"] not in ("root", "0") and given.get("privileged") is not True
    assert service in ("roles", "migrate") or given["healthcheck"]["test"]


@pytest.mark.parametrize("service", OURS)
def test_settings_exist_and_are_good(service: str) -> None:
    given = {**environment(dockerfile_of(service)), **SERVICES[service].get("environment", {})}
    ours = {name: filled_in(value) for name, value in given.items() if name.startswith(PREFIX)}
    settings = load_settings(ours)  # refuses unknown names and bad values
    assert settings.database_url or service == "flower"
    assert settings.redis_url or service == "migrate"
    if service in ("api", "flower"):
        assert settings.host == "0.0.0.0"  # else nobody outside of the container could reach it
    if service == "api":
        assert settings.api_key is not None


@pytest.mark.parametrize("service", OURS)
def test_command_exists(service: str) -> None:
    check_command(SERVICES[service]["command"])


def test_ports_are_those_that_the_program_listens_on() -> None:
    for service, name in (("api", "port"), ("flower", "flower_port")):
        given = {**environment(dockerfile_of(service)), **SERVICES[service]["environment"]}
        port = str(given.get(f"{PREFIX}{name.upper()}", Settings.model_fields[name].default))
        (published,) = SERVICES[service]["ports"]
        assert published.rsplit(":", 1)[1] == port
        assert f"http://127.0.0.1:{port}/" in str(SERVICES[service]["healthcheck"]["test"])


def test_probes_exist() -> None:
    from flower.urls import handlers

    from api.app import create_app

    def path_of(service: str) -> str:
        found = re.search(
            r"127\.0\.0\.1:\d+(/[\w/]*)", str(SERVICES[service]["healthcheck"]["test"])
        )
        assert found
        return found.group(1)

    served = create_app(
        load_settings({}, database_url="postgresql://nowhere/x", redis_url="redis://nowhere/0")
    )
    assert path_of("api") in served.openapi()["paths"]
    pages = [h[0] if isinstance(h, tuple) else h.matcher.regex.pattern for h in handlers]
    assert any(re.fullmatch(page, path_of("flower")) for page in pages)
    probe = SERVICES["worker"]["healthcheck"]["test"]
    assert probe[0] == "CMD"
    check_command(probe[1:])


def test_our_containers_cannot_write_their_image() -> None:
    for service in OURS:
        given = SERVICES[service]
        assert (
            given["read_only"] is True
            and given["tmpfs"] == ["/tmp"]
            and given["cap_drop"] == ["ALL"]
        ), service
    assert SERVICES["worker"]["volumes"] == [
        "models:" + environment(dockerfile_of("worker"))["HF_HOME"]
    ]


def test_passwords_come_from_outside_and_must_be_given() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    roles = {f"POSTGRES_{part}_PASSWORD" for part in ("API", "WORKER", "DELIVER")}
    secrets = {
        *roles,
        "POSTGRES_PASSWORD",
        "REDIS_PASSWORD",
        "VDIFF_API_KEY",
        "FLOWER_PASSWORD",
        "GRAFANA_PASSWORD",
    }
    references = [(name, kind) for name, kind, _ in _REFERENCE.findall(text)]
    assert {name for name, _ in references} >= secrets
    assert all(kind == ":?" for name, kind in references if name in secrets)
    for value in re.findall(r"(?:PASSWORD|AUTH|KEY): (.+)", text):
        assert value.removeprefix("vdiff:").startswith("${"), f"a secret in the file: {value}"


def test_each_process_has_the_password_of_its_own_role_alone() -> None:
    for part in ("api", "worker", "deliver"):
        given = str(SERVICES[part]["environment"])
        assert f"postgresql://vdiff_{part}:${{POSTGRES_{part.upper()}_PASSWORD:?" in given
        assert set(re.findall(r"POSTGRES_\w*PASSWORD", given)) == {
            f"POSTGRES_{part.upper()}_PASSWORD"
        }
    assert "VDIFF_SECRET_KEYS" not in SERVICES["worker"]["environment"]


def test_nothing_starts_before_what_it_needs() -> None:
    for service in ("api", "deliver", "worker"):
        wanted = SERVICES[service]["depends_on"]
        assert wanted["migrate"]["condition"] == "service_completed_successfully"
        assert wanted["redis"]["condition"] == "service_healthy"
    assert (
        SERVICES["migrate"]["depends_on"]["roles"]["condition"] == "service_completed_successfully"
    )
    assert SERVICES["roles"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    for given in SERVICES.values():
        assert set(given.get("depends_on", {})) <= set(SERVICES)
    drain_seconds = Settings.model_fields["drain_seconds"].default
    assert int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) > drain_seconds


def test_data_lives_in_named_volumes() -> None:
    used = {
        v.split(":")[0]
        for given in SERVICES.values()
        for v in given.get("volumes", ())
        if v[0] not in "./"
    }
    assert used == set(COMPOSE["volumes"])
    assert {"postgres-data", "redis-data"} <= used


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_dockerfile(file: Path) -> None:
    steps = instructions(file)
    assert steps[0][0] == "ARG" and re.fullmatch(
        r"PYTHON_IMAGE=python:\d+\.\d+\.\d+-[\w-]+", steps[0][1]
    )
    assert steps[1] == ("FROM", "${PYTHON_IMAGE}")
    users = [rest for word, rest in steps if word == "USER"]
    assert users and users[-1] not in ("root", "0")
    commands = [json.loads(rest) for word, rest in steps if word == "CMD"]
    assert len(commands) == 1
    check_command(commands[0])
    load_settings({k: v for k, v in environment(file).items() if k.startswith(PREFIX)})


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_dockerfile_copies_what_is_there(file: Path) -> None:
    ignored = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and line[0] not in "#!"
    ]
    kept = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    assert ignored[0] == "*"
    copied = {
        name
        for word, rest in instructions(file)
        if word == "COPY"
        for name in shlex.split(rest)[:-1]
    }
    for name in copied:
        assert (ROOT / name).exists() and any(fnmatch.fnmatch(name, pattern) for pattern in kept), (
            name
        )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {
        pattern.rstrip("*")
        for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]
    }
    assert copied >= packages | {"pyproject.toml", "requirements.txt", project["project"]["readme"]}


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_dockerfile_installs_the_locked_versions(file: Path) -> None:
    """Hashes for everything but torch, whose index has another file for each build."""
    lock = f"requirements.{file.name.removeprefix('Dockerfile.')}.txt"
    steps = [
        step.removesuffix("rm -rf build").strip(" &")
        for word, rest in instructions(file)
        if word == "RUN"
        for step in rest.split("&&")
        if "pip install" in step
    ]
    first, *torch, last = [" ".join(step.split()) for step in steps]
    assert first == f"python -m pip install --require-hashes --no-deps --requirement {lock}"
    assert last == "python -m pip install --no-deps --no-build-isolation ."
    wanted = """python -m pip install --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' requirements.txt)\""""
    assert torch == ([] if file.name == "Dockerfile.api" else [wanted])


def test_the_lock_of_the_worker_has_what_torch_depends_on() -> None:
    """Otherwise pip would look for the missing package on the index of torch, which may not have
    it.
    """
    lock = (ROOT / "deploy/docker/requirements.worker.txt").read_text(encoding="utf-8")
    locked = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    needed = [Requirement(text) for text in metadata.requires("torch") or ()]
    names = {
        canonicalize_name(r.name)
        for r in needed
        if r.marker is None or r.marker.evaluate({"extra": ""})
    }
    brought = {
        name for name in names if re.match(r"(triton|nvidia-|cuda-)", name)
    }  # by a CUDA build, from its index
    assert names - brought <= locked
    pins = re.findall(
        r"^torch==.*$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(pins) == 1
