"""llama.cpp in a process of its own, for bench/models.py: any Python with llama-cpp-python and
numpy, no torch. One JSON request a line on stdin, one JSON answer a line on stdout.

    {"do": "about"}                                          -> {"version", "system"}
    {"do": "quantize", "source", "to", "format": "Q4_0"}     -> {}
    {"do": "load", "path", "context"}                        -> {"model": 0, "description", "bytes"}
    {"do": "turn", "model", "threads", "prompt", "new", "cpu_clock"}
                                                             -> {"prefill", "decode"} in seconds
    {"do": "logits", "model", "threads", "prompt"}           -> {"logits": [...]} of the last token
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import llama_cpp as c
import numpy as np

Request = dict[str, Any]
loaded: list[tuple[Any, Any]] = []  # (model, context)


def about(request: Request) -> Request:
    return {"version": c.__version__, "system": c.llama_print_system_info().decode().strip()}


def quantize(request: Request) -> Request:
    params = c.llama_model_quantize_default_params()
    params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{request['format']}")
    params.allow_requantize = True
    params.nthread = os.cpu_count()
    failed = c.llama_model_quantize(request["source"].encode(), request["to"].encode(), params)
    if failed:
        raise RuntimeError(f"llama_model_quantize: {failed}")
    return {}


def load(request: Request) -> Request:
    model = c.llama_model_load_from_file(request["path"].encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx = request["context"]
    params.n_batch = params.n_ubatch = 512
    context = c.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"{request['path']} does not load")
    text = ctypes.create_string_buffer(256)
    c.llama_model_desc(model, text, 256)
    loaded.append((model, context))
    return {
        "model": len(loaded) - 1,
        "description": text.value.decode(),
        "bytes": c.llama_model_size(model),
    }


def _feed(context: Any, tokens: list[int]) -> None:
    """Evaluate tokens after what the cache holds."""
    for begin in range(0, len(tokens), 512):
        part = tokens[begin : begin + 512]
        array = (c.llama_token * len(part))(*part)  # the batch only points to it
        if c.llama_decode(context, c.llama_batch_get_one(array, len(part))):
            raise RuntimeError("llama_decode failed")


def _logits(model: Any, context: Any) -> np.ndarray:
    """Of the last token: (vocabulary,), valid until the next call."""
    count = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), shape=(count,))


def _clock(request: Request) -> Callable[[], float]:
    return time.process_time if request["cpu_clock"] else time.perf_counter


def _prefill(request: Request) -> tuple[Any, Any, float]:
    clock = _clock(request)
    model, context = loaded[request["model"]]
    c.llama_set_n_threads(context, request["threads"], request["threads"])
    c.llama_memory_clear(c.llama_get_memory(context), True)
    start = clock()
    _feed(context, request["prompt"])
    _logits(model, context)  # waits for the answer
    return model, context, clock() - start


def turn(request: Request) -> Request:
    """Prefill, then greedy tokens one at a time."""
    model, context, prefill = _prefill(request)
    clock = _clock(request)
    start = clock()
    for _ in range(request["new"]):
        _feed(context, [int(_logits(model, context).argmax())])
    return {"prefill": prefill, "decode": clock() - start}


def logits(request: Request) -> Request:
    model, context, _ = _prefill(request)
    return {"logits": _logits(model, context).tolist()}


DO = {f.__name__: f for f in (about, quantize, load, turn, logits)}


ERROR = 4  # GGML_LOG_LEVEL_ERROR


def _log(level: int, text: bytes, data: Any) -> None:
    """Of llama.cpp's log, only errors."""
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    log = c.llama_log_callback(_log)
    c.llama_log_set(log, ctypes.c_void_p(0))
    c.llama_backend_init()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(DO[request["do"]](request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
