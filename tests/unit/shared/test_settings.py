"""Settings: where a value comes from, and what a person reads who got one wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigurationError
from shared.settings import Settings, get_settings, load_settings


def test_the_command_line_wins_over_the_environment_over_the_default() -> None:
    assert load_settings({}).port == 8000
    assert load_settings({"VDIFF_PORT": "9000"}).port == 9000
    assert load_settings({"VDIFF_PORT": "9000"}, port=9001).port == 9001
    assert (
        load_settings({"VDIFF_PORT": "9000"}, port=None).port == 9000
    )  # an option that was not given


def test_only_our_variables_are_read() -> None:
    settings = load_settings(
        {"PORT": "1", "HOST": "example.org", "PATH": "/bin", "vdiff_host": "::1"}
    )
    assert (settings.port, settings.host) == (8000, "::1")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("VDIFF_PROT", "VDIFF_PORT"),
        ("VDIFF_DATABASE", "VDIFF_DATABASE_URL"),
        ("VDIFF_MAX_NUM_SEQ", "VDIFF_MAX_NUM_SEQS"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigurationError) as wrong:
        load_settings({name: "x"})
    assert wrong.value.message == f"{name} is not a setting of vdiff; did you mean {hint}?"
    assert wrong.value.param == name


def test_an_unknown_name_near_to_none_suggests_none() -> None:
    with pytest.raises(ConfigurationError, match=r"^VDIFF_QQQQQQQQ is not a setting of vdiff$"):
        load_settings({"VDIFF_QQQQQQQQ": "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "eighty"),
        ("port", "65536"),
        ("port", "-1"),
        ("max_body_bytes", "10"),
        ("max_wait_seconds", "0"),
        ("max_wait_seconds", "291"),
        ("sync_timeout_seconds", "1000"),
        ("dtype", "int4"),
        ("max_num_seqs", "0"),
        ("max_model_len", "0"),
        ("trust_remote_code", "perhaps"),
        ("drain_seconds", "-1"),
        ("max_attempts", "101"),
        ("log_level", "LOUD"),
        ("log_format", "xml"),
        ("database_url", "mysql://x"),
        ("redis_url", "http://x"),
        ("worker_stale_seconds", "nan"),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError) as wrong:
        load_settings({f"VDIFF_{name.upper()}": value})
    assert wrong.value.message.startswith(f"VDIFF_{name.upper()}: ")
    assert wrong.value.param == name
    assert "\n" not in wrong.value.message


def test_a_heartbeat_that_does_not_fit_the_lease_is_refused() -> None:
    with pytest.raises(
        ConfigurationError,
        match="VDIFF_HEARTBEAT_SECONDS must be at most a third of VDIFF_LEASE_SECONDS",
    ):
        load_settings({"VDIFF_LEASE_SECONDS": "10", "VDIFF_HEARTBEAT_SECONDS": "5"})
    short = {
        "VDIFF_LEASE_SECONDS": "0.3",
        "VDIFF_HEARTBEAT_SECONDS": "0.1",
        "VDIFF_SWEEP_SECONDS": "0.075",
    }
    assert load_settings(short).lease_seconds == 0.3


def test_a_sweep_that_does_not_fit_the_lease_is_refused() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"VDIFF_SWEEP_SECONDS \(8\) must be at most a quarter of VDIFF_LEASE_SECONDS \(30\)",
    ):
        load_settings({"VDIFF_SWEEP_SECONDS": "8"})
    assert load_settings({"VDIFF_SWEEP_SECONDS": "7.5"}).sweep_seconds == 7.5


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_an_empty_variable_means_the_default(name: str) -> None:
    assert load_settings({f"VDIFF_{name.upper()}": ""}) == load_settings({})


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_types_of_values(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "VDIFF_DATA_DIR": str(tmp_path),
        "VDIFF_NUM_THREADS": "2",
        "VDIFF_TRUST_REMOTE_CODE": "true",
        "VDIFF_DATABASE_URL": "postgres://u@h/d",
        "VDIFF_REDIS_URL": "unix:///run/redis.sock",
    }
    settings = load_settings(given)
    assert (settings.data_dir, settings.num_threads, settings.trust_remote_code) == (
        tmp_path,
        2,
        True,
    )
    assert settings.require_database_url() == "postgres://u@h/d"
    assert settings.require_redis_url() == "unix:///run/redis.sock"


def test_a_part_that_needs_a_url_says_which() -> None:
    settings = load_settings({})
    with pytest.raises(ConfigurationError, match="VDIFF_DATABASE_URL is not set"):
        settings.require_database_url()
    with pytest.raises(ConfigurationError, match="VDIFF_REDIS_URL is not set"):
        settings.require_redis_url()


def test_the_process_reads_its_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    get_settings.cache_clear()
    monkeypatch.setenv("VDIFF_PORT", "9123")
    try:
        assert get_settings().port == 9123
        monkeypatch.setenv("VDIFF_PORT", "9124")
        assert get_settings().port == 9123
    finally:
        get_settings.cache_clear()


def test_every_trouble_is_told_in_a_line_of_its_own() -> None:
    with pytest.raises(ConfigurationError) as wrong:
        load_settings({"VDIFF_FOO": "1", "VDIFF_PORT": "abc", "VDIFF_MAX_NUM_SEQS": "x"})
    lines = wrong.value.message.splitlines()
    assert [line.split()[0].rstrip(":") for line in lines] == [
        "VDIFF_FOO",
        "VDIFF_PORT",
        "VDIFF_MAX_NUM_SEQS",
    ]


def test_bundled_models_go_by_their_names() -> None:
    from vdiff import bundled
    from vdiff.cli.options import settings_of

    assert settings_of(model="vdiff-tiny").model == str(bundled.folder("vdiff-tiny"))
    assert settings_of(model="GSAI-ML/LLaDA-8B-Instruct").model == "GSAI-ML/LLaDA-8B-Instruct"


def test_what_kubernetes_says_of_services_is_no_setting() -> None:
    """A Service called vdiff-api (or vdiff) puts these into every container of its namespace."""
    links = {
        "VDIFF_API_SERVICE_HOST": "10.0.0.1",
        "VDIFF_API_SERVICE_PORT": "8000",
        "VDIFF_API_SERVICE_PORT_HTTP": "8000",
        "VDIFF_API_PORT": "tcp://10.0.0.1:8000",
        "VDIFF_API_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "VDIFF_API_PORT_8000_TCP_PROTO": "tcp",
        "VDIFF_API_PORT_8000_TCP_PORT": "8000",
        "VDIFF_API_PORT_8000_TCP_ADDR": "10.0.0.1",
        "VDIFF_SERVICE_HOST": "10.0.0.2",
        "VDIFF_PORT": "tcp://10.0.0.2:8000",
    }
    assert load_settings(links).model_fields_set == set()
    assert load_settings({**links, "VDIFF_PORT": "9001"}).port == 9001
    with pytest.raises(ConfigurationError, match="VDIFF_API_PORT"):
        load_settings({"VDIFF_API_PORT": "8000"})


def test_a_child_process_gets_every_setting_as_its_parent_had_it() -> None:
    given = {
        "VDIFF_WEBHOOK_RETRY_SECONDS": "1,2.5,30",
        "VDIFF_API_KEY": "secret",
        "VDIFF_WEBHOOK_ALLOW_PRIVATE": "true",
        "VDIFF_DATA_DIR": "/srv/vdiff",
        "VDIFF_QUANTIZATION": "int8",
        "VDIFF_PORT": "9000",
    }
    settings = load_settings(given)
    assert load_settings(settings.environment()) == settings


def test_followers_leave_connections_for_other_requests() -> None:
    made = load_settings({})
    assert made.max_followers_per_key < made.max_followers < made.max_connections
    with pytest.raises(ConfigurationError) as wrong:
        load_settings({"VDIFF_MAX_CONNECTIONS": "10", "VDIFF_MAX_FOLLOWERS": "10"})
    assert (
        "VDIFF_MAX_FOLLOWERS (10) must be less than VDIFF_MAX_CONNECTIONS (10)"
        in wrong.value.message
    )
    assert (
        load_settings({"VDIFF_MAX_CONNECTIONS": "10", "VDIFF_MAX_FOLLOWERS": "9"}).max_followers
        == 9
    )
