#!/usr/bin/env python3
"""Writes the seeds that are no plain text: corpus/NAME/ of safetensors, gguf, tokenizer_*, incremental_decoder,
stop_matcher and generate_request (which needs protoc). Files beside them, such as those of past crashes, stay.
"""
import base64
import json
import pathlib
import struct
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def write(corpus, name, data):
    folder = HERE / "corpus" / corpus
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


# --- safetensors -----------------------------------------------------------------------------------------------------


def safetensors(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def make_safetensors():
    def tensor(dtype, shape, begin, end):
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    write("safetensors", "two", safetensors({"__metadata__": {"format": "pt"}, "a": tensor("BF16", [2, 3], 0, 12),
                                             "b": tensor("F32", [], 12, 16)}, bytes(16)))
    write("safetensors", "out_of_order", safetensors({"b": tensor("U8", [1], 4, 5), "a": tensor("F32", [1], 0, 4),
                                                      "none": tensor("I64", [0, 7], 5, 5)}, bytes(5)))
    write("safetensors", "empty", safetensors(b"{}      ", b""))
    write("safetensors", "huge_header", struct.pack("<Q", 99_999_999) + b"{}")
    write("safetensors", "huge_shape", safetensors({"a": tensor("F64", [1 << 62, 1 << 62], 0, 8)}, bytes(8)))
    write("safetensors", "escaped", safetensors(b'{"\\u00e9\\n":{"shape":[4],"dtype":"F8_E4M3","data_offsets":[0,4]}}',
                                                bytes(4)))
    write("safetensors", "twice", safetensors(b'{"a":{"dtype":"U8","dtype":"U8"}}', b""))


# --- GGUF ------------------------------------------------------------------------------------------------------------

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def gguf_string(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_value(kind, value):
    if kind == STRING:
        return gguf_string(value)
    if kind == ARRAY:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(gguf_value(element, v) for v in values)
    return struct.pack({U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}[kind], value)


def gguf(metadata, tensors, version=3, alignment=32):
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        out += gguf_string(key) + struct.pack("<I", kind) + gguf_value(kind, value)
    offset, datas = 0, []
    for name, shape, kind, data in tensors:
        out += gguf_string(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape[::-1])
        out += struct.pack("<IQ", kind, offset)
        datas.append(data + bytes(-len(data) % alignment))
        offset += len(datas[-1])
    return out + bytes(-len(out) % alignment) + b"".join(datas)


def floats(n):
    return struct.pack(f"<{n}f", *(0.25 * (i % 7 - 3) for i in range(n)))


def small_model(width, matrix_kind, matrix_bytes, vocab=4):
    """One layer, hidden = ffn = `width`, two heads; matrices of so many bytes a row."""
    metadata = {
        "general.architecture": (STRING, "llama"),
        "general.name": (STRING, "seed"),
        "llama.block_count": (U32, 1),
        "llama.context_length": (U32, 64),
        "llama.embedding_length": (U32, width),
        "llama.feed_forward_length": (U32, width),
        "llama.attention.head_count": (U32, 2),
        "llama.attention.head_count_kv": (U32, 1),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "llama.rope.freq_base": (F32, 500000.0),
    }

    def matrix(name, rows):
        return (name, [rows, width], matrix_kind, (b"\x00\x3c" + bytes(range(1, 251)))[:matrix_bytes].ljust(
            matrix_bytes, b"\x11") * rows)

    tensors = [matrix("token_embd.weight", vocab)]
    for name in ("attn_norm", "ffn_norm"):
        tensors.append((f"blk.0.{name}.weight", [width], 0, floats(width)))
    for name, rows in (("attn_q", width), ("attn_k", width // 2), ("attn_v", width // 2), ("attn_output", width),
                       ("ffn_gate", width), ("ffn_up", width), ("ffn_down", width)):
        tensors.append(matrix(f"blk.0.{name}.weight", rows))
    tensors.append(("output_norm.weight", [width], 0, floats(width)))
    return metadata, tensors


def make_gguf():
    metadata, tensors = small_model(4, 1, 8)  # F16
    write("gguf", "f16", gguf(metadata, tensors))
    write("gguf", "version_2", gguf(metadata, tensors, version=2))
    write("gguf", "missing_tensor", gguf(metadata, tensors[:-1]))
    write("gguf", "truncated", gguf(metadata, tensors)[:-33])
    write("gguf", "no_tensors", gguf(metadata, []))
    f32, f32_tensors = small_model(4, 0, 16)
    factors = ("rope_freqs.weight", [1], 0, struct.pack("<f", 8.0))
    write("gguf", "rope_factors", gguf(f32, f32_tensors + [factors]))
    head = ("output.weight", [4, 4], 0, floats(16))
    f32 |= {
        "general.alignment": (U32, 8),
        "llama.rope.scaling.type": (STRING, "linear"),
        "llama.rope.scaling.factor": (F32, 2.0),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "llama-bpe"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, ["a", "b", "ab", "<|eot_id|>"])),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [1, 1, 1, 3])),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b"])),
        "tokenizer.ggml.bos_token_id": (U32, 0),
        "tokenizer.ggml.eos_token_id": (U32, 3),
        "tokenizer.ggml.add_bos_token": (BOOL, True),
        "tokenizer.chat_template": (STRING, "{{ x }}"),
        "general.sampling.temp": (F32, 0.5),
        "general.sampling.top_k": (I32, 40),
        "odd": (ARRAY, (ARRAY, [(F32, [1.0]), (STRING, ["x", ""]), (BOOL, [])])),
    }
    write("gguf", "tokenizer", gguf(f32, f32_tensors + [head], alignment=8))
    write("gguf", "q8_0", gguf(*small_model(32, 8, 34, vocab=1)))
    write("gguf", "q4_0", gguf(*small_model(32, 2, 18, vocab=1)))
    write("gguf", "q4_1", gguf(*small_model(32, 3, 20, vocab=1)))
    write("gguf", "huge_counts", b"GGUF" + struct.pack("<IQQ", 3, 100_000, 100_000) + bytes(8))
    write("gguf", "huge_array", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_string("k") +
          struct.pack("<IIQ", ARRAY, STRING, 1 << 61) + bytes(64))


