#!/usr/bin/env python3
"""No kernel spills registers, keeps anything on a stack, has wgmmas that wait for each other (C7510 and the like), loses
its setmaxnreg (C7508 and the like) or begins with other registers than that counts on. Reads what ptxas said when the
kernels were compiled.

    ptxas_test.py FOLDER [--table]     every *.ptxas below it; --table prints docs/kernels.md's table
"""
import pathlib
import re
import sys

ENTRY = re.compile(r"Compiling entry function '([^']+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# Of kernels with setmaxnreg, for sm_90a: with fewer, what some warps take is never given back by others.
AT_ENTRY = {"PrefillAttentionKernel": 168}


def kernels(folder):
    """Yields file, mangled name, target, (stack, spill stores, spill loads), registers, static shared bytes."""
    for path in sorted(pathlib.Path(folder).rglob("*.ptxas")):
        name = target = stack = None
        for line in path.read_text().splitlines():
            if match := ENTRY.search(line):
                name, target = match.groups()
            elif match := STACK.search(line):
                stack = tuple(int(n) for n in match.groups())
            elif (match := USED.search(line)) and name:
                shared = SHARED.search(line)
                yield (path.name.removesuffix(".o.ptxas"), name, target, stack, int(match.group(1)),
                       int(shared.group(1)) if shared else 0)
                name = stack = None


def short(name):
    """RmsNormKernel<4, 1> of its mangled name; types of template arguments as they are mangled."""
    match = re.search(r"\d([A-Z]\w*?Kernel)(?:I(\w+?)EE)?[vE]", name)
    if not match:
        return name
    arguments = re.findall(r"L[a-z](\d+)E?|([a-z]\w*)", match.group(2) or "")
    return match.group(1) + (f"<{', '.join(a or b for a, b in arguments)}>" if arguments else "")


def main():
    found = list(kernels(sys.argv[1]))
    if "--table" in sys.argv:
        for file, name, target, _, registers, shared in found:
            print(f"| {file} | `{short(name)}` | {target} | {registers} | {shared} |")
    problems = [f"{file}: {name}: {target}: stack {stack[0]}, spill stores {stack[1]}, spill loads {stack[2]} bytes"
                for file, name, target, stack, _, _ in found if stack is None or any(stack)]
    problems += [f"{file}: {name}: {registers} registers, and not the {AT_ENTRY[kernel]} that its setmaxnreg counts on"
                 for file, name, target, _, registers, _ in found if target == "sm_90a"
                 for kernel in [short(name).partition("<")[0]] if registers != AT_ENTRY.get(kernel, registers)]
    problems += [f"{path.name.removesuffix('.o.ptxas')}: {line}" for path in sorted(pathlib.Path(sys.argv[1]).rglob("*.ptxas"))
                 for line in path.read_text().splitlines() if "are serialized" in line or "'setmaxnreg' ignored" in line]
    if not found:
        problems = [f"no kernel in any *.ptxas below {sys.argv[1]}: were the kernels built?"]
    print("\n".join(problems) or f"{len(found)} kernels of {', '.join(sorted({kernel[2] for kernel in found}))}, no spills, nothing on a stack, no wgmma serialized, no setmaxnreg ignored")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
