"""What the names of other libraries are called here, for the errors that `zp.NAME` raises."""

from __future__ import annotations

_IN_PLACE = "zp.quantize(model, weights='int4'), then zp.freeze(model)"
_WHILE_LOADING = "zp.load(source, weights='int4')"
_CHECKPOINT = (
    "model, tokenizer = zp.load(source, weights='int4'); zp.save(model, folder, "
    "tokenizer=tokenizer); zp.load(folder)"
)
_CALIBRATED = "zp.quantize(model, weights='int4'), then zp.freeze(model, 'gptq', data=texts)"

SPELLINGS = {
    # optimum-quanto
    "quantization_map": "report = zp.quantize(model, weights='int8'), then "
    "{m.name: m.scheme for m in report.modules}; zp.save keeps it with the weights",
    "requantize": "zp.load(folder), after zp.save(model, folder)",
    "QuantizedModelForCausalLM": _CHECKPOINT,
    "QuantizedTransformersModel": _CHECKPOINT,
    "qint2": "weights='int2'",
    "qint4": "weights='int4'",
    "qint8": "weights='int8'",
    "qfloat8": "weights='float8_e4m3fn'",
    "qfloat8_e4m3fn": "weights='float8_e4m3fn'",
    "qfloat8_e5m2": "weights='float8_e5m2'",
    # torchao
    "quantize_": _IN_PLACE,
    "Int8WeightOnlyConfig": "weights='int8'",
    "Int4WeightOnlyConfig": "weights='int4', group_size=128",
    "Int8DynamicActivationInt8WeightConfig": "weights='int8', activations='int8'",
    "Float8WeightOnlyConfig": "weights='float8_e4m3fn'",
    "FqnToConfig": "recipe=zp.Recipe(rules=(...)), one zp.Rule for each pattern",
    # HQQ
    "AutoHQQHFModel": _CHECKPOINT,
    "HQQModelForCausalLM": _CHECKPOINT,
    "HQQLinear": _IN_PLACE,
    "BaseQuantizeConfig": "zp.Scheme.of('int4', group_size=64)",
    # bitsandbytes, and transformers' configurations
    "Linear8bitLt": "zp.quantize(model, weights='int8'), then zp.freeze(model)",
    "Linear4bit": "zp.quantize(model, weights='nf4'), then zp.freeze(model)",
    "LinearNF4": "zp.quantize(model, weights='nf4'), then zp.freeze(model)",
    "BitsAndBytesConfig": "zp.load(source, weights='nf4')",
    "QuantoConfig": _WHILE_LOADING,
    "HqqConfig": _WHILE_LOADING,
    "TorchAoConfig": _WHILE_LOADING,
    # calibrated formats
    "GPTQModel": _CALIBRATED,
    "AutoGPTQForCausalLM": _CALIBRATED,
    "oneshot": _CALIBRATED,
    # transformers
    "from_pretrained": "zp.load(source)",
    "save_pretrained": "zp.save(model, folder, tokenizer=tokenizer)",
}