# --- tokenizers ------------------------------------------------------------------------------------------------------

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def tokenizer_json(**changes):
    tokens = [chr(c) for c in range(0x21, 0x7F)] + ["\u0120", "he", "ll", "hell", "\u0120he"]
    file = {
        "added_tokens": [{"id": 200, "content": "<|begin_of_text|>", "special": True},
                         {"id": 201, "content": "<tool>", "special": False}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL]},
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"SpecialToken": {"id": "<|begin_of_text|>"}}, {"Sequence": {"id": "A"}}],
                           "special_tokens": {"<|begin_of_text|>": {"ids": [200]}}},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "ignore_merges": False, "vocab": {t: i for i, t in enumerate(tokens)},
                  "merges": ["h e", "l l", "he ll", "\u0120 he"]},
    }
    for pointer, value in changes.items():
        *path, last = pointer.split("__")
        at = file
        for step in path:
            at = at[step]
        at[last] = value
    return json.dumps(file, separators=(",", ":")).encode()


def make_tokenizers():
    write("tokenizer_json", "llama3", tokenizer_json())
    write("tokenizer_json", "pairs", tokenizer_json(model__merges=[["h", "e"], ["l", "l"]], model__ignore_merges=True))
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, gpt2]}
    write("tokenizer_json", "gpt2", tokenizer_json(pre_tokenizer=gpt2, post_processor={"type": "ByteLevel"}))
    write("tokenizer_json", "digits", tokenizer_json(pre_tokenizer=digits))
    write("tokenizer_json", "added", tokenizer_json(added_tokens=[
        {"id": 300, "content": "\u00e9", "special": False}, {"id": 200, "content": "<|begin_of_text|>"},
        {"id": 0, "content": "!", "special": False}]))
    write("tokenizer_json", "unsupported", tokenizer_json(normalizer={"type": "NFC"}))
    write("tokenizer_json", "wordpiece", b'{"model":{"type":"WordPiece","vocab":{}}}')

    def line(token, rank):
        return base64.b64encode(token) + b" %d\n" % rank

    write("tokenizer_tiktoken", "merges", line(b"he", 256) + line(b"ll", 257) + line(b"hell", 258))
    write("tokenizer_tiktoken", "windows", line(b"  ", 256).replace(b"\n", b"\r\n") + b"\r\n")
    write("tokenizer_tiktoken", "gap", line(b"\xe6\x97\xa5", 257))
    write("tokenizer_tiktoken", "malformed", b"aG*= 256\naGU=\n==== 257\n")
    write("tokenizer_tiktoken", "none", b"")

    write("tokenizer_gguf", "llama", b"a\n1 he\n1 ll\n3 <|eot_id|>\n+ h e\n+ l l\n")
    write("tokenizer_gguf", "smollm", "p smollm\na\n1 \u0120\u0120\n6 \u0100\n4 <tool>\n5 unused\nb 96\n".encode())
    write("tokenizer_gguf", "gpt2", b"p gpt-2\na\n2 <unk>\n1 ab\n1 abc\n+ a b\n+ ab c\nb 0\n")
    write("tokenizer_gguf", "sentencepiece", b"m llama\np default\n1 x\n")
    write("tokenizer_gguf", "types", b"a\nn\n9 x\n")


