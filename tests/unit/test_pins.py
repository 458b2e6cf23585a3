"""Pins of third-party parts: images by digest as far as one is known, packages of the images by
hash.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts import lock_images, pin_images

ROOT = Path(__file__).resolve().parents[2]
LOCK = pin_images.read_lock(pin_images.LOCK.read_text(encoding="utf-8"))
_DEFAULT = re.compile(r"\$\{(\w+):-([^}]+)\}")
DIGEST = f"sha256:{'0123456789abcdef' * 4}"


def pins(path: Path) -> dict[str, str]:
    return dict(
        re.findall(r"^([\w.-]+)==([^\s;\\]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    )


def foreign_images() -> set[tuple[str, str]]:
    """(variable, image) of every image that compose and the Dockerfiles take from others."""
    found: set[tuple[str, str]] = set()
    for service in yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))[
        "services"
    ].values():
        image = service.get("image", "")
        if not image.startswith("vdiff-"):
            named = _DEFAULT.fullmatch(image)
            assert named, (
                f"{image} is not of the lock: write ${{NAME_IMAGE:-{image}}} and a line in deploy/images.lock"
            )
            found.add((named.group(1), named.group(2)))
        for name, value in service.get("build", {}).get("args", {}).items():
            if name.endswith("_IMAGE"):
                named = _DEFAULT.fullmatch(value)
                assert named and named.group(1) == name
                found.add((name, named.group(2)))
    for file in sorted((ROOT / "deploy" / "docker").glob("Dockerfile.*")):
        text = file.read_text(encoding="utf-8")
        arguments = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", text, re.MULTILINE))
        for name in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
            variable = name.strip("${}")
            assert name == f"${{{variable}}}" and variable in arguments, (
                f"{file.name}: FROM {name} is not of the lock"
            )
            found.add((variable, arguments[variable]))
    return found


def test_every_foreign_image_is_in_the_lock() -> None:
    assert foreign_images() == {(name, image) for name, image, _ in LOCK}


def test_a_digest_makes_an_image_exact_and_a_bad_one_is_refused() -> None:
    assert pin_images.variables([("A_IMAGE", "a:1", DIGEST), ("B_IMAGE", "b:2", "unknown")]) == [
        f"A_IMAGE=a:1@{DIGEST}",
        "B_IMAGE=b:2",
    ]
    assert pin_images.read_lock(f"# head\nA_IMAGE a:1 {DIGEST}\n") == [("A_IMAGE", "a:1", DIGEST)]
    for line in ("A_IMAGE a:1", "A_IMAGE a:1 latest", "A_IMAGE a:1 sha256:abc"):
        with pytest.raises(ValueError, match="not VARIABLE IMAGE DIGEST"):
            pin_images.read_lock(line)


def test_the_script_writes_what_the_registry_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "images.lock"
    lock.write_text("# head\nA_IMAGE a:1 unknown\n")
    docker = tmp_path / "docker"
    docker.write_text(f"#!/bin/sh\necho {DIGEST}\n")
    docker.chmod(0o755)
    monkeypatch.setattr(pin_images, "LOCK", lock)
    monkeypatch.setattr(sys, "argv", ["pin_images.py"])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert pin_images.main() == 0
    assert lock.read_text() == f"# head\nA_IMAGE a:1 {DIGEST}\n"
    docker.write_text("#!/bin/sh\nexit 1\n")
    assert pin_images.main() == 1
    assert lock.read_text() == f"# head\nA_IMAGE a:1 {DIGEST}\n"  # as it was


@pytest.mark.parametrize("image", lock_images.EXTRAS)
def test_the_images_packages_have_hashes_and_the_versions_of_the_requirements(image: str) -> None:
    path = ROOT / "deploy" / "docker" / f"requirements.{image}.txt"
    text, wanted = path.read_text(encoding="utf-8"), pins(ROOT / "requirements.txt")
    found = pins(path)
    assert len(found) > 60 and "fastapi" in found
    assert {
        name: v for name, v in found.items() if name != "setuptools" and wanted.get(name) != v
    } == {}
    entries = re.split(r"^(?=\S+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(found)
    assert [
        e.split("==")[0] for e in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}", e)
    ] == []
    assert "torch" not in found and not any(name.startswith("nvidia-") for name in found)


def test_what_the_project_asks_for_is_in_the_locks() -> None:
    """A dependency that is added to pyproject.toml alone would be missing in the images."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for image, extras in lock_images.EXTRAS.items():
        asked = [
            *project["dependencies"],
            *(one for name in extras for one in project["optional-dependencies"][name]),
        ]
        names = {re.split(r"[\[<>=!~ ]", one)[0].lower().replace("_", "-") for one in asked} - {
            "torch"
        }
        assert names <= set(pins(ROOT / "deploy" / "docker" / f"requirements.{image}.txt")), image


def test_the_lock_without_torch_keeps_the_rest() -> None:
    kept, hashed = "torchao==0.18.0\n", " \\\n    --hash=sha256:x\n"
    text = f"a==1{hashed}nvidia-y==2{hashed}torch==2.13.0{hashed}{kept}"
    assert lock_images.without_torch(text) == f"a==1{hashed}{kept}"


def test_the_script_says_that_uv_is_missing() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "lock_images.py")]
    done = subprocess.run(
        command, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "uv is not on PATH" in done.stderr) == (2, True)
