"""Room for tokens to come in a cache of keys and values, which transformers copies for each one."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

LEAST_ROOM = 64  # tokens for which there is room when a cache has grown, and
ROOM_SHARE = 4  # at least its length divided by this


class _Room:
    """Keys and values, (B, H, capacity, D), and the tensors that were last handed out: the
    beginning of both. A layer that has any others, since it was cut, reordered or filled by
    somebody else, gets new room: nothing that was ever handed out changes.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.given: tuple[Tensor, Tensor] = keys, values

    def has(self, layer: Any, length: int) -> bool:
        keys, values = self.given
        return layer.keys is keys and layer.values is values and self.keys.shape[2] >= length


_ROOMS: WeakKeyDictionary[Any, _Room] = WeakKeyDictionary()


def growing_layer(past_key_values: Any, index: int) -> Any | None:
    """The layer of this cache, if it is one that `extend` knows: transformers' DynamicLayer."""
    dynamic_cache, dynamic_layer = _kinds()
    if type(past_key_values) is not dynamic_cache or past_key_values.offloading:
        return None
    layers = past_key_values.layers
    layer = layers[index] if index < len(layers) else None
    return layer if type(layer) is dynamic_layer else None


def length_of(layer: Any) -> int:
    """Tokens in it."""
    return int(layer.keys.shape[2]) if layer.is_initialized and layer.keys.dim() == 4 else 0


def extend(layer: Any, tokens: int, like: Tensor) -> bool:
    """Make `layer.keys` and `layer.values`, (B, H, L, D), longer by so many tokens, which are still
    to be written: the last of L. like: (B, tokens, H, D). Returns whether it could.
    """
    past, (batch, _, heads, width) = length_of(layer), like.shape
    if past == 0:
        layer.lazy_initialization(like, like)  # its dtype and device
    elif layer.keys.dtype is not like.dtype or not (
        layer.keys.shape == layer.values.shape == (batch, heads, past, width)
    ):
        return False
    length = past + tokens
    room = _ROOMS.get(layer)
    if room is None or not room.has(layer, length):
        capacity = length + max(LEAST_ROOM, length // ROOM_SHARE)
        room = _Room(*(like.new_empty(batch, heads, capacity, width) for _ in range(2)))
        if past > 0:
            room.keys[:, :, :past], room.values[:, :, :past] = layer.keys, layer.values
        _ROOMS[layer] = room
    keys, values = room.keys.narrow(2, 0, length), room.values.narrow(2, 0, length)
    layer.keys, layer.values = room.given = keys, values
    return True


@cache
def _kinds() -> tuple[Any, Any]:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return DynamicCache, DynamicLayer
