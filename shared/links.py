"""URLs of the API that vdiff builds: paths, below the prefix that a proxy serves it under
(`VDIFF_ROOT_PATH`).

No host is in them: the Host of a request is the client's to say, and behind a proxy it is not the
one to come back to.
"""

from __future__ import annotations

_prefix = ""


def use_prefix(prefix: str) -> None:
    """Set the prefix of this process."""
    global _prefix
    _prefix = prefix


def link(path: str) -> str:
    """Return the path as clients reach it."""
    return _prefix + path