# --- streams ---------------------------------------------------------------------------------------------------------


def make_streams():
    def fields(*parts):
        return b"\0".join(parts)

    for name, parts in {
        "split": [b"\xe6", b"\x97\xa5\xf0\x9f", b"\x98", b"\x80 ok"],
        "bad": [b"\xff\xc0\xaf", b"\xe2\x82", b"x\xed", b"\xa0", b"\x80", b"\xf4\x90\x80\x80"],
        "special": [b"a\xc3", b"\x01<|eot_id|>", b"\xa9", b"\x01\xc3", b"\xf0\x90"],
        "replacement": [b"\xef\xbf\xbd", b"\xef\xbf", b"\xef\xbf\xbd"],
    }.items():
        write("incremental_decoder", name, fields(*parts))
    for name, parts in {
        "held": [b"-", b"END", b"\n\n", b"", b"hello E", b"N", b"x\n", b"\ny"],
        "included": [b"i", b"abcabd", b"cab", b"", b"abcab", b"cabd", b"more"],
        "inner": [b"i", b"abcd", b"bc", b"c", b"", b"xab", b"cd"],
        "equal": [b"-", b"no", b"no", b"", b"n", b"n", b"o"],
        "none": [b"-", b"", b"text"],
    }.items():
        write("stop_matcher", name, fields(*parts))


# --- requests --------------------------------------------------------------------------------------------------------

