"""The pieces of a vision transformer, with the parameter names of ViTForImageClassification.

Written here rather than imported, because importing a model library takes a small machine more
memory than a whole streamed block; tests hold every piece against that library.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fedra_edge.protocol.vit import VitSettings
from fedra_edge.training.torch_activations import ACTIVATIONS
from fedra_edge.training.torch_pieces import ResidualBlock


class VitStem(nn.Module):
    """Patch, class-token and position embeddings (arXiv 2010.11929, equation 1)."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        width, patch = settings.hidden_size, settings.patch_size
        patches = (settings.image_size // patch) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.empty(1, patches + 1, width))
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(settings.num_channels, width, patch, stride=patch)}
        )

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map (examples, channels, size, size) to (examples, tokens, width)."""
        patches = self.patch_embeddings["projection"](images).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1)
        return tokens + self.position_embeddings


class VitAttention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        width, bias = settings.hidden_size, settings.qkv_bias
        self.num_heads = settings.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width)

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Map (examples, tokens, width) to the same shape."""
        query, key, value = (
            project(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class VitMlp(nn.Module):
    """Two linear maps with an activation between them; the block applies the second one."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[settings.hidden_act]
        self.fc1 = nn.Linear(settings.hidden_size, settings.intermediate_size)
        self.fc2 = nn.Linear(settings.intermediate_size, settings.hidden_size)

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Map (examples, tokens, width) to what enters ``fc2``."""
        return self.activation(self.fc1(hidden))


class VitBlock(ResidualBlock):
    """One pre-norm layer (arXiv 2010.11929, equations 2 and 3), a ``ResidualBlock``."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        width, eps = settings.hidden_size, settings.layer_norm_eps
        self.attention = VitAttention(settings)
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.layernorm_after = nn.LayerNorm(width, eps=eps)
        self.mlp = VitMlp(settings)

    @property
    @override
    def last(self) -> nn.Module:
        return self.mlp.fc2

    @override
    def inner(self, hidden: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.attention(self.layernorm_before(hidden)).add_(hidden)
        return hidden, self.mlp(self.layernorm_after(hidden))


class VitHead(nn.Module):
    """Final norm, and the classifier on the class token (arXiv 2010.11929, equation 4)."""

    def __init__(self, settings: VitSettings, num_labels: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)
        self.classifier = nn.Linear(settings.hidden_size, num_labels)

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Map (examples, tokens, width) to logits (examples, labels)."""
        logits: Tensor = self.classifier(self.layernorm(hidden[:, 0, :]))
        return logits
