# SPDX-License-Identifier: Apache-2.0
"""Times what is installed beside libpowerattn: PyTorch's SDPA through cuDNN and FlashAttention, retention's power
retention, flash-linear-attention. Same shapes, random data, medians of CUDA events, peak memory beside the inputs; says
what is missing and what had no time. --device cpu runs the script itself on a machine without a GPU."""

import argparse
import csv
import importlib.util
import math
import os
import signal
import statistics
import subprocess
import sys
import time

import torch


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def calls(work, device, count=1):
    """Milliseconds of one call, out of `count` calls in a row, so that the host's launches do not count."""
    if device != "cuda":
        begin = time.perf_counter()
        for _ in range(count):
            work()
        return (time.perf_counter() - begin) * 1e3 / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


BURST_MS, REST = 20, 0.1  # kBurstMs, kRest of timing.h: every measurement at the clock that short work gets


def measure(work, device, warm_ms=0.0, budget_ms=60.0):
    """Median milliseconds, and the peak of the memory that a call takes beside what was there before. `warm_ms` of the
    same work first give the clock of a long run; else work of BURST_MS follows a rest."""
    work()  # compiles, tunes, builds plans
    sync(device)
    peak = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    first = calls(work, device)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
    row = max(1, min(20, int(10 / first)))
    if first < 200:
        calls(work, device, row)
    begin = time.monotonic()
    while (time.monotonic() - begin) * 1e3 < warm_ms:
        calls(work, device, row)
    times, since_rest = [], BURST_MS
    while len(times) < (5 if first < 200 else 3) or (sum(times) * row < budget_ms and len(times) < 200):
        if device == "cuda" and warm_ms == 0 and since_rest >= BURST_MS:
            time.sleep(REST)
            since_rest = 0
        times.append(calls(work, device, row))
        since_rest += times[-1] * row
    return statistics.median(times), peak


class NoTime(BaseException):  # no library that catches every Exception may swallow it
    pass


