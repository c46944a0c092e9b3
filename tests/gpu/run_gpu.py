#!/usr/bin/env python3
"""Correctness first, then speed, on the GPU of this machine; everything that is found lies in one folder.

    run_gpu.py --programs DIR [--out DIR] [--dry] [--slice SECONDS] [--only PART,...] [--case-seconds SECONDS]

DIR holds gpu_bench, cuda_kernels_gpu_test, llama_on_real_gpu_test and altiplano (a part whose program is missing is left out,
and the table says so). Each part may fail alone; each suite of tests is one, since a kernel's fault stays with its process. state.json in the output folder remembers what is done: when the slice
of time is over, the same command goes on where this one stopped (exit code 75: call again). --dry runs nothing on a GPU
and needs none. Exit code 0: all parts passed; 1: some failed; 69: there is no GPU, or it answers no more.
"""
import argparse
import datetime
import glob
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# In a process each: what a large batch cannot do costs the others nothing.
STREAMS = ((1, 2, 4, 8, 16, 32), (64, 128, 256))
PROMPTS = (512, 2048, 8192, 32768)
# One rank's part of a large model: model, ranks; its bytes of FP8 matrices and a bf16 head over those of
# bf16 (docs/measurements/*-projection-*).
SHARDS = (("70b", 4, 0.508), ("70b", 8, 0.508), ("405b", 8, 0.503))
# All ranks of a model on the one GPU, so many layers of it: 8 of 405B are 60 GB, 16 of 70B are 32 GB.
TOGETHER = (("70b", 4, 16), ("70b", 8, 16), ("405b", 8, 8))
# Ranks of one process that share a GPU wait for each other in kernels. Their streams must not share a queue of the
# hardware, and no kernel may be loaded in the middle of a step: the driver may wait for the whole GPU then.
TOGETHER_ENV = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
# A case that takes longer hangs. The longest, a prompt of 32768 tokens, is 9 TFLOP about 35 times: a few seconds. What is
# slow once lies before the first case (contexts, cuBLASLt, filling memory, the import of torch), but for what is loaded on
# first use: kernels, cuDNN. Ranks wait 10 s for one that does not come before they fail.
CASE_SECONDS, RANKS_CASE_SECONDS, TORCH_CASE_SECONDS = 30, 45, 60
# So much of what hung cases take is not counted against their part: a slice and this stay below ten minutes.
HUNG_SECONDS = 60
CHECK_SECONDS = 20  # for gpu_bench --check: contexts of all GPUs
MOST_READERS = 64  # of the 256 that there may be; each has 16 MiB of pinned memory
# What else than an exit code may come of a command.
LATE, HUNG, STUCK = "late", "hung", "stuck"


class Part:
    """One command. seconds: what it may take; unless so much is left of the slice, it waits for the next. lines: a file
    in which the command leaves a line for each case that it has done, the one that it failed in (exit code 1) included;
    with --skip N it goes on behind those. In FILE.running it leaves the case that it is at, which may take case_seconds."""

    def __init__(self, name, command, seconds, needs, dry=None, kind="speed", may_not_fit=False, env=None, lines=None,
                 case_seconds=CASE_SECONDS):
        self.name, self.command, self.seconds, self.needs, self.kind = name, command, seconds, needs, kind
        self.dry, self.may_not_fit, self.env, self.lines, self.case_seconds = dry, may_not_fit, env or {}, lines, case_seconds
        self.running = lines and lines.with_name(lines.name + ".running")


class Gpu:
    """Which may not survive what hung on it. silent: empty, or why nothing more is to be measured."""

    def __init__(self, program=None, env=None):
        self.command, self.env, self.silent = program and [str(program), "--check"], env, ""

    def ask(self, ended, log):
        """Has a new process use it, since nvidia-smi answers beside a kernel that never ends. ended: the last one was."""
        if self.command is None:
            return
        if not ended:
            self.silent = "the driver holds a process that hung, and nothing ends it"
            return
        if not os.path.exists(self.command[0]):
            return
        result = run_to_end(self.command, log, self.env, CHECK_SECONDS)
        if result != 0:
            said = f"took longer than {CHECK_SECONDS} s" if result in (LATE, STUCK) else f"exit code {result}"
            self.silent = f"the GPU answers no more (gpu_bench --check: {said})"


