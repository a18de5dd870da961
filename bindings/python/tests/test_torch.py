# SPDX-License-Identifier: Apache-2.0
"""The PyTorch operators: values, gradients, compilation, layouts, memory."""

from __future__ import annotations

import pytest

import power_attention as pa
from conftest import attention, make_inputs

torch = pytest.importorskip("torch")

from torch.library import opcheck  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from power_attention.torch import Rope, State, power_attention  # noqa: E402

OPS = torch.ops.powerattn


def inputs(seed=0, dtype=torch.float64, requires_grad=True, **shape):
    """q, k, v, log_g as torch tensors."""
    import numpy as np

    made = make_inputs(np.random.default_rng(seed), **shape)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    kinds = (dtype, dtype, dtype, wide)
    return [torch.tensor(x).to(t).requires_grad_(requires_grad) for x, t in zip(made, kinds, strict=True)]


def states(n=2, heads=2, d=6, e=5, degree=2, requires_grad=True):
    rows = pa.state_rows(d, degree)
    generator = torch.Generator().manual_seed(5)
    s = torch.randn(n, heads, rows, e, dtype=torch.float64, generator=generator)
    z = torch.rand(n, heads, rows, dtype=torch.float64, generator=generator)
    # A state that real tokens made: z . phi(q) is a sum of squares, and so is never near zero.
    _, state = power_attention(*inputs(9, requires_grad=False, t=30, d=d, e=e, b=n, h=heads, hk=heads)[:3],
                               return_final_state=True, degree=degree)  # fmt: skip
    return State((state.s + 0.1 * s).requires_grad_(requires_grad), (state.z + 0.01 * z).requires_grad_(requires_grad))


def test_value():
    q, k, v, g = inputs(requires_grad=False)
    y = power_attention(q, k, v, log_g=g, degree=4)
    torch.testing.assert_close(y, torch.tensor(attention(q, k, v, g, 4)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"degree": 4},
        {"degree": 1, "normalize": False},
        {"degree": 3, "normalize": False, "scale": 0.5},
        {"rope": "half"},
        {"rope": Rope("interleaved", dim=4), "rope_offset": [5, 0]},
        {"eps": 0.3, "form": "chunked", "chunk_size": 2},
    ],
)
def test_gradcheck(options):
    q, k, v, g = inputs(t=5, h=2, hk=1)
    assert torch.autograd.gradcheck(lambda q, k, v, g: power_attention(q, k, v, log_g=g, **options), (q, k, v, g))


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_with_states(packed):
    n = 3 if packed else 2
    q, k, v, g = inputs(t=7, b=1 if packed else 2, h=2, hk=1, d=3, e=2)
    state = states(n, heads=1, d=3, e=2)
    cu = torch.tensor([0, 2, 2, 6]) if packed else None

    def run(q, k, v, g, s, z):
        y, final = power_attention(
            q, k, v, log_g=g, initial_state=(s, z), return_final_state=True, cu_seqlens=cu, eps=0.1
        )
        return y, final.s, final.z

    assert torch.autograd.gradcheck(run, (q, k, v, g, *state), atol=1e-4)


def test_gradient_of_the_final_state_alone():
    q, k, v, g = inputs()
    _, final = power_attention(q, k, v, log_g=g, return_final_state=True)
    final.s.sum().backward()
    assert not q.grad.any()
    assert k.grad.any()
    assert g.grad.any()


