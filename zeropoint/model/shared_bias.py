"""T5's attention with heads missing. Importing this file imports the models.

The first layer computes one bias for the heads of all layers, which hand it on. A layer that has
lost heads takes the columns of those it has, and hands on all of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention


class _SomeColumns:
    """kept_heads: original numbers of the heads there are; all_heads: how many there were."""

    kept_heads: list[int]
    all_heads: int

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of the heads there are. Returns (1, heads, queries, keys)."""
        return self._whole_bias(*args, **kwargs)[:, self.kept_heads]

    def _whole_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        bias: Tensor = super().compute_bias(*args, **kwargs)  # type: ignore[misc]
        return bias

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """As the float module's; the bias that it returns is of all heads."""
        me: Any = self
        seen = 0 if past_key_values is None else past_key_values.get_seq_length(me.layer_idx)
        seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache counts in place
        some = None if position_bias is None else position_bias[:, self.kept_heads]
        output, used, weights = super().forward(  # type: ignore[misc]
            hidden_states,
            mask=mask,
            key_value_states=key_value_states,
            position_bias=some,
            past_key_values=past_key_values,
            **kwargs,
        )
        if position_bias is None and me.has_relative_attention_bias:
            queries, keys = used.shape[2:]
            position_bias = self._whole_bias(
                queries, keys, device=used.device, past_seen_tokens=seen
            )
        elif position_bias is None:  # zeros
            position_bias = used[:, :1].expand(-1, self.all_heads, -1, -1)
        return output, position_bias, weights


class PrunedT5Attention(_SomeColumns, T5Attention):  # type: ignore[misc]
    """T5's."""


class PrunedMT5Attention(_SomeColumns, MT5Attention):  # type: ignore[misc]
    """mT5's."""


_KINDS = {T5Attention: PrunedT5Attention, MT5Attention: PrunedMT5Attention}


def with_some_columns(module: nn.Module, kept: list[int], all_heads: int) -> nn.Module:
    """A module with the same projections that takes the columns `kept` of the shared bias."""
    kind = _KINDS.get(type(module), type(module))
    new: Any = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    new.kept_heads, new.all_heads = kept, all_heads
    pruned: nn.Module = new
    return pruned