def suites_of(program, env):
    """The names of a test program's suites; none where it does not say."""
    try:
        said = subprocess.run([program, "--gtest_list_tests"], capture_output=True, text=True, env=env, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split()[0].removesuffix(".") for line in said.splitlines() if re.match(r"\S+\.(\s|$)", line)]


def tool(name):
    """A program of the toolkit, which is often not on the path; None where it is not at all."""
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/local/cuda*/bin/{name}"), reverse=True)), None)


def parts_of(programs, out, env):
    def program(name):
        return str(programs / name)

    def bench(part, seconds, env=None, case_seconds=CASE_SECONDS):
        base = [program("gpu_bench"), "--part", part, "--json", str(out / f"{part}.jsonl")]
        return Part(part, base, seconds, program("gpu_bench"), base + ["--dry"], env=env, lines=out / f"{part}.jsonl",
                    case_seconds=case_seconds)

    def tests(name, seconds, env_of_tests=None):
        def part(part_name, base):
            return Part(part_name, base + [f"--gtest_output=json:{out / part_name}.json"], seconds, program(name),
                        base + ["--gtest_list_tests"], "correctness", env=env_of_tests)
        return [part(f"{name}.{suite.replace('/', '-')}", [program(name), f"--gtest_filter={suite}.*"])
                for suite in suites_of(program(name), env)] or [part(name, [program(name)])]

    def sanitizer(check, seconds, tests_):
        base, found = [program("cuda_kernels_gpu_test"), f"--gtest_filter={tests_}"], tool("compute-sanitizer")
        return Part(f"sanitizer_{check}", [found or "compute-sanitizer", "--tool", check, "--error-exitcode", "9"] + base,
                    seconds, found, base + ["--gtest_list_tests"], "correctness")

    # A rank's weights are made anew in each process: 16 GB of 8B, 60 of a part of 405B.
    readers = ["--load-threads", str(min(os.cpu_count() or 4, MOST_READERS))]

    def streams_of(group):
        return str(group[0]) if len(group) == 1 else f"{group[0]}_to_{group[-1]}"

    def engine(name, streams, input_len, output_len, extra=(), seconds=90):
        base = [program("altiplano"), "bench", "offline", "--json", "--streams", ",".join(map(str, streams)), *readers, *extra]
        model = ["--model", "random:8b", "--device", "cuda", "--dtype", "bf16", "--input-len", str(input_len),
                 "--output-len", str(output_len)]
        tiny = ["--model", str(ROOT / "tests/data/tiny"), "--device", "cpu", "--kv-memory", "64MiB", "--input-len", "8",
                "--output-len", "3"]
        return Part(name, base + model, seconds, program("altiplano"), base + tiny)

    def shard(model, ranks):
        checkpoint = f"random:{model},rank-of={ranks}"
        command = [program("altiplano"), "bench", "offline", "--model", checkpoint, "--device", "cuda", "--dtype", "bf16",
                   "--max-model-len", "2048", "--json", "--streams", "1", "--input-len", "512", "--output-len", "128", *readers]
        return Part(f"shard_{model}_{ranks}", command, 180, program("altiplano"),
                    [program("altiplano"), "inspect", checkpoint], may_not_fit=True)

    def plan(model, ranks):
        command = [program("altiplano"), "plan", "--model", model, "--gpus", f"{ranks}xH200", "--json"]
        return Part(f"plan_{model}_{ranks}", command, 30, program("altiplano"), command)

    def together(model, ranks, layers, extra):
        base = [program("altiplano"), "bench", "offline", "--tensor-parallel", str(ranks), "--json", *readers, *extra]
        command = base + ["--model", f"random:{model},layers={layers}", "--device", "cuda", "--dtype", "bf16", "--devices",
                          ",".join(["0"] * ranks), "--kv-memory", "1GiB", "--max-num-seqs", "8", "--max-model-len", "2048",
                          "--max-num-batched-tokens", "512", "--batch-invariant", "--streams", "1,8", "--input-len", "512",
                          "--output-len", "128"]
        dry = base + ["--model", str(ROOT / "tests/data/tiny"), "--device", "cpu", "--kv-memory", "16MiB", "--streams", "1",
                      "--input-len", "8", "--output-len", "4"]
        name = f"together_{model}_{ranks}" + ("_unsummed" if extra else "")
        return Part(name, command, 180, program("altiplano"), dry, may_not_fit=True, env=TOGETHER_ENV)

    small = "CudaRowOps*:CudaRope*:CudaLinear*Every*:CudaPagedAttention*DecodeIs*:CudaSample*Equal*"
    cases, all_streams = str(out / "cases.jsonl"), sum(STREAMS, ())
    compare = [sys.executable, str(HERE / "compare_devices.py"), program("altiplano"), str(ROOT / "tests/data/tiny")]
    # What says most comes first: a machine with a GPU is lent for half an hour, and may go away before.
    parts = [
        Part("machine", ["nvidia-smi", "-q"], 30, shutil.which("nvidia-smi"), ["true"]),
        # Ranks share the GPU in some of them.
        *tests("cuda_kernels_gpu_test", 120, TOGETHER_ENV),
        *tests("llama_on_real_gpu_test", 120),
        Part("tiny_model", compare, 300, program("altiplano"), compare + ["--dry"], "correctness"),
        bench("limits", 60),
        bench("linear", 120),
        bench("decode_attention", 90),
        bench("prefill_attention", 120),
        bench("row_ops", 90),
        bench("sample", 90),
        *(engine(f"engine_decode_{streams_of(group)}", group, 512, 128, seconds=120) for group in STREAMS),
        *(engine(f"engine_prefill_{n}", (1,), n, 2) for n in PROMPTS),
        Part("cases", [program("gpu_bench"), "--dry", "--json", cases], 10, program("gpu_bench"),
             [program("gpu_bench"), "--dry", "--json", cases]),
        Part("torch", [sys.executable, str(HERE / "torch_peers.py"), cases, str(out / "torch.jsonl")], 240,
             str(HERE / "torch_peers.py"), [sys.executable, "-m", "py_compile", str(HERE / "torch_peers.py")],
             env={"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")},  # torch has libraries of its own
             lines=out / "torch.jsonl", case_seconds=TORCH_CASE_SECONDS),
        # Without what hides the host's time for launches.
        engine(f"engine_decode_{streams_of(all_streams)}_eager", all_streams, 512, 128, ["--cuda-graphs", "off"], 180),
        engine("engine_decode_1_32_serial", (1, 32), 512, 128, ["--overlap-kernels=false"]),
        *(plan(model, ranks) for model, ranks, _ in SHARDS),
        *(shard(model, ranks) for model, ranks, _ in SHARDS),
        bench("linear_invariant", 90),
        bench("plain", 60),
        # The kernels take many times as long under these.
        sanitizer("memcheck", 200, small + ":CudaPagedAttention*LongPartsAreNear*"),  # TMA and wgmma, too
        sanitizer("racecheck", 200, small),
        # Last, should a GPU in whose kernels ranks wait for each other not recover; whether they sum rightly first.
        Part("tiny_model_together", compare + ["--ranks", "2,4,8"], 300, program("altiplano"),
             compare + ["--ranks", "2,4,8", "--dry"], "correctness", env=TOGETHER_ENV),
        bench("all_reduce", 120, env=TOGETHER_ENV, case_seconds=RANKS_CASE_SECONDS),
        *(together(*case, extra) for case in TOGETHER for extra in ([], ["--without-all-reduces"])),
    ]
    return parts


