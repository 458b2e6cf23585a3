"""Every setting of vdiff, and the only place that reads the environment.

Precedence: an explicit keyword (the command line) over `VDIFF_*` in the environment over the
default here. A bad or unknown value stops the process with a `ConfigurationError` that names the
variable.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from shared.checks import MOST
from shared.errors import ConfigurationError
from shared.vault import parse_keys

PREFIX = "VDIFF_"
LEDGER_SECONDS = 365 * 86_400.0
TEBIBYTE = 2**40
TEN_YEARS = 316_224_000.0  # seconds
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
_HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9.\-]+")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~\-]+)+")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Settings(BaseSettings):
    """All settings, each read from `VDIFF_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    # Where things are
    database_url: str | None = Field(
        None, description="postgresql:// URL; empty means embedded (vdiff up only)"
    )
    redis_url: str | None = Field(
        None, description="redis:// URL; empty means embedded (vdiff up only)"
    )
    data_dir: Path = Field(Path(".vdiff"), description="folder of the embedded services and logs")

    # API
    host: str = Field("127.0.0.1", description="address the API listens on")
    port: int = Field(8000, ge=0, le=65535, description="port the API listens on")
    flower_port: int = Field(5555, ge=0, le=65535, description="port of Flower")
    flower_basic_auth: SecretStr | None = Field(
        None, description="name:password for Flower; required beyond loopback"
    )
    max_body_bytes: int = Field(
        2 * 1024 * 1024,
        ge=1024,
        le=TEBIBYTE,
        description="largest JSON body of a request, bytes; max_file_bytes is for files",
    )
    max_connections: int = Field(
        8000,
        ge=2,
        le=1_000_000,
        description="open connections of one API process; above it, "
        "an idle one is closed, else the new one",
    )
    header_timeout_seconds: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="longest time from the start of a connection "
        "or request to the end of its headers",
    )
    body_timeout_seconds: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="longest time for a request's body; each 4 KiB received add a second",
    )
    keep_alive_seconds: float = Field(
        75.0,
        gt=0,
        le=3600,
        description="longest time that a connection may be idle between two requests",
    )
    write_timeout_seconds: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="longest time that a client may leave a response unread",
    )
    root_path: str = Field(
        "",
        description="path prefix under which a proxy serves the API, like /vdiff; also sent in URLs that vdiff builds",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="origins whose pages may call the API from a browser, comma-separated; * for all; empty means none",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="host names that requests without a key may use on loopback, beside localhost, comma-separated",
    )
    max_wait_seconds: float = Field(60.0, gt=0, le=290, description="longest long-poll, seconds")
    sync_timeout_seconds: float = Field(
        290.0, gt=0, le=290, description="longest wait of a sync endpoint, seconds"
    )
    auth: Literal["auto", "required", "open"] = Field(
        "auto",
        description="when an API key is required; auto: beyond loopback, or if api_key is set",
    )
    api_key: SecretStr | None = Field(
        None, description="a static key with every scope; the CLI sends it too"
    )
    requests_per_minute: int | None = Field(
        None, ge=1, le=MOST, description="per key, unless the key has its own limit"
    )
    max_queued_jobs: int = Field(
        100_000,
        ge=1,
        le=MOST,
        description="queued jobs per key before 429, unless the key has its own limit",
    )
    max_queued_tokens: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="queued tokens per key before 429, unless the key has its own limit",
    )
    max_waiting_requests: int = Field(
        256,
        ge=0,
        le=MOST,
        description="sync requests beyond a limit that one API process lets wait; the rest is 429 at once",
    )
    max_followers: int = Field(
        5_000,
        ge=1,
        le=MOST,
        description="clients that wait for or follow something at one API process, fewer than max_connections; "
        "the rest is 429",
    )
    max_followers_per_key: int = Field(
        1_000, ge=1, le=MOST, description="of these, with one API key"
    )
    file_store: str | None = Field(
        None,
        description="where files are: file:///folder, s3://bucket/prefix or the like; empty means PostgreSQL",
    )
    max_file_bytes: int = Field(
        200 * 1024 * 1024,
        ge=1024,
        le=TEBIBYTE,
        description="largest file that may be uploaded, bytes",
    )
    max_stored_file_bytes: int = Field(
        50 * 1024**3,
        ge=0,
        le=2**60,
        description="total size of the files of one tenant, bytes; 0 means no limit",
    )
    max_batch_lines: int = Field(50_000, ge=1, le=MOST, description="lines that a batch may have")
    code_graders: bool = Field(
        False,
        description="allow code graders in evaluations, in a sandbox of the API process (Linux)",
    )
    sandboxes: int = Field(
        3,
        ge=1,
        le=64,
        description="code graders that run at once on one host, over all API processes",
    )
    sandbox_memory_mb: int = Field(
        512,
        ge=64,
        le=2048,
        description="maximum memory of a code grader's sandbox, MB",
    )
    worker_stale_seconds: float = Field(
        30.0,
        gt=0,
        le=TEN_YEARS,
        description="a worker without a heartbeat for this time counts as stopped",
    )

    # Client and command line
    base_url: str | None = Field(
        None,
        description="URL of the API for clients; empty means a `vdiff up` in the same folder, else host and port",
    )

    # Webhooks
    webhook_allow_private: bool = Field(
        False, description="let webhooks reach loopback and private addresses, and plain http"
    )
    webhook_retry_seconds: Annotated[tuple[float, ...], NoDecode] = Field(
        (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400),
        description="waits between the attempts of a webhook, comma-separated",
    )
    webhook_timeout_seconds: float = Field(
        15.0, gt=0, le=120, description="longest wait for a receiver's response"
    )
    webhook_concurrency: int = Field(
        32, ge=1, le=512, description="webhooks that one process sends at once"
    )
    webhook_per_receiver: int = Field(4, ge=1, le=MOST, description="of these, to one receiver")
    webhook_forget_seconds: float = Field(
        30 * 86_400.0,
        gt=0,
        le=TEN_YEARS,
        description="time for which events and their attempts are kept",
    )

    # Secrets at rest
    secret_keys: SecretStr | None = Field(
        None,
        description="keys that encrypt webhook secrets in the database, comma-separated: the first encrypts, all decrypt; "
        "empty stores them in clear text (`vdiff "
        "up` creates one for its embedded PostgreSQL)",
    )

    # Worker and engine
    model: str | None = Field(
        None, description="model folder or hub id; empty means the bundled vdiff-tiny"
    )
    tokenizer: str | None = Field(
        None, description="tokenizer folder or hub id; empty means the model's own"
    )
    revision: str | None = Field(None, description="hub revision of the model")
    served_model_name: str | None = Field(
        None, description="name clients use; empty means the folder's name"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights and activations"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    max_num_seqs: int = Field(
        8, ge=1, le=4096, description="sequences per engine step; the engine's slots"
    )
    max_model_len: int | None = Field(
        None, ge=1, le=MOST, description="context length, tokens; empty means the model's own"
    )
    num_threads: int | None = Field(
        None, ge=1, le=4096, description="torch threads on CPU; empty means one less than the cores"
    )
    trust_remote_code: bool = Field(
        False,
        description="run a model of another family through "
        "transformers, with the code of its repository",
    )
    tensor_parallel_size: int = Field(1, ge=1, le=1024, description="only 1 is supported")
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of the accelerator's memory for weights and K/V together",
    )
    max_batched_tokens: int = Field(
        8192,
        ge=1,
        le=MOST,
        description="rows of one engine step; longer prompts are stored in pieces",
    )
    cache_tokens: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="K/V capacity of all running sequences together, tokens; empty means what memory allows",
    )
    quantization: Literal["int8"] | None = Field(
        None, description="int8 stores weights as 8-bit integers"
    )
    compile: bool = Field(
        False,
        description="fuse the model's layers with torch.compile; the first steps take longer, it needs a C++ compiler",
    )
    cuda_graphs: bool | None = Field(
        None,
        description="replay recorded CUDA graphs; empty means where they work, true refuses to start without them",
    )
    diffusion_steps: int | None = Field(
        None, ge=1, le=MOST, description="default steps of the whole answer"
    )
    block_size: int | None = Field(None, ge=1, le=MOST, description="default block_length, tokens")
    enable_apd: bool | None = Field(
        None,
        description="Adaptive Parallel Decoding; empty means where there is a verifier, false loads none",
    )
    verifier: str | None = Field(
        None,
        description="folder or hub id of the autoregressive "
        "verifier of APD; the bundled model has one",
    )

    # Jobs
    lease_seconds: float = Field(
        30.0, gt=0, le=TEN_YEARS, description="time for which a claim is valid without a heartbeat"
    )
    heartbeat_seconds: float = Field(
        10.0,
        gt=0,
        le=TEN_YEARS,
        description="time between heartbeats; at most a third of the lease",
    )
    sweep_seconds: float = Field(
        5.0,
        gt=0,
        le=TEN_YEARS,
        description="time between two rounds of the sweeper; at most a quarter of the lease",
    )
    repush_after_seconds: float = Field(
        15.0,
        gt=0,
        le=TEN_YEARS,
        description="time after which a queued job with a possibly lost message is pushed again",
    )
    drain_seconds: float = Field(
        10.0, ge=0, le=TEN_YEARS, description="time that running jobs get at SIGTERM before requeue"
    )
    max_attempts: int = Field(
        3, ge=1, le=100, description="number of failures after which a job ends as failed"
    )
    retain_seconds: float = Field(
        30 * 86_400.0,
        ge=0,
        le=TEN_YEARS,
        description="input and output of a finished job are purged after "
        "this time, unless the job sets its own; 0 means never",
    )
    file_retain_seconds: float = Field(
        30 * 86_400.0,
        ge=0,
        le=TEN_YEARS,
        description="files without `expires_after` are deleted after this time; 0 means never",
    )
    forget_after_seconds: float | None = Field(
        None,
        ge=0,
        le=TEN_YEARS,
        description="the ledger row of a finished job is deleted after this time; 0 means never; empty means 365 days, "
        "and never if retain_seconds is 0",
    )
    hang_seconds: float = Field(
        120.0,
        gt=0,
        le=TEN_YEARS,
        description="an engine with work that makes no step for this time is hung",
    )
    keep_steps_tokens: int = Field(
        8_192,
        ge=0,
        le=MOST,
        description="a job keeps which step committed which token, unless there are more tokens; 0: none",
    )
    event_stream_seconds: int = Field(
        600, ge=1, le=MOST, description="how long a job's progress events stay in Redis"
    )
    event_stream_length: int = Field(
        10_000, ge=10, le=MOST, description="events kept per job in Redis"
    )
    event_stream_bytes: int = Field(
        2 << 20, ge=65_536, le=MOST, description="bytes of events kept per job in Redis"
    )
    event_tenant_bytes: int = Field(
        64 << 20,
        ge=65_536,
        le=MOST,
        description="bytes of events kept per tenant in Redis; the oldest jobs' events go first",
    )
    redis_maxmemory_bytes: int = Field(
        512 << 20,
        ge=0,
        le=1 << 50,
        description="memory of the embedded Redis, which refuses writes above it; 0 means no limit",
    )

    # Logs
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="lowest level logged"
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="console for people, json for machines"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """`load_settings` reads the environment, so that an unknown name is noticed and a test may
        hand over another.
        """
        return (init_settings,)

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_absent(cls, value: Any, info: Any) -> Any:
        if value == "":
            return cls.model_fields[info.field_name].get_default()
        return value

    @field_validator("webhook_retry_seconds", mode="before")
    @classmethod
    def _waits(cls, value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        waits = tuple(float(part) for part in value.split(","))
        if not all(0 <= wait <= 30 * 86_400 for wait in waits):
            raise ValueError("each wait is from 0 to 2592000 seconds")
        return waits

    @field_validator("cors_origins", "allowed_hosts", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"must be origins like https://app.example.com, or *; {origin[:80]!r} is not one"
                )
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not _HOST_NAME.fullmatch(host):
                raise ValueError(
                    f"must be host names without a port, like vdiff.lan; {host[:80]!r} is not one"
                )
        return tuple(host.lower() for host in value)

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if value and not _ROOT_PATH.fullmatch(value):
            raise ValueError(
                "must be a path like /vdiff: it begins with a slash and does not end with one"
            )
        return value

    @field_validator("database_url")
    @classmethod
    def _database_scheme(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("postgresql://", "postgres://")):
            raise ValueError("must start with postgresql://")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value

    @field_validator("base_url")
    @classmethod
    def _http_scheme(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value

    @field_validator("secret_keys")
    @classmethod
    def _fernet_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_keys(value.get_secret_value())
        return value

    @field_validator("flower_basic_auth")
    @classmethod
    def _name_and_password(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not all(value.get_secret_value().partition(":")):
            raise ValueError("must be name:password")
        return value

    @model_validator(mode="after")
    def _heartbeat_fits_lease(self) -> Settings:
        if self.heartbeat_seconds * 3 > self.lease_seconds + 1e-9:
            raise ValueError(
                f"{PREFIX}HEARTBEAT_SECONDS must be at most a third of {PREFIX}LEASE_SECONDS"
            )
        return self

    @model_validator(mode="after")
    def _followers_leave_connections(self) -> Settings:
        if self.max_followers >= self.max_connections:
            raise ValueError(
                f"{PREFIX}MAX_FOLLOWERS ({self.max_followers}) must be less than {PREFIX}MAX_CONNECTIONS "
                f"({self.max_connections}), or followers can take every connection; lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _sweep_fits_lease(self) -> Settings:
        # The sweeper's rounds are also pulses of `lease_clock`. Rounds that are farther apart look
        # like outages of PostgreSQL, and no lease would ever run out.
        if self.sweep_seconds * 4 > self.lease_seconds + 1e-9:
            raise ValueError(
                f"{PREFIX}SWEEP_SECONDS ({self.sweep_seconds:g}) must be at most a quarter of "
                f"{PREFIX}LEASE_SECONDS ({self.lease_seconds:g})"
            )
        return self

    def environment(self) -> dict[str, str]:
        """Return the settings as environment variables for a child process that must have the same."""
        given = {name: getattr(self, name) for name in sorted(self.model_fields_set)}
        return {
            f"{PREFIX}{name.upper()}": _as_text(value)
            for name, value in given.items()
            if value is not None
        }

    @property
    def default_retain_seconds(self) -> float | None:
        """Return how long a job's input and output are kept if the job does not say; None is for
        ever.
        """
        return self.retain_seconds or None

    @property
    def default_file_seconds(self) -> float | None:
        """Return how long a file is kept that does not say; None is for ever."""
        return self.file_retain_seconds or None

    @property
    def ledger_seconds(self) -> float | None:
        """Return how long the row of a finished job is kept; None is for ever."""
        if self.forget_after_seconds is not None:
            return self.forget_after_seconds or None
        return LEDGER_SECONDS if self.retain_seconds else None

    def require_database_url(self) -> str:
        if self.database_url is None:
            raise ConfigurationError(
                "VDIFF_DATABASE_URL is not set; set it, or use `vdiff up`, which brings its own"
            )
        return self.database_url

    def require_redis_url(self) -> str:
        if self.redis_url is None:
            raise ConfigurationError(
                "VDIFF_REDIS_URL is not set; set it, or use `vdiff up`, which brings its own"
            )
        return self.redis_url


def _as_text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


# Kubernetes puts such variables into every container for each Service of its namespace, and ours
# are called vdiff-...: VDIFF_API_SERVICE_HOST, VDIFF_API_SERVICE_PORT_HTTP,
# VDIFF_API_PORT=tcp://..., VDIFF_API_PORT_8000_TCP_ADDR.
_SERVICE_LINK = re.compile(
    r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$"
)


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.search(name)) or (
        name.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://"))
    )


def load_settings(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read the settings; `overrides` (command line) win, None among them meaning "not given".

    Raises:
        ConfigurationError: a value is bad, or a `VDIFF_*` variable does not exist; a line for each.
    """
    env = os.environ if environ is None else environ
    names = Settings.model_fields
    values: dict[str, Any] = {}
    troubles: list[tuple[str, str]] = []  # (param, what is wrong)
    for key, value in env.items():
        if not key.upper().startswith(PREFIX) or _is_service_link(key, value):
            continue
        name = key[len(PREFIX) :].lower()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
            troubles.append((key, f"{key} is not a setting of vdiff{hint}"))
            continue
        values[name] = value
    values.update({k: v for k, v in overrides.items() if v is not None})
    made = None
    try:
        made = Settings(**values)
    except ValidationError as exc:
        for error in exc.errors():
            field = str(error["loc"][0]) if error["loc"] else ""
            where = f"{PREFIX}{field.upper()}: " if field else ""
            troubles.append((field, f"{where}{error['msg'].removeprefix('Value error, ')}"))
    if troubles:
        raise ConfigurationError(
            "\n".join(text for _, text in troubles), param=troubles[0][0] or None
        )
    assert made is not None
    return made


def trace_endpoint(environ: Mapping[str, str] | None = None) -> str | None:
    """Return where OpenTelemetry's own variables send traces; None where they ask for none.

    Raises:
        ConfigurationError: they ask for an exporter or a protocol that is not built.
    """
    env = os.environ if environ is None else environ
    exporter = env.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    endpoint = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get(
        "OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    if (
        not endpoint
        or exporter == "none"
        or env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    ):
        return None
    if exporter != "otlp":
        raise ConfigurationError(
            f"OTEL_TRACES_EXPORTER: otlp or none, not {exporter}", param="OTEL_TRACES_EXPORTER"
        )
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := env.get(name, "").strip():
            if protocol != "http/protobuf":
                raise ConfigurationError(f"{name}: http/protobuf, not {protocol}", param=name)
            break
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigurationError("OTEL_EXPORTER_OTLP_ENDPOINT is not an http:// or https:// URL")
    return endpoint


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return load_settings()
