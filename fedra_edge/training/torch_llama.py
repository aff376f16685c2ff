"""The pieces of a Llama-like decoder, with the parameter names of LlamaForSequenceClassification.

A batch is int64 (examples, tokens), padded at the end with negative numbers. Attention is causal
and padding comes last, so no real token ever sees a padded one and no layer needs a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fedra_edge.protocol.llama import LlamaSettings
from fedra_edge.training.torch_activations import ACTIVATIONS
from fedra_edge.training.torch_pieces import Context, ResidualBlock


class LlamaStem(nn.Module):
    """The token embedding."""

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(settings.vocab_size, settings.hidden_size))

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Map (examples, tokens) to (examples, tokens, width)."""
        return F.embedding(tokens.clamp(min=0), self.weight)


class RmsNorm(nn.Module):
    """Divides by the root mean square of the features (arXiv 1910.07467, equation 4)."""

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(settings.hidden_size))
        self.eps = settings.rms_norm_eps

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions; query heads share key and value heads."""

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        width, bias, self.head_dim = (
            settings.hidden_size,
            settings.attention_bias,
            settings.head_dim,
        )
        query_width = settings.num_attention_heads * self.head_dim
        key_width = settings.num_key_value_heads * self.head_dim
        self.theta = settings.rope_parameters.rope_theta
        self.is_grouped = key_width != query_width
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_width, bias=bias)
        self.v_proj = nn.Linear(width, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=bias)

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Map (examples, tokens, width) to the same shape."""
        query, key, value = (
            project(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        turn = _turns(hidden.shape[1], self.head_dim, self.theta, hidden.device)
        mixed = F.scaled_dot_product_attention(
            _rotated(query, *turn), _rotated(key, *turn), value,
            is_causal=True, enable_gqa=self.is_grouped,
        )  # fmt: skip
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class LlamaMlp(nn.Module):
    """The gated feed-forward part (SwiGLU: arXiv 2002.05202, equation 6); down_proj is its end."""

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        width, inner, bias = settings.hidden_size, settings.intermediate_size, settings.mlp_bias
        self.activation = ACTIVATIONS[settings.hidden_act]
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Map (examples, tokens, width) to what enters ``down_proj``."""
        out: Tensor = self.activation(self.gate_proj(hidden)) * self.up_proj(hidden)
        return out


class LlamaBlock(ResidualBlock):
    """One pre-norm decoder layer (arXiv 2302.13971, section 2.2)."""

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(settings)
        self.mlp = LlamaMlp(settings)
        self.input_layernorm = RmsNorm(settings)
        self.post_attention_layernorm = RmsNorm(settings)

    @property
    @override
    def last(self) -> nn.Module:
        return self.mlp.down_proj

    @override
    def inner(self, hidden: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        residual: Tensor = self.self_attn(self.input_layernorm(hidden)).add_(hidden)
        return residual, self.mlp(self.post_attention_layernorm(residual))


class LlamaHead(nn.Module):
    """Final norm, and the classifier on the last real token."""

    def __init__(self, settings: LlamaSettings, num_labels: int) -> None:
        super().__init__()
        self.norm = RmsNorm(settings)
        self.score = nn.Linear(settings.hidden_size, num_labels, bias=False)

    @override
    def forward(self, hidden: Tensor, is_real: Tensor) -> Tensor:
        """Map (examples, tokens, width) to logits (examples, labels)."""
        last = is_real.sum(dim=1) - 1
        examples = torch.arange(len(hidden), device=hidden.device)
        logits: Tensor = self.score(self.norm(hidden[examples, last]))
        return logits


def real_tokens(tokens: Tensor) -> Context:
    """Tell padding from tokens: true where there is one."""
    return (tokens >= 0,)


def _turns(
    num_tokens: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Give cosine and sine of each position's angles (arXiv 2104.09864, equation 34)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def _rotated(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs made of each half's features, as transformers' checkpoints have them."""
    first, second = states.chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, dim=-1)
