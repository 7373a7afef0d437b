"""A transformers Llama as a GGUF file, so that llama.cpp can be timed on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
LAYER = "model.layers."


def write_gguf(model: Any, path: Path) -> None:
    """Weights in their own dtype, without a tokenizer: it is fed with token ids."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if f".{part}." in name:
                weight = _interleave(weight, count)
        _add(writer, _name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    if not name.startswith(LAYER):
        return NAMES[name]
    index, _, rest = name.removeprefix(LAYER).partition(".")
    return f"blk.{index}.{NAMES[rest]}"


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring rows of a head, transformers rows half a head apart."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add(writer: gguf.GGUFWriter, name: str, weight: Tensor) -> None:
    if weight.dim() == 1 or weight.dtype == torch.float32:
        writer.add_tensor(name, weight.float().numpy())
        return
    assert weight.dtype == torch.bfloat16, weight.dtype
    stored = weight.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
