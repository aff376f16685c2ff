"""The base of every value that crosses the wire, and the number types with their ranges."""

from __future__ import annotations

import json
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from fedra_edge.protocol.plain_text import plain


def _check_can_be_said(value: JsonValue) -> JsonValue:
    """Refuse numbers that JSON cannot write: they would arrive as null, or not at all."""
    json.dumps(value, allow_nan=False)
    return value


HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ByteCount = Annotated[int, Field(ge=0, le=2**50)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
ShortText = Annotated[str, Field(max_length=200), AfterValidator(plain)]
Detail = Annotated[str, Field(max_length=4000), AfterValidator(plain)]
PlainJson = Annotated[JsonValue, AfterValidator(_check_can_be_said)]
Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_LONGEST_COUNT: Final = 16
"""Digits of a number of bytes; thousands of them are no number to Python at all."""


def byte_count_of(text: str) -> int | None:
    """Read a header that counts bytes; None when it does not."""
    return int(text) if text.isdecimal() and len(text) <= _LONGEST_COUNT else None


class WireModel(BaseModel):
    """A frozen value with checked ranges.

    Unknown fields are ignored, because a peer one minor version ahead may add some. Errors never
    repeat what came, which may be a secret.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)
