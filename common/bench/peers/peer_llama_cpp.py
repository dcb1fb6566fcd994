"""llama.cpp through the package `llama-cpp-python`, on a quantised GGUF file.

`pip install llama-cpp-python` compiles llama.cpp for this machine, which takes some minutes. The
binding's own `Llama` decodes one sequence at a time. So this speaks llama.cpp's C interface through
it: every sequence has an id, and a step is one `llama_batch` with a token of each.
"""

import ctypes
from collections.abc import Callable
from typing import Any

from peer_protocol import Generate, main

MAX_BATCH = 2048  # tokens in one call: llama.cpp's default
FILE_TYPES = {  # llama.cpp's numbers
    0: "float32",
    1: "float16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    15: "Q4_K_M",
    32: "bfloat16",
}


def start(job: dict[str, Any]) -> tuple[Generate, str]:
    import llama_cpp as llama
    import numpy

    if not job["gguf"]:
        raise ValueError("llama.cpp needs a GGUF file: give --gguf FILE")
    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    model_params.n_gpu_layers = 0 if job["device"] == "cpu" else 999
    model = llama.llama_model_load_from_file(job["gguf"].encode(), model_params)
    if not model:
        raise ValueError(f"llama.cpp cannot load {job['gguf']}")
    context = contexts(llama, model, job)
    vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(MAX_BATCH, 0, 1)

    def forward(place: Any, entries: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Run (token, position, sequence, wants logits); returns the next token by sequence."""
        chosen = {}
        for first in range(0, len(entries), MAX_BATCH):
            part = entries[first : first + MAX_BATCH]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if status := llama.llama_decode(place, batch):
                raise RuntimeError(f"llama_decode gave {status}")
            for i, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    logits = llama.llama_get_logits_ith(place, i)
                    row = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * vocab_size))
                    chosen[sequence] = int(numpy.frombuffer(row.contents, numpy.float32).argmax())
        return chosen

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        place = context(len(prompts))
        llama.llama_memory_clear(llama.llama_get_memory(place), False)
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        chosen = forward(place, entries)
        outputs = [[chosen[sequence]] for sequence in range(len(prompts))]
        while True:
            entries = [
                (output[-1], len(prompt) + len(output) - 1, sequence, True)
                for sequence, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
                if len(output) < max_tokens[sequence]
            ]
            if not entries:
                return outputs
            for sequence, token in forward(place, entries).items():
                outputs[sequence].append(token)

    return generate, file_type(llama, model)


def contexts(llama: Any, model: Any, job: dict[str, Any]) -> Callable[[int], Any]:
    """Gives a context for so many sequences, the last one again where it fits: llama.cpp is slower
    with room for more than there are."""
    kept: dict[int, Any] = {}

    def context(num_sequences: int) -> Any:
        if num_sequences not in kept:
            while kept:
                llama.llama_free(kept.popitem()[1])
            params = llama.llama_context_default_params()
            params.n_ctx = num_sequences * job["max_model_len"]
            params.n_seq_max = num_sequences
            params.n_batch = MAX_BATCH
            params.n_threads = params.n_threads_batch = job["threads"]
            kept[num_sequences] = llama.llama_init_from_model(model, params)
        if not kept[num_sequences]:
            raise RuntimeError(f"llama.cpp makes no context for {num_sequences} sequences")
        return kept[num_sequences]

    return context


def file_type(llama: Any, model: Any) -> str:
    """The number format of most weights, as the file tells it."""
    buffer = ctypes.create_string_buffer(32)
    length = llama.llama_model_meta_val_str(model, b"general.file_type", buffer, len(buffer))
    number = buffer.value.decode() if length > 0 else ""
    known = FILE_TYPES.get(int(number)) if number.isdigit() else None
    return known or f"GGUF file type {number or 'unknown'}"


if __name__ == "__main__":
    main("llama_cpp_python", start)