def test_second_derivative_is_refused():
    q, k, v, _ = inputs()
    (grad,) = torch.autograd.grad(power_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(pa.UnsupportedError, match="second derivative"):
        grad.sum().backward()


OPTIONS = (2, None, 0.0, 0, 0, True, 0, 1, 0, 0.0)


def op_cases():
    q, k, v, g = inputs()
    state, cu = states(), torch.tensor([0, 4, 13])
    one = inputs(b=1)
    offset = torch.tensor([3, 9])
    yield "forward", (q, k, v, g, *state, None, offset, True, *OPTIONS)
    yield "forward", (q, k, v, None, None, None, None, None, False, *OPTIONS)
    yield "forward", (*one, None, None, cu, None, True, *OPTIONS)
    with torch.no_grad():
        y, norm, s, z = OPS.forward(q, k, v, g, *state, None, offset, True, *OPTIONS)
    dy = torch.ones_like(y)
    plain = [x.detach() for x in (q, k, v, g)]
    held = [x.detach() for x in state]
    yield "backward", (*plain, y, norm, dy, *held, s, z, None, offset, True, True, *OPTIONS)
    with torch.no_grad():
        y, norm, _, _ = OPS.forward(q, k, v, None, None, None, None, None, False, *OPTIONS)
    yield "backward", (*plain[:3], None, y, norm, dy, *(None,) * 6, False, False, *OPTIONS)
    lengths, slots = torch.tensor([13, 2]), torch.tensor([1, -1])
    for name in ("step", "step_"):
        yield name, (*plain, *(x.clone() for x in held), slots, lengths, offset, *OPTIONS)
        yield name, (*plain[:3], None, *(x.clone() for x in held), None, None, None, *OPTIONS)


@pytest.mark.parametrize(("name", "args"), list(op_cases()), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name, args):
    opcheck(getattr(OPS, name).default, args)


def test_compile_fullgraph_dynamic():
    def run(q, k, v, g, s, z):
        y, final = power_attention(
            q * 2, k, v, log_g=-torch.nn.functional.softplus(g), initial_state=(s, z), return_final_state=True
        )
        return (y * y).mean() + final.s.mean() + final.z.mean()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for t in (9, 14, 33):
        args = inputs(t, t=t)
        state = states()
        expected = torch.autograd.grad(run(*args, *state), (*args, *state))
        actual = torch.autograd.grad(compiled(*args, *state), (*args, *state))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_inductor_hands_over_any_strides():
    torch._dynamo.reset()
    compiled = torch.compile(power_attention, fullgraph=True, backend="inductor")
    q, k, v, _ = inputs()
    q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    dy = torch.randn(2, 13, 4, 5, dtype=torch.float64).transpose(1, 2).contiguous().transpose(1, 2)
    expected = torch.autograd.grad(power_attention(q, k, v), (q, k, v), dy)
    for a, b in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v), dy), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("as_list", [False, True])
def test_compile_packed_sequences(as_list):
    q, k, v, g = inputs(b=1, t=17, d=6)
    cu = [0, 5, 5, 14] if as_list else torch.tensor([0, 5, 5, 14])

    def run(q, k, v, g):
        return power_attention(q, k, v, log_g=g, cu_seqlens=cu, rope="half", rope_offset=[3, 0, 1])

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = run(q, k, v, g)
    y = compiled(q, k, v, g)
    torch.testing.assert_close(y, expected)
    args = (q, k, v, g)
    for a, b in zip(torch.autograd.grad(y.sum(), args), torch.autograd.grad(expected.sum(), args), strict=True):
        torch.testing.assert_close(a, b)


def test_dynamic_lengths_compile_once():
    from torch._dynamo import testing

    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: power_attention(q, k, v), fullgraph=True, dynamic=True, backend=counter)
    compiled(*inputs(t=9, requires_grad=False)[:3])
    first = counter.frame_count
    for t in (14, 33, 50):
        compiled(*inputs(t=t, requires_grad=False)[:3])
    assert counter.frame_count == first > 0


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, g):
            return power_attention(q, k, v, log_g=g, rope="half")

    args = tuple(inputs(requires_grad=False))
    t = torch.export.Dim("t", min=2, max=4096)
    shapes = ({1: t},) * 4
    program = torch.export.export(Model(), args, dynamic_shapes=shapes)
    other = inputs(1, t=29, requires_grad=False)
    torch.testing.assert_close(program.module()(*other), Model()(*other))


def test_fake_strides_are_the_real_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v, g = inputs(requires_grad=False)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    args = (q, k, v, g, None, None, None, None, True, *OPTIONS)
    real = OPS.forward(*args)
    with FakeTensorMode() as mode:
        fake = OPS.forward(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in real]


def test_autocast_casts_q_k_v_and_never_the_gates():
    q, k, v, g = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = power_attention(q, k, v, log_g=g, return_final_state=True)
    assert y.dtype is torch.bfloat16
    assert state.s.dtype is torch.float32
    low = [x.detach().bfloat16() for x in (q, k, v)]
    torch.testing.assert_close(y, power_attention(*low, log_g=g))
    y.sum().backward()
    assert q.grad.dtype is torch.float32
    assert g.grad.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="log_g is torch.bfloat16"):
        power_attention(q, k, v, log_g=g.bfloat16())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    q, k, v, g = inputs()
    expected = torch.autograd.grad(power_attention(q, k, v, log_g=g).square().sum(), (q, k, v, g))
    y = checkpoint(lambda *x: power_attention(*x[:3], log_g=x[3]), q, k, v, g, use_reentrant=reentrant)
    y.square().sum().backward()
    for x, grad in zip((q, k, v, g), expected, strict=True):
        torch.testing.assert_close(x.grad, grad)


