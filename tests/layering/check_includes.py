#!/usr/bin/env python3
"""Who may include whom. Reads #include lines; prints each that breaks the DAG. The rules are CONTRIBUTING.md's, as data.

    check_includes.py ROOT
"""
import pathlib
import re
import sys

# Folder -> folders (or single headers) of ours that its files may include. Its own folder always.
ALLOWED = {
    "kernels": [],
    "server/base": [],
    "server/scheduler": ["server/base"],
    "server/bench": ["server/base", "server/model", "server/scheduler"],
    "server/text": ["server/base"],
    "server/model": ["server/base", "kernels"],
    "server/engine": ["server/base", "server/scheduler", "server/model", "kernels"],
    "server/cluster": ["server/base", "server/scheduler", "server/model", "server/engine", "kernels", "proto"],
    "server/frontend": ["server/base", "server/text", "server/engine/device_memory.h", "server/engine/engine.h",
                        "server/scheduler/request.h", "server/scheduler/step_plan.h", "proto"],
    "server/cli": ["server", "kernels", "proto"],
    "server/main.cc": ["server", "kernels", "proto"],
}
# Libraries that only some folders may see: pattern of the include -> folders.
RESTRICTED = [
    (r"^(cuda|cublas|nccl|nvtx)", ["kernels/cuda", "kernels/comm"]),
    (r"^(grpc|google/protobuf|google/rpc)|\.pb\.h$", ["server/frontend", "server/cluster", "server/cli", "server/main.cc"]),
    (r"^spdlog/", ["server/base"]),
    (r"^zlib", ["server/bench"]),
    (r"^nlohmann/", ["server/base"]),
]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]')


def folder_of(path):
    return next((f for f in sorted(ALLOWED, key=len, reverse=True) if path == f or path.startswith(f + "/")), None)


def broken_includes(root):
    for file in sorted(p for top in ("server", "kernels") for p in (root / top).rglob("*")
                       if p.suffix in (".h", ".cc", ".cu", ".cuh", ".inc")):
        path = file.relative_to(root).as_posix()
        home = folder_of(path)
        for number, line in enumerate(file.read_text().splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            include = match.group(1)
            where = f"{path}:{number}: includes {include}"
            if home is None:
                yield f"{where}, but {path} belongs to no layer; name it in tests/layering/check_includes.py"
                continue
            for pattern, folders in RESTRICTED:
                if re.search(pattern, include) and not any(path == f or path.startswith(f + "/") for f in folders):
                    yield f"{where}, which only {', '.join(folders)} may"
            if include.startswith(("server/", "kernels/")):
                allowed = ALLOWED[home] + [home]
                if not any(include == a or include.startswith(a + "/") for a in allowed):
                    yield f"{where}, but {home} may use only {', '.join(allowed)}"
            elif line.split("include", 1)[1].strip().startswith('"') and (root / include).exists() is False \
                    and not include.endswith(".pb.h"):
                yield f"{where}: write includes from the root of the project"


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    problems = list(broken_includes(root))
    print("\n".join(problems) if problems else "include layering: ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
