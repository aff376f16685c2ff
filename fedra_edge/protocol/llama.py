"""What of a configuration decides the computation of a Llama-like decoder, and what we support."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(ge=1, le=2**20)]


class RopeSettings(BaseModel):
    """Which rotary embedding: the plain one only, without a stretched context."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rope_type: Literal["default"]
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LlamaSettings(BaseModel):
    """The names are those of LlamaConfig of transformers; the rest of it decides nothing here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Annotated[int, Field(ge=2, le=2**12, multiple_of=2)]
    rope_parameters: RopeSettings
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    attention_bias: bool
    mlp_bias: bool

    @model_validator(mode="after")
    def _heads_share_evenly(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self
