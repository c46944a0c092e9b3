#!/usr/bin/env python3
"""The server on GPUs that interpret PTX: two ranks that share one, CUDA graphs, several requests at once over gRPC. They are
answered as the CPU answers, and SIGTERM ends it in order.

    serve_test.py ALTIPLANO_ON_PTX ALTIPLANO MODEL
"""
import pathlib
import re
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "gpu"))
from compare_devices import PROMPTS as ALL_PROMPTS, SMALL  # noqa: E402

PROMPTS = ALL_PROMPTS[0], ALL_PROMPTS[2], ALL_PROMPTS[0]
SAMPLING = ("--chat", "--temperature", "0", "--max-tokens", "24")


def main():
    on_ptx, altiplano, model = sys.argv[1:4]
    server = subprocess.Popen(
        [on_ptx, "serve", "--model", model, "--listen", "127.0.0.1:0", "--device", "cuda", "--dtype", "f32",
         "--tensor-parallel", "2", "--devices", "0,0", *SMALL, "--step-deadline", "10m", "--health-deadline", "5m"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        return ask(server, altiplano, model)
    finally:
        server.kill()


def ask(server, altiplano, model):
    lines, address = [], None
    for line in server.stdout:
        lines.append(line)
        if ready := re.match(r"READY address=(\S+)", line):
            address = ready[1]
            break
    if address is None:
        print("".join(lines), "the server was not READY")
        return 1
    asked = [subprocess.Popen([altiplano, "generate", "--url", address, *SAMPLING, "--prompt", prompt], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) for prompt in PROMPTS]
    said = [process.communicate(timeout=300)[0] for process in asked]
    here = [subprocess.run([altiplano, "generate", "--model", model, "--device", "cpu", "--dtype", "f32", *SAMPLING, "--prompt",
                            prompt], capture_output=True, text=True, timeout=60).stdout for prompt in PROMPTS]
    server.send_signal(signal.SIGTERM)
    rest, _ = server.communicate(timeout=60)
    for prompt, answer, expected in zip(PROMPTS, said, here):
        print(f"{'same' if answer == expected else 'Failed, different'}: {prompt!r}: {answer!r}, CPU {expected!r}")
    if said != here or not all(said) or server.returncode != 0 or "captured the graphs" not in "".join(lines):
        print("".join(lines), rest, f"exit code {server.returncode}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
