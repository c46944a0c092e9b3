#!/usr/bin/env python3
"""Files for an instruction set that a machine may lack run nothing at start-up: what they define are constants. A vector of
kernels with such a constructor is an illegal instruction before main on every older machine.

    start_code_test.py BUILD     looks at the object files of *avx512* and *amx* sources
"""
import pathlib
import re
import subprocess
import sys


def main():
    objects = [path for path in pathlib.Path(sys.argv[1]).rglob("*.o") if re.search("avx512|amx", path.name)]
    if not objects:
        print(f"no object file of an *avx512* or *amx* source below {sys.argv[1]}: was it built?")
        return 1
    guilty = [path for path in objects
              if ".init_array" in subprocess.run(["readelf", "-SW", path], capture_output=True, text=True, check=True).stdout]
    for path in guilty:
        print(f"{path.name}: has code that runs at start-up (.init_array); make its objects constinit")
    print(f"{len(objects)} files looked at")
    return 1 if guilty else 0


if __name__ == "__main__":
    sys.exit(main())
