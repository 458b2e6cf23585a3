"""Write what the images install, with hashes: deploy/docker/requirements.api.txt and
requirements.worker.txt.

python scripts/lock_images.py     needs `uv` (`pip install uv`) and the package index

The versions are those of requirements.txt. `pip install --require-hashes` in the Dockerfiles
refuses a file that is not among these. Two things have no hash. `torch` comes from an index of its
own, where each build (CPU, CUDA) is another file: it is pinned by version, and its CUDA libraries
come with it. `make setup` takes torch from wherever the machine has it, so requirements-dev.txt has
versions alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "docker"
EXTRAS = {"api": ("api", "flower", "otel"), "worker": ("api", "worker", "embedded", "otel")}
PYTHON = "3.11.14"  # of the images
# torch, and what only its CUDA builds bring.
UNHASHED = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
_ENTRY = re.compile(r"^\S+==.*?(?=^\S+==|\Z)", re.MULTILINE | re.DOTALL)


def without_torch(text: str) -> str:
    """Return a lock file's entries without those that the index of torch brings."""
    return "".join(entry for entry in _ENTRY.findall(text) if not UNHASHED.match(entry))


def lock(image: str) -> str:
    """Resolve what an image installs. Raises CalledProcessError."""
    extras = [argument for name in EXTRAS[image] for argument in ("--extra", name)]
    command = [
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--generate-hashes",
        "--no-header",
        "--no-annotate",
        "--python-platform",
        "linux",
        "--python-version",
        PYTHON,
        *extras,
        "--constraint",
        "requirements.txt",
        "pyproject.toml",
        "deploy/docker/build.in",
    ]
    return without_torch(
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    )


def main() -> int:
    if shutil.which("uv") is None:
        print("uv is not on PATH; install it with `pip install uv`", file=sys.stderr)
        return 2
    for image in EXTRAS:
        (FOLDER / f"requirements.{image}.txt").write_text(lock(image), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