def wait_for(process, seconds, running, case_seconds):
    """Its exit code; LATE; or HUNG, when the file `running` was the same for too long."""
    end, seen, since = time.monotonic() + seconds, None, 0
    while True:
        now = time.monotonic()
        if running:
            try:
                found = os.stat(running)
                case = found.st_mtime_ns, found.st_size, found.st_ino
            except FileNotFoundError:
                case = None
            if case != seen:
                seen, since = case, now
            if case and now - since >= case_seconds:
                return HUNG
        if now >= end:
            return LATE
        try:
            return process.wait(min(end - now, 0.2) if running else end - now)
        except subprocess.TimeoutExpired:
            pass


def end_group(process):
    """Whether it ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        return False
    return True


def run_to_end(command, log, env, seconds, running=None, case_seconds=0):
    """The exit code; LATE when it took longer than `seconds`, HUNG when one case did, STUCK when it took too long and cannot
    be ended. Neither it nor what it has started (compute-sanitizer and others start the program that they look at) is left
    on the GPU, where the next part would measure it too."""
    if running:
        running.unlink(missing_ok=True)  # of a process before
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        result = wait_for(process, seconds, running, case_seconds)
    finally:
        ended = end_group(process)
    return result if ended else STUCK


def note(part, error):
    """Leaves a line for the case that a command came to its end in, unless there is no error to note; the case's name, or
    None where it was in none."""
    case = json_lines(part.running)[-1:]
    part.running.unlink(missing_ok=True)
    if not case or not error:
        return None
    whole = part.lines.read_bytes() if part.lines.exists() else b""
    with open(part.lines, "wb") as lines:
        lines.write(whole[:whole.rfind(b"\n") + 1] + json.dumps(case[0] | {"error": error}).encode() + b"\n")
    return case[0]["name"]


def run_cases(part, command, log, env, gpu):
    """Runs the command, and again behind each case that it failed, hung or died in. The first exit code that is not 0, or 0;
    and in words what else went wrong."""
    begin, not_counted, done, code, reasons = time.monotonic(), 0, 0, 0, []
    if part.lines:
        part.lines.unlink(missing_ok=True)  # of a try before
    while True:
        left = part.seconds + min(not_counted, HUNG_SECONDS) - (time.monotonic() - begin)
        result = run_to_end(command + (["--skip", str(done)] if done else []), log, env, left, part.running, part.case_seconds)
        ended_at, by_force = time.monotonic(), result in (LATE, HUNG, STUCK)
        died = not by_force and result < 0
        case = None
        if part.lines:
            case = note(part, f"hung: no result in {part.case_seconds} s" if result == HUNG else
                        "hung: nothing ends its process" if result == STUCK else
                        f"ended by signal {-result}" if died else None)
        if result == LATE:
            reasons.append(f"took longer than {part.seconds} s")
        elif by_force:
            reasons.append(f"{case or 'it'} hung")
        elif case:
            reasons.append(f"{case} died of signal {-result}")
        else:
            code = code or result
        if by_force:
            gpu.ask(ended=result != STUCK, log=log)
        if result == HUNG:
            not_counted += part.case_seconds + time.monotonic() - ended_at
        before, done = done, len(json_lines(part.lines)) if part.lines else 0
        if gpu.silent or done == before or not (result == 1 or case):
            return code, reasons


def run_part(part, out, dry, env, gpu):
    """(state, reason)"""
    if part.needs is None or not os.path.exists(part.needs):
        return "left out", f"there is no {pathlib.Path(part.needs).name if part.needs else part.command[0]}"
    command = part.dry if dry else part.command
    with open(out / f"{part.name}.log", "w") as log:
        log.write(" ".join(command) + "\n\n")
        log.flush()
        try:
            result, reasons = run_cases(part, command, log, env | part.env, gpu)
        except OSError as error:
            return "failed", str(error)
    if len(reasons) > 4:
        reasons[3:] = [f"{len(reasons) - 3} more"]
    if gpu.silent:
        reasons.append(gpu.silent)
    if reasons and result == 0:
        return "failed", "; ".join(reasons)
    lines = (out / f"{part.name}.log").read_text(errors="replace").splitlines()[2:]
    if not reasons and result == 69 and part.may_not_fit and any("memory" in line for line in lines):
        return "left out", "it does not fit: " + next(line for line in reversed(lines) if "memory" in line)[:160]
    if not reasons and result == 77:
        return "left out", lines[-1] if lines else "it said so"
    if result != 0:
        said = [line for line in lines if re.search(r"FAILED|rror|Fail", line)] or lines or ["nothing"]
        return "failed", "; ".join([f"exit code {result}: {said[0][:160]}", *reasons])
    report = out / f"{part.name}.json"
    if not dry and part.kind == "correctness" and report.exists():
        said = json.loads(report.read_text())
        skipped = sum(case["result"] == "SKIPPED" for suite in said["testsuites"] for case in suite["testsuite"])
        if skipped == said["tests"]:
            return "failed", f"all {skipped} tests skipped: the program found no GPU"
        return "passed", f"{said['tests'] - skipped} tests, {skipped} skipped"
    return "passed", ""


def json_lines(path):
    """But for a line that a program was ended in."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            pass
    return lines


