"""Changing single settings in server.toml without touching what the operator wrote."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence

from fedra_server.errors import ConfigurationError

Setting = str | Sequence[str]


def with_settings(text: str, settings: Mapping[str, Setting]) -> str:
    """Write settings in the place of the lines that show their defaults, else at the start.

    Raises:
        ConfigurationError: The file has another value already.
    """
    try:
        present = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        present = {}  # said where the settings are read
    for name, value in settings.items():
        wanted = value if isinstance(value, str) else list(value)
        if name in present:
            if present[name] != wanted:
                raise ConfigurationError(
                    f"server.toml has another {name} already",
                    remedy=f"Edit {name} in server.toml.",
                )
            continue
        line = f"{name} = {json.dumps(wanted, ensure_ascii=False)}"
        shown = re.compile(rf"^# {name} = .*$", re.MULTILINE)
        text = shown.sub(lambda _: line, text, 1) if shown.search(text) else f"{line}\n{text}"  # noqa: B023
    return text
