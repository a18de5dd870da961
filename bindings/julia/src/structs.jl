# SPDX-License-Identifier: Apache-2.0
# isbits mirrors of the structs and enums in power_attention.h, field for field. test/structs.jl compares
# sizes with the C ones.

const OK = Int32(0)
const ERROR_INVALID_ARGUMENT = Int32(1)
const ERROR_UNSUPPORTED = Int32(2)
const ERROR_STATE_TOO_LARGE = Int32(3)
const ERROR_OUT_OF_MEMORY = Int32(4)
const ERROR_WORKSPACE_TOO_SMALL = Int32(5)
const ERROR_NO_DEVICE = Int32(6)
const ERROR_DEVICE = Int32(7)
const ERROR_VERSION = Int32(8)
const ERROR_INTERNAL = Int32(9)
const ERROR_NOT_LOADED = Int32(-1)  # this package's own: there is no library to ask

const FLOAT32 = Int32(1)
const FLOAT16 = Int32(2)
const BFLOAT16 = Int32(3)
const FLOAT64 = Int32(4)

const CPU = Int32(0)
const CUDA_DEVICE = Int32(1)

const UNNORMALIZED = Int32(1)
const CUSTOM_SCALE = Int32(2)
const USE_STATE = Int32(4)
const ALLOW_TF32 = Int32(8)

const FORMS = (auto = Int32(0), attention = Int32(1), chunked = Int32(2))
const ROPE_STYLES = (none = Int32(0), half = Int32(1), interleaved = Int32(2))

# powerattn_desc
struct Desc
    struct_size::UInt32
    device_type::Int32
    device_index::Int32
    dtype::Int32
    state_dtype::Int32
    degree::Int32
    flags::Int32
    form::Int32
    batch::Int64
    seq_len::Int64
    heads_q::Int64
    heads_kv::Int64
    head_dim::Int64
    value_dim::Int64
    sequences::Int64
    max_seq_len::Int64
    chunk_size::Int64
    scale::Float64
    eps::Float64
    rope_base::Float64
    rope_dim::Int64
    rope_style::Int32
    num_threads::Int32
    state_limit::UInt64
    reserved::NTuple{4,Int64}
end

# powerattn_plan_info
struct PlanInfo
    struct_size::UInt32
    form::Int32
    chunk_size::Int64
    sequences::Int64
    state_rows::Int64
    state_bytes::UInt64
    workspace_forward::UInt64
    workspace_backward::UInt64
    workspace_backward_saved::UInt64
    workspace_step::UInt64
    workspace_summary::UInt64
    saved_bytes::UInt64
    scale::Float64
    predicted_forward_s::Float64
    predicted_backward_s::Float64
end

# powerattn_tensor
struct CTensor
    data::Ptr{Cvoid}
    stride_b::Int64
    stride_t::Int64
    stride_h::Int64
end

# powerattn_state
struct CState
    s::Ptr{Cvoid}
    z::Ptr{Cvoid}
    s_stride_n::Int64
    s_stride_h::Int64
    z_stride_n::Int64
    z_stride_h::Int64
end

const NO_TENSOR = CTensor(C_NULL, 0, 0, 0)
const NO_STATE = CState(C_NULL, C_NULL, 0, 0, 0, 0)

struct ForwardArgs
    struct_size::UInt32
    reserved::UInt32
    q::CTensor
    k::CTensor
    v::CTensor
    log_g::CTensor
    y::CTensor
    row_norm::CTensor
    initial_state::CState
    final_state::CState
    cu_seqlens::Ptr{Int64}
    rope_offset::Ptr{Int64}
    saved::Ptr{Cvoid}
    saved_bytes::UInt64
    workspace::Ptr{Cvoid}
    workspace_bytes::UInt64
    stream::Ptr{Cvoid}
end

struct BackwardArgs
    struct_size::UInt32
    reserved::UInt32
    q::CTensor
    k::CTensor
    v::CTensor
    log_g::CTensor
    y::CTensor
    row_norm::CTensor
    d_y::CTensor
    d_q::CTensor
    d_k::CTensor
    d_v::CTensor
    d_log_g::CTensor
    initial_state::CState
    d_final_state::CState
    d_initial_state::CState
    cu_seqlens::Ptr{Int64}
    rope_offset::Ptr{Int64}
    saved::Ptr{Cvoid}
    saved_bytes::UInt64
    workspace::Ptr{Cvoid}
    workspace_bytes::UInt64
    stream::Ptr{Cvoid}
end

struct StepArgs
    struct_size::UInt32
    reserved::UInt32
    q::CTensor
    k::CTensor
    v::CTensor
    log_g::CTensor
    y::CTensor
    state::CState
    num_slots::Int64
    slots::Ptr{Int64}
    lengths::Ptr{Int64}
    rope_offset::Ptr{Int64}
    workspace::Ptr{Cvoid}
    workspace_bytes::UInt64
    stream::Ptr{Cvoid}
end

struct SummaryArgs
    struct_size::UInt32
    reserved::UInt32
    k::CTensor
    v::CTensor
    log_g::CTensor
    state::CState
    total_log_g::Ptr{Cvoid}
    cu_seqlens::Ptr{Int64}
    rope_offset::Ptr{Int64}
    workspace::Ptr{Cvoid}
    workspace_bytes::UInt64
    stream::Ptr{Cvoid}
end

struct SummaryReverseArgs
    struct_size::UInt32
    reserved::UInt32
    q::CTensor
    log_g::CTensor
    y::CTensor
    row_norm::CTensor
    d_y::CTensor
    d_state::CState
    total_log_g::Ptr{Cvoid}
    cu_seqlens::Ptr{Int64}
    rope_offset::Ptr{Int64}
    workspace::Ptr{Cvoid}
    workspace_bytes::UInt64
    stream::Ptr{Cvoid}
end

struct ComposeArgs
    struct_size::UInt32
    reserved::UInt32
    count::Int64
    segments::CState
    s_stride_segment::Int64
    z_stride_segment::Int64
    log_g::Ptr{Cvoid}
    log_g_stride_segment::Int64
    log_g_stride_n::Int64
    log_g_stride_h::Int64
    out::CState
    out_log_g::Ptr{Cvoid}
    stream::Ptr{Cvoid}
end

struct ConvertArgs
    struct_size::UInt32
    src_dtype::Int32
    dst_dtype::Int32
    reserved::Int32
    src::CState
    dst::CState
    count::Int64
    src_slots::Ptr{Int64}
    dst_slots::Ptr{Int64}
    src_num_slots::Int64
    dst_num_slots::Int64
    stream::Ptr{Cvoid}
end

struct PackArgs
    struct_size::UInt32
    dtype::Int32
    state::CState
    count::Int64
    packed::Ptr{Cvoid}
    packed_bytes::UInt64
    stream::Ptr{Cvoid}
end

struct_size(::Type{T}) where {T} = UInt32(sizeof(T))