def json_in(log):
    """What `bench offline --json` or `plan --json` wrote between other lines; {} when there is none. Lines of the program's
    log are JSON, too."""
    body = log.read_text(errors="replace") if log.exists() else ""
    for brace in re.finditer(r"^\{", body, re.MULTILINE):
        try:
            found = json.JSONDecoder().raw_decode(body[brace.start():])[0]
        except ValueError:
            continue
        if "ts" not in found:
            return found
    return {}


def step_ms(result):
    return 1e3 * result["streams"] / result["decode_tokens_per_second"]


def measured_together(out):
    """A dict for each model, number of ranks and of streams that was measured with sums and without, all on one GPU."""
    rows = []
    for model, ranks, layers in TOGETHER:
        summed, unsummed = (json_in(out / f"together_{model}_{ranks}{what}.log") for what in ("", "_unsummed"))
        for with_, without in zip(summed.get("results", []), unsummed.get("results", [])):
            if None in (with_["decode_tokens_per_second"], without["decode_tokens_per_second"]):
                continue  # at no time did all streams decode
            calls, streams = summed["all_reduces"]["a_step"], with_["streams"]
            rows.append({"model": model, "ranks": ranks, "layers": layers, "streams": streams, "calls": calls,
                         "message_bytes": streams * summed["all_reduces"]["token_bytes"], "step_ms": step_ms(with_),
                         "unsummed_ms": step_ms(without),
                         "call_us": 1e3 * (step_ms(with_) - step_ms(without)) / calls})
    return rows