REQUESTS = {
    "text": 'text: "hello" sampling { temperature: 0.7 top_p: 0.9 top_k: 40 min_p: 0.05 seed: 7 num_sequences: 2 '
            'presence_penalty: 0.5 frequency_penalty: -0.5 repetition_penalty: 1.1 logit_bias { key: 1 value: -100 } } '
            'stopping { max_new_tokens: 5 min_new_tokens: 1 sequences: "END" token_ids: 3 time_limit { seconds: 2 } } '
            'output { token_ids: true echo_prompt: true top_logprobs: 2 prompt_top_logprobs: 0 } '
            'scheduling { priority: -1 tenant: "t" queue_timeout { nanos: 5 } ttft_target { seconds: 1 } } '
            'cache { salt: "s" bypass_prefix_cache: true } request_id: "id" model: "m"',
    "ids": 'token_ids { ids: 1 ids: 263 ids: 264 } output { omit_text: true }',
    "chat": 'chat { messages { role: ROLE_SYSTEM content: "be brief" } messages { role: ROLE_USER content: "hi" } '
            'messages { role: ROLE_ASSISTANT content: "wel" } continue_final_message: true date: "26 Jul 2024" }',
    "tools": 'chat { messages { role: ROLE_USER content: "?" } messages { role: ROLE_ASSISTANT tool_calls { id: "1" '
             'name: "f" arguments_json: "{\\"a\\": 1}" } } messages { role: ROLE_TOOL content: "[1]" tool_call_id: "1" '
             '} tools_json: "{\\"type\\":\\"function\\",\\"function\\":{\\"name\\":\\"f\\",\\"parameters\\":{}}}" '
             'tool_choice { mode: TOOL_MODE_AUTO } }',
    "forced": 'chat { messages { role: ROLE_USER content: "x" } tool_choice { function: "f" } } '
              'constraint { regex: "a+" }',
    "too_much": 'text: "x" model: "other" request_id: "a b" sampling { top_p: 0 num_sequences: 99 temperature: nan } '
                'stopping { max_new_tokens: 0 sequences: "" sequences: "123456789" time_limit { nanos: -1 } }',
}


def make_requests():
    for name, text in REQUESTS.items():
        encoded = subprocess.run(
            ["protoc", f"-I{ROOT / 'proto'}", "--encode=altiplano.inference.v1.GenerateRequest",
             "altiplano/inference/v1/inference.proto"], input=text.encode(), stdout=subprocess.PIPE, check=True).stdout
        write("generate_request", name, encoded)


# --- Flight records: what follows the version, up to the checksum ---------------------------------------------------


def number(value):
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def signed(value):
    return number(value << 1 if value >= 0 else (-value << 1) - 1)


NEVER = signed((1 << 63) - 1)


def frame(kind, *fields):
    body = bytes([kind]) + b"".join(fields)
    return number(len(body)) + body


def flight_header(blocks=8, tenants=b"\x00", dropped=0):
    sizes = b"".join(signed(v) for v in (blocks, 4, 2, 16, 100))  # blocks of 4, slots, budget, context
    cost = struct.pack("<6d", 100, 1000, 10, 1, 0.1, 0.01)
    return (sizes + number(1) + signed(0) + cost + number(0) + signed(10**10) + signed(0) + tenants +
            signed(1_700_000_000 * 10**9) + signed(10**9) + number(dropped) + number(dropped))


def flight_request(key, prompt, new=4, sequences=1, tenant=b"a"):
    name = b"r-%d" % key
    return b"".join((number(key), number(len(name)), name, number(len(tenant)), tenant, number(prompt),
                     number(sequences), number(new), signed(0), number(0), number(0), signed(1000), NEVER, NEVER, NEVER,
                     signed(0)))


def flight_arrival(key, *shape, **more):
    return frame(1, flight_request(key, *shape, **more))


def numbers(*values):
    return b"".join(number(value) for value in values)


