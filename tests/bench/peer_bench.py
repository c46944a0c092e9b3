#!/usr/bin/env python3
"""This engine beside llama.cpp: the same bf16 model file, prompts and answers of the same lengths, as many threads.

    peer_bench.py PROGRAM MODEL.gguf [--native LLAMA_BATCHED_BENCH] [--streams 1,8,32] [--rounds N] [--cpu] [--json FILE]

In turns; the best round of each side counts. --native also measures a llama-batched-bench that was built for this
machine. Each turn waits (a minute at most) until others leave the cores alone, and says how much they took.

--cpu compares CPU seconds of one thread instead, which hold when others never leave the cores alone: what a longer
prompt or a longer answer costs, as the difference of two runs, so that loading the model does not count.
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
RATES = ("prefill_tokens_per_second", "decode_tokens_per_second", "tokens_per_second")
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


def run(command, wait=True):
    """Output, CPU seconds, and the share of the cores' time that others took."""
    if wait:
        wait_for_quiet()
    begin, busy, own = time.monotonic(), machine_seconds(), own_seconds()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} left with {done.returncode}:\n{done.stderr[-2000:]}")
    used = own_seconds() - own
    others = machine_seconds() - busy - used
    return done.stdout, used, max(0.0, others / (time.monotonic() - begin) / os.cpu_count())


class Altiplano:
    def __init__(self, program, model):
        self.program, self.model, self.name = program, model, "altiplano"

    def command(self, streams, threads, prompt, new):
        return [self.program, "bench", "offline", "--model", self.model, "--json", "--input-len", str(prompt),
                "--output-len", str(new), "--max-num-seqs", str(streams), "--max-model-len", str(prompt + new + 16),
                "--streams", str(streams), "--threads", str(threads)]

    def rates(self, output):
        result = json.loads(output)
        self.name = "altiplano on " + result["device"].split(", ")[-1]
        result = result["results"][0]
        return {key: result[key] for key in RATES}


class Wheel:
    def __init__(self, model):
        self.model, self.name = model, "xllamacpp"

    def command(self, streams, threads, prompt, new):
        return [sys.executable, HERE / "peer_llama_cpp.py", self.model, str(streams), str(prompt), str(new), str(threads)]

    def rates(self, output):
        result = last_json_line(output)
        self.name = result.pop("peer")
        return result


class Native:
    def __init__(self, program, model):
        self.program, self.model, self.name = program, model, "llama.cpp built here"

    def command(self, streams, threads, prompt, new):
        context = streams * (prompt + new) + 256
        return [self.program, "-m", self.model, "-npp", str(prompt), "-ntg", str(new), "-npl", str(streams), "-c",
                str(context), "-b", "2048", "-ub", "512", "-t", str(threads), "-tb", str(threads), "--output-format",
                "jsonl"]

    def rates(self, output):
        result = last_json_line(output)
        return {"prefill_tokens_per_second": result["speed_pp"], "decode_tokens_per_second": result["speed_tg"],
                "tokens_per_second": result["speed"]}


def wall_rates(side, streams):
    output, _, others = run(side.command(streams, len(os.sched_getaffinity(0)), PROMPT, NEW))
    return side.rates(output), others


def cpu_rates(side, streams):
    def cost(prompt, new, at_once):
        output, used, others = run(side.command(at_once, 1, prompt, new), wait=False)
        side.rates(output)
        return used, others
    # A single prompt would drown in the noise of loading the model.
    prompts, answers = max(streams, 8), max(NEW, 256 // streams)
    (long, _), (short, _) = cost(PROMPT, 2, prompts), cost(32, 2, prompts)
    (many, others), (few, _) = cost(32, answers + 2, streams), cost(32, 2, streams)
    return {"prefill_tokens_per_cpu_second": prompts * (PROMPT - 32) / (long - short),
            "decode_tokens_per_cpu_second": streams * answers / (many - few)}, others


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--native")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    sides = [Altiplano(args.program, args.model), Wheel(args.model)]
    if args.native:
        sides.append(Native(args.native, args.model))
    lines = open(args.json, "a") if args.json else None
    measure, threads = (cpu_rates, 1) if args.cpu else (wall_rates, len(os.sched_getaffinity(0)))

    for streams in map(int, args.streams.split(",")):
        best, disturbed = [{} for _ in sides], [1.0 for _ in sides]
        for _ in range(args.rounds):
            for i, side in enumerate(sides):
                rates, others = measure(side, streams)
                if lines:
                    print(json.dumps({"bench": "peer", "side": side.name, "streams": streams, "prompt": PROMPT, "new": NEW,
                                      "threads": threads, "others_share": round(others, 3), **rates}),
                          file=lines, flush=True)
                disturbed[i] = min(disturbed[i], others)
                for key, rate in rates.items():
                    best[i][key] = max(best[i].get(key, 0), rate)
        print(f"\n{streams} streams, {PROMPT} + {NEW} tokens each, threads: {threads}; best of {args.rounds} rounds")
        for key in best[0]:
            print(f"  {key.replace('_', ' ')}")
            for side, rates, others in zip(sides, best, disturbed):
                if key not in rates:
                    continue
                ratio = "" if side is sides[0] else f"   ours is {best[0][key] / rates[key] * 100:.0f} % of it"
                print(f"    {side.name:<40} {rates[key]:9.1f}{ratio}; others took {others * 100:.0f} % or more")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
