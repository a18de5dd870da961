# SPDX-License-Identifier: Apache-2.0
# The manual: julia --project=docs -e 'using Pkg; Pkg.develop(path = "."); Pkg.instantiate()', then
# julia --project=docs docs/make.jl. Its examples also run in test/quality.jl, without Documenter.
using Documenter
using PowerAttention

makedocs(;
    sitename = "PowerAttention.jl",
    modules = [PowerAttention],
    pages = ["Guide" => "index.md", "Reference" => "api.md"],
    warnonly = false,
)
