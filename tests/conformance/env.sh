# Sourced by the suites: where sources and builds live, and how a download is made whole or not at all.

conformance_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$conformance_dir/../.." && pwd)
cache_dir=${FLUMEN_CACHE:-$repository/.cache}/conformance
mkdir -p "$cache_dir"

suite_fail() { echo "$(basename "$0"): $*" >&2; exit 1; }

need() {
    local tool
    for tool in "$@"; do command -v "$tool" >/dev/null || suite_fail "$tool is needed and was not found"; done
}

# Debian packages by a file that each brings, "file=package"; installed where that is possible.
need_files() {
    local missing=() entry
    for entry in "$@"; do
        [ -n "$(find /usr/include /usr/lib -path "*/${entry%%=*}" -print -quit 2>/dev/null)" ] || missing+=("${entry##*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || suite_fail "missing: ${missing[*]}"
    local sudo=""
    [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get update -qq && $sudo apt-get install -y -qq "${missing[@]}" >/dev/null || suite_fail "cannot install ${missing[*]}"
}

# crate NAME VERSION DIR: the sources of a crate from crates.io, through cargo, copied to where they may be changed.
crate() {
    local name=$1 version=$2 target=$3 scratch
    [ -d "$target" ] && return 0
    need cargo
    scratch=$(mktemp -d)
    mkdir -p "$scratch/src" && : >"$scratch/src/lib.rs"
    printf '[package]\nname = "fetch"\nversion = "0.0.0"\nedition = "2021"\n[dependencies]\n%s = { version = "=%s", default-features = false }\n[workspace]\n' \
        "$name" "$version" >"$scratch/Cargo.toml"
    cargo fetch -q --manifest-path "$scratch/Cargo.toml" || suite_fail "cannot fetch $name $version"
    local source
    source=$(find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -maxdepth 2 -type d -name "$name-$version*" -print -quit)
    [ -n "$source" ] || suite_fail "$name $version was fetched and is not in cargo's registry"
    rm -rf "$scratch" "$target.part"
    cp -r "$source" "$target.part"
    chmod -R u+w "$target.part"
    mv "$target.part" "$target"
}

# Waits for the ready line of a broker: its output, its process, its log.
await_ready() {
    until grep -qs '^flumen ready' "$1"; do
        kill -0 "$2" 2>/dev/null || suite_fail "the broker did not start; see $3"
        sleep 0.05
    done
}
