# SPDX-License-Identifier: Apache-2.0
# Finding libpowerattn: use_library!(path), then ENV["POWERATTN_LIBRARY"], then the `libpowerattn_path` of a
# LocalPreferences.toml beside the active project, then the system's loader. Nothing is opened before the
# first call.

const VERSION_MAJOR = 0
const VERSION_MINOR = 1

struct Library
    handle::Ptr{Cvoid}
    path::String
    symbols::Dict{Symbol,Ptr{Cvoid}}
end

const LIBRARY = Ref{Union{Nothing,Library}}(nothing)
const LIBRARY_LOCK = ReentrantLock()
const LIBRARY_PATH = Ref{String}("")

const SYMBOLS = (
    :powerattn_plan_create,
    :powerattn_plan_destroy,
    :powerattn_plan_query,
    :powerattn_plan_describe,
    :powerattn_forward,
    :powerattn_backward,
    :powerattn_step,
    :powerattn_summary,
    :powerattn_summary_reverse,
    :powerattn_state_compose,
    :powerattn_state_rows,
    :powerattn_state_bytes,
    :powerattn_state_monomial,
    :powerattn_state_convert,
    :powerattn_state_pack_size,
    :powerattn_state_pack,
    :powerattn_state_unpack,
    :powerattn_version,
    :powerattn_device_count,
    :powerattn_status_string,
    :powerattn_last_error,
)

"""
    use_library!(path)

Use the libpowerattn at `path` from the next call on (before any other call of the process).
"""
function use_library!(path::AbstractString)
    lock(LIBRARY_LOCK) do
        LIBRARY[] === nothing || error("libpowerattn is loaded already, from $(LIBRARY[].path)")
        LIBRARY_PATH[] = String(path)
    end
    return nothing
end

# The one key that this package keeps in LocalPreferences.toml, read without a TOML parser (Julia 1.5 has none).
function preferred_path()
    project = Base.active_project()
    project === nothing && return ""
    file = joinpath(dirname(project), "LocalPreferences.toml")
    isfile(file) || return ""
    section = false
    for line in eachline(file)
        text = strip(line)
        if startswith(text, "[")
            section = text == "[PowerAttention]"
        elseif section
            m = match(r"^libpowerattn_path\s*=\s*\"(.*)\"\s*(#.*)?$", text)
            m === nothing || return String(m.captures[1])
        end
    end
    return ""
end

function candidates()
    isempty(LIBRARY_PATH[]) || return [LIBRARY_PATH[]]
    path = get(ENV, "POWERATTN_LIBRARY", "")
    isempty(path) || return [path]
    path = preferred_path()
    isempty(path) || return [path]
    return ["libpowerattn.so.$(VERSION_MAJOR)", "libpowerattn"]
end

function open_library()
    reasons = String[]
    for path in candidates()
        handle = try
            Libdl.dlopen(path)
        catch e
            push!(reasons, replace(sprint(showerror, e), '\n' => ' '))
            nothing
        end
        handle === nothing && continue
        symbols = Dict{Symbol,Ptr{Cvoid}}()
        for name in SYMBOLS
            pointer = Libdl.dlsym(handle, name; throw_error = false)
            pointer === nothing && throw(
                PowerAttentionError(
                    ERROR_VERSION,
                    "the library at $(path) has no $(name): it is not libpowerattn $(VERSION_MAJOR).$(VERSION_MINOR)",
                ),
            )
            symbols[name] = pointer
        end
        number = ccall(symbols[:powerattn_version], UInt32, ())
        check_version(number, path)
        return Library(handle, path, symbols)
    end
    throw(
        PowerAttentionError(
            ERROR_NOT_LOADED,
            "libpowerattn cannot be loaded ($(join(reasons, "; "))). Set ENV[\"POWERATTN_LIBRARY\"] to the path of " *
            "libpowerattn.so, or libpowerattn_path in LocalPreferences.toml, or install the library",
        ),
    )
end

# Before 1.0 a minor version may break the ABI.
function check_version(number::Integer, path::AbstractString)
    major, minor = divrem(div(number, 100), 100)
    if (major, minor) != (VERSION_MAJOR, VERSION_MINOR)
        throw(
            PowerAttentionError(
                ERROR_VERSION,
                "the library at $(path) is version $(major).$(minor); this package needs " *
                "$(VERSION_MAJOR).$(VERSION_MINOR)",
            ),
        )
    end
    return nothing
end

function library()
    found = LIBRARY[]
    found === nothing || return found
    return lock(LIBRARY_LOCK) do
        if LIBRARY[] === nothing
            LIBRARY[] = open_library()
        end
        return LIBRARY[]
    end
end

symbol(name::Symbol) = library().symbols[name]

"Version of the library in use, as a `VersionNumber`."
function library_version()
    number = ccall(symbol(:powerattn_version), UInt32, ())
    return VersionNumber(div(number, 10000), div(number, 100) % 100, number % 100)
end

"""
    device_count(device = :cpu)

Devices of a type (`:cpu` or `:cuda`) that can be used here.
"""
function device_count(device::Symbol = :cpu)
    count = Ref{Int32}(0)
    check(ccall(symbol(:powerattn_device_count), Int32, (Int32, Ptr{Int32}), device_type(device), count))
    return Int(count[])
end

function device_type(device::Symbol)
    device === :cpu && return CPU
    device === :cuda && return CUDA_DEVICE
    throw(ArgumentError("device must be :cpu or :cuda, got :$(device)"))
end
