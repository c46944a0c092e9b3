#!/usr/bin/env python3
"""Breaks what only nvcc compiles of the kernels, one way at a time, and demands that the tests for a GPU notice each when
their PTX is run on the host.

    mutation_test.py SOURCE_DIR BUILD_DIR [NAME...]

Needs nvcc and a built cuda_kernels_gpu_test_on_ptx.
"""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

DEVICE, HOPPER = "ptx_device.h", "ptx_hopper_device.h"
# name, file in kernels/cuda, text, replacement, the kernels' files that are compiled anew, tests
MUTATIONS = [
    ("bf16 pairs the other way around", DEVICE, '"f"(high), "f"(low)', '"f"(low), "f"(high)', ["rms_norm"], "CudaRowOps*"),
    ("vectors of four are stored in another order", DEVICE, '"r"(value.z),\n               "r"(value.w)',
     '"r"(value.w),\n               "r"(value.z)', ["rms_norm"], "CudaRowOps*"),
    ("weights are loaded in another order", DEVICE, '"=r"(v.x), "=r"(v.y)', '"=r"(v.y), "=r"(v.x)', ["linear"], "CudaLinear*"),
    ("2^-x", DEVICE, '"=f"(y) : "f"(x)', '"=f"(y) : "f"(-x)', ["paged_attention"], "CudaPagedAttention*"),
    ("the lower half of the product", DEVICE, "__umul64hi(x, y)", "x * y", ["sample"], "CudaSample*"),
    ("a block counts itself twice", DEVICE, '"=r"(before) : "l"(to), "r"(value)', '"=r"(before) : "l"(to), "r"(value * 2)',
     ["sample"], "CudaSample*"),
    ("copies of what lies outside", DEVICE, '"r"(inside ? 16 : 0)', '"r"(16)', ["linear_tiles"], "CudaLinear*"),
    ("copies are not waited for", DEVICE, '"n"(kPending)', '"n"(kPending + 1)', ["linear_tiles"], "CudaLinear*"),
    ("matrices are not transposed", DEVICE, "m8n8.x4.trans.shared", "m8n8.x4.shared", ["paged_attention_mma"],
     "CudaPagedAttention*"),
    ("the second operand's halves are exchanged", DEVICE, "{%8, %9}", "{%9, %8}", ["linear"], "CudaLinear*"),
    ("the first operand's rows are exchanged", DEVICE, "{%4, %5, %6, %7}", "{%5, %4, %6, %7}", ["linear"], "CudaLinear*"),
    ("a product replaces the sum", DEVICE, "{%0, %1, %2, \"\n      \"%3};", "{%0, %1, %2, \"\n      \"%2};", ["linear"],
     "CudaLinear*"),
    ("barriers of twice as many", DEVICE, '"bar.sync %0, %1;" ::"r"(id), "r"(threads)',
     '"bar.sync %0, %1;" ::"r"(id), "r"(threads * 2)', ["paged_attention_hopper"], "CudaPagedAttention*LongParts*"),
    ("boxes' rows and columns are exchanged", HOPPER, "[%1, {%2, %3}]", "[%1, {%3, %2}]", ["paged_attention_hopper"],
     "CudaPagedAttention*LongParts*"),
    ("the other parity is waited for", HOPPER, '"r"(parity)', '"r"(parity ^ 1)', ["paged_attention_hopper"],
     "CudaPagedAttention*LongParts*"),
    ("half of the bytes are announced", HOPPER, '"r"(bytes)', '"r"(bytes / 2)', ["paged_attention_hopper"],
     "CudaPagedAttention*LongParts*"),
    ("one arrival too many is waited for", HOPPER, '"r"(arrivals)', '"r"(arrivals + 1)', ["paged_attention_hopper"],
     "CudaPagedAttention*LongParts*"),
    ("values are K-major", HOPPER, '"n"(static_cast<int>(kMnMajor))', '"n"(0)', ["paged_attention_hopper"],
     "CudaPagedAttention*LongParts*"),
    ("sums begin with what was there", HOPPER, "setp.ne.b32 p, %37, 0", "setp.eq.b32 p, %37, %37", ["paged_attention_hopper"],
     "CudaPagedAttention*LongParts*"),
    ("a's registers in another order", HOPPER, "{%32, %33, %34, %35}", "{%32, %34, %33, %35}", ["paged_attention_hopper"],
     "CudaPagedAttention*LongParts*"),
    ("sums' registers in another order", HOPPER, '"+f"(d[i + 2]), "+f"(d[i + 3])', '"+f"(d[i + 3]), "+f"(d[i + 2])',
     ["paged_attention_hopper"], "CudaPagedAttention*LongParts*"),
    ("another flag is released", DEVICE, 'st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value)',
     'st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value + 1)', ["all_reduce"], "CudaAllReduce*Mixing*"),
    ("nobody's time passes", DEVICE, "mov.u64 %0, %%globaltimer;", "mov.u64 %0, 0;", ["all_reduce"], "CudaAllReduce*"),
]


def main():
    source, build = (pathlib.Path(path).resolve() for path in sys.argv[1:3])
    wanted = sys.argv[3:]
    program = build / "tests/ptx/cuda_kernels_gpu_test"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    missed = ran = 0
    for name, file, text, instead, kernels, tests in MUTATIONS:
        if wanted and name not in wanted:
            continue
        with tempfile.TemporaryDirectory(prefix="altiplano-ptx-") as folder:
            tree = pathlib.Path(folder)
            shutil.copytree(source / "kernels", tree / "kernels")
            path = tree / "kernels/cuda" / file
            body = path.read_text()
            if text not in body:
                sys.exit(f"mutation_test: {name}: {file} has no {text!r}")
            path.write_text(body.replace(text, instead))
            for kernel in kernels:
                subprocess.run([nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{tree}", "-arch=compute_90a", "-ptx",
                                str(tree / f"kernels/cuda/{kernel}.cu"), "-o", str(tree / f"{kernel}.ptx")], check=True)
            env = dict(os.environ, ALTIPLANO_PTX_INSTEAD=folder)
            try:
                result = subprocess.run([str(program), f"--gtest_filter={tests}", "--gtest_brief=1"], env=env, timeout=120,
                                        capture_output=True, text=True)
                lines = (result.stdout + result.stderr).splitlines()
                # A test's failure or a kernel's fault, and not that this PTX cannot be read.
                said = next((line for line in lines if line.startswith("GPU ") or "FAILED" in line), "")
                caught = result.returncode != 0 and said != ""
            except subprocess.TimeoutExpired:
                caught, said = True, "no end within two minutes"
        ran += 1
        missed += not caught
        print(f"{'caught' if caught else 'MISSED'}: {name}" + (f": {said[:150]}" if caught else ""), flush=True)
    if ran == 0:
        sys.exit("mutation_test: no mutation of that name")
    print(f"{ran - missed} of {ran} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
