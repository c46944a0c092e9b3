#!/usr/bin/env python3
"""Sampling gives the CPU's tokens to the bit, so each f32 operation in its PTX says how it rounds: ptxas may fuse a product
and a sum that do not.

    rounding_test.py PTX_FOLDER...
"""
import pathlib
import re
import sys


def main():
    files = [path for folder in sys.argv[1:] for path in pathlib.Path(folder).rglob("sample.ptx")]
    said = rounded = 0
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            rounded += bool(re.search(r"\b(add|sub|mul|fma)\.rn\.f32\b", line))
            if re.search(r"\b(add|sub|mul|mad)\.f32\b", line):
                said += 1
                print(f"{path}:{number}: {line.strip()}")
    print(f"{len(files)} files, {rounded} operations that say how they round, {said} that do not")
    return 0 if len(files) == len(sys.argv) - 1 and rounded > 0 and said == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
