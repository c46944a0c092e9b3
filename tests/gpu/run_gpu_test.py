#!/usr/bin/env python3
"""run_gpu.py with programs that only pretend: order, failures that cost one part, going on after an interruption, the
table. run_gpu_test.py"""
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest
import unittest.mock

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.dont_write_bytecode = True
import run_gpu  # noqa: E402

BENCH = """#!{python}
import json, os, sys, time
words = sys.argv[1:]
if "--check" in words:
    open("{asked}", "a").write("asked\\n")
    sys.exit(69 if {dead} else 0)
part = words[words.index("--part") + 1] if "--part" in words else "all"
if part == "row_ops" and {break_row_ops}:
    print("CUDA error: misaligned address")
    sys.exit(1)
skip = int(words[words.index("--skip") + 1]) if "--skip" in words else 0
if part == "sample" and {break_sample} and skip < 3:  # in the first and the third of four
    with open(words[words.index("--json") + 1], "a" if skip else "w") as out:
        for case in range(skip, 1 if skip == 0 else 3):
            measured = {{"error": "misaligned address"}} if case != 1 else {{"us": 1.0}}
            out.write(json.dumps({{"part": part, "name": f"Sample {{case}}", "bytes": 1e6, "flops": 0, **measured}}) + "\\n")
    print("CUDA error: misaligned address")
    sys.exit(1)
if part == "sample" and {hang_sample}:  # one after another does what a program can do
    path, does = words[words.index("--json") + 1], ["times", "hangs", "times", "faults", "aborts", "hangs", "hangs", "times", "hangs"]
    for case in range(skip, len(does)):
        line = {{"part": part, "name": f"Sample {{case}}", "bytes": 1e6, "flops": 0}}
        json.dump(line, open(path + ".running", "w"))
        out = open(path, "a" if case else "w")
        if does[case] == "hangs":
            out.write('{{"part": "sam')  # and is ended in the middle of a line
            out.flush()
            time.sleep(600)
        if does[case] == "aborts":
            os.abort()
        out.write(json.dumps(line | ({{"us": 4.0}} if does[case] == "times" else {{"error": "misaligned address"}})) + "\\n")
        out.close()
        if does[case] == "faults":
            os.remove(path + ".running")
            print("CUDA error: misaligned address")
            sys.exit(1)
    sys.exit(0)
lines = {{"limits": [("copy of 1 GiB", 2e9, 0, 1000.0), ("read of 2 GiB", 2e9, 0, 1000.0)],
         "linear": [("Linear 8b qkv, 1 tokens", 1e9, 1e9, 1000.0)],
         "sample": [("Sample 3", 1e6, 0, 4.0)],
         "all_reduce": [("AllReduceSum 70b, 1 tokens, 8 ranks on 1 GPU", 1 << 20, 0, 10.0)]}}.get(part, [])
if part == "all_reduce" and "--dry" not in words:
    assert os.environ["CUDA_MODULE_LOADING"] == "EAGER" and os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
with open(words[words.index("--json") + 1], "a" if skip else "w") as out:
    for name, bytes_, flops, us in lines:
        out.write(json.dumps({{"part": part, "name": name, "bytes": bytes_, "flops": flops, "message": 32768, "gpus": 1,
                              **({{}} if "--dry" in words else {{"us": us, "least_us": us - 1}})}}) + "\\n")
"""
TESTS = """#!{python}
import json, os, sys
if "--gtest_list_tests" in sys.argv and not any("filter" in word for word in sys.argv):
    print("Running main() from ./googletest/src/gtest_main.cc\\nCudaOne.\\n  Adds\\n  Takes\\nAll/CudaTwo.\\n  Adds/0  # GetParam() = 1")
suite = next((word.split("=")[1] for word in sys.argv if word.startswith("--gtest_filter=")), "")
if "kernels" in sys.argv[0] and suite and "--gtest_list_tests" not in sys.argv:
    assert suite in ("CudaOne.*", "All/CudaTwo.*"), suite
    assert os.environ["CUDA_MODULE_LOADING"] == "EAGER" and os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    if {breaks_one} and suite == "CudaOne.*":
        print("[  FAILED  ] CudaOne.Adds: cudaErrorIllegalAddress")
        os.abort()
report = [word.split(":", 1)[1] for word in sys.argv if word.startswith("--gtest_output=json:")]
if report:
    case = {{"result": "SKIPPED" if {skipped} else "COMPLETED"}}
    json.dump({{"tests": 1, "testsuites": [{{"testsuite": [case]}}]}}, open(report[0], "w"))
"""
ENGINE = """#!{python}
import json, os, sys
words = sys.argv[1:]
LOG = '{{"ts":"2026-11-28T20:50:52.491Z","level":"warn","event":"the checkpoint has no chat template"}}'
if words[0] == "generate":
    alone = words[words.index("--tensor-parallel") + 1] == "1"
    print("Paris." if {agrees} or "cpu" in words or ({ranks_disagree} and alone) else "Lyon.")
if words[0] == "plan":
    print(json.dumps({{"all_reduces": {{"a_step": 161, "token_bytes": 32768, "one_token_us": 7.8, "hidden_weights_us": 322}}}}, indent=2))
if words[0] == "bench" and "405b" in " ".join(words):
    print(LOG)
    print("altiplano bench: no memory for weights of 94.5 GiB")
    sys.exit(69)
if words[0] == "bench":
    ranks = int(words[words.index("--tensor-parallel") + 1]) if "--tensor-parallel" in words else 1
    if ranks > 1 and "cuda" in words:
        assert words[words.index("--devices") + 1] == ",".join(["0"] * ranks), words
        assert os.environ["CUDA_MODULE_LOADING"] == "EAGER" and os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    unsummed = "--without-all-reduces" in words
    def rate(streams):
        return 200.0 if not unsummed else 400.0 if streams == 1 else 250.0
    print(LOG)
    if {odd}:
        print(json.dumps({{"results": [{{}}]}}, indent=2))
        sys.exit(0)
    print(json.dumps({{"weight_bytes": 16e9, "input_len": 512, "all_reduces": {{"a_step": 33, "token_bytes": 32768}}, "results": [
          {{"streams": int(streams), "mean_ttft_ms": 5.0, "prefill_tokens_per_second": 100.0,
            "decode_tokens_per_second": rate(int(streams)) * (int(streams) if ranks > 1 else 1), "decode_steps": 127,
            "decode_steps_from_graphs": 0 if "off" in words else 127, "host_gap_us": {{"median": 3.25, "p90": 7.5}},
            "issue_us": {{"median": 40.0}}, "device_step_us": {{"median": 4900.0}}}}
          for streams in words[words.index("--streams") + 1].split(",")]}}, indent=2))
"""
# Calls nothing, and times everything at 3 ms, of three calls.
TORCH = """import sys, time
from unittest.mock import MagicMock
torch = MagicMock(__version__="0", version=MagicMock(cuda="0"))
torch.backends.cudnn.version.return_value = 0
torch.cuda.get_device_name.return_value = "none"
torch.cuda.Event.return_value.elapsed_time.return_value = 3.0
memory = torch.randn.return_value.__mul__.return_value
memory.numel.return_value = 1 << 30
memory.__getitem__.return_value.view.side_effect = lambda *shape: MagicMock(rows=shape[0])
def mm(x, weight, out):
    if x.rows == 1:
        time.sleep(600)
    if x.rows == 2:
        raise RuntimeError("CUDA error: an illegal access\\nmore")
    if x.rows == 3:
        raise RuntimeError("CUDA out of memory")
torch.mm = mm
sys.modules["torch"] = torch
"""


