"""Changing single settings in server.toml without touching what else the operator wrote."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from fedra_server.errors import ConfigurationError

Setting = str | Sequence[str]


def with_settings(text: str, settings: Mapping[str, Setting]) -> str:
    """Write settings in the place of the lines that show their defaults, else at the start.

    What is wanted of a list is added to what it has.

    Raises:
        ConfigurationError: The file has another value already.
    """
    present = _parsed(text)  # what is wrong with it is said where the settings are read
    for name, value in settings.items():
        wanted = value if isinstance(value, str) else list(value)
        if name in present:
            text = _with_more(text, present, name, wanted)
            continue
        line = _line(name, wanted)
        shown = re.compile(rf"^# {name} = .*$", re.MULTILINE)
        text = shown.sub(lambda _: line, text, 1) if shown.search(text) else f"{line}\n{text}"  # noqa: B023
    return text


def _with_more(
    text: str, present: Mapping[str, Any], name: str, wanted: str | Sequence[str]
) -> str:
    """Add to a list what it lacks."""
    known = present[name]
    if known == wanted:
        return text
    if isinstance(known, list) and not isinstance(wanted, str):
        both = list(dict.fromkeys([*known, *wanted]))
        if both == known:
            return text
        written = re.compile(rf"^{name}\s*=\s*\[[^\]]*\]", re.MULTILINE)
        changed = written.sub(lambda _: _line(name, both), text, count=1)
        if _parsed(changed) == {**present, name: both}:
            return changed
    raise ConfigurationError(
        f"server.toml has another {name} already", remedy=f"Edit {name} in server.toml."
    )


def _parsed(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _line(name: str, value: str | Sequence[str]) -> str:
    return f"{name} = {json.dumps(value, ensure_ascii=False)}"
