"""The base of every value that crosses the wire, and the number types with their ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ByteCount = Annotated[int, Field(ge=0, le=2**50)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
ShortText = Annotated[str, Field(max_length=200)]
Detail = Annotated[str, Field(max_length=4000)]
Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class WireModel(BaseModel):
    """A frozen value with checked ranges.

    Unknown fields are ignored, because a peer one minor version ahead may add some.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
