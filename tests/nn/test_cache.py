"""A cache of keys and values grows without being copied, and nothing it ever handed out changes."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from zeropoint.nn import cache

B, H, D = 2, 3, 4


def new_tokens(tokens, seed):
    """Keys and values, (B, T, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, B, tokens, H, D, generator=generator)


class Both:
    """A layer that grows in its room beside one that transformers grows."""

    def __init__(self):
        self.found, self.expected = DynamicLayer(), DynamicLayer()
        self.given = []

    def grow(self, tokens):
        keys, values = new_tokens(tokens, seed=len(self.given))
        assert cache.extend(self.found, tokens, keys)
        self.found.keys[:, :, -tokens:] = keys.transpose(1, 2)
        self.found.values[:, :, -tokens:] = values.transpose(1, 2)
        self.expected.update(keys.transpose(1, 2), values.transpose(1, 2))
        self.check()
        self.given.append((self.found.keys, self.found.keys.clone()))

    def check(self):
        for name in ("keys", "values"):
            found, expected = getattr(self.found, name), getattr(self.expected, name)
            assert found is expected is None or torch.equal(found, expected)
        assert self.found.get_seq_length() == cache.length_of(self.found)
        assert all(torch.equal(tensor, then) for tensor, then in self.given)

    def each(self, do):
        do(self.found)
        do(self.expected)
        self.check()


def test_it_grows_as_transformers_grows_it():
    both = Both()
    assert cache.length_of(both.found) == 0
    for tokens in (5, 1, 1, 100, 1, 1):
        both.grow(tokens)


def test_most_tokens_are_added_without_a_copy():
    both = Both()
    both.grow(1)
    places = set()
    for _ in range(500):
        both.grow(1)
        places.add(both.found.keys.data_ptr())
    assert len(places) < 8


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(1),
        lambda layer: layer.reset(),
        lambda layer: layer.update(*new_tokens(2, seed=99).transpose(2, 3)),
        lambda layer: setattr(layer, "values", layer.values.clone()),
    ],
    ids=["cut", "reordered", "repeated", "emptied", "filled", "replaced"],
)
def test_it_goes_on_from_what_others_did_to_it(change):
    both = Both()
    for tokens in (6, 1):
        both.grow(tokens)
    both.each(change)
    for tokens in (1, 1, 3):
        both.grow(tokens)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_two_that_were_one_go_apart(copied):
    both = Both()
    for tokens in (6, 1):
        both.grow(tokens)
    other = Both()
    other.found, other.expected = copied(both.found), copied(both.expected)
    other.given = list(both.given)
    for one in (both, other, other, both):
        one.grow(1)
        both.check()
        other.check()


def test_other_shapes_are_left_to_the_layer():
    layer = DynamicLayer()
    layer.update(*new_tokens(3, seed=0).transpose(2, 3))
    before = layer.keys
    for other in (torch.zeros(B + 1, 1, H, D), torch.zeros(B, 1, H, D).double()):
        assert not cache.extend(layer, 1, other) and layer.keys is before


def test_only_a_cache_that_grows_has_layers_that_do():
    config = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    growing = DynamicCache(config=config)
    assert cache.growing_layer(growing, 1) is growing.layers[1]
    assert cache.growing_layer(growing, 2) is None
    assert cache.growing_layer(DynamicCache(), 0) is None  # its layers come with their first tokens
    growing.offloading = True
    assert cache.growing_layer(growing, 1) is None
    assert cache.growing_layer(StaticCache(config=config, max_cache_len=8), 1) is None
    config.sliding_window, config.layer_types = 4, ["sliding_attention"] * 2
    assert cache.growing_layer(DynamicCache(config=config), 1) is None
