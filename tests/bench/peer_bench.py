#!/usr/bin/env python3
"""This engine beside llama.cpp: the same bf16 model file, the same prompts' lengths, the same number of threads, in turns.

    peer_bench.py PROGRAM MODEL.gguf [--native LLAMA_BATCHED_BENCH] [--streams 1,8,32] [--rounds N] [--json FILE]

The best round of each side counts. --native also measures a llama-batched-bench that was built for this machine.
Where the machine is shared, each turn waits (a minute at most) until others leave its cores alone, and says how much
of the cores' time they took.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
PROMPT, NEW = 512, 64
QUIET, PATIENCE = 0.1, 60  # share of the cores' time that others may use; seconds to wait for it


def machine_seconds():
    """CPU seconds that any process has used."""
    fields = open("/proc/stat").readline().split()[1:]
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def wait_for_quiet():
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        begin, busy = time.monotonic(), machine_seconds()
        time.sleep(0.5)
        if machine_seconds() - busy < QUIET * (time.monotonic() - begin) * os.cpu_count():
            return


def last_json_line(output):
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))


def run(command):
    """Output, and the share of the cores' time that others took."""
    wait_for_quiet()
    begin, busy, own = time.monotonic(), machine_seconds(), own_seconds()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} left with {done.returncode}:\n{done.stderr[-2000:]}")
    others = machine_seconds() - busy - (own_seconds() - own)
    return done.stdout, max(0.0, others / (time.monotonic() - begin) / os.cpu_count())


class Altiplano:
    name = "altiplano"

    def __init__(self, program, model):
        self.command = [program, "bench", "offline", "--model", model, "--json", "--input-len", str(PROMPT),
                        "--output-len", str(NEW), "--max-num-seqs", "32", "--max-model-len", str(PROMPT + NEW + 16)]

    def measure(self, streams, threads):
        output, others = run(self.command + ["--streams", str(streams), "--threads", str(threads)])
        result = json.loads(output)
        self.name = "altiplano on " + result["device"]
        result = result["results"][0]
        keys = ("prefill_tokens_per_second", "decode_tokens_per_second", "tokens_per_second")
        return {key: result[key] for key in keys}, others


class Wheel:
    name = "xllamacpp"

    def __init__(self, model):
        self.model = model

    def measure(self, streams, threads):
        output, others = run([sys.executable, HERE / "peer_llama_cpp.py", self.model, str(streams), str(PROMPT), str(NEW),
                              str(threads)])
        result = last_json_line(output)
        self.name = result.pop("peer")
        return result, others


class Native:
    name = "llama-batched-bench"

    def __init__(self, program, model):
        self.program, self.model = program, model

    def measure(self, streams, threads):
        context = streams * (PROMPT + NEW) + 256
        output, others = run([self.program, "-m", self.model, "-npp", str(PROMPT), "-ntg", str(NEW), "-npl", str(streams),
                              "-c", str(context), "-b", "2048", "-ub", "512", "-t", str(threads), "-tb", str(threads),
                              "--output-format", "jsonl"])
        result = last_json_line(output)
        return {"prefill_tokens_per_second": result["speed_pp"], "decode_tokens_per_second": result["speed_tg"],
                "tokens_per_second": result["speed"]}, others


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--native")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    sides = [Altiplano(args.program, args.model), Wheel(args.model)]
    if args.native:
        sides.append(Native(args.native, args.model))
    lines = open(args.json, "a") if args.json else None

    for streams in map(int, args.streams.split(",")):
        best, disturbed = [{} for _ in sides], [1.0 for _ in sides]
        for _ in range(args.rounds):
            for i, side in enumerate(sides):
                rates, others = side.measure(streams, threads)
                if lines:
                    print(json.dumps({"bench": "peer", "side": side.name, "streams": streams, "prompt": PROMPT, "new": NEW,
                                      "threads": threads, "others_share": round(others, 3), **rates}),
                          file=lines, flush=True)
                disturbed[i] = min(disturbed[i], others)
                for key, rate in rates.items():
                    best[i][key] = max(best[i].get(key, 0), rate)
        print(f"\n{streams} streams, {PROMPT} + {NEW} tokens each, {threads} threads; tokens/s of the best of {args.rounds} rounds")
        for key in best[0]:
            print(f"  {key.removesuffix('_tokens_per_second').replace('tokens_per_second', 'all, prompts included')}")
            for side, rates, others in zip(sides, best, disturbed):
                if key not in rates:
                    continue
                ratio = "" if side is sides[0] else f"   ours is {best[0][key] / rates[key] * 100:.0f} % of it"
                print(f"    {side.name:<50} {rates[key]:9.1f}{ratio}; others took {others * 100:.0f} % or more")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