def layouts():
    yield "bhtd", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "tbhd", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "padded", lambda x: torch.nn.functional.pad(x, (0, 3), value=float("nan"))[..., : x.shape[-1]]
    yield "every second head", lambda x: x.repeat_interleave(2, 2)[:, :, ::2]
    yield "offset", lambda x: torch.cat([x.new_full((1,), 7), x.reshape(-1)])[1:].view(x.shape)


@pytest.mark.parametrize(("name", "move"), list(layouts()), ids=lambda x: x if isinstance(x, str) else "")
def test_layouts(name, move):
    q, k, v, g = inputs()
    expected = power_attention(q, k, v, log_g=g)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v, g), grad)
    moved = [move(x.detach()).requires_grad_() for x in (q, k, v)]
    gates = move(g.detach()[..., None])[..., 0].requires_grad_()
    y = power_attention(*moved, log_g=gates)
    assert torch.equal(y, expected)
    for a, b in zip(torch.autograd.grad(y, (*moved, gates), move(grad)), expected_grads, strict=True):
        assert torch.equal(a, b)


def test_packed_qkv_and_broadcast_gates():
    packed = torch.randn(2, 11, 3, 4, 8)
    q, k, v = packed.unbind(2)
    gate = torch.tensor(-0.1).expand(2, 11, 4)
    y = power_attention(q, k, v, log_g=gate)
    again = power_attention(q.clone(), k.clone(), v.clone(), log_g=gate.contiguous())
    assert torch.equal(y, again)


