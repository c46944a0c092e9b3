#!/usr/bin/env python3
"""What of the machine code for sm_90a, read with cuobjdump, ptxas undoes unless something keeps it from that. Kernels that
wait for memory have their loads on their way together: as many loads of 16 bytes before anything that could wait for
one. What wgmma's descriptors are made of is computed once for a warp: few values go from lanes' registers to the uniform
ones. In prefill attention queries are copied into shared memory, but not by warps that use the tensor cores; results are
read there together before the first is stored; queries, results and the state are read while wgmma is under way. And
nowhere do threads try an atomic operation until none was faster.

    loads_test.py FOLDER [--table]     every *.cu.o below it; --table prints what was found
"""
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

from ptxas_test import short

SKIPPED = 77
LEAST = {  # as docs/kernels.md counts them
    "OneShotKernel<4, 2>": 8, "OneShotKernel<4, 4>": 16, "OneShotKernel<4, 8>": 16,
    "TwoShotsKernel<4, 2>": 8, "TwoShotsKernel<4, 4>": 16, "TwoShotsKernel<4, 8>": 16,
    "AllReduceAddRmsNormKernel<4, 2>": 12, "AllReduceAddRmsNormKernel<4, 4>": 20, "AllReduceAddRmsNormKernel<4, 8>": 18,
    "GatherKernel<uint4>": 8,
    "MmaLinearKernel<1, 1, 4>": 8 + 4, "MmaLinearKernel<1, 2, 4>": 16 + 2, "MmaLinearKernel<2, 1, 4>": 8 + 4,
    "MmaAttentionKernel<128>": 2,
    "MmaLinearKernel<2, 2, 4>": 16 + 4, "MmaLinearKernel<8, 1, 4>": 8 + 3, "MmaLinearKernel<8, 1, 2>": 4,
    "HopperLinearKernel<64, 128>": 16, "HopperLinearKernel<64, 64>": 8, "HopperLinearKernel<32, 128>": 8,
}
# How often the code, in its order, waits for loads from global memory: those that are on their way then count once.
MOST_WAITS = {"HopperLinearKernel<64, 128>": 3, "HopperLinearKernel<64, 64>": 3, "HopperLinearKernel<32, 128>": 3,
              "HopperLinearKernel<32, 64>": 4, "HopperLinearKernel<16, 128>": 4, "HopperLinearKernel<16, 64>": 5}
# Loads of a lane from shared memory: of results; of them and of the state that is folded (LDS) and of queries (LDSM).
RESULTS = {"PrefillAttentionKernel<128>": 8, "PrefillAttentionKernel<64>": 4}
BESIDE_WGMMA = {"PrefillAttentionKernel<128>": {"LDS": 8 + 16, "LDSM": 8},
                "PrefillAttentionKernel<64>": {"LDS": 4 + 8, "LDSM": 4}}
MOST_MADE_UNIFORM = {"PrefillAttentionKernel<128>": 39, "PrefillAttentionKernel<64>": 26}  # R2UR
MOST_MADE_UNIFORM |= {f"HopperLinearKernel<{columns}, {rows}>": 48 for columns in (16, 32, 64) for rows in (64, 128)}
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
WAITS = re.compile(r"HMMA|FADD|FMUL|FFMA|STG|STS|BAR")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*) ([^;]*);")
REGISTER = re.compile(r"\bR(\d+)")


def cuobjdump():
    """Beside nvcc, or in the Python package that has it; None where it is not."""
    package = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(p) for p in (package.submodule_search_locations if package else [])]
    beside = [pathlib.Path("/usr/local/cuda/bin/cuobjdump"), *(p for f in folders for p in f.glob("*/bin/cuobjdump"))]
    return shutil.which("cuobjdump") or next((p for p in beside if p.exists()), None)


def most_together(code, load="LDG"):
    """The most loads of 16 bytes that follow each other with nothing between that waits for one."""
    most = run = 0
    for opcode in OPCODE.findall(code):
        if opcode.split(".")[0] == load and ".128" in opcode:
            run += 1
            most = max(most, run)
        elif WAITS.match(opcode):
            run = 0
    return most


def waits_for_loads(code):
    """How often an instruction reads what loads from global memory have written since the last that did."""
    waits, loaded = 0, set()
    for opcode, operands in INSTRUCTION.findall(code):
        to, _, others = operands.partition(",")
        if opcode.startswith("LDG."):
            words = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
            first = int(REGISTER.search(to)[1])
            loaded |= set(range(first, first + words))
        elif any(int(register) in loaded for register in REGISTER.findall(others)):
            waits, loaded = waits + 1, set()
    return waits


