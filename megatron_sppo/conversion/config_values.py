"""Reads facts of config.json: numbers that are numbers, and keys that state one thing twice."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from megatron_sppo.errors import ConversionError


def agreed(place: str, sources: Mapping[str, Any]) -> Any:
    """Take one fact from the keys that may state it -> its value, None where none does.

    Raises:
        ConversionError: two of them differ.
    """
    said = {key: value for key, value in sources.items() if value is not None}
    if any(value != next(iter(said.values())) for value in said.values()):
        stated = " and ".join(f"{key}: {json.dumps(value)}" for key, value in said.items())
        raise ConversionError(f"{place} says {stated}, which contradict each other. Remove the wrong one.")
    return next(iter(said.values()), None)


def only(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Take some of the keys, those that say something -> {key: value}."""
    return {key: values[key] for key in keys if values.get(key) is not None}


def whole(values: Mapping[str, Any], key: str, place: str, *, default: int | None = None, least: int = 1) -> int:
    """Read a whole number.

    Args:
        place: how errors name the config.
        default: what stands where the key is absent or null; None: it must be there.

    Raises:
        ConversionError: it is none, or less than `least`.
    """
    value = _number(values, key, default)
    if value is None or value % 1 or value < least:
        raise _no_number(values, key, place, f"a whole number from {least}")
    return int(value)


def positive(values: Mapping[str, Any], key: str, place: str, *, default: float | None = None) -> float:
    """Read a number above 0, as `whole` does."""
    value = _number(values, key, default)
    if value is None or not 0 < value <= sys.float_info.max:
        raise _no_number(values, key, place, "a number above 0")
    return float(value)


def switch(values: Mapping[str, Any], key: str, place: str, *, default: bool) -> bool:
    """Read a boolean.

    Raises:
        ConversionError: it is none.
    """
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ConversionError(f"{place}: {key} is {value!r}; it must be true or false.")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None) -> float | None:
    """Read a finite number; None where there is none."""
    value = default if values.get(key) is None else values[key]
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_number and not isinstance(value, bool) else None


def _no_number(values: Mapping[str, Any], key: str, place: str, wanted: str) -> ConversionError:
    said = "is missing" if values.get(key) is None else f"is {values[key]!r}"
    return ConversionError(f"{place}: {key} {said}; it must be {wanted}. The config is damaged: fetch the model again.")
