#!/usr/bin/env python3
"""The trained tiny model answers on the GPU as on the CPU: greedy, in f32, where its choices have room.

    compare_devices.py ALTIPLANO MODEL [--dry]     --dry: only the CPU answers
"""
import subprocess
import sys

PROMPTS = ("What is the capital of France?", "Count from 3 to 9.", "Spell the word house.",
           "Repeat this list: red, green, blue.")


def answer(program, model, device, prompt):
    result = subprocess.run([program, "generate", "--model", model, "--device", device, "--dtype", "f32", "--kv-memory",
                             "64MiB", "--chat", "--temperature", "0", "--max-tokens", "48", "--prompt", prompt],
                            capture_output=True, text=True, timeout=60)
    if result.returncode != 0:
        sys.exit(f"Failed on {device}: {result.stderr.strip()}")
    return result.stdout


def main():
    program, model, dry = sys.argv[1], sys.argv[2], "--dry" in sys.argv
    different = 0
    for prompt in PROMPTS:
        cpu = answer(program, model, "cpu", prompt)
        gpu = cpu if dry else answer(program, model, "cuda", prompt)
        same = bool(cpu.strip()) and cpu == gpu
        different += not same
        print(f"{'same' if same else 'Failed, different'}: {prompt!r}: CPU {cpu.strip()!r}, GPU {gpu.strip()!r}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
