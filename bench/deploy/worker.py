"""One way to compute a network, in a process of its own that is asked over pipes.

`python worker.py WAY FOLDER THREADS` reads `model.onnx` and `input.npy` of the folder and answers
with lines of JSON: one when it is ready, then one for each number that it reads, which is how many
calls to time. An empty line ends it, and makes it write its result into `WAY.npy`.

The ways below need numpy and their runtime alone, so that each runtime can live in an environment
of its own. The other ways are those of `bench.deploy.torch_ways`.
"""

import ctypes
import json
import os
import signal
import sys
import time

import numpy as np

_PR_SET_PDEATHSIG = 1  # of prctl, from sys/prctl.h


def onnxruntime(folder, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    path = os.path.join(folder, "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x, name = _input(folder), session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0], onnxruntime.__version__


def _openvino(precision):
    def make(folder, threads):
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
        }
        path = os.path.join(folder, "model.onnx")
        request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
        x = _input(folder)
        version = openvino.__version__.split("-")[0]
        return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0], version

    return make


def deepsparse(folder, threads):
    import deepsparse

    path = os.path.join(folder, "model.onnx")
    engine = deepsparse.Engine(path, batch_size=1, num_cores=threads)
    x = _input(folder)
    return lambda: engine.run([x])[0], deepsparse.__version__


RUNTIMES = {
    "onnxruntime": onnxruntime,
    "openvino f32": _openvino("f32"),
    "openvino bf16": _openvino("bf16"),
    "deepsparse": deepsparse,
}


def _input(folder):
    return np.load(os.path.join(folder, "input.npy"))


def _reset_peak():
    """Forgets what preparing took; without effect where the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _peak_bytes():
    """Most memory that this process held since `_reset_peak`; None where nothing tells."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["VmHWM"].split()[0])
    except (OSError, KeyError):
        return None


def _prepare(way, folder, threads):
    """The call, and what is told of it; None and why, where a runtime is not there or fails."""
    if way not in RUNTIMES:
        from bench.deploy import torch_ways

        return torch_ways.prepare(way, folder, threads)
    try:
        call, version = RUNTIMES[way](folder, threads)
        call()
    except ImportError as error:
        return None, {"missing": f"not installed ({error})"}
    except Exception as error:  # any failure of a peer is printed
        return None, {"missing": " ".join(str(error).split())[:300] or type(error).__name__}
    size = os.path.getsize(os.path.join(folder, "model.onnx"))
    return call, {"version": version, "file": size}


def _timed(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _end_with_parent():
    """A process that is stopped would outlive a parent that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(way, folder, threads):
    _end_with_parent()
    # Answers go where only they go: runtimes print to stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    call, facts = _prepare(way, folder, threads)
    if call:
        call()
        facts["first"] = _timed(call)
        _reset_peak()
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        if facts["first"] < 1:
            call()  # the caches hold what another process computed
        seconds = [_timed(call) for _ in range(int(line))]
        print(json.dumps({"seconds": seconds, "peak": _peak_bytes()}), file=answers, flush=True)
    if call:
        np.save(os.path.join(folder, f"{way}.npy"), np.asarray(call(), np.float32))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