def together(rows):
    """The section of README.md."""
    if not rows:
        return []
    lines = [f"| {row['model']}, {row['layers']} layers | {row['ranks']} | {row['streams']} | {row['message_bytes'] >> 10} | "
             f"{row['calls']} | {row['step_ms']:.3f} | {row['unsummed_ms']:.3f} | {row['call_us']:.2f} |" for row in rows]
    return ["", "## All ranks on this one GPU", "",
            "Measured: decode steps of all ranks of a model (random bf16 weights, the layers that fit), threads of one process with a",
            "stream each on this GPU, whose all-reduce kernels meet in its memory; the same with the sums left out (each rank norms its",
            "own part; the logits' gather and the ids' broadcast stay); and the difference, for each call. Prompts went by",
            "`--batch-invariant`, so that nobody opens a library while others wait in kernels.",
            "- **What it says**: that the kernels run and meet on a GPU, and what a call costs without a link: launch, laying out,",
            "  flags, sums. Where ranks come late to a call, that is in it too.",
            "- **What it does not**: how ranks scale. They share the multiprocessors and the memory, so a step computes all ranks'",
            "  parts and takes about as long as one rank with all of these layers. Nor NVLink: flags and messages go through this",
            "  GPU's L2. Nor is it a bound: without sums ranks drift apart and fill each other's gaps, which the difference",
            "  counts as the sums' cost, and what a call waits for, the others compute meanwhile.",
            "- **No deadlock by geometry**: at most 8 ranks x 16 blocks of at most 512 threads wait at one time, fewer than this GPU",
            "  must have multiprocessors for (132 on H100 and H200), so that some are always free for a rank that still computes; a",
            "  stream each has a queue of its own (CUDA_DEVICE_MAX_CONNECTIONS=32), and kernels are loaded before",
            "  (CUDA_MODULE_LOADING=EAGER). Were it otherwise, kernels leave after --step-deadline and the part fails.", "",
            "| | ranks | streams | KiB a call | calls a step | step ms | without sums ms | us a call |",
            "|---|---|---|---|---|---|---|---|", *lines]


def all_reduces(out, copy):
    """The section of README.md. copy: GB/s of this GPU, or None."""
    rows = []
    for line in json_lines(out / "all_reduce.jsonl"):
        if "us" in line:
            rate = line["bytes"] / line["us"] * 1e-3
            share = f"{100 * rate / copy:.0f} %" if copy and line["gpus"] == 1 else ""
            rows.append(f"| {line['name']} | {line['message'] >> 10} | {line['us']:.2f} | {line['least_us']:.2f} | "
                        f"{line['bytes'] / (1 << 20):.2f} | {rate:.0f} | {share} |")
    if not rows:
        return []
    return ["", "## All-reduces", "",
            "Measured: graphs of calls of our own kernels, each rank a thread of one process with a stream of its own; the time of one",
            "call, from the rank that began last. Moved: by all ranks together, through mailboxes that L2 may keep; share: of this GPU's",
            "copy bandwidth. On one GPU that is the kernel, its launch and its waits for the others, **not NVLink**: what it would",
            "cost without a link. Several GPUs are there only where the machine has them and they reach each other's memory.", "",
            "| | KiB a rank | us a call | least us | MiB moved | GB/s | share |", "|---|---|---|---|---|---|---|", *rows]


