# SPDX-License-Identifier: Apache-2.0
"""What needs a CUDA device and a build with the CUDA backend. Run on its own:

    pytest bindings/python/tests/gpu

Values are compared with the library's own CPU results, which the other tests compare with the formula.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

import power_attention as pa
from power_attention.torch import PowerAttention, PowerAttentionState, power_attention, step

OPTIONS = (2, None, 0.0, 0, 0, True, 0, 1, 0, 0.0)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}


def test_there_is_a_device():
    """The other tests would say so in many ways; this one in one."""
    assert torch.cuda.is_available(), "torch finds no CUDA device"
    assert pa.cuda_available(), "libpowerattn finds no CUDA device: is the backend in this build?"


def tokens(dtype=torch.float32, b=2, t=70, h=4, hk=2, d=64, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, t, n, d, generator=g).to(device, dtype) for n in (h, hk, hk))
    return q, k, v, -torch.rand(b, t, hk, generator=g).to(device)


def close(actual, expected, dtype, roundings=1):
    """`roundings`: of the operands, 2 where q and k are rotated before they are multiplied."""
    expected = expected.detach().double()
    scale = max(float(expected.abs().max()), 1.0)
    error = (actual.detach().cpu().double() - expected).abs().max()
    assert error <= roundings * TOLERANCE[dtype] * scale, f"{float(error / scale):.2e} of the largest value"


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("options", [{}, {"form": "chunked", "chunk_size": 32}, {"degree": 4}, {"rope": "half"}])
def test_values_and_gradients(dtype, options):
    host = [x.requires_grad_() for x in tokens(dtype)]
    device = [x.detach().cuda().requires_grad_() for x in host]
    device[0] = device[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    dy = torch.randn(2, 70, 4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = [x.detach().float().requires_grad_() for x in host]
    expected = power_attention(*wide[:3], log_g=wide[3], **options)
    y = power_attention(*device[:3], log_g=device[3], **options)
    roundings = 2 if "rope" in options else 1
    close(y, expected, dtype, roundings)
    expected_grads = torch.autograd.grad(expected, wide, dy.float())
    for a, b in zip(torch.autograd.grad(y, device, dy.cuda()), expected_grads, strict=True):
        close(a, b, dtype, roundings)


def test_the_callers_stream():
    """Work goes to the current stream: a result read there needs no other synchronisation."""
    q, k, v, g = tokens(t=4096, device="cuda")
    expected = power_attention(q, k, v, log_g=g)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = [x.clone() for x in (q, k, v)]
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, (q, k, v), strict=True):
            x.copy_(y)
        y = power_attention(*late, log_g=g)
        before = stream.query()
    assert not before, "the call waited for the device"
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("rope", [None, "half"])
@pytest.mark.parametrize("slots", [None, [3, -1, 0]])
def test_step_in_a_cuda_graph(rope, slots):
    """A captured step of a pool, replayed, does what as many steps do: states, positions, outputs."""
    with torch.no_grad():
        many = [tokens(b=3, t=1, device="cuda", seed=i) for i in range(6)]
        eager = PowerAttentionState(4, 2, 64, rope=rope, device="cuda")
        expected = []
        index = None if slots is None else torch.tensor(slots, device="cuda")
        for q, k, v, g in many:
            expected.append(eager.step(q, k, v, log_g=g, slots=index))

        pool = PowerAttentionState(4, 2, 64, rope=rope, device="cuda")
        static = [x.clone() for x in many[0]]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            pool.step(*static[:3], log_g=static[3], slots=index)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = pool.step(*static[:3], log_g=static[3], slots=index)
        pool.reset()
        for inputs, wanted in zip(many, expected, strict=True):
            for x, new in zip(static, inputs, strict=True):
                x.copy_(new)
            graph.replay()
            assert torch.equal(y, wanted)
        assert torch.equal(pool.s, eager.s)
        assert pool.position.tolist() == eager.position.tolist()


def test_positions_are_counted_when_they_are_read(monkeypatch):
    """Whatever order of calls, index tensors that are used again, and a graph captured in between."""
    pool, expected = PowerAttentionState(4, 2, 16, device="cuda"), [0, 0, 0, 0]
    q, k, v = (torch.randn(4, 2, 2, 16, device="cuda") for _ in range(3))
    slots, lengths = torch.tensor([2, -1, 0], device="cuda"), torch.tensor([2, 2, 1], device="cuda")
    three = (q[:3], k[:3], v[:3])

    def some(i: int) -> None:
        pool.step(*three, slots=slots, lengths=lengths if i % 2 else None)

    with torch.no_grad():
        for i in range(300):
            some(i)
            expected[int(slots[0])] += 2
            expected[0] += 1 if i % 2 else 2
            slots[0] = 3 if i % 3 else 2  # the caller's buffer
            if i % 7 == 0:
                pool.step(q, k, v)
                expected = [n + 2 for n in expected]
            if i % 5 == 0:  # the same slots again and again, as they are and under another name
                for same in (slots, slots, slots.view(3)):
                    pool.step(*three, slots=same)
                expected[int(slots[0])] += 6
                expected[0] += 6
            if i % 11 == 0:  # slots that count no versions
                with torch.inference_mode():
                    other = torch.tensor([1, -(i % 2), 3], device="cuda")
                    pool.step(*three, slots=other)
                    expected[1] += 2
                    expected[3] += 2
                    expected[0] += 0 if i % 2 else 2
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            some(1)
        for _ in range(3):
            graph.replay()
    expected[int(slots[0])] += 6
    expected[0] += 3
    assert pool.clone().position.tolist() == pool.position.tolist() == expected
    pool.step(q, k, v)
    monkeypatch.setattr("power_attention.torch.state._capturing", lambda: True)
    with pytest.raises(pa.InvalidArgumentError, match="before the capture"):
        pool.position  # noqa: B018


def test_forward_and_backward_in_a_cuda_graph():
    q, k, v, g = (x.requires_grad_() for x in tokens(t=300, device="cuda"))
    expected = torch.autograd.grad(power_attention(q, k, v, log_g=g).square().sum(), (q, k, v, g))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(power_attention(q, k, v, log_g=g).square().sum(), (q, k, v, g))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = torch.autograd.grad(power_attention(q, k, v, log_g=g).square().sum(), (q, k, v, g))
    graph.replay()
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b)


def test_accepted_layouts_are_not_copied():
    b, t, h, d = 1, 2048, 8, 64
    q, k, v = torch.randn(b, t, 3, h, d, device="cuda", dtype=torch.bfloat16).unbind(2)
    power_attention(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = power_attention(q, k, v)
    used = torch.cuda.max_memory_allocated() - before
    plan = pa.plan(seq_len=t, heads=h, head_dim=d, dtype="bfloat16", device="cuda")
    outputs = y.nbytes + 4 * b * t * h
    assert used <= outputs + plan.workspace_forward + 8 * 512


def test_opcheck():
    q, k, v, g = (x.requires_grad_() for x in tokens(device="cuda", t=20))
    opcheck(torch.ops.powerattn.forward.default, (q, k, v, g, None, None, None, None, True, *OPTIONS))
    pool = PowerAttentionState(3, 2, 64, device="cuda")
    plain = [x.detach() for x in (q, k, v, g)]
    slots = torch.tensor([2, -1], device="cuda")
    opcheck(torch.ops.powerattn.step_.default, (*plain, pool.s, pool.z, slots, None, slots + 1, *OPTIONS))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_compile_reduces_overhead():
    """torch.compile with CUDA graphs of its own."""
    torch.manual_seed(0)
    layer = PowerAttention(128, 4, num_kv_heads=2, rope="half", device="cuda")
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        x = torch.randn(2, 64, 128, device="cuda")
        torch.testing.assert_close(compiled(x).clone(), layer(x), rtol=1e-3, atol=1e-4)


def test_autocast():
    q, k, v, g = (x.requires_grad_() for x in tokens(device="cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        y, state = power_attention(q, k, v, log_g=g, return_final_state=True)
    assert y.dtype is torch.bfloat16
    assert state.s.dtype is torch.float32
    y.sum().backward()
    assert q.grad.dtype is torch.float32


def test_states_travel():
    q, k, v, g = tokens()
    with torch.no_grad():
        host, device = PowerAttentionState(2, 2, 64), PowerAttentionState(2, 2, 64, device="cuda")
        host.step(q, k, v, log_g=g)
        device.from_bytes(host.to_bytes())
        assert torch.equal(device.s.cpu(), host.s)
        close(device.step(*(x.cuda() for x in (q, k, v)), log_g=g.cuda()), host.step(q, k, v, log_g=g), torch.float32)


def test_bad_input_is_named():
    q, k, v, g = tokens()
    with pytest.raises(pa.InvalidArgumentError, match="k is on cpu; q is on cuda:0"):
        power_attention(q.cuda(), k, v)
    with pytest.raises(pa.InvalidArgumentError, match="log_g is on cuda:0; q is on cpu"):
        power_attention(q, k, v, log_g=g.cuda())
    with pytest.raises(pa.PowerAttentionError, match="float64|FLOAT64"):
        power_attention(q.double().cuda(), k.double().cuda(), v.double().cuda())
    with pytest.raises(pa.InvalidArgumentError, match="state S is on cpu"), torch.no_grad():
        step(q.cuda(), k.cuda(), v.cuda(), tuple(PowerAttentionState(2, 2, 64).__dict__[n] for n in "sz"))


def test_distributed_over_nccl(tmp_path):
    """One process for each device, up to four; the cases are those of gloo."""
    world = max(n for n in (1, 2, 4) if n <= torch.cuda.device_count())
    worker = pathlib.Path(__file__).parents[1] / "distributed_worker.py"
    processes = [
        subprocess.Popen([sys.executable, str(worker), str(rank), str(world), str(tmp_path / "rendezvous"), "nccl"])
        for rank in range(world)
    ]
    assert [p.wait(timeout=300) for p in processes] == [0] * world


def test_jax():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("jax has no GPU here")
    from power_attention.jax import power_attention as attention

    q, k, v, g = (x.numpy() for x in tokens())
    y = jax.jit(lambda q, k, v, g: attention(q, k, v, log_g=g))(q, k, v, g)
    close(torch.tensor(jax.device_get(y)), power_attention(*tokens()[:3], log_g=tokens()[3]), torch.float32)
