"""Configuration and weights of a .gguf file, compared with what transformers itself reads."""

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import zeropoint as zp
from bench._gguf import write_gguf
from tests.models import llama
from zeropoint.errors import SourceError
from zeropoint.model import gguf as ours
from zeropoint.model.load import load_float
from zeropoint.model.source import Source

gguf = pytest.importorskip("gguf")

NUMBERS = {
    "context_length": 77,
    "embedding_length": 64,
    "block_count": 3,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}


def write(path, architecture, *, vocabulary_size=None, layer_norm="attention.layer_norm_epsilon"):
    """A file with a vocabulary of 40 and one tensor, as far as a configuration needs it."""
    letters = [chr(ord("a") + i) for i in range(20)]
    pairs = list(zip(letters, letters[1:] + letters[:1], strict=True))
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in NUMBERS.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 12345.0)
    if vocabulary_size is not None:
        writer.add_uint32(f"{architecture}.vocab_size", vocabulary_size)
    writer.add_bool("general.truth", True)
    writer.add_int32("general.negative", -3)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, *(a + b for a, b in pairs)])
    writer.add_token_types([1] * 40)
    writer.add_token_merges([f"{a} {b}" for a, b in pairs])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_tensor("token_embd.weight", torch.zeros(40, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("vocabulary_size", [None, 41], ids=["unsaid", "41"])
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "falcon", "gpt2", "starcoder2"]
)
def test_the_configuration_is_the_one_transformers_reads(tmp_path, architecture, vocabulary_size):
    write(tmp_path / "m.gguf", architecture, vocabulary_size=vocabulary_size)
    expected = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    found = ours.load_config(tmp_path / "m.gguf")
    assert type(found) is type(expected)
    assert found.to_dict() == expected.to_dict()
    if architecture == "llama":
        assert found.vocab_size == (vocabulary_size or 40) and found.eos_token_id == 2


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with a tokenizer_config.json"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "falcon", "gpt2"])
def test_the_tokenizer_is_the_one_transformers_reads(tmp_path, architecture, beside):
    write(tmp_path / "m.gguf", architecture)
    if beside:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    found = ours.load_tokenizer(tmp_path / "m.gguf")
    assert type(found) is type(expected)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert found.init_kwargs == expected.init_kwargs


@pytest.mark.parametrize("read", [ours.load_config, ours.load_tokenizer])
def test_the_vocabulary_is_not_read(tmp_path, monkeypatch, read):
    """A reader that makes an object of every token would take hundreds of MB for a real one."""
    write(tmp_path / "m.gguf", "llama")
    fields = []
    init = gguf.GGUFReader.__init__

    def noting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        fields.append(set(self.fields))

    monkeypatch.setattr(gguf.GGUFReader, "__init__", noting)
    read(tmp_path / "m.gguf")
    assert len(fields) == 1 and "llama.block_count" in fields[0]
    assert not {f for f in fields[0] if f.endswith((".tokens", ".merges", ".token_type"))}


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:100], "cannot be read as a .gguf file: "),
        (lambda data: data[:-40], r"ends after \d+ bytes, but its tensors take \d+; download it"),
        (lambda data: b"", "cannot be read as a .gguf file: .*empty"),
        (lambda data: b"PK" + data, "does not start with the GGUF magic bytes"),
    ],
    ids=["header cut", "data cut", "empty", "another kind"],
)
def test_a_broken_file_is_refused_by_name(tmp_path, change, says, weights):
    path = tmp_path / "m.gguf"
    write(path, "llama")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SourceError, match=f"m.gguf.* {says}"):
        zp.load(path, weights=weights)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int8"},
        {"weights": "int4", "group_size": 32},
        {"weights": "nf4", "double_quant": True},
        {"weights": "float8_e4m3fn"},
        {"weights": "bfloat16"},
        {"weights": "int4", "exclude": ["*embed_tokens", "lm_head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tables_quantized_by_parts_are_those_quantized_whole(
    tmp_path, monkeypatch, options, tied, dtype
):
    torch.manual_seed(0)
    write_gguf(llama(tied=tied), tmp_path / "m.gguf")
    monkeypatch.setattr(ours, "ROWS_AT_ONCE", 7)
    source = Source(kind="gguf", location=str(tmp_path / "m.gguf"))
    config = zp.ZeropointConfig(**options, strict=False)
    found = load_float(source, dtype, None, None, quantization_config=config)
    expected = load_float(source, dtype, None, None)
    zp.quantize(expected, **options, strict=False)
    zp.freeze(expected)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    assert zp.footprint(found).total_bytes == zp.footprint(expected).total_bytes
