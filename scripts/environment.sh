# Sourced by scripts/test and scripts/demo: makes .venv in the repository root, with what constraints.txt pins.
# Needs only Python 3.10 or newer and access to a package index; does nothing where nothing has changed.
set -euo pipefail
unset PYTHONPATH PYTHONHOME
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$ROOT/.venv/bin/python

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.10 or newer with venv on PATH: install one (Debian and Ubuntu: python3 and python3-venv)" >&2
    return 1
}

install() {
    "$PYTHON" -m pip install -qq --no-input --disable-pip-version-check --constraint "$ROOT/constraints.txt" "$@"
}

# The report is tested in a browser. It is installed where that takes no password; elsewhere the message says how.
find_browser() {
    local candidate
    for candidate in chromium chromium-browser google-chrome; do
        if command -v "$candidate" >/dev/null; then
            return
        fi
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing chromium" >&2
        apt-get -qq update >&2 && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium >&2 && return
    fi
    echo "no chromium on PATH, in which the report is tested: install it (Debian: apt-get install chromium)" >&2
    return 1
}

make_environment() {
    local stamp=$ROOT/.venv/made-from wanted python
    # The path is part of it: a copied or moved environment points at the checkout that it was made in.
    wanted=$(cat "$ROOT/constraints.txt" "$ROOT/pyproject.toml" "$ROOT/scripts/environment.sh" | cksum)$ROOT
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    python=$(find_python)
    echo "making $ROOT/.venv with $("$python" --version)" >&2
    "$python" -m venv --clear "$ROOT/.venv"
    install "$(grep '^torch==' "$ROOT/constraints.txt")"
    install --editable "$ROOT[test,lint,docs]"
    echo "$wanted" >"$stamp"
}
