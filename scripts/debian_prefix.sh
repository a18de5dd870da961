# SPDX-License-Identifier: Apache-2.0
# Programs of another Debian release below a private prefix; nothing on the machine changes. Sourced.

# debian_prefix name suite package...: sets PREFIX to a folder with the packages and what they depend on, unpacked,
# except the C and C++ run-time libraries, which stay the machine's own (newer) ones.
debian_prefix() {
  local name=$1 suite=$2
  shift 2
  PREFIX=$CACHE/$name-$suite
  [ -e "$PREFIX/complete" ] && return 0
  command -v apt-get >/dev/null || skip_part "$name comes from Debian's packages, and this system has no apt-get"
  say "fetching $* of Debian $suite"
  (
    exec 9>"$CACHE/$name.lock" # two runs at once: the second waits and finds it complete
    flock 9
    [ -e "$PREFIX/complete" ] && exit 0
    quietly "$name" unpack_debian "$suite" "$PREFIX" "$@"
    touch "$PREFIX/complete"
  )
}

unpack_debian() {
  local suite=$1 prefix=$2 mirror work deb
  shift 2
  # The mirror that this machine's own apt uses.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -E '/debian/?$' | sort -u | head -n 1)
  [ -n "$mirror" ] || {
    echo "apt has no Debian mirror configured" >&2
    return 1
  }
  work=$(mktemp -d)
  mkdir -p "$work/lists/partial" "$work/archives/partial"
  : >"$work/status" # an empty list of installed packages: every dependency is fetched
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$work/sources.list"
  local options=(-o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$work/lists" -o "Dir::State::status=$work/status" -o "Dir::Cache::archives=$work/archives"
    -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=" -o APT::Sandbox::User=root -o Debug::NoLocking=true)
  apt-get "${options[@]}" update
  apt-get "${options[@]}" install -y --no-install-recommends --download-only "$@"
  rm -rf "$prefix"
  mkdir -p "$prefix"
  for deb in "$work"/archives/*.deb; do
    case $(basename "$deb") in
      libc6_* | libstdc++6_* | libgcc-s1_*) ;;
      *) dpkg -x "$deb" "$prefix" ;;
    esac
  done
  rm -rf "$work"
}

# in_prefix prefix program argument...: runs a program with the prefix's libraries.
in_prefix() {
  local prefix=$1 lib
  lib=$1/usr/lib/$(uname -m)-linux-gnu
  shift
  LD_LIBRARY_PATH="$lib/julia:$lib:$prefix/lib/$(uname -m)-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$@"
}
