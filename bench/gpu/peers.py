# SPDX-License-Identifier: Apache-2.0
"""Times what is installed beside libpowerattn: PyTorch's SDPA through cuDNN and FlashAttention, retention's power
retention, flash-linear-attention. Same shapes, random data, medians of CUDA events; says what is missing."""

import argparse
import csv
import statistics

import torch


def median_ms(work, budget_ms=60.0):
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times = []
    while len(times) < 5 or (sum(times) < budget_ms and len(times) < 200):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def tensors(b, t, h, d, layout, count=3):
    shape = (b, h, t, d) if layout == "bhtd" else (b, t, h, d)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(count)]


def sdpa(backend):
    def make(b, t, h, d):
        q, k, v = tensors(b, t, h, d, "bhtd")

        def forward():
            with torch.nn.attention.sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return forward, (q, k, v)

    return make


def power_retention():
    from retention import power_retention as run  # noqa: PLC0415

    def make(b, t, h, d):
        q, k, v = tensors(b, t, h, d, "bthd")
        gates = -0.002 * torch.rand(b, t, h, device="cuda", dtype=torch.float32)
        return (lambda: run(q, k, v, log_G=gates, deg=2, chunk_size=1024)), (q, k, v)

    return make


def linear_attention():
    from fla.ops.simple_gla import chunk_simple_gla  # noqa: PLC0415

    def make(b, t, h, d):
        q, k, v = tensors(b, t, h, d, "bthd")
        gates = -0.002 * torch.rand(b, t, h, device="cuda", dtype=torch.float32)
        return (lambda: chunk_simple_gla(q, k, v, g=gates)[0]), (q, k, v)

    return make


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rows = []

    def note(what, config, name, ms):
        rows.append((what, config, name, f"{ms:.6f}"))
        print(f"{what:12} {config:30} {name:20} {ms:9.4f} ms", flush=True)

    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = median_ms(lambda: a @ b)
    note("matmul", "8192^3 bf16", "torch", ms)
    print(f"             {2 * n**3 / ms * 1e-9:.0f} TFLOP/s")
    del a, b
    x = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16).normal_()
    y = torch.empty_like(x)
    ms = median_ms(lambda: y.copy_(x))
    note("copy", "2 GiB", "torch", ms)
    print(f"             {4 * x.numel() / ms * 1e-6:.0f} GB/s")
    del x, y

    backends = torch.nn.attention.SDPBackend
    peers = {"cudnn softmax": sdpa(backends.CUDNN_ATTENTION), "flash softmax": sdpa(backends.FLASH_ATTENTION)}
    for name, load in (("retention p2", power_retention), ("fla p1", linear_attention)):
        try:
            peers[name] = load()
        except Exception as error:  # not installed, or not for this version of PyTorch
            print(f"{name}: not measured ({type(error).__name__}: {error})")

    shapes = [(1, 65536, 8, 64), (1, 65536, 8, 128), (16, 4096, 8, 64), (64, 1024, 8, 64)]
    if not args.quick:
        for d in (64, 128):
            shapes += [(max(1, 65536 // t), t, 8, d) for t in (1024, 2048, 4096, 8192, 16384, 32768)]
    seen = set()
    for shape in shapes:
        if shape in seen:
            continue
        seen.add(shape)
        config = "bf16 d{3} b{0} t{1} h{2}".format(*shape)
        for name, make in peers.items():
            try:
                forward, inputs = make(*shape)
                with torch.no_grad():
                    note("forward", config, name, median_ms(forward))
                gradient = torch.randn_like(forward())
                note("fwd+bwd", config, name, median_ms(lambda: torch.autograd.grad(forward(), inputs, gradient)))
            except Exception as error:
                print(f"{name} {config}: failed ({type(error).__name__}: {str(error)[:120]})")
            torch.cuda.empty_cache()
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("what", "config", "name", "ms"))
            writer.writerows(rows)


if __name__ == "__main__":
    main()
