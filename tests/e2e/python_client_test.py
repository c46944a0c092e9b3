#!/usr/bin/env python3
"""A Python grpcio client, its stubs generated from our protos, against the real server.

    python_client_test.py --program build/release/altiplano --source . --work FOLDER

grpcio and grpcio-tools come from PyPI into a virtual environment in FOLDER; without network Debian's python3-grpcio with
protoc's generators will do. Exit code 77, and the reason, when neither can be had.
"""
import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

SKIP = 77
PATIENCE = 60


def run_quietly(command, timeout):
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, str(error))


def has_grpc(python, tools):
    return run_quietly([str(python), "-c", "import grpc" + (", grpc_tools.protoc" if tools else "")], 60).returncode == 0


def choose_python(work):
    """A Python with grpcio, and the command that generates stubs with it."""
    venv = work / "venv"
    python = venv / "bin" / "python"
    if not has_grpc(python, tools=True):
        shutil.rmtree(venv, ignore_errors=True)
        made = run_quietly([sys.executable, "-m", "venv", str(venv)], 60)
        if made.returncode == 0:
            made = run_quietly([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1",
                                "--timeout", "15", "grpcio", "grpcio-tools"], 200)
    if has_grpc(python, tools=True):
        return python, [str(python), "-m", "grpc_tools.protoc"]
    debian, plugin = pathlib.Path("/usr/bin/python3"), shutil.which("grpc_python_plugin")
    if plugin and shutil.which("protoc") and has_grpc(debian, tools=False):
        return debian, ["protoc", f"--plugin=protoc-gen-grpc_python={plugin}"]
    print("skipped: no grpcio, neither from PyPI nor as Debian's python3-grpcio")
    sys.exit(SKIP)


def generate_stubs(command, source, out):
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    root = source / "proto"
    protos = [str(p.relative_to(root)) for p in sorted(root.rglob("*.proto"))
              if p.relative_to(root).parts[0] != "google" or p.name != "descriptor.proto"]
    done = run_quietly(command + [f"-I{root}", f"--python_out={out}", f"--grpc_python_out={out}"] + protos, 120)
    if done.returncode != 0:
        sys.exit(f"protoc failed: {done.stdout}")
    # grpcio's own package "grpc" must not be hidden by generated folders of the same name.
    health = out / "grpc"
    if health.exists():
        shutil.rmtree(health)
        renamed = out / "protos"
        renamed.mkdir()
        for proto in (p for p in protos if p.startswith("grpc/")):
            flat = proto.replace("/", "_")
            shutil.copy(root / proto, renamed / flat)
            done = run_quietly(command + [f"-I{renamed}", f"--python_out={out}", f"--grpc_python_out={out}", flat], 120)
            if done.returncode != 0:
                sys.exit(f"protoc failed: {done.stdout}")


class Server:
    def __init__(self, program, model, *more):
        self.process = subprocess.Popen(
            [program, "serve", "--model", model, "--listen", "127.0.0.1:0", "--dtype", "f32", "--threads", "1", "--kv-memory",
             "64MiB", "--served-model-name", "tiny", "--log-level", "warn", *more], stdout=subprocess.PIPE, text=True)
        self.ready = self.process.stdout.readline()
        if not self.ready.startswith("READY "):
            sys.exit(f"not READY: {self.ready!r}")
        self.address = dict(f.split("=", 1) for f in self.ready.split()[1:])["address"]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def test_stream_equals_golden(pb, stub, golden):
    request = pb.GenerateRequest(
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role=pb.ROLE_USER, content=golden["messages"][0]["content"])]),
        sampling=pb.Sampling(temperature=0), stopping=pb.Stopping(max_new_tokens=64), output=pb.Output(token_ids=True))
    text, ids, kinds = "", [], []
    finish = None
    for number, message in enumerate(stub.StreamGenerate(pb.StreamGenerateRequest(request=request), timeout=PATIENCE)):
        assert message.sequence_number == number, message
        kinds.append(message.WhichOneof("event"))
        for delta in message.deltas.items:
            text += delta.text
            ids += delta.token_ids
            if delta.HasField("finish"):
                finish = delta.finish
    assert text == golden["greedy_text"], text
    # The reference's list may or may not hold the EOS that ended it.
    assert ids[:len(golden["greedy_token_ids"])] == golden["greedy_token_ids"][:len(ids)], ids
    assert kinds[0] == "started" and kinds[-1] == "completed" and set(kinds[1:-1]) == {"deltas"}, kinds
    assert finish is not None and finish.reason == pb.FINISH_REASON_EOS, finish

    whole = stub.Generate(request, timeout=PATIENCE)
    assert whole.sequences[0].text == text, whole


def test_errors_have_details(grpc, pb, stub):
    try:
        stub.Generate(pb.GenerateRequest(text="x", sampling=pb.Sampling(top_p=1.5)), timeout=PATIENCE)
        raise AssertionError("top_p 1.5 was accepted")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        from google.rpc import error_details_pb2, status_pb2
        rich = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
        bad = error_details_pb2.BadRequest()
        assert any(detail.Unpack(bad) for detail in rich.details), rich
        assert "top_p" in bad.field_violations[0].field, bad


