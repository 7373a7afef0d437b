"""Padding is found however a model is called."""

import pytest
import torch
from torch import nn

from tests.models import build
from zeropoint.model.padding import following_masks, masks_of


def ids(*shape):
    return torch.ones(shape, dtype=torch.int64)


# --- the masks of one call ------------------------------------------------------------------------


def test_a_mask_of_the_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    (found,) = masks_of({"input_ids": ids(2, 3), "attention_mask": mask})
    assert found.dtype == torch.bool and found.tolist() == mask.bool().tolist()
    (found,) = masks_of({"inputs_embeds": torch.ones(2, 3, 8), "attention_mask": mask})
    assert found.tolist() == mask.bool().tolist()
    (found,) = masks_of({"attention_mask": mask})
    assert found.tolist() == mask.bool().tolist()


def test_of_a_mask_that_reaches_into_the_cache_the_last_columns_apply():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    (found,) = masks_of({"input_ids": ids(2, 2), "attention_mask": mask})
    assert found.tolist() == [[True, True], [True, False]]


def test_an_encoder_decoder_has_two_and_tokens_without_a_mask_are_all_kept():
    mask = torch.tensor([[1, 0]])
    call = {"input_ids": ids(1, 2), "attention_mask": mask, "decoder_input_ids": ids(1, 2)}
    encoder, decoder = masks_of(call)
    assert (encoder.tolist(), decoder.tolist()) == ([[True, False]], [[True, True]])
    call["decoder_attention_mask"] = torch.tensor([[0, 1]])
    assert masks_of(call)[1].tolist() == [[False, True]]


def test_masks_that_say_who_sees_whom_and_calls_without_tokens_give_none():
    assert masks_of({"input_ids": ids(1, 2), "attention_mask": torch.ones(1, 1, 2, 2)}) == []
    assert masks_of({}) == [] and masks_of({"attention_mask": None}) == []
    assert masks_of({"input_ids": ids(4)}) == [], "packed"


# --- in a model -----------------------------------------------------------------------------------


def rows(model, run, layer):
    """Numbers of rows that are no padding, by call of a layer."""
    seen = []
    module = model.get_submodule(layer)
    with following_masks(model) as kept:
        handle = module.register_forward_pre_hook(lambda m, a: seen.append(len(kept(a[0]))))
        try:
            with torch.no_grad():
                run(model)
        finally:
            handle.remove()
    return seen


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
TOKENS = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
QUERY = {
    "bert": "encoder.layer.0.attention.self.query",
    "llama": "model.layers.0.self_attn.q_proj",
}


@pytest.mark.parametrize("name", QUERY)
def test_masks_are_found_by_keyword_and_by_position(name):
    model, layer = build(name), QUERY[name]
    assert rows(model, lambda m: m(input_ids=TOKENS, attention_mask=MASK), layer) == [8]
    assert rows(model, lambda m: m(TOKENS, MASK), layer) == [8]
    assert rows(model, lambda m: m(TOKENS), layer) == [10]
    assert rows(model, lambda m: (m(TOKENS, MASK), m(TOKENS)), layer) == [8, 10], "call by call"


def test_a_wrapped_model_and_a_part_of_one_are_followed():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return self.inner(**batch)

    model = build("llama")
    batch = {"input_ids": TOKENS, "attention_mask": MASK}
    assert rows(Wrapper(model), lambda m: m(batch), f"inner.{QUERY['llama']}") == [8]
    assert rows(model, lambda m: m.model(**batch), QUERY["llama"]) == [8]


def test_tokens_that_are_generated_count_and_padding_on_the_left_does_not():
    model = build("llama")
    tokens, mask = TOKENS.flip(1), MASK.flip(1)

    def run(m):
        m.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=3, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    assert rows(model, run, QUERY["llama"]) == [8, 2, 2]


def test_both_sides_of_an_encoder_decoder_even_of_one_length():
    model = build("t5")
    tokens = TOKENS[:, :4]
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])

    def run(m):
        m(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens)

    assert rows(model, run, "encoder.block.0.layer.0.SelfAttention.q") == [6]
    assert rows(model, run, "decoder.block.0.layer.0.SelfAttention.q") == [8]

    def write(m):
        m.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=3, min_new_tokens=3)

    assert rows(model, write, "encoder.block.0.layer.0.SelfAttention.q") == [6]
    assert rows(model, write, "decoder.block.0.layer.1.EncDecAttention.k")[0] == 6


def test_a_failing_call_leaves_no_mask_behind_and_no_hook():
    model = build("llama")

    def run(m):
        with pytest.raises(AttributeError, match="get_seq_length"):
            m(input_ids=TOKENS, attention_mask=MASK, past_key_values=3)
        m(input_ids=TOKENS)

    assert rows(model, run, QUERY["llama"])[-1] == 10
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_that_is_not_written_in_python_is_passed_over():
    class Odd(nn.Linear):
        @property
        def forward(self):
            return dict  # whose signature nobody knows

    with following_masks(nn.Sequential(Odd(2, 2))) as kept:
        assert kept(torch.ones(3, 2)).shape == (3, 2)
