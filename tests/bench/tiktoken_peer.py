#!/usr/bin/env python3
"""Encodes a text with the PyPI package tiktoken, once for each line on stdin; answers with CPU seconds, tokens and a checksum.

    tiktoken_peer.py TOKENIZER_MODEL TEXT
"""
import base64
import sys
import time

import tiktoken

# The split of Llama 3 (meta-llama/llama-models, tokenizer.py).
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")


def main(model, path):
    with open(model, "rb") as lines:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line.strip())}
    encoding = tiktoken.Encoding(name="llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    print("tiktoken", tiktoken.__version__, flush=True)
    for _ in sys.stdin:
        begin = time.thread_time()
        ids = encoding.encode_ordinary(text)
        seconds = time.thread_time() - begin
        checksum = 0
        for token in ids:
            checksum = (checksum * 31 + token) % 2**32
        print(seconds, len(ids), checksum, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
