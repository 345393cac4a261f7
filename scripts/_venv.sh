# shellcheck shell=bash
# Sourced by the scripts beside it: find a Python, make a virtual environment, install into it.
#
#   ROOT                     the top of the repository
#   say, die                 a message on standard error; die also ends the script
#   PYTHONS                  where scripts/pythons puts interpreters: .pythons or $WHITEPOOL_PYTHONS
#   find_python              print the first Python for an environment
#   python_of_version X.Y    print the path of a Python of this version, or fail
#   ensure_venv DIR EXTRA MODE
#                            make DIR when it is missing, and install this package with its
#                            [EXTRA]; MODE is `editable` (installed again only when pyproject.toml
#                            changed) or `copy` (also when the package's sources changed)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

die() {
    say "$*"
    exit 2
}

PYTHONS="${WHITEPOOL_PYTHONS:-$ROOT/.pythons}"
case "$PYTHONS" in
    /*) ;;
    *) PYTHONS="$PWD/$PYTHONS" ;;
esac

# Whether a command is a Python that is new enough. It is run, not looked up: a version manager's
# shim may exist and fail.
python_works() { "$1" -c 'import sys, venv; assert sys.version_info >= (3, 10)' >/dev/null 2>&1; }

# Whether it can make whole environments by itself. Debian splits ensurepip off.
has_ensurepip() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# The first Python that can make environments by itself; if there is none, the first of all, if uv
# can make them for it.
find_python() {
    local candidate candidates version
    if [ -n "${PYTHON:-}" ]; then
        python_works "$PYTHON" && printf '%s\n' "$PYTHON" && return
        die "PYTHON=$PYTHON is not a Python >= 3.10 with the venv module"
    fi
    candidates=(python3.15 python3.14 python3.13 python3.12 python3.11 python3.10 python3 python)
    for version in 3.15 3.14 3.13 3.12 3.11 3.10; do
        candidates+=("$HOME"/.pyenv/versions/"$version".*/bin/python)
        candidates+=("$PYTHONS/$version/usr/bin/python$version")
    done
    for candidate in "${candidates[@]}"; do
        python_works "$candidate" && has_ensurepip "$candidate" && printf '%s\n' "$candidate" && return
    done
    if command -v uv >/dev/null 2>&1; then
        for candidate in "${candidates[@]}"; do
            python_works "$candidate" && printf '%s\n' "$candidate" && return
        done
    fi
    die "needs Python 3.10 or newer with the venv and ensurepip modules" \
        "(Debian and Ubuntu: apt-get install python3-venv); found:" \
        "$(python3 --version 2>/dev/null || echo 'no python3'). Set PYTHON to choose another."
}

python_of_version() {
    local candidate
    for candidate in "python$1" python3 "$HOME"/.pyenv/versions/"$1".*/bin/python \
        "$PYTHONS/$1/usr/bin/python$1"; do
        if python_works "$candidate" && [ "$(python_version "$candidate")" = "$1" ]; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

# Run a command in silence; when it fails, show what it said and end the script.
quietly() {
    local what="$1" output
    shift
    if ! output="$("$@" 2>&1)"; then
        printf '%s\n' "$output" >&2
        die "$what failed (see above)"
    fi
}

# A program that comes from PyPI, in an environment of its own.
tool() { # NAME
    local python venv="$ROOT/.venv-tools"
    if ! [ -x "$venv/bin/$1" ]; then
        python="$(PYTHON="" find_python)" || return
        has_ensurepip "$venv/bin/python" || { rm -rf "$venv" && new_venv "$python" "$venv"; }
        install_into "$venv" "$1"
    fi
    printf '%s\n' "$venv/bin/$1"
}

new_venv() { # PYTHON DIR
    local uv
    rm -rf "$2"
    if has_ensurepip "$1"; then
        quietly "making a virtual environment with $1" "$1" -m venv "$2"
    else
        # Debian keeps ensurepip apart, and interpreters that scripts/pythons brought have none.
        uv="$(command -v uv || tool uv)" || exit
        quietly "making a virtual environment with $1" \
            "$uv" venv --quiet --seed --no-config --python "$1" "$2"
    fi
}

install_into() { # DIR PIP-ARGUMENTS...
    local venv="$1"
    shift
    quietly "pip install $*" "$venv/bin/python" -m pip install \
        --quiet --disable-pip-version-check --no-input "$@"
}

# What the installation depends on, as a checksum.
sources_stamp() { # EXTRA MODE
    (
        cd "$ROOT" || exit
        printf '%s %s %s\n' "$1" "$2" "$ROOT"
        cat pyproject.toml
        if [ "$2" = copy ]; then
            find whitepool_mp -name '*.py' -print | LC_ALL=C sort | while read -r file; do
                printf '%s\n' "$file"
                cat "$file"
            done
        fi
    ) | cksum
}

ensure_venv() ( # DIR EXTRA MODE, in a subshell: the lock ends with it
    venv="$1" extra="$2" mode="$3"
    if command -v flock >/dev/null 2>&1; then
        exec 9<"$ROOT"
        flock 9
    fi
    if python_works "$venv/bin/python" &&
        { [ -z "${PYTHON:-}" ] ||
            [ "$(python_version "$PYTHON")" = "$(python_version "$venv/bin/python")" ]; }; then
        :
    else
        python="$(find_python)"
        if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
            die "$venv exists and is not a virtual environment"
        fi
        say "making $venv with $("$python" --version)"
        new_venv "$python" "$venv"
    fi
    stamp="$(sources_stamp "$extra" "$mode")"
    if [ "$(cat "$venv/whitepool.stamp" 2>/dev/null)" != "$stamp" ]; then
        say "installing whitepool_mp[$extra] into $venv"
        case "$mode" in
            editable) install_into "$venv" --editable "${ROOT}[$extra]" ;;
            copy) install_into "$venv" "${ROOT}[$extra]" ;;
            *) die "ensure_venv: no such mode: $mode" ;;
        esac
        printf '%s\n' "$stamp" >"$venv/whitepool.stamp"
    fi
)

# The environment for tests and checks, as an absolute path.
test_venv() {
    local venv="${WHITEPOOL_VENV:-$ROOT/.venv-test}"
    case "$venv" in
        /*) ;;
        *) venv="$PWD/$venv" ;;
    esac
    printf '%s\n' "$venv"
}
