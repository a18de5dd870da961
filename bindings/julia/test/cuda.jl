# SPDX-License-Identifier: Apache-2.0
# The CUDA extension against a stand-in of the names of CUDA.jl that it uses: device pointers, device numbers and the
# stream reach the C call. test/device.jl computes with it, on an emulated device.

include("cuda_standin.jl")

@testset "CuArrays" begin
    x = CUDA.CuArray{Float32}(undef, 8, 2, 10, 1)
    slice = view(x, :, 2:2, :, :)
    swapped = PermutedDimsArray(x, (1, 3, 2, 4))
    @test PA.device_of(x) == PA.device_of(slice) == PA.device_of(swapped) == (:cuda, 0)
    @test PA.tensor(x, "x", :dhtb) == PA.CTensor(Ptr{Cvoid}(x.at), 160, 16, 8)
    @test PA.tensor(slice, "x", :dhtb) == PA.CTensor(Ptr{Cvoid}(x.at + 32), 160, 16, 8)
    @test PA.tensor(swapped, "x", :dthb) == PA.CTensor(Ptr{Cvoid}(x.at), 160, 16, 8)
    CUDA.STREAM[] = Ptr{Nothing}(UInt(0x5eed))
    @test PA.stream_of(slice) == Ptr{Cvoid}(UInt(0x5eed))
    CUDA.STREAM[] = C_NULL
    @test PA.allocate(swapped, Float32, 3, 4) isa CUDA.CuArray{Float32,2}
    w = PA.make_workspace(x, 1000)
    @test w.memory isa CUDA.CuArray{UInt8,1} && UInt(PA.aligned_pointer(w)) % 256 == 0
    @test isempty(detect_ambiguities(PowerAttentionCUDAExt))
    # Arrays of two devices are told apart before anything is read.
    host = zeros(Float32, 8, 2, 10, 1)
    @test_throws ArgumentError power_attention(x, host, x)
    # A plan for the device: refused with the library's words where there is none.
    if PA.device_count(:cuda) == 0
        @test status_of(() -> power_attention(x, x, x)) in (PA.ERROR_NO_DEVICE, PA.ERROR_UNSUPPORTED)
        other = CUDA.CuArray{Float32,4}(x.at, x.dims, 1)
        @test_throws ArgumentError power_attention(x, other, x)
    end
end
