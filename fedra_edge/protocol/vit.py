"""What of a configuration decides the computation of a vision transformer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
Size = Annotated[int, Field(ge=1, le=2**20)]


class VitSettings(BaseModel):
    """The names are those of ViTConfig of transformers; the rest of it decides nothing here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    hidden_size: Size
    num_attention_heads: Size
    intermediate_size: Size
    image_size: Size
    patch_size: Size
    num_channels: Size
    hidden_act: Activation = "gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-12
    qkv_bias: bool = True
