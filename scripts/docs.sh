# SPDX-License-Identifier: Apache-2.0
# The API reference and the pages of docs/ as HTML; any warning of doxygen is an error.
docs_build() {
  need_apt doxygen
  mkdir -p "$BUILD/docs"
  # The version stands in the public header and nowhere else.
  POWERATTN_VERSION=$(sed -n 's/^#define POWERATTN_VERSION_[A-Z]* \([0-9]*\)$/\1/p' include/power_attention.h | paste -sd.) \
    POWERATTN_DOCS_OUTPUT=$BUILD/docs doxygen docs/Doxyfile
}

docs() {
  docs_build
  say "open $BUILD/docs/html/index.html"
}
