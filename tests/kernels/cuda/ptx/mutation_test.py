#!/usr/bin/env python3
"""Breaks what only nvcc compiles of the kernels, one way at a time, and demands that the tests for a GPU notice each when
their PTX is run on the host.

    mutation_test.py SOURCE_DIR BUILD_DIR [NAME...]

Needs nvcc and a built cuda_kernels_gpu_test_on_ptx.
"""
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))
from mutation_testlib import Mutation, Tree, run  # noqa: E402

DEVICE, HOPPER = "ptx_device.h", "ptx_hopper_device.h"
# The kernel's file that is compiled anew, and the tests.
PREFILL = "paged_attention_hopper", "CudaPagedAttention*LongParts*"
LINEAR = "linear_hopper", "CudaLinearHopper*"
# name, file in kernels/cuda, text, replacement, then as above
MUTATIONS = [
    ("bf16 pairs the other way around", DEVICE, '"f"(high), "f"(low)', '"f"(low), "f"(high)', "rms_norm", "CudaRowOps*"),
    ("vectors of four are stored in another order", DEVICE, '"r"(value.z),\n               "r"(value.w)',
     '"r"(value.w),\n               "r"(value.z)', "rms_norm", "CudaRowOps*"),
    ("weights are loaded in another order", DEVICE, '"=r"(v.x), "=r"(v.y)', '"=r"(v.y), "=r"(v.x)', "linear", "CudaLinear*"),
    ("2^-x", DEVICE, '"=f"(y) : "f"(x)', '"=f"(y) : "f"(-x)', "paged_attention", "CudaPagedAttention*"),
    ("the lower half of the product", DEVICE, "__umul64hi(x, y)", "x * y", "sample", "CudaSample*"),
    ("a block counts itself twice", DEVICE, '"=r"(before) : "l"(to), "r"(value)', '"=r"(before) : "l"(to), "r"(value * 2)',
     "sample", "CudaSample*"),
    ("copies of what lies outside", DEVICE, '"r"(inside ? 16 : 0)', '"r"(16)', "linear_tiles", "CudaLinear*"),
    ("copies are not waited for", DEVICE, '"n"(kPending)', '"n"(kPending + 1)', "linear_tiles", "CudaLinear*"),
    ("matrices are not transposed", DEVICE, "m8n8.x4.trans.shared", "m8n8.x4.shared", "paged_attention_mma",
     "CudaPagedAttention*"),
    ("the second operand's halves are exchanged", DEVICE, "{%8, %9}", "{%9, %8}", "linear", "CudaLinear*"),
    ("the first operand's rows are exchanged", DEVICE, "{%4, %5, %6, %7}", "{%5, %4, %6, %7}", "linear", "CudaLinear*"),
    ("a product replaces the sum", DEVICE, "{%0, %1, %2, \"\n      \"%3};", "{%0, %1, %2, \"\n      \"%2};", "linear",
     "CudaLinear*"),
    ("barriers of twice as many", DEVICE, '"bar.sync %0, %1;" ::"r"(id), "r"(threads)',
     '"bar.sync %0, %1;" ::"r"(id), "r"(threads * 2)', *PREFILL),
    ("boxes' rows and columns are exchanged", HOPPER, "[%1, {%2, %3}]", "[%1, {%3, %2}]", *PREFILL),
    ("the other parity is waited for", HOPPER, '"r"(parity)', '"r"(parity ^ 1)', *PREFILL),
    ("half of the bytes are announced", HOPPER, '"r"(bytes)', '"r"(bytes / 2)', *PREFILL),
    ("one arrival too many is waited for", HOPPER, '"r"(arrivals)', '"r"(arrivals + 1)', *PREFILL),
    ("values are K-major in heads of 64", HOPPER, '"n"(static_cast<int>(kMnMajor))', '"n"(0)', *PREFILL),
    ("values are K-major in heads of 128", HOPPER, '"n"(static_cast<int>(kMnMajor)));\n}\n\n//', '"n"(0));\n}\n\n//',
     *PREFILL),
    ("sums begin with what was there", HOPPER, "setp.ne.b32 p, %37, 0", "setp.eq.b32 p, %37, %37", *PREFILL),
    ("a's registers in another order", HOPPER, "{%32, %33, %34, %35}", "{%32, %34, %33, %35}", *PREFILL),
    ("sums' registers in another order", HOPPER, '"+f"(d[i + 2]), "+f"(d[i + 3])', '"+f"(d[i + 3]), "+f"(d[i + 2])',
     *PREFILL),
    ("products are not waited for", HOPPER, '"n"(kPending) : "memory"', '"n"(kPending + 1) : "memory"', *PREFILL),
    ("products' registers have no fence", HOPPER, 'PTX_SM90A("wgmma.fence.sync.aligned;" ::: "memory");', "", *PREFILL),
    ("sums are read whenever nvcc likes", HOPPER, "(Touch(registers), ...);", "((void)registers, ...);", *PREFILL),
    ("16 columns: the operands are exchanged", HOPPER, "%8, %9, p", "%9, %8, p", *LINEAR),
    ("32 columns: the operands are exchanged", HOPPER, "%16, %17, p", "%17, %16, p", *LINEAR),
    ("64 columns: the operands are exchanged", HOPPER, "%32, %33, p", "%33, %32, p", *LINEAR),
    ("16 columns: sums begin with what was there", HOPPER, "setp.ne.b32 p, %10, 0", "setp.eq.b32 p, %10, %10", *LINEAR),
    ("32 columns: sums begin with what was there", HOPPER, "setp.ne.b32 p, %18, 0", "setp.eq.b32 p, %18, %18", *LINEAR),
    ("64 columns: sums begin with what was there", HOPPER, "setp.ne.b32 p, %34, 0", "setp.eq.b32 p, %34, %34", *LINEAR),
    ("sums of several tiles are read whenever nvcc likes", HOPPER, "Touch(registers[i]);", "(void)registers[i];", *LINEAR),
    ("another flag is released", DEVICE, 'st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value)',
     'st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value + 1)', "all_reduce", "CudaAllReduce*Mixing*"),
    ("nobody's time passes", DEVICE, "mov.u64 %0, %%globaltimer;", "mov.u64 %0, 0;", "all_reduce", "CudaAllReduce*"),
]


def build_ptx(tree, scratch, mutation, text):
    """The program that has been built, and where it finds the PTX of the broken kernel."""
    copy = scratch / mutation.file
    copy.parent.mkdir(parents=True)
    copy.write_text(text)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    subprocess.run([nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{scratch}", f"-I{tree.source}",
                    "-arch=compute_90a", "-ptx", tree.source / f"kernels/cuda/{mutation.program}.cu",
                    "-o", scratch / f"{mutation.program}.ptx"], check=True)
    return tree.build / "tests/ptx/cuda_kernels_gpu_test", {"ALTIPLANO_PTX_INSTEAD": str(scratch)}


if __name__ == "__main__":
    run(Tree.of_arguments(),
        [Mutation(name, f"kernels/cuda/{file}", old, new, tests, kernel) for name, file, old, new, kernel, tests in MUTATIONS],
        timeout=120, build=build_ptx,
        must_say=r"(?m)^GPU \d+: |\[  FAILED  \]")  # and not that this PTX cannot be read