def test_deadline_and_cancel(grpc, pb, stub, status_stub, status_pb):
    endless = pb.GenerateRequest(text="Once", stopping=pb.Stopping(max_new_tokens=100000, ignore_eos=True))
    try:
        for _ in stub.StreamGenerate(pb.StreamGenerateRequest(request=endless), timeout=0.2):
            pass
        raise AssertionError("no deadline")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    call = stub.StreamGenerate(pb.StreamGenerateRequest(request=endless))
    next(call)
    call.cancel()
    done = threading.Event()
    for _ in range(PATIENCE * 50):
        load = status_stub.GetLoad(status_pb.GetLoadRequest(), timeout=PATIENCE)
        if load.kv_blocks_used == 0 and load.running_requests == 0:
            return
        done.wait(0.02)
    raise AssertionError(f"blocks still held: {load}")


def test_health_and_reflection(out, channel):
    sys.path.insert(0, str(out))
    import grpc_health_v1_health_pb2 as health_pb
    import grpc_health_v1_health_pb2_grpc as health_grpc
    answer = health_grpc.HealthStub(channel).Check(health_pb.HealthCheckRequest(), timeout=PATIENCE)
    assert answer.status == health_pb.HealthCheckResponse.SERVING, answer
    for version in ("v1", "v1alpha"):
        pb = __import__(f"grpc_reflection_{version}_reflection_pb2")
        stub = __import__(f"grpc_reflection_{version}_reflection_pb2_grpc").ServerReflectionStub(channel)
        requests = [pb.ServerReflectionRequest(list_services=""),
                    pb.ServerReflectionRequest(file_containing_symbol="altiplano.inference.v1.InferenceService")]
        answers = list(stub.ServerReflectionInfo(iter(requests), timeout=PATIENCE))
        names = {s.name for s in answers[0].list_services_response.service}
        for name in ("altiplano.inference.v1.InferenceService", "altiplano.inference.v1.StatusService",
                     "altiplano.inference.v1.ModelService", "grpc.health.v1.Health"):
            assert name in names, (version, names)
        assert answers[1].file_descriptor_response.file_descriptor_proto, answers[1]


def test_the_example_of_the_docs_runs(source, out, address, golden):
    code = (source / "docs" / "clients.md").read_text().split("```python\n", 1)[1].split("```", 1)[0]
    for written, here in (("127.0.0.1:50051", address), ('"stubs"', repr(str(out)))):
        assert code.count(written) == 1, written
        code = code.replace(written, here)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == golden["greedy_text"] + " FINISH_REASON_EOS\n", done
    # And says why not, where it is told off.
    done = subprocess.run([sys.executable, "-c", code.replace("temperature=0", "temperature=-1")], capture_output=True, text=True,
                          timeout=PATIENCE)
    assert "INVALID_ARGUMENT" in done.stdout and "INVALID_FIELD" in done.stdout, done


def test_features(program, model):
    """Of a server by itself: whether prefixes are cached is a setting."""
    import grpc
    from altiplano.inference.v1 import model_pb2, model_pb2_grpc
    for flag, cached in (("--enable-prefix-caching", True), ("--no-enable-prefix-caching", False)):
        server = Server(program, model, flag)
        try:
            with grpc.insecure_channel(server.address) as channel:
                stub = model_pb2_grpc.ModelServiceStub(channel)
                served = stub.GetModel(model_pb2.GetModelRequest(), timeout=PATIENCE)
            assert ("prefix_cache" in served.features) == cached, served
        finally:
            assert server.stop() == 0


def test(program, source, work):
    """Runs inside the Python that has grpcio."""
    out = work / "stubs"
    sys.path.insert(0, str(out))
    import grpc
    from altiplano.inference.v1 import inference_pb2 as pb, inference_pb2_grpc, status_pb2 as status_pb, status_pb2_grpc
    model = source / "tests" / "data" / "tiny"
    golden = next(g for g in json.loads((model / "goldens.json").read_text()) if g["id"] == "capital-en")
    server = Server(program, str(model))
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            test_stream_equals_golden(pb, stub, golden)
            test_errors_have_details(grpc, pb, stub)
            test_deadline_and_cancel(grpc, pb, stub, status_pb2_grpc.StatusServiceStub(channel), status_pb)
            test_health_and_reflection(out, channel)
            test_the_example_of_the_docs_runs(source, out, server.address, golden)
    finally:
        code = server.stop()
    assert code == 0, f"exit code {code}"
    test_features(program, str(model))
    print("python client: ok, grpcio", grpc.__version__)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--source", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--inside", action="store_true", help="this Python has grpcio and the stubs are there")
    args = parser.parse_args()
    if args.inside:
        test(args.program, args.source, args.work)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    python, protoc = choose_python(args.work)
    generate_stubs(protoc, args.source, args.work / "stubs")
    os.execv(python, [str(python), __file__, *sys.argv[1:], "--inside"])


if __name__ == "__main__":
    main()
