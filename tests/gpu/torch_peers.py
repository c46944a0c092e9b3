#!/usr/bin/env python3
"""Times what PyTorch (cuBLAS, cuDNN) makes of the same shapes, on the same GPU, in the same way: CUDA graphs of calls on
operands that lie in no cache.

    torch_peers.py CASES OUT [--skip N]

CASES: the JSON lines of gpu_bench, also of gpu_bench --dry. OUT gets a line for each case that PyTorch can do, under the
same name, with the peer and its microseconds; and the rate of a product of 8192^3, the limit of computing. OUT.running
has the case that is being measured. --skip N goes on behind the N lines that are in OUT. Exit code 1: a case was the last,
since CUDA refuses a process everything behind a kernel's fault; 2: some cases failed; 77: there is no torch, or it sees no
GPU.
"""
import json
import pathlib
import statistics
import sys

RUNS, RUN_SECONDS, MOST_CALLS = 9, 0.004, 500
POOL_BYTES = 3 << 30


class Pool:
    """Random bf16 numbers; pieces as gpu_bench's arena hands them out."""

    def __init__(self, torch):
        self.torch = torch
        self.memory = (torch.randn(POOL_BYTES // 2, device="cuda", dtype=torch.bfloat16) * 2**-6)

    def matrix(self, turn, *shape):
        count = 1
        for n in shape:
            count *= n
        room = self.memory.numel() - count
        at = (turn * (self.memory.numel() // 3 + (19 << 20)) % room) // 512 * 512
        return self.memory[at:at + count].view(*shape)

    def f32(self, turn, rows, columns):
        return self.matrix(turn, rows, 2 * columns).view(self.torch.float32)

    def all_of_it(self, dtype, columns):
        whole = self.memory.view(dtype)
        return whole[:whole.numel() // columns * columns].view(-1, columns)


def subject(torch, pool, case):
    """(peer, call(turn)) or None."""
    functional = torch.nn.functional
    part, op = case["part"], case["name"].split()[0]
    if part == "linear" and op == "Linear":
        m, n, k = case["m"], case["n"], case["k"]
        outs = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        return "cuBLAS bf16", lambda turn: torch.mm(pool.matrix(2 * turn, m, k), pool.matrix(2 * turn + 1, n, k).t(),
                                                    out=outs[turn % 2])
    if part == "linear" and op == "LinearSiluMul":
        m, n, k = case["m"], case["n"], case["k"]

        def product(turn):
            gate_up = torch.mm(pool.matrix(2 * turn, m, k), pool.matrix(2 * turn + 1, n, k).t())
            return functional.silu(gate_up[:, :n // 2]) * gate_up[:, n // 2:]
        return "cuBLAS bf16 and two torch kernels", product
    if part in ("decode_attention", "prefill_attention") and "context" in case:  # of one length
        b, queries, context, dim = case["sequences"], case["queries"], case["context"], case["dim"]
        heads, kv_heads = case["q_heads"], case["kv_heads"]
        if 2 * b * kv_heads * context * dim * 2 > POOL_BYTES or (queries not in (1, context)):
            return None
        causal = queries > 1
        backends = torch.nn.attention.SDPBackend

        def attend(backend, turn):
            q = pool.matrix(3 * turn, b, heads, queries, dim)
            k, v = (pool.matrix(3 * turn + i, b, kv_heads, context, dim) for i in (1, 2))
            with torch.nn.attention.sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv_heads)
        for name, backend in (("cuDNN", backends.CUDNN_ATTENTION), ("flash", backends.FLASH_ATTENTION)):
            try:
                attend(backend, 0)
            except RuntimeError:  # this backend does not do the shape
                continue
            return f"SDPA by {name}, contiguous cache", lambda turn, backend=backend: attend(backend, turn)
        return None
    if op == "SiluMul":
        tokens, ffn = case["tokens"], case["ffn"]

        def call(turn):
            gate_up = pool.matrix(turn, tokens, 2 * ffn)
            return functional.silu(gate_up[:, :ffn]) * gate_up[:, ffn:]
        return "two torch kernels", call
    if op in ("Embed", "GatherRows"):
        table = pool.all_of_it(torch.float32 if op == "GatherRows" else torch.bfloat16, case["hidden"])
        # As many places as gpu_bench reads, so that L2 has none of them when it comes round again.
        places = min(max((256 << 20) // (case["tokens"] * case["hidden"] * table.element_size()), 4), 256)
        chosen = [torch.randint(table.shape[0], (case["tokens"],), device="cuda") for _ in range(places)]
        if op == "GatherRows":
            return "index_select", lambda turn: torch.index_select(table, 0, chosen[turn % places])
        return "embedding and widening", lambda turn: functional.embedding(chosen[turn % places], table).float()
    if op == "RmsNorm":
        tokens, hidden = case["tokens"], case["hidden"]
        weight = torch.randn(hidden, device="cuda")
        return "rms_norm and rounding", lambda turn: functional.rms_norm(
            pool.f32(turn, tokens, hidden), (hidden,), weight, 1e-5).bfloat16()
    if op == "Sample" and "greedy, " in case["name"] and "log" not in case["name"]:
        return "argmax", lambda turn: torch.argmax(pool.f32(turn, case["rows"], case["vocab"]), dim=-1)
    return None


def measure(torch, call):
    stream = torch.cuda.Stream()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        for turn in range(3):
            call(turn)
        begin.record(stream)
        call(3)
        end.record(stream)
        stream.synchronize()
        calls = max(3, min(MOST_CALLS, int(RUN_SECONDS / max(begin.elapsed_time(end) / 1e3, 1e-7))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for turn in range(calls):
            call(turn)
    times = []
    for _ in range(RUNS):
        graph.replay()  # so that the GPU is busy until the other begins
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    del graph
    return statistics.median(times)


def main():
    if len(sys.argv) not in (3, 5) or sys.argv[3:4] not in ([], ["--skip"]):
        sys.exit(__doc__)
    try:
        import torch
    except ImportError as error:
        print(f"torch_peers: {error}")
        return 77
    if not torch.cuda.is_available():
        print("torch_peers: torch sees no GPU")
        return 77
    with open(sys.argv[1]) as file:
        cases = [json.loads(line) for line in file]
    skipped = int(sys.argv[4]) if len(sys.argv) == 5 else 0
    done = set()
    if skipped > 0:
        with open(sys.argv[2]) as file:
            done = {json.loads(line)["name"] for line in file}
    running = pathlib.Path(sys.argv[2] + ".running")
    pool = Pool(torch)
    failed = 0
    with open(sys.argv[2], "a" if skipped > 0 else "w") as out:
        def write(line):
            out.write(json.dumps(line) + "\n")
            out.flush()
        if skipped == 0:
            write({"part": "torch", "name": "versions", "torch": torch.__version__, "cuda": torch.version.cuda,
                   "cudnn": torch.backends.cudnn.version(), "device": torch.cuda.get_device_name(0)})
        edge = 8192
        square = {"part": "linear", "name": f"Linear {edge}^3", "m": edge, "n": edge, "k": edge}
        for case in [square] + cases:
            if case["name"] in done:
                continue
            running.write_text(json.dumps({"part": case["part"], "name": case["name"]}) + "\n")
            try:
                found = subject(torch, pool, case)
                if found is None:
                    continue
                microseconds = measure(torch, found[1])
            except Exception as error:  # out of memory, no kernel for the shape, an older torch: the others go on
                said = (str(error).splitlines() or [repr(error)])[0]
                write({"part": case["part"], "name": case["name"], "error": said})
                if "CUDA error" in said:
                    running.unlink()
                    return 1
                failed += 1
                torch.cuda.empty_cache()
                continue
            line = {"part": case["part"], "name": case["name"], "peer": found[0], "us": microseconds}
            if case is square:
                line |= {"limit": "product", "tflops": 2 * edge**3 / microseconds * 1e-6}
            write(line)
            print(f"{case['name']:60} {microseconds:10.2f} us  {found[0]}", flush=True)
    running.unlink(missing_ok=True)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
