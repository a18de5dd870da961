# SPDX-License-Identifier: Apache-2.0
# Comments of the header for doxygen: "/* text" alone on its line documents what follows, "; /* text" or
# ", /* text" after a declaration what stands before it. Section rules and the licence line stay as they are.
/^\/\* (SPDX|----)/b
/^#/b
s|^/\* |/** |
s|^( +)/\* |\1/** |
s|([;,]) +/\* |\1 /**< |
s|^( +[A-Z0-9_]+ = [0-9]+) +/\* |\1 /**< |
