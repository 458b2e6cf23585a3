"""Fill deploy/images.lock with the digests of the images that compose and the Dockerfiles name.

python scripts/pin_images.py            ask the registries, with `docker buildx imagetools inspect`
python scripts/pin_images.py --env      print the lock as variables for compose and `docker build`

A line is `VARIABLE image:tag digest`. The digest is `unknown` until this script ran where the
registries can be reached: a digest is never written by hand. With the variables, an image is
exactly the one of the lock:

    python scripts/pin_images.py --env > .images.env
    docker compose --env-file .env --env-file .images.env up --build --wait
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "deploy" / "images.lock"
UNKNOWN = "unknown"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def read_lock(text: str) -> list[tuple[str, str, str]]:
    """Return (variable, image, digest) of each line. Raises ValueError: a line is none."""
    found = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 3 or not (parts[2] == UNKNOWN or DIGEST.fullmatch(parts[2])):
            raise ValueError(f"not VARIABLE IMAGE DIGEST: {line}")
        found.append((parts[0], parts[1], parts[2]))
    return found


def variables(lock: list[tuple[str, str, str]]) -> list[str]:
    """Return the images as variables; one without a digest is named by its tag."""
    return [
        f"{name}={image}" + ("" if digest == UNKNOWN else f"@{digest}")
        for name, image, digest in lock
    ]


def ask(image: str) -> str:
    """Return the digest of an image's index. Raises CalledProcessError, OSError."""
    command = [
        "docker",
        "buildx",
        "imagetools",
        "inspect",
        "--format",
        "{{.Manifest.Digest}}",
        image,
    ]
    digest = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
    if not DIGEST.fullmatch(digest):
        raise OSError(f"{image}: the registry gave no digest")
    return digest


def main() -> int:
    text = LOCK.read_text(encoding="utf-8")
    lock = read_lock(text)
    if "--env" in sys.argv[1:]:
        print("\n".join(variables(lock)))
        return 0
    head = "".join(line + "\n" for line in text.splitlines() if line.startswith("#"))
    try:
        filled = [(name, image, ask(image)) for name, image, _ in lock]
    except (OSError, subprocess.SubprocessError) as exc:
        print(f"nothing was changed: {exc}", file=sys.stderr)
        return 1
    LOCK.write_text(head + "".join(f"{' '.join(line)}\n" for line in filled), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