class RunGpu(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        self.out = self.root / "out"
        (self.root / "bundle/bin").mkdir(parents=True)
        (self.root / "path").mkdir()
        (self.root / "bundle/COMMIT").write_text("abc1234\n")
        self.program("path/nvidia-smi", "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3'\n")
        self.programs()

    def program(self, name, text, **values):
        path = self.root / name
        path.write_text(text.format(python=sys.executable, **values) if values or "{python}" in text else text)
        path.chmod(0o755)

    def programs(self, break_row_ops=False, break_sample=False, hang_sample=False, dead=False, skipped=False, agrees=True, ranks_disagree=False, breaks_one=False, odd=False):
        self.program("bundle/bin/gpu_bench", BENCH, break_row_ops=break_row_ops, break_sample=break_sample, hang_sample=hang_sample,
                     dead=dead, asked=self.root / "asked")
        for name in ("cuda_kernels_gpu_test", "llama_on_real_gpu_test"):
            self.program(f"bundle/bin/{name}", TESTS, skipped=skipped, breaks_one=breaks_one)
        self.program("bundle/bin/altiplano", ENGINE, agrees=agrees and not ranks_disagree, ranks_disagree=ranks_disagree,
                     odd=odd)

    def run_gpu(self, *arguments, path=None):
        env = dict(os.environ, PATH=path if path is not None else f"{self.root}/path:{os.environ['PATH']}")
        return subprocess.run([sys.executable, HERE / "run_gpu.py", "--programs", self.root / "bundle/bin", "--out",
                               self.out, *arguments], capture_output=True, text=True, env=env, timeout=120)

    def state(self):
        return {name: entry["state"] for name, entry in json.loads((self.out / "state.json").read_text()).items()}

    def test_everything_passes_and_lands_in_one_table(self):
        result = self.run_gpu()
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        state = self.state()
        self.assertEqual(state.pop("torch"), "left out")  # or there is a torch here, and no GPU
        self.assertEqual({k for k, v in state.items() if v == "left out"},
                         {k for k in state if k.startswith("sanitizer")} | {"shard_405b_8", "together_405b_8", "together_405b_8_unsummed"})
        order = list(state)
        self.assertLess(order.index("cuda_kernels_gpu_test.CudaOne"), order.index("limits"))
        self.assertIn("cuda_kernels_gpu_test.All-CudaTwo", order)
        self.assertLess(order.index("sample"), order.index("engine_decode_1_to_32"))
        # The slow ones and those that may cost the GPU behind what says most.
        self.assertLess(order.index("engine_prefill_32768"), order.index("sanitizer_memcheck"))
        self.assertLess(order.index("sanitizer_racecheck"), order.index("tiny_model_together"))
        table = (self.out / "README.md").read_text()
        self.assertIn("h100-80gb-hbm3, abc1234", table)
        self.assertIn("read 2000 GB/s", table)
        self.assertIn("| Linear 8b qkv, 1 tokens | 1000.0 | 1000 | 1.0 | 50 % |", table)
        self.assertIn("| engine_decode_64_to_256 | 256 | 512 | 5.0 | 100 | 200.0 | 12 | 3.2 | 7.5 | 40 | 4900 | 127 of 127 |", table)
        self.assertIn("| engine_decode_1_to_256_eager | 256 | 512 | 5.0 | 100 | 200.0 | 12 | 3.2 | 7.5 | 40 | 4900 | 0 of 127 |", table)
        self.assertIn("| AllReduceSum 70b, 1 tokens, 8 ranks on 1 GPU | 32 | 10.00 | 9.00 | 1.00 | 105 | 5 % |", table)
        # 5 ms a step with sums, 2.5 or, of 8 streams, 4 without; 33 calls.
        self.assertIn("| 70b, 16 layers | 8 | 1 | 32 | 33 | 5.000 | 2.500 | 75.76 |", table)
        self.assertIn("| 70b, 16 layers | 4 | 8 | 256 | 33 | 5.000 | 4.000 | 30.30 |", table)
        self.assertEqual(len((self.out / "together.jsonl").read_text().splitlines()), 4)
        # 5 ms a step; 161 all-reduces of 4.5, 7.8, 7.8 less 2 beside which weights load, 24 and 75.76 us.
        self.assertIn("| 70b of 8 | 5.00 | 16.0 | 3200 | 0.72 / 1.26 / 0.93 / 3.86 / 12.20 | 174.7 / 159.9 / 168.5 / 112.8 / 58.1 | 8.1 | "
                      "306.3 / 263.4 / 287.9 / 156.2 / 67.9 |", table)
        self.assertIn("| shard_405b_8 | left out | it does not fit: altiplano bench: no memory", table)
        with tarfile.open(self.root / "out.tar.gz") as packed:
            self.assertEqual(packed.extractfile("out/README.md").read().decode(), table)
            self.assertEqual({name.removeprefix("out/") for name in packed.getnames()} - {"out"},
                             {path.name for path in self.out.iterdir()})

    def test_weights_are_made_by_as_many_threads_as_the_program_takes(self):
        for cores, readers in ((16, "16"), (512, "64"), (None, "4")):
            with unittest.mock.patch.object(os, "cpu_count", lambda: cores):
                parts = run_gpu.parts_of(self.root / "bundle/bin", self.out, dict(os.environ))
            engines = [part.command for part in parts if part.command[1:3] == ["bench", "offline"]]
            self.assertGreater(len(engines), 10)
            for command in engines:
                self.assertEqual(command[command.index("--load-threads") + 1], readers)

    def test_a_part_that_fails_costs_itself_alone(self):
        self.programs(break_row_ops=True)
        result = self.run_gpu()
        self.assertEqual(result.returncode, 1)
        state = self.state()
        self.assertEqual([k for k, v in state.items() if v == "failed"], ["row_ops"])
        self.assertIn("| row_ops | failed | exit code 1: CUDA error: misaligned address |",
                      (self.out / "README.md").read_text())
        # What is done is not done again.
        self.programs()
        self.assertEqual(self.run_gpu().returncode, 1)
        self.assertEqual(self.state(), state)

    def test_a_case_whose_kernel_faults_costs_no_other(self):
        self.programs(break_sample=True)
        self.assertEqual(self.run_gpu("--only", "sample").returncode, 1)
        table = (self.out / "README.md").read_text()
        self.assertIn("| sample | failed | exit code 1: CUDA error: misaligned address |", table)
        self.assertEqual([line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| Sample")],
                         ["Sample 1", "Sample 3"])
        self.assertEqual([line["name"] for line in run_gpu.json_lines(self.out / "sample.jsonl")],
                         [f"Sample {case}" for case in range(4)])

    def test_a_case_that_hangs_costs_no_other(self):
        self.programs(hang_sample=True)
        self.assertEqual(self.run_gpu("--only", "sample,plain", "--case-seconds", "1").returncode, 1)
        table = (self.out / "README.md").read_text()
        self.assertIn("| sample | failed | exit code 1: CUDA error: misaligned address; Sample 1 hung; Sample 4 died of signal 6; "
                      "Sample 5 hung; 2 more |", table)
        self.assertIn("| plain | passed |", table)
        self.assertIn("| sample | Sample 1 | hung: no result in 1 s |", table)
        self.assertIn("| sample | Sample 3 | misaligned address |", table)
        self.assertEqual([line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| Sample")],
                         ["Sample 0", "Sample 2", "Sample 7"])
        lines = run_gpu.json_lines(self.out / "sample.jsonl")
        self.assertEqual([line["name"] for line in lines], [f"Sample {case}" for case in range(9)])
        self.assertEqual([line.get("error") for line in lines],
                         [None, "hung: no result in 1 s", None, "misaligned address", "ended by signal 6", "hung: no result in 1 s",
                          "hung: no result in 1 s", None, "hung: no result in 1 s"])
        self.assertEqual(lines[1]["bytes"], 1e6)
        self.assertEqual((self.root / "asked").read_text(), "asked\n" * 4)  # behind what hung alone
        self.assertEqual(list(self.out.glob("*.running")), [])

    def test_a_gpu_that_answers_no_more_ends_the_run(self):
        self.programs(hang_sample=True, dead=True)
        result = self.run_gpu("--only", "row_ops,sample,plain", "--case-seconds", "1")
        self.assertEqual(result.returncode, 69)
        self.assertIn("run_gpu: the GPU answers no more (gpu_bench --check: exit code 69); nothing more was measured. Once a "
                      "program can use it again, the same command goes on behind sample", result.stdout)
        self.assertEqual(self.state(), {"row_ops": "passed", "sample": "failed"})
        table = (self.out / "README.md").read_text()
        self.assertIn("| sample | failed | Sample 1 hung; the GPU answers no more (gpu_bench --check: exit code 69) |", table)
        self.assertIn("| sample | Sample 1 | hung: no result in 1 s |", table)
        self.assertEqual(len(run_gpu.json_lines(self.out / "sample.jsonl")), 2)
        self.programs()
        self.assertEqual(self.run_gpu("--only", "row_ops,sample,plain").returncode, 1)
        self.assertEqual(self.state(), {"row_ops": "passed", "sample": "failed", "plain": "passed"})

    def part(self, text, seconds, case_seconds):
        """Of a program that knows its FILE as `path` and how many cases are done as `skip`."""
        lines = self.root / "cases.jsonl"
        lines.unlink(missing_ok=True)
        self.program("cases", f"#!{sys.executable}\nimport json, os, sys, time\npath = {str(lines)!r}\n"
                     "skip = int(sys.argv[2]) if sys.argv[1:] else 0\n"
                     "def begin(case): json.dump({'name': f'case {case}'}, open(path + '.running', 'w'))\n"
                     "def end(case): open(path, 'a').write(json.dumps({'name': f'case {case}', 'us': 1}) + '\\n')\n" + text)
        return run_gpu.Part("cases", [str(self.root / "cases")], seconds, str(self.root / "cases"), lines=lines,
                            case_seconds=case_seconds)

    def test_what_comes_before_the_first_case_may_take_longer(self):
        part = self.part("time.sleep(2)\nbegin(0)\nend(0)\n", 60, 1)
        part.running.write_text("{}")  # of a process before
        self.assertEqual(run_gpu.run_part(part, self.root, False, dict(os.environ), run_gpu.Gpu()), ("passed", ""))

    def test_a_case_before_which_others_took_long_does_not_hang(self):
        part = self.part("for case in range(6):\n  begin(case)\n  time.sleep(0.5)\n  end(case)\n", 60, 2)
        self.assertEqual(run_gpu.run_part(part, self.root, False, dict(os.environ), run_gpu.Gpu()), ("passed", ""))
        self.assertEqual(len(run_gpu.json_lines(part.lines)), 6)

    def test_the_time_of_a_case_that_hangs_is_not_its_parts(self):
        text = "begin(skip)\ntime.sleep(3 if skip else 600)\nend(skip)\n"
        for spared, expected in ((60, "case 0 hung"), (0, "case 0 hung; took longer than 6 s")):
            with unittest.mock.patch.object(run_gpu, "HUNG_SECONDS", spared):
                self.assertEqual(run_gpu.run_part(self.part(text, 6, 5), self.root, False, dict(os.environ), run_gpu.Gpu()),
                                 ("failed", expected))

    def test_behind_all_that_is_ended_the_gpu_is_asked(self):
        self.program("gpu", "#!/bin/sh\nsleep 60\n")
        part = self.part("time.sleep(600)\n", 1, 60)  # in no case
        with unittest.mock.patch.object(run_gpu, "CHECK_SECONDS", 1):
            silent = "the GPU answers no more (gpu_bench --check: took longer than 1 s)"
            gpu = run_gpu.Gpu(self.root / "gpu", dict(os.environ))
            self.assertEqual(run_gpu.run_part(part, self.root, False, dict(os.environ), gpu),
                             ("failed", f"took longer than 1 s; {silent}"))
            self.assertEqual(gpu.silent, silent)

    def test_behind_a_process_that_nothing_ends_nothing_is_measured(self):
        def end_group(process):
            real(process)
            return False
        self.program("gpu", "#!/bin/sh\nexit 0\n")
        gpu, real = run_gpu.Gpu(self.root / "gpu", dict(os.environ)), run_gpu.end_group
        with unittest.mock.patch.object(run_gpu, "end_group", end_group):
            result = run_gpu.run_part(self.part("begin(skip)\ntime.sleep(600)\n", 60, 1), self.root, False, dict(os.environ), gpu)
        self.assertEqual(result, ("failed", "case 0 hung; the driver holds a process that hung, and nothing ends it"))
        self.assertEqual([line["error"] for line in run_gpu.json_lines(self.root / "cases.jsonl")], ["hung: nothing ends its process"])

    def test_a_suite_whose_kernel_faults_costs_no_other(self):
        self.programs(breaks_one=True)
        self.assertEqual(self.run_gpu("--only", "cuda_kernels_gpu_test").returncode, 1)
        self.assertEqual(self.state(), {"cuda_kernels_gpu_test.CudaOne": "failed", "cuda_kernels_gpu_test.All-CudaTwo": "passed"})
        self.assertIn("| cuda_kernels_gpu_test.CudaOne | failed | exit code -6: [  FAILED  ] CudaOne.Adds: cudaErrorIllegalAddress |",
                      (self.out / "README.md").read_text())

    def test_what_a_part_has_started_ends_with_it(self):
        # As compute-sanitizer starts the program that it looks at.
        pid = self.root / "pid"
        self.program("starts", f"#!/bin/sh\nsleep 60 &\necho $! >{pid}\nwait\n")
        part = run_gpu.Part("starts", [str(self.root / "starts")], 1, str(self.root / "starts"))
        self.assertEqual(run_gpu.run_part(part, self.root, False, dict(os.environ), run_gpu.Gpu()),
                         ("failed", "took longer than 1 s"))
        running = pathlib.Path("/proc") / pid.read_text().strip() / "stat"
        for _ in range(50):  # whoever takes in orphans may leave a zombie
            if not running.exists() or running.read_text().split()[2] == "Z":
                return
            time.sleep(0.1)
        self.fail("it runs on")

    def test_results_unlike_any_end_nothing_but_the_table(self):
        self.programs(odd=True)
        result = self.run_gpu("--only", "engine_decode_1_to_32,engine_decode_64_to_256")
        self.assertEqual(result.returncode, 1)
        self.assertIn("run_gpu: no table: Traceback", result.stdout)
        self.assertEqual(self.state(), {"engine_decode_1_to_32": "passed", "engine_decode_64_to_256": "passed"})

    def test_a_line_that_a_program_was_ended_in_is_left_out(self):
        path = self.root / "limits.jsonl"
        path.write_text('{"us": 1}\n{"us": 2')
        self.assertEqual(run_gpu.json_lines(path), [{"us": 1}])
        self.assertEqual(run_gpu.json_lines(self.root / "none"), [])

    def test_midnight_does_not_begin_it_anew(self):
        day = datetime.date(2026, 3, 1)
        folder = run_gpu.folder_of(self.root, day, "h100", "abc")
        self.assertEqual(folder, self.root / "2026-03-01-h100-abc")
        folder.mkdir()
        self.assertEqual(run_gpu.folder_of(self.root, day + datetime.timedelta(1), "h100", "abc").name, "2026-03-02-h100-abc")
        (folder / "state.json").write_text("{}")
        self.assertEqual(run_gpu.folder_of(self.root, day + datetime.timedelta(1), "h100", "abc"), folder)
        self.assertEqual(run_gpu.folder_of(self.root, day + datetime.timedelta(2), "h100", "abc").name, "2026-03-03-h100-abc")

    def test_torch_finds_its_own_libraries(self):
        (self.root / "torch.py").write_text("import os\nraise ImportError(os.environ['LD_LIBRARY_PATH'])\n")
        os.environ |= {"PYTHONPATH": str(self.root), "LD_LIBRARY_PATH": "/of/mine"}
        self.addCleanup(lambda: [os.environ.pop(name) for name in ("PYTHONPATH", "LD_LIBRARY_PATH")])
        self.assertEqual(self.run_gpu("--only", "torch").returncode, 0)
        self.assertIn("| torch | left out | torch_peers: /of/mine |", (self.out / "README.md").read_text())

    def test_a_shape_that_hangs_or_faults_in_torch_costs_no_other(self):
        (self.root / "torch.py").write_text(TORCH)
        os.environ["PYTHONPATH"] = str(self.root)
        self.addCleanup(lambda: os.environ.pop("PYTHONPATH"))
        self.out.mkdir()
        (self.out / "cases.jsonl").write_text("".join(json.dumps(
            {"part": "linear", "name": f"Linear {what}", "m": m, "n": 8, "k": 8}) + "\n"
            for m, what in enumerate(("fine", "hangs", "faults", "too large", "fine too"))))
        self.assertEqual(self.run_gpu("--only", "torch", "--case-seconds", "2").returncode, 1)
        lines = run_gpu.json_lines(self.out / "torch.jsonl")
        self.assertEqual([(line["name"], line.get("error"), line.get("us")) for line in lines], [
            ("versions", None, None), ("Linear 8192^3", None, 1000.0), ("Linear fine", None, 1000.0),
            ("Linear hangs", "hung: no result in 2 s", None), ("Linear faults", "CUDA error: an illegal access", None),
            ("Linear too large", "CUDA out of memory", None), ("Linear fine too", None, 1000.0)])
        table = (self.out / "README.md").read_text()
        self.assertIn("| torch | Linear hangs | hung: no result in 2 s |", table)
        self.assertRegex(table, r"\| torch \| failed \| exit code 1: .*; Linear hangs hung \|")
        self.assertEqual(list(self.out.glob("*.running")), [])

    def test_tests_that_all_skip_did_not_pass(self):
        self.programs(skipped=True)
        self.assertEqual(self.run_gpu("--only", "cuda_kernels_gpu_test").returncode, 1)
        self.assertIn("all 1 tests skipped", (self.out / "README.md").read_text())

    def test_a_gpu_that_answers_otherwise_than_the_cpu_fails(self):
        self.programs(agrees=False)
        self.assertEqual(self.run_gpu("--only", "tiny_model").returncode, 1)
        self.assertIn("CPU 'Paris.', GPU 'Lyon.'", (self.out / "tiny_model.log").read_text())

    def test_ranks_that_answer_otherwise_than_one_fail(self):
        self.programs(ranks_disagree=True)
        self.assertEqual(self.run_gpu("--only", "tiny_model_together").returncode, 1)
        self.assertIn("1 rank 'Paris.', 2 ranks 'Lyon.'", (self.out / "tiny_model_together.log").read_text())

    def test_without_what_ranks_together_measured_the_projection_has_a_gap(self):
        self.assertEqual(self.run_gpu("--only", "plan_70b_8,shard_70b_8,together_70b_8").returncode, 0)
        self.assertIn("| 0.72 / 1.26 / 0.93 / 3.86 / - | 174.7 / 159.9 / 168.5 / 112.8 / - |", (self.out / "README.md").read_text())

    def test_goes_on_where_a_slice_ended(self):
        seen = set()
        for _ in range(4):
            # Less than any part may take: one part each time.
            result = self.run_gpu("--slice", "1", "--only", "limits,linear,row_ops,engine_prefill_32768")
            self.assertIn(result.returncode, (0, 75))
            done = {name for name, state in self.state().items() if state != "running"}
            self.assertEqual(len(done - seen), 1)
            seen = done
        self.assertEqual(result.returncode, 0)

    def test_a_machine_that_went_away_is_tried_once_more(self):
        self.run_gpu("--only", "limits")
        path = self.out / "state.json"
        for tries, expected in ((1, "passed"), (2, "failed")):
            path.write_text(json.dumps({"limits": {"state": "running", "reason": "", "tries": tries}}))
            self.run_gpu("--only", "limits")
            self.assertEqual(self.state()["limits"], expected)

    def test_without_a_gpu_only_a_rehearsal(self):
        result = self.run_gpu(path="/nowhere")
        self.assertEqual(result.returncode, 69)
        self.assertIn("--dry rehearses without one", result.stderr)
        result = self.run_gpu("--dry", path="/usr/bin:/bin")
        self.assertEqual(result.returncode, 0, result.stdout)
        table = (self.out / "README.md").read_text()
        self.assertIn("nothing ran on a GPU", table)
        self.assertIn("| engine_decode_1_to_32 | 1 | ", table)
        self.assertEqual(self.run_gpu("--only", "nonsense").returncode, 64)


if __name__ == "__main__":
    unittest.main()
