#!/usr/bin/env python3
"""Measures the llama.cpp inside the PyPI wheel xllamacpp on one model, and prints one JSON line.

    peer_llama_cpp.py MODEL.gguf STREAMS PROMPT_TOKENS NEW_TOKENS THREADS
"""
import json
import random
import sys
import threading
import time
from importlib.metadata import version

import xllamacpp


def main(model, streams, prompt, new, threads):
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = streams
    params.n_ctx = streams * (prompt + new + 16)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cont_batching = True
    params.warmup = True
    server = xllamacpp.Server(params)
    rng = random.Random(1)
    answers = []

    def complete():
        answer = server.handle_completions({
            "prompt": [rng.randrange(300, 40000) for _ in range(prompt)], "n_predict": new, "temperature": 0,
            "ignore_eos": True, "cache_prompt": False, "stream": False})
        answers.append(answer if isinstance(answer, dict) else json.loads(answer))

    begin = time.perf_counter()
    calls = [threading.Thread(target=complete) for _ in range(streams)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    wall = time.perf_counter() - begin
    timings = [answer["timings"] for answer in answers]
    for timing in timings:
        assert timing["prompt_n"] == prompt and timing["predicted_n"] == new, timing
    result = {"peer": "xllamacpp " + version("xllamacpp"), "tokens_per_second": streams * (prompt + new) / wall}
    if streams == 1:  # with several, a stream's own times hold the others' work too
        result["prefill_tokens_per_second"] = timings[0]["prompt_per_second"]
        result["decode_tokens_per_second"] = timings[0]["predicted_per_second"]
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