def projection(out, together_rows):
    """Tokens per second of a whole group, from the step that one rank's part was measured to take."""
    rows = []
    for model, ranks, fp8 in SHARDS:
        said, sums = json_in(out / f"shard_{model}_{ranks}.log"), json_in(out / f"plan_{model}_{ranks}.log").get("all_reduces")
        here = [row["call_us"] for row in together_rows
                if (row["model"], row["ranks"], row["streams"]) == (model, ranks, 1) and row["call_us"] > 0]
        for result in said.get("results", []) if sums else []:
            if result["decode_tokens_per_second"] is None:
                continue
            step, weights = step_ms(result), said["weight_bytes"]
            beside = sums["hidden_weights_us"] / sums["a_step"]
            calls = (4.5, sums["one_token_us"], sums["one_token_us"] - beside, 24, *here)
            reduces = [sums["a_step"] * us * 1e-3 for us in calls]
            missing = "" if here else " / -"

            def rates(alone):
                return " / ".join(f"{1e3 / (alone + ms):.1f}" for ms in reduces) + missing

            rows.append(f"| {model} of {ranks} | {step:.2f} | {weights * 1e-9:.1f} | {weights / step * 1e-6:.0f} | "
                        + " / ".join(f"{ms:.2f}" for ms in reduces) + missing
                        + f" | {rates(step)} | {weights * fp8 * 1e-9:.1f} | {rates(step * fp8)} |")
    if not rows:
        return []
    return ["", "## One rank of a large model, and what the group would give", "",
            "**A projection.** Measured: the decode step of one stream with one rank's part of the model (random bf16 weights, all",
            "layers, context 512 to 640), alone on this GPU. Added: the all-reduces of one token that `altiplano plan` counts, at 4.5 us",
            "each (the least that NCCL's own model has for symmetric memory), at plan's own (a line through the published 7.8 us of",
            "32 KiB and 16.7 us of 256 KiB, 8 H100, one shot), at that less the weights that plan reckons to be read beside them, at 24 us",
            "(NCCL's ring), and at what a call was measured to cost with all ranks on this one GPU, without a link (above; - where that is",
            "missing). Not in it: the logits' gather, ranks that come late, NVLink under load,",
            "power limits of several busy GPUs, the host's work for all ranks. For FP8 the measured step is scaled by the bytes of FP8",
            "matrices with a bf16 head, as if FP8 kernels read at the same rate and nothing else took time: no FP8 kernel ran.",
            "Bars, of eight H200: 405B in FP8 at least 63 tok/s, 70B at least 240.", "",
            "| | step ms | GB bf16 | GB/s | all-reduces ms | tok/s bf16 | GB FP8 | tok/s FP8 |", "|---|---|---|---|---|---|---|---|",
            *rows]


