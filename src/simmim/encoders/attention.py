"""SwinV2's attention through torch's fused kernel, which timm gives Swin's alone.

Its scores are cosines (Liu et al., CVPR 2022, arXiv:2111.09883, section 3.3): queries and keys of
length 1 make them ordinary ones, and the position bias is the kernel's mask.
"""

from math import log
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor
from torch.nn import functional as F


class FusedWindowAttention(WindowAttention):
    """timm's attention of SwinV2 with the flag that its other attention has.

    Attributes:
        fused_attn: Whether to use torch's kernel, or timm's own way.
    """

    fused_attn = False

    def forward(
        self, x: Float[Tensor, "b n d"], mask: Float[Tensor, "w n n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Attend within windows; those of an image lie beside each other, and share the masks."""
        if not self.fused_attn:
            return cast(Tensor, super().forward(x, mask))
        query, key, value = (part.transpose(1, 2) for part in unit_query_key_value(self, x))
        bias = position_bias(self)[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        dropout = self.attn_drop.p if self.training else 0.0
        bias = bias.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=1.0)
        return cast(Tensor, self.proj_drop(self.proj(out.transpose(1, 2).flatten(2))))


def unit_query_key_value(
    attn: Any, tokens: Float[Tensor, "*b d"]
) -> tuple[
    Float[Tensor, "*b heads e"],
    Float[Tensor, "*b heads e"],
    Float[Tensor, "*b heads e"],
]:
    """Queries and keys of length 1, the queries times the temperature; and values."""
    bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    together = F.linear(tokens, attn.qkv.weight, bias).unflatten(-1, (3, attn.num_heads, -1))
    query, key, value = together.unbind(-3)
    temperature = attn.logit_scale.clamp(max=log(100.0)).exp()[:, 0]
    query = F.normalize(query, dim=-1) * temperature
    return query.to(value.dtype), F.normalize(key, dim=-1).to(value.dtype), value


def position_bias(attn: Any) -> Float[Tensor, "heads n n"]:
    """What each place of a window adds to the score of each other one: 0 to 16."""
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    return (16 * table.sigmoid())[attn.relative_position_index].permute(2, 0, 1)