def flight_checkpoint(said):
    """Before plan 4 the first request decodes in slot 0, with a step in flight, and the second waits."""
    before = signed(3500) + numbers(3, 2) + number(0)  # now, step, orders; nothing is learned
    accounts = signed(0) + number(1) + signed(9000) + signed(2) + signed(0)
    # Blocks 0 to 2 are held, 3 and 4 cached, the last one valued; all but 2 have names.
    names = frame(10, signed(0), number(2), struct.pack("<2Q", 7, 8), signed(1), number(2), struct.pack("<2Q", 9, 10))
    bits = number(1) + struct.pack("<2Q", 0b11011, 0b10000)
    cached = number(2) + struct.pack("<2Q", 5, 6)
    place = lambda order, admitted: numbers(order, admitted) + signed(10**10) + signed(0)
    table = number(3) + signed(0) + signed(1) + signed(1)
    running = (flight_request(1, 8) + place(1, 1) + numbers(0, 0) + numbers(0, 2) + numbers(5, 1, 9, 0) +
               numbers(0, 9, 8, 2) + table + number(0) + numbers(2, 2, 0))
    waiting = flight_request(2, 20) + place(2, 0) + numbers(0, 1) + numbers(0, 5) + numbers(2, 0, 0, 0) + numbers(0, 0)
    in_flight = numbers(1, 1) + signed(1) + numbers(1, 0, 8, 1) + number(0)
    if said:  # with two blocks, before it came so far
        names += frame(11, flight_request(1, 8) + place(1, 1) + numbers(0, 0) + numbers(0, 2) + numbers(5, 1, 8, 0) +
                       numbers(0, 8, 8, 2) + number(2) + signed(0) + signed(1) + number(0) + numbers(2, 2, 0))
        running = numbers(1, 1) + numbers(1, 9, 0, 9, 8, 2) + number(1) + signed(2) + number(0)
    else:
        running = number(0) + running
    return names + frame(9, before, accounts, numbers(1, 1), bits, cached, number(2), running, number(0), waiting,
                         number(0), number(0), in_flight, numbers(1, 77, 1), numbers(1, 1, 5))


def flight_plan(now, step, planned, waiting=0, why=0, head=0):
    out, last = [], 0
    for key, flags, slot, first, tokens in planned:
        out.append(signed(key - last) + number(flags) + number(slot) + number(first) + number(tokens))
        last = key
    return frame(7, signed(now), number(step), number(why), number(waiting), number(head), number(0), number(3),
                 number(0), number(0), number(0), number(0), number(len(planned)), *out)


def flight_result(now, step, ends=()):
    coded = b"".join(number(1) + number(key) + number(who) + number(how) + number(token)
                     for key, who, how, token in ends)
    return frame(8, signed(now), number(step), number(900), number(0), coded, number(0))


def make_flight_records():
    whole = (1 << 32) - 1  # a request, not one of its sequences
    begin = flight_header() + flight_arrival(1, 8, new=2) + flight_arrival(2, 20)
    first = flight_plan(2000, 1, [(1, 3, 0, 0, 8), (2, 2, 1, 0, 8)]) + flight_plan(2100, 2, [(1, 1, 0, 8, 1)])
    end = (flight_result(3000, 1) + frame(6, number(1), number(whole), number(0), struct.pack("<2Q", 7, 8)) +
           flight_result(4000, 2, [(1, 0, 3, 1), (1, whole, 0, 0)]) + frame(2, number(2), number(1)) +
           flight_plan(5000, 0, []))
    write("flight_record", "two_requests", begin + first + end)
    write("flight_record", "aborted", begin + first + frame(5, signed(2500)) + frame(4) + frame(3, number(1), number(0)))
    write("flight_record", "from_the_middle", flight_header() + first + end)
    for name, said in (("from_a_checkpoint", False), ("from_a_checkpoint_with_said_requests", True)):
        write("flight_record", name, flight_header(dropped=1) + flight_checkpoint(said) +
              flight_plan(3600, 4, [(1, 1, 0, 9, 1)]) + flight_result(4000, 3) + flight_result(5000, 4))
    write("flight_record", "siblings", flight_header() + flight_arrival(1, 9, sequences=3) +
          flight_plan(2000, 1, [(1, 3, 0, 0, 9)], 0) + flight_result(3000, 1))
    share = number(2) + b"".join(number(1) + name + signed(w) + signed(0) + signed(0) + signed(0)
                                 for name, w in ((b"a", 1), (b"b", 3)))
    write("flight_record", "tenants", flight_header(tenants=share) + flight_arrival(1, 8, tenant=b"b") + first)
    write("flight_record", "huge_counts", flight_header() + frame(7, signed(0), number(1), number(1 << 62)))
    write("flight_record", "header_only", flight_header(blocks=(1 << 31) - 1))


make_flight_records()
make_safetensors()
make_gguf()
make_tokenizers()
make_streams()
make_requests()