def summary(parts, state, out, about):
    """The table of README.md."""
    torch = {line["name"]: line for line in json_lines(out / "torch.jsonl")}
    limits = {line["name"].split()[0]: line["bytes"] / line["us"] * 1e-3
              for line in json_lines(out / "limits.jsonl") if "us" in line}  # GB/s
    product = next((line["tflops"] for line in torch.values() if line.get("limit") == "product"), None)
    text = [f"# {about['date']}, {about['card']}, {about['commit']}", ""]
    if about["dry"]:
        text += ["**A rehearsal: nothing ran on a GPU.** The engine's rows are a tiny model's on the CPU.", ""]
    text += ["## Parts", "", "| part | | |", "|---|---|---|"]
    for part in parts:
        entry = state.get(part.name, {"state": "not yet", "reason": ""})
        text.append(f"| {part.name} | {entry['state']} | {entry['reason'].replace('|', '/')} |")
    if limits or product:
        text += ["", "Limits measured here: " + ", ".join(
            [f"{name} {rate:.0f} GB/s" for name, rate in limits.items()] +
            ([f"product of 8192^3 by cuBLAS {product:.0f} TFLOP/s"] if product else [])) + "."]
    rows = []
    for name in ("linear", "linear_invariant", "decode_attention", "prefill_attention", "row_ops", "sample", "plain"):
        for line in json_lines(out / f"{name}.jsonl"):
            if "us" not in line:
                continue
            us = line["us"]
            # Row operations write about as much as they read; the others read.
            rate = limits.get("copy" if name == "row_ops" else "read")
            floors = [line["bytes"] / rate * 1e-3] if rate else []
            if product:
                floors.append(line["flops"] / product * 1e-6)
            share = f"{100 * max(floors) / us:.0f} %" if floors else ""
            peer = torch.get(line["name"].removesuffix(", batch-invariant"), {})
            against = f"{peer['us'] / us:.2f} of {peer['peer']}" if "us" in peer else ""
            rows.append(f"| {line['name']} | {us:.1f} | {line['bytes'] / us * 1e-3:.0f} | "
                        f"{line['flops'] / us * 1e-6:.1f} | {share} | {against} |")
    if rows:
        text += ["", "## Ops", "", "Share: of the least time that the limits allow. Against: our speed over the peer's.", "",
                 "| op | us | GB/s | TFLOP/s | share | against |", "|---|---|---|---|---|---|", *rows]
    rows = [f"| {part.name} | {line['name']} | {line['error'].replace('|', '/')} |"
            for part in parts if part.lines for line in json_lines(part.lines) if "error" in line]
    if rows:
        text += ["", "## Cases without a time", "", "| part | case | |", "|---|---|---|", *rows]
    rows = []
    for path in sorted(out.glob("engine_*.log"), key=lambda p: (p.name.split("_")[1], int(re.findall(r"\d+", p.name)[0]), p.name)):
        said = json_in(path)
        for result in said.get("results", []):
            decode, streams = result["decode_tokens_per_second"], result["streams"]
            rates = "– | –" if decode is None else f"{decode:.1f} | {decode / streams * said['weight_bytes'] * 1e-9:.0f}"
            gap, issue, step = (result[name]["median"] for name in ("host_gap_us", "issue_us", "device_step_us"))
            rows.append(f"| {path.stem} | {streams} | {said['input_len']} | {result['mean_ttft_ms']:.1f} | "
                        f"{result['prefill_tokens_per_second']:.0f} | {rates} | {gap:.1f} | "
                        f"{result['host_gap_us']['p90']:.1f} | {issue:.0f} | {step:.0f} | "
                        f"{result['decode_steps_from_graphs']} of {result['decode_steps']} |")
    if rows:
        text += ["", "## Engine, 8B of random weights", "",
                 "Host gap: of the steps that decode all streams, how long the GPU waits between the end of one and the begin of the next",
                 "(CUDA events around each), median and ninth decile. Issue: the host's time to enqueue a step. Step: the GPU's from begin",
                 "to end, in which kernels that are issued one by one may wait for the host, too.", "",
                 "| | streams | prompt | mean TTFT ms | prefill tok/s | decode tok/s | weights GB/s | host gap us | p90 | issue us "
                 "| step us | from graphs |",
                 "|---|---|---|---|---|---|---|---|---|---|---|---|", *rows]
    rows = [] if about["dry"] else measured_together(out)
    if rows:
        (out / "together.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text += all_reduces(out, limits.get("copy")) + together(rows) + projection(out, rows)
    write(out / "README.md", "\n".join(text) + "\n")
    return "\n".join(text)


def card_name():
    try:
        said = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True,
                              timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    name = said.stdout.strip().splitlines()
    return re.sub(r"[^a-z0-9]+", "-", name[0].lower().replace("nvidia", "")).strip("-") if said.returncode == 0 and name else None


def commit(programs):
    bundled = programs.parent / "COMMIT"
    if bundled.exists():
        return bundled.read_text().strip()
    said = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def environment(programs):
    """cuBLASLt may lie in the toolkit or beside PyTorch; the bundle brings its own libraries."""
    folders = [str(programs.parent / "lib")] if (programs.parent / "COMMIT").exists() else []
    folders += sorted(glob.glob("/usr/local/cuda*/lib64"), reverse=True)
    try:
        import importlib.util
        spec = importlib.util.find_spec("nvidia")
        for base in (spec.submodule_search_locations if spec else []):
            folders += glob.glob(f"{base}/cu*/lib") + glob.glob(f"{base}/cublas/lib")
    except (ImportError, ValueError):
        pass
    before = os.environ.get("LD_LIBRARY_PATH")
    return dict(os.environ, LD_LIBRARY_PATH=":".join(folders + ([before] if before else [])), PYTHONUNBUFFERED="1")


def write(path, text):
    """All of it or nothing, also when the machine goes away."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def pack(out):
    """All of the folder in one file beside it, for machines from which few files come back."""
    packed = out.with_name(out.name + ".tar.gz")
    part = packed.with_suffix(".part")
    with tarfile.open(part, "w:gz", compresslevel=1) as archive:
        archive.add(out, out.name)
    os.replace(part, packed)


def folder_of(base, day, card, commit):
    """Today's, or yesterday's where midnight has come between."""
    today, yesterday = (base / f"{(day - datetime.timedelta(days=ago)).isoformat()}-{card}-{commit}" for ago in (0, 1))
    return yesterday if not today.exists() and (yesterday / "state.json").exists() else today


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of run_to_end, which ends what runs
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--slice", type=int, default=480)
    parser.add_argument("--only", default="")
    parser.add_argument("--case-seconds", type=int, help=f"a case that takes longer hangs ({CASE_SECONDS}, "
                        f"{RANKS_CASE_SECONDS} between ranks, {TORCH_CASE_SECONDS} of torch)")
    arguments = parser.parse_args()
    begin = time.monotonic()
    programs = arguments.programs.resolve()
    card = "dry" if arguments.dry else card_name()
    if card is None:
        print("run_gpu: nvidia-smi names no GPU on this machine; --dry rehearses without one", file=sys.stderr)
        return 69
    today = datetime.date.today()
    about = {"date": today.isoformat(), "card": card, "commit": commit(programs), "dry": arguments.dry}
    # Not in a folder of the tree's own: where the tree is copied anew for each slice, state.json would be gone with it.
    out = arguments.out or folder_of(ROOT / "build/gpu", today, card, about["commit"])
    out.mkdir(parents=True, exist_ok=True)
    state_path = out / "state.json"
    state = json.loads(state_path.read_text()) if state_path.exists() else {}
    env = environment(programs)
    parts = parts_of(programs, out, env)
    for part in parts:
        part.case_seconds = arguments.case_seconds or part.case_seconds
    gpu = Gpu() if arguments.dry else Gpu(programs / "gpu_bench", env)
    wanted = set(filter(None, arguments.only.split(",")))  # parts, or test programs with all their suites
    if unknown := wanted - {name for part in parts for name in (part.name, part.name.split(".")[0])}:
        print(f"run_gpu: no part {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in parts)}", file=sys.stderr)
        return 64

    def save():
        write(state_path, json.dumps(state, indent=1))
        try:
            table = summary(parts, state, out, about)
        except Exception:  # a result unlike what the table is made of is no reason to measure nothing else
            table = f"run_gpu: no table: {traceback.format_exc()}"
        try:
            pack(out)
        except OSError as error:
            print(f"run_gpu: {out} could not be packed: {error}", flush=True)
        return table

    ran = 0
    for part in parts:
        if wanted and not wanted & {part.name, part.name.split(".")[0]}:
            continue
        before = state.get(part.name, {"state": "", "tries": 0})
        # A part that was running when the machine went away is tried once more.
        if before["state"] not in ("", "running") or before["tries"] >= 2:
            if before["state"] == "running":
                before |= {"state": "failed", "reason": "the machine went away twice while it ran"}
            continue
        spent = time.monotonic() - begin
        if ran > 0 and spent + part.seconds > arguments.slice:
            save()
            print(f"run_gpu: {spent:.0f} s are spent; the same command goes on with {part.name}", flush=True)
            return 75
        ran += 1
        state[part.name] = {"state": "running", "reason": "", "tries": before["tries"] + 1}
        save()
        print(f"run_gpu: {part.name}", flush=True)
        started = time.monotonic()
        result, reason = run_part(part, out, arguments.dry, env, gpu)
        state[part.name] |= {"state": result, "reason": reason, "seconds": round(time.monotonic() - started, 1)}
        print(f"run_gpu: {part.name}: {result} {reason}", flush=True)
        save()
        if gpu.silent:
            print(f"run_gpu: {gpu.silent}; nothing more was measured. Once a program can use it again, the same command goes on "
                  f"behind {part.name}", flush=True)
            return 69
    table = save()
    print(table)
    print(f"\nrun_gpu: all of it in {out}, and in one file in {out}.tar.gz")
    return 1 if table.startswith("run_gpu:") or any(entry["state"] == "failed" for entry in state.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