def allocated(call):
    """Bytes that torch's allocator gives out during a call."""
    from torch._C._profiler import _EventType

    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, record_shapes=True, with_stack=True) as profile:
        call()
    total, left = 0, list(profile.profiler.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        if event.tag == _EventType.Allocation:
            total += max(event.extra_fields.alloc_size, 0)
    return total


@pytest.mark.filterwarnings("ignore::UserWarning")  # the profiler's own
def test_accepted_layouts_are_not_copied():
    """What torch allocates for a call are its outputs and the plan's workspace, to the byte, and no input."""
    b, t, h, d = 1, 256, 4, 32
    size, slack = 4 * b * t * h * d, 256 + 512  # the alignment of the workspace, and empty outputs
    q, k, v = torch.randn(b, t, 3, h, d).unbind(2)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    gate = torch.tensor(-0.1).expand(b, t, h)
    options = (2, None, 0.0, 0, 0, True, 0, 0, 0, 0.0)
    args = (q, k, v, gate, None, None, None, None, False, *options)
    y, norm, _, _ = OPS.forward(*args)
    dy = torch.randn(b, h, t, d).transpose(1, 2)
    plan = pa.plan(seq_len=t, heads=h, head_dim=d, num_threads=torch.get_num_threads())

    outputs = size + size // d
    assert (
        outputs <= allocated(lambda: power_attention(q, k, v, log_g=gate)) <= outputs + plan.workspace_forward + slack
    )
    bad = q.transpose(1, 3).contiguous().transpose(1, 3)  # stride t in the last dimension: copied, and seen here
    assert allocated(lambda: power_attention(bad, k, v, log_g=gate)) >= outputs + size

    backward = (q, k, v, gate, y, norm, dy, *(None,) * 6, False, False, *options)
    outputs = 3 * size + size // d
    assert outputs <= allocated(lambda: OPS.backward(*backward)) <= outputs + plan.workspace_backward + slack

    rows = pa.state_rows(d, 2)
    pool = torch.zeros(3, h, rows, d), torch.zeros(3, h, rows)
    one = [x[:, :1] for x in (q, k, v, gate)]
    slots, lengths = torch.tensor([2]), torch.tensor([1])
    plan = pa.plan(seq_len=1, heads=h, head_dim=d, use_state=True, num_threads=torch.get_num_threads())
    outputs = size // t
    used = allocated(lambda: OPS.step_(*one, *pool, slots, lengths, None, *options))
    assert outputs <= used <= outputs + plan.workspace_step + slack


def test_packed_sequences_and_padding():
    q, k, v, g = inputs(b=1, t=17)
    cu = [0, 5, 5, 6, 14]
    y, final = power_attention(q, k, v, log_g=g, cu_seqlens=cu, return_final_state=True)
    for i, (a, b) in enumerate(zip(cu, cu[1:], strict=False)):
        part = [x[:, a:b] for x in (q, k, v, g)]
        one, state = power_attention(*part[:3], log_g=part[3], return_final_state=True)
        torch.testing.assert_close(y[:, a:b], one)
        torch.testing.assert_close(final.s[i : i + 1], state.s)
    assert not y[:, 14:].any()
    y.sum().backward()
    assert not q.grad[:, 14:].any()
    assert not k.grad[:, 14:].any()


def test_deterministic():
    q, k, v, g = inputs(t=64, dtype=torch.float32)
    runs = []
    for _ in range(3):
        y = power_attention(q, k, v, log_g=g)
        runs.append((y, *torch.autograd.grad(y.sum(), (q, k, v, g))))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_bad_input_is_named():
    q, k, v, g = inputs(requires_grad=False)
    state = states(requires_grad=False)
    cases = [
        ((q, k.float(), v), {}, TypeError, "k is torch.float32"),
        ((q, k, v), {"log_g": g.float()}, TypeError, "log_g is torch.float32"),
        ((q.float(), k.float(), v.float()), {"log_g": g.bfloat16()}, TypeError, "log_g is torch.bfloat16"),
        ((q.long(), k, v), {}, TypeError, "q is torch.int64"),
        ((q, k.to("meta"), v), {}, ValueError, "k is on meta"),
        ((q, k[:, 1:], v), {}, ValueError, "k has shape"),
        ((q[0], k, v), {}, ValueError, "q has shape"),
        ((q[:, :, :3], k, v), {}, ValueError, "3 heads"),
        ((q, k, v), {"log_g": g[:, 1:]}, ValueError, "log_g has shape"),
        ((q, k, v), {"degree": 3}, ValueError, "degree is 3"),
        ((q, k, v), {"degree": 2.0}, ValueError, "degree is 2.0"),
        ((q, k, v), {"chunk_size": -1}, ValueError, "chunk_size is -1"),
        ((q, k, v), {"form": "warp"}, ValueError, "warp"),
        ((q, k, v), {"cu_seqlens": [0, 13]}, ValueError, "batch is 2"),
        ((q[:1], k[:1], v[:1]), {"cu_seqlens": [0, 14]}, ValueError, "cu_seqlens"),
        ((q[:1], k[:1], v[:1]), {"cu_seqlens": torch.tensor([0.0, 13.0])}, ValueError, "index tensor"),
        ((q, k, v), {"rope_offset": [1], "rope": "half"}, ValueError, "rope_offset"),
        ((q, k, v), {"initial_state": (state.s, None)}, ValueError, "S and z are needed together"),
        (
            (q, k, v),
            {"initial_state": (state.s.float(), state.z)},
            TypeError,
            "initial_state S is torch.float32",
        ),
        ((q, k, v), {"initial_state": (state.s[:, :, 1:], state.z)}, ValueError, "initial_state: S has shape"),
    ]
    for args, options, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            power_attention(*args, **options)
        assert isinstance(caught.value, pa.PowerAttentionError)


def test_cuda_without_the_backend_is_refused_by_name():
    from power_attention.torch import _native

    class Remote:
        device = torch.device("cuda", 0)

    if not pa.cuda_available():
        with pytest.raises(pa.NoDeviceError, match="q is on cuda:0"):
            _native.check_device(Remote())
    Remote.device = torch.device("mps")
    with pytest.raises(pa.NoDeviceError, match="q is on mps"):
        _native.check_device(Remote())


def test_large_outputs_ask_for_large_pages(monkeypatch):
    """The advice stays inside the new tensor; small ones get none."""
    from power_attention.torch import _native

    asked = []
    monkeypatch.setattr(_native, "_madvise", lambda *a: asked.append(a))
    _native.large_pages(torch.empty(1000))
    assert asked == []
    x = torch.empty(5_000_001)
    assert _native.large_pages(x) is x
    ((begin, size, advice),) = asked
    assert (begin % (2 << 20), size % (2 << 20), advice) == (0, 0, 14)
    assert size >= 16 << 20
    assert x.data_ptr() <= begin
    assert begin + size <= x.data_ptr() + x.nbytes

    asked.clear()
    q, k, v = (torch.randn(1, 16384, 4, 64, requires_grad=True) for _ in range(3))
    power_attention(q, k, v).sum().backward()
    assert len(asked) >= 4  # y, d_q, d_k, d_v