class limit:
    """Raises NoTime in the block after so many seconds: compilers and tuners of a peer can take minutes."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        if self.seconds <= 0:
            raise NoTime
        signal.signal(signal.SIGALRM, self.expired)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def expired(*_):
        raise NoTime


def tensors(b, t, h, d, layout, device):
    shape = (b, h, t, d) if layout == "bhtd" else (b, t, h, d)
    return [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def gates(b, t, h, device):
    return -0.002 * torch.rand(b, t, h, device=device, dtype=torch.float32)


def sdpa(backend):
    def load():
        def make(b, t, h, d, device):
            q, k, v = tensors(b, t, h, d, "bhtd", device)

            def forward():
                with torch.nn.attention.sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

            return forward, (q, k, v)

        return make

    return load


def power_retention():
    from retention import power_retention as run

    def make(b, t, h, d, device):
        q, k, v = tensors(b, t, h, d, "bthd", device)
        log_g = gates(b, t, h, device)
        return (lambda: run(q, k, v, log_G=log_g, deg=2, chunk_size=1024)), (q, k, v)

    return make


def linear_attention(gated):
    def load():
        from fla.ops.simple_gla import chunk_simple_gla

        def make(b, t, h, d, device):
            q, k, v = tensors(b, t, h, d, "bthd", device)
            log_g = gates(b, t, h, device) if gated else None
            return (lambda: chunk_simple_gla(q, k, v, g=log_g)[0]), (q, k, v)

        return make

    return load


BACKENDS = torch.nn.attention.SDPBackend
# name -> (loader, the package that has to be installed, compiled by Triton). The first two run at every length, the
# others at the lengths that have a target.
PEERS = {
    "cudnn softmax": (sdpa(BACKENDS.CUDNN_ATTENTION), None, False),
    "flash softmax": (sdpa(BACKENDS.FLASH_ATTENTION), None, False),
    "retention p2": (power_retention, "retention", True),
    "fla p1": (linear_attention(True), "fla", True),
    # fla-core 0.6.0 refuses the gated backward on Hopper with Triton 3.4 to 3.7.0, which get it wrong.
    "fla p1 ungated": (linear_attention(False), "fla", True),
}


def compile_ahead(name, shape, jobs):
    """Compiles the variants that a Triton peer will try, on all cores: processes that fill Triton's cache, each with
    its share. The tuning itself stays in this process, alone on the device."""
    command = [sys.executable, __file__, "--compile", name, "--shape", ",".join(map(str, shape))]
    workers = [
        subprocess.Popen([*command, "--share", f"{i}/{jobs}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(jobs)
    ]
    try:
        for worker in workers:
            worker.wait()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def compile_share(name, shape, share, of):
    """One of compile_ahead's processes: where the tuner would try its variants, this share of them is compiled, and no
    tuned kernel runs, so that nothing false gets into the tuner's own cache."""
    from triton.runtime.autotuner import Autotuner

    def compile_only(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        for i, config in enumerate(self.prune_configs(kwargs)):
            if i % of == share:
                try:
                    self.fn.run(*args, **{**kwargs, **config.all_kwargs(), "warmup": True})
                except Exception:  # a variant that this device cannot run; the tuner will find out
                    pass

    Autotuner.run = compile_only
    forward, inputs = PEERS[name][0]()(*shape, "cuda")
    y = forward()
    torch.autograd.grad(y, inputs, torch.randn_like(y))


class Table:
    def __init__(self, path, append=False):
        self.file = open(path, "a" if append else "w", newline="") if path else None
        self.writer = csv.writer(self.file) if self.file else None
        if not append:
            self.write("what", "config", "name", "ms", "memory_bytes")

    def write(self, *row):
        if self.writer:
            self.writer.writerow(row)
            self.file.flush()  # a time limit must not cost what was measured

    def note(self, what, config, name, ms, memory=0, more=""):
        self.write(what, config, name, f"{ms:.6f}", memory)
        size = f"{memory * 1e-6:9.0f} MB" if memory else ""
        print(f"{what:9} {config:46} {name:18} {ms:10.4f} ms {size}{more}", flush=True)


def ceilings(table, device):
    n = 8192 if device == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    ms, _ = measure(lambda: a @ b, device)
    table.note("matmul", f"{n}^3 bf16", "torch", ms, more=f" {2 * n**3 / ms * 1e-9:.0f} TFLOP/s")
    count = 1 << (30 if device == "cuda" else 16)
    x = torch.randn(1 << 16, device=device).to(torch.bfloat16).repeat(count >> 16)
    y = torch.empty_like(x)
    ms, _ = measure(lambda: y.copy_(x), device)
    table.note("copy", f"{2 * count} bytes", "torch", ms, more=f" {4 * count / ms * 1e-6:.0f} GB/s")


def time_peer(table, name, make, shape, device, warm_ms):
    name += " sustained" if warm_ms else ""
    config = "bf16 d{3} b{0} t{1} h{2}".format(*shape)
    forward, inputs = make(*shape, device)
    with torch.no_grad():
        ms, memory = measure(forward, device, warm_ms)
    table.note("forward", config, name, ms, memory)
    gradient = torch.randn_like(forward())
    ms, memory = measure(lambda: torch.autograd.grad(forward(), inputs, gradient), device, warm_ms)
    table.note("fwd+bwd", config, name, ms, memory)


def shapes(tokens, quick):
    """(b, t, h, d): those with a target first, then every length."""
    first = [(1, tokens, 8, 64), (1, tokens, 8, 128), (16, tokens // 16, 8, 64), (64, tokens // 64, 8, 64)]
    lengths = [tokens >> 6 << i for i in range(9)]
    every = [(max(1, tokens // t), t, 8, d) for d in (64, 128) for t in lengths]
    return first, first if quick else list(dict.fromkeys(first + every))


def run(args):
    end = time.monotonic() + args.seconds
    left = lambda: end - time.monotonic()  # noqa: E731
    table = Table(args.csv, args.append)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"# {name}, PyTorch {torch.__version__}")
    if not args.append:
        ceilings(table, args.device)
    targets, every = shapes(args.tokens, args.quick)
    loaded, compiled = {}, set()

    def attempt(peer, label, work):
        """Runs work with what time there is; False, and a line that says why, where it did not come to its end."""
        try:
            with limit(min(left(), args.peer_seconds)):
                work()
            return True
        except NoTime:
            print(f"{peer}{label}: not measured, no time left", flush=True)
        except Exception as error:
            print(f"{peer}{label}: not measured ({type(error).__name__}: {str(error)[:200]})", flush=True)
        return False

    def load(peer):
        if peer not in loaded:
            loader, package, _ = PEERS[peer]
            loaded[peer] = None
            if package and importlib.util.find_spec(package) is None:
                print(f"{peer}: {package} is not installed")
            else:
                attempt(peer, "", lambda: loaded.__setitem__(peer, loader()))
        return loaded[peer]

    chosen = [peer for peer in PEERS if not args.only or args.only in peer]
    jobs = [(peer, shape) for peer in chosen if not PEERS[peer][2] for shape in every]
    for d in (64, 128):  # every Triton peer at 64 before any at 128, which has its own variants
        jobs += [(peer, shape) for peer in chosen if PEERS[peer][2] for shape in targets if shape[3] == d]
    for peer, shape in jobs:
        make = load(peer)
        if make is None:
            continue
        if PEERS[peer][2] and args.device == "cuda" and (peer, shape[3]) not in compiled:
            compiled.add((peer, shape[3]))
            begin = time.monotonic()
            if not attempt(peer, f" d{shape[3]}", lambda p=peer, s=shape: compile_ahead(p, s, args.jobs)):
                continue
            print(f"{peer} d{shape[3]}: compiled in {time.monotonic() - begin:.0f} s by {args.jobs} processes")
        config = "bf16 d{3} b{0} t{1} h{2}".format(*shape)
        attempt(peer, f" {config}", lambda m=make, p=peer, s=shape: time_peer(table, p, m, s, args.device, args.warm))
        if args.device == "cuda":
            torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--warm", type=float, default=0.0, help="ms of the same work before each measurement")
    parser.add_argument("--quick", action="store_true", help="only the shapes that have a target")
    parser.add_argument("--only", help="peers whose name contains this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time for everything")
    parser.add_argument(
        "--peer-seconds", type=float, default=120, help="time for one peer's compilation, and for each shape"
    )
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        share, of = map(int, args.share.split("/"))
        compile_share(args.compile, tuple(map(int, args.shape.split(","))), share, of)
    else:
        run(args)


if __name__ == "__main__":
    main()
