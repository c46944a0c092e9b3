#!/usr/bin/env python3
"""The trained tiny model answers on the GPU as on the CPU, or on several ranks as on one: greedy, in f32, where its
choices have room.

    compare_devices.py ALTIPLANO MODEL [--ranks 2,4,8] [--prompts N] [--patience SECONDS] [--dry]

--ranks: so many ranks that share the one GPU, against one on it. --prompts: the first N of four alone. --patience: for
one answer, 60 without. --dry: all of it on the CPU.
"""
import argparse
import subprocess
import sys

PROMPTS = ("What is the capital of France?", "Count from 3 to 9.", "Spell the word house.",
           "Repeat this list: red, green, blue.")
# Little to warm up, for GPUs that are none: the tests' programs interpret PTX.
SMALL = ("--max-num-batched-tokens", "64", "--max-num-seqs", "2", "--max-model-len", "256", "--kv-memory", "64MiB")


def answer(program, model, device, prompt, ranks, patience):
    command = [program, "generate", "--model", model, "--device", device, "--dtype", "f32", *SMALL, "--chat",
               "--temperature", "0", "--max-tokens", "48", "--prompt", prompt, "--tensor-parallel", str(ranks)]
    if ranks > 1 and device == "cuda":
        command += ["--devices", ",".join(["0"] * ranks)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    if result.returncode != 0:
        sys.exit(f"Failed on {device} with {ranks} ranks: {result.stderr.strip()}")
    return result.stdout


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--ranks", default="")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--patience", type=int, default=60)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    gpu = "cpu" if arguments.dry else "cuda"
    # (what, device, ranks) against the first.
    cases = [("CPU", "cpu", 1), ("GPU", gpu, 1)]
    if arguments.ranks:
        cases = [("1 rank", gpu, 1)] + [(f"{n} ranks", gpu, int(n)) for n in arguments.ranks.split(",")]
    different = 0
    for prompt in PROMPTS[:arguments.prompts]:
        said = {what: answer(arguments.program, arguments.model, device, prompt, ranks, arguments.patience)
                for what, device, ranks in cases}
        same = all(said.values()) and len(set(said.values())) == 1 and bool(said[cases[0][0]].strip())
        different += not same
        print(f"{'same' if same else 'Failed, different'}: {prompt!r}: "
              + ", ".join(f"{what} {text.strip()!r}" for what, text in said.items()), flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
