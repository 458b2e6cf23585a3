"""Checks that the bodies of all endpoints share: an object, known fields, a model, labels. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from shared import checks
from shared.diffusion_params import DIFFUSION_FIELDS
from shared.errors import InvalidParameter, MissingParameter
from shared.jobs.no_ops import with_effect

LABELS = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
SERVICE_TIERS = ("auto", "default")  # others would ask for a different treatment
MAX_VARIABLES, MAX_VARIABLE_LENGTH, MAX_VARIABLE_NUMBER = 16, 4096, 1_000_000
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512


def opened(
    endpoint: str, body: Any, own: Collection[str], *, refused: str = "is not served; leave it out"
) -> dict[str, Any]:
    """Return the body's fields that say something. Labels are allowed everywhere.

    Raises:
        InvalidParameter, UnknownParameter: with the field's name.
    """
    known = ", ".join(sorted(own))
    return with_effect(
        body,
        {*own, *LABELS},
        lambda name: f"{name[:80]} is not a field of {endpoint}; known: {known}",
        refused=refused,
    )


def meant(name: str, allowed: Collection[str]) -> str:
    """`; did you mean x?`: another field, or one that belongs inside of `diffusion`."""
    if name in DIFFUSION_FIELDS:
        return f"; did you mean diffusion.{name}?"
    return checks.meant(name, allowed) or checks.meant(name, DIFFUSION_FIELDS, "diffusion.")


def model_of(body: dict[str, Any]) -> str:
    """Raises MissingParameter, InvalidParameter."""
    if "model" not in body:
        raise MissingParameter("model is required", param="model")
    if not isinstance(body["model"], str) or not body["model"]:
        raise InvalidParameter("model must be a non-empty string", param="model")
    return str(body["model"])


def labels_of(body: dict[str, Any]) -> dict[str, str]:
    """The metadata, all labels being checked. Raises InvalidParameter."""
    for name in LABELS:
        if name != "metadata" and not isinstance(body.get(name, ""), str):
            raise InvalidParameter(f"{name} must be a string", param=name)
    if body.get("service_tier", "auto") not in SERVICE_TIERS:
        raise InvalidParameter(
            f"service_tier must be one of {', '.join(SERVICE_TIERS)}", param="service_tier"
        )
    return metadata_of(body.get("metadata", {}), "metadata")


def template_variables_of(value: Any) -> dict[str, Any]:
    """Return `chat_template_kwargs`: a few plain values by name. The model's template says which
    names there are.

    Raises:
        InvalidParameter
    """
    at = "chat_template_kwargs"
    if not isinstance(value, dict) or len(value) > MAX_VARIABLES:
        raise InvalidParameter(
            f"{at} must be an object of at most {MAX_VARIABLES} values", param=at
        )
    for name, one in value.items():
        param = f"{at}.{name[:80]}"
        if one is None:
            continue
        if not isinstance(one, bool | int | float | str) or (
            isinstance(one, str) and len(one) > MAX_VARIABLE_LENGTH
        ):
            message = (
                f"{param} must be a plain value, text of at most {MAX_VARIABLE_LENGTH} characters"
            )
            raise InvalidParameter(message, param=param)
        if isinstance(one, int):  # a template may write `"x" * n`, or count to n
            checks.integer(int(one), param, -MAX_VARIABLE_NUMBER, MAX_VARIABLE_NUMBER)
    return {name: one for name, one in value.items() if one is not None}


def metadata_of(value: Any, param: str) -> dict[str, str]:
    """Labels as OpenAI bounds them: at most 16 pairs of strings. Raises InvalidParameter."""
    if not isinstance(value, dict):
        raise InvalidParameter(f"{param} must be an object of strings", param=param)
    value = {key: text for key, text in value.items() if text is not None}
    if len(value) > MAX_METADATA:
        raise InvalidParameter(f"{param} takes at most {MAX_METADATA} pairs", param=param)
    for key, text in value.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY:
            raise InvalidParameter(
                f"keys of {param} have 1 to {MAX_METADATA_KEY} characters", param=param
            )
        if not isinstance(text, str) or len(text) > MAX_METADATA_VALUE:
            message = f"{param}.{key} must be a string of at most {MAX_METADATA_VALUE} characters"
            raise InvalidParameter(message, param=f"{param}.{key}")
    return dict(value)