def queries_are_copied(code):
    """Whether queries are copied into shared memory, and not by warps that use the tensor cores. The code of the others
    lies in front of an EXIT, or behind."""
    parts = [OPCODE.findall(part) for part in re.split(r"\*/\s+EXIT ;", code)]
    loads = [any(opcode.startswith("LDG") and ".128" in opcode for opcode in part) for part in parts]
    tensor_cores = [any(opcode.startswith("HGMMA") for opcode in part) for part in parts]
    return "LDGSTS" in code and any(tensor_cores) and not any(map(all, zip(loads, tensor_cores)))


def read_beside_wgmma(opcodes, load):
    """The most such loads of 16 bytes between wgmmas and the wait for them, in the order of the code."""
    most = run = 0
    for opcode in opcodes:
        if opcode.split(".")[0] == load and (".128" in opcode or load == "LDSM"):
            run += 1
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            most = max(most, run)
        if opcode.startswith(("HGMMA", "WARPGROUP.DEPBAR")):
            run = 0
    return most


def main():
    tool = cuobjdump()
    if tool is None:
        print("no cuobjdump: it comes with the CUDA toolkit")
        return SKIPPED
    found, waits, made_uniform, results, beside, spinning, problems = {}, {}, {}, {}, {}, {}, []
    for path in sorted(pathlib.Path(sys.argv[1]).rglob("*.cu.o")):
        code = subprocess.run([tool, "-arch", "sm_90a", "-sass", path], capture_output=True, text=True).stdout
        for function in code.split("Function : ")[1:]:
            kernel, opcodes = short(function.split()[0]), OPCODE.findall(function)
            spinning[kernel] = sum(opcode.startswith("ATOM") and "CAS" in opcode for opcode in opcodes)
            if any(kernel.startswith(name.split("<")[0]) for name in LEAST):
                found[kernel] = most_together(function)
            if kernel in MOST_WAITS:
                waits[kernel] = waits_for_loads(function)
            if kernel in MOST_MADE_UNIFORM:
                made_uniform[kernel] = opcodes.count("R2UR")
            if kernel in RESULTS:
                results[kernel] = most_together(function, "LDS")
                beside[kernel] = {load: read_beside_wgmma(opcodes, load) for load in ("LDS", "LDSM")}
                if not queries_are_copied(function):
                    problems.append(f"{kernel}: warps that use the tensor cores load queries")
    if "--table" in sys.argv:
        print("\n".join(f"{kernel}: {count}" for counts in (found, waits, results, beside, made_uniform)
                        for kernel, count in sorted(counts.items())))
    if not spinning:
        print(f"no kernel for sm_90a below {sys.argv[1]}")
        return SKIPPED
    problems += [f"{kernel}: {found.get(kernel, 'not built, no')} loads together, at least {least} were"
                 for kernel, least in LEAST.items() if found.get(kernel, 0) < least]
    problems += [f"{kernel}: {waits.get(kernel, 'not built, no')} waits for loads, at most {most} were"
                 for kernel, most in MOST_WAITS.items() if not waits.get(kernel, most + 1) <= most]
    problems += [f"{kernel}: {results.get(kernel, 'not built, no')} results read together, {least} were"
                 for kernel, least in RESULTS.items() if results.get(kernel, 0) < least]
    problems += [f"{kernel}: {beside.get(kernel, {}).get(load, 0)} {load} beside wgmma, {least} were"
                 for kernel, loads in BESIDE_WGMMA.items() for load, least in loads.items()
                 if beside.get(kernel, {}).get(load, 0) < least]
    problems += [f"{kernel}: {made_uniform.get(kernel, 'not built, no')} values made uniform, at most {most} were"
                 for kernel, most in MOST_MADE_UNIFORM.items() if not made_uniform.get(kernel, most + 1) <= most]
    problems += [f"{kernel}: {count} atomic operations that are tried until none was faster"
                 for kernel, count in spinning.items() if count > 0]
    print("\n".join(problems) or f"of {len(spinning)} kernels {len(LEAST)} have their loads together, "
          f"{len(MOST_MADE_UNIFORM)} their descriptors in uniform registers, {len(RESULTS)} their queries copied, none spins")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
