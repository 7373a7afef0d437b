"""Tiny models with random weights, and the tensors to run them on. Every K is a multiple of 32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 99
WIDTH = 64
LAYERS = 2
HEADS = 4
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def llama(*, tied: bool = False, layers: int = LAYERS) -> Any:
    """Grouped-query attention: 4 heads read 2 heads of keys and values."""
    sizes = _DECODER | {"num_hidden_layers": layers}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **sizes, **_SPECIAL, num_key_value_heads=2, tie_word_embeddings=tied
        )
    )


def qwen2() -> Any:
    """Biases in the attention only; tied."""
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **_DECODER, **_SPECIAL, num_key_value_heads=2, tie_word_embeddings=True
        )
    )


def mistral() -> Any:
    """Sliding window."""
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**_DECODER, **_SPECIAL, num_key_value_heads=2, sliding_window=4)
    )


def gpt2() -> Any:
    """Conv1D layers, learned positions, tied head."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=64,
            **_SPECIAL,
        )
    )


def gpt_neox() -> Any:
    """Parallel residual, biases everywhere, untied head."""
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            **_DECODER, **_SPECIAL, rotary_pct=0.25, tie_word_embeddings=False
        )
    )


def opt() -> Any:
    """Learned positions whose module is a subclass of Embedding."""
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=64,
            **_SPECIAL,
        )
    )


def bert() -> Any:
    """An encoder without a head."""
    return transformers.BertModel(transformers.BertConfig(**_DECODER, pad_token_id=0))


def bert_masked() -> Any:
    """An encoder whose head is tied, bias included."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**_DECODER, pad_token_id=0))


def t5(*, tied: bool = False) -> Any:
    """Encoder and decoder share an embedding; the head has a Parameter of its own unless tied."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() * 0.9)
    return model


def vit() -> Any:
    """A convolution, positions that are a bare parameter, and a classifier."""
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=16,
            patch_size=4,
        )
    )


def whisper() -> Any:
    """Audio encoder with 1-D convolutions, text decoder with a tied head."""
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=2 * WIDTH,
            decoder_ffn_dim=2 * WIDTH,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            decoder_start_token_id=1,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "qwen2": qwen2,
    "mistral": mistral,
    "gpt2": gpt2,
    "gpt-neox": gpt_neox,
    "opt": opt,
    "bert": bert,
    "bert-masked": bert_masked,
    "t5": t5,
    "t5-tied": lambda: t5(tied=True),
    "vit": vit,
    "whisper": whisper,
}


def build(name: str, seed: int = 0) -> Any:
    """The architecture with weights drawn from `seed`, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[name]()
        for (
            parameter
        ) in model.parameters():  # zeros and ones would hide mistakes in biases and norms
            if parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def example_inputs(model: Any) -> dict[str, torch.Tensor]:
    """What the model's forward takes, two examples."""
    generator = torch.Generator().manual_seed(7)
    config = model.config
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=generator)
    if config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if config.model_type == "whisper":
        features = torch.randn(2, config.num_mel_bins, 32, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids[:, :5]}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {})


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    """Logits, or hidden states, on the example inputs."""
    result = model(**example_inputs(model))
    return result["logits"] if "logits" in result else result["last_hidden_state"]


def continuation(model: Any, new_tokens: int = 4) -> torch.Tensor:
    """Greedy tokens after the example inputs."""
    inputs = example_inputs(model)
    inputs.pop("decoder_input_ids", None)
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)


def tokenizer() -> Any:
    """One token for each word: <pad> (also for unknown words), <bos>, w2, w3 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<bos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<pad>", pad_token="<pad>", bos_token="<bos>"
    )


class Perceptron(nn.Module):
    """Not a transformers model: an embedding, two layers, a tied head, a norm with buffers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.up = nn.Linear(width, 2 * width)
        self.norm = nn.BatchNorm1d(2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """indices: (B,) int; returns (B, 11)."""
        hidden = self.down(self.norm(self.up(self.embed(indices))).relu())
        return self.head(hidden)


def perceptron(seed: int = 0, width: int = 64) -> Perceptron:
    """A `Perceptron` with weights and buffers drawn from `seed`, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Perceptron(width)
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


PERCEPTRON_INPUT = torch.tensor([0, 3, 10, 3])
