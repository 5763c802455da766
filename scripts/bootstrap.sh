# Sourced by scripts/demo and scripts/test: finds or makes an environment with everything installed.
# Sets `python`, the interpreter of that environment, and moves to the root of the repository.

set -euo pipefail

say() { echo "hf_attribution: $*" >&2; }
fail() { say "$*"; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly constraints=scripts/constraints.txt
readonly torch_version=$(sed -n 's/^torch==//p' "$constraints")
readonly torch_cpu_index=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_new_enough "$name"; then command -v "$name"; return; fi
    done
    fail "no Python >= 3.10 on the PATH: install one, or activate an environment that has one."
}

# An active environment is used as it is found; conda's base is everybody's and is left alone.
choose_environment() {
    if [[ -n "${VIRTUAL_ENV:-}" ]]; then
        environment=$VIRTUAL_ENV
    elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-}" != base ]]; then
        environment=$CONDA_PREFIX
    else
        environment=$PWD/.venv
        [[ -x $environment/bin/python ]] || make_environment
    fi
    python=$environment/bin/python
    is_new_enough "$python" || fail "$python is missing or older than Python 3.10: use another environment."
}

make_environment() {
    local base
    base=$(find_python)
    say "making a virtual environment in .venv with $("$base" --version)"
    "$base" -m venv "$environment" ||
        fail "$base cannot make virtual environments: install its venv module (on Debian: apt install python3-venv)."
}

# What the environment must have been installed from for there to be nothing to do.
wanted_stamp() {
    "$python" - pyproject.toml "$constraints" scripts/bootstrap.sh <<'PY'
import hashlib, pathlib, sys
parts = [sys.version, str(pathlib.Path.cwd()), *(pathlib.Path(name).read_text() for name in sys.argv[1:])]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
}

# pip's output is shown only when it fails.
pip_install() {
    local log status=0
    log=$(mktemp)
    "$python" -m pip install --progress-bar off "$@" >"$log" 2>&1 || status=$?
    ((status == 0)) || grep -v '^WARNING: Location' "$log" | tail -n 20 >&2
    rm -f "$log"
    return "$status"
}

installed_torch() { "$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null; }

has_recent_torch() {
    local installed
    installed=$(installed_torch) && [[ $(printf '%s\n' "$torch_version" "$installed" | sort -V | head -n 1) == "$torch_version" ]]
}

# torch comes first and alone: asked for together with the rest, pip may choose a CUDA build of several GB.
install_torch() {
    local pins=$1
    if has_recent_torch; then return; fi
    if [[ $(uname) == Darwin ]] || nvidia-smi >/dev/null 2>&1; then
        say "installing torch $torch_version"
        pip_install "torch==$torch_version" -c "$pins" ||
            fail "torch $torch_version could not be installed: is there a network?"
        return
    fi
    say "installing torch $torch_version for the CPU"
    pip_install "torch==$torch_version+cpu" -c "$pins" 2>/dev/null ||
        pip_install "torch==$torch_version+cpu" -c "$pins" \
            --extra-index-url "$torch_cpu_index" --retries 1 --timeout 20 ||
        fail "no CPU build of torch $torch_version for $("$python" --version) could be installed: is there a network?" \
            "Any torch >= $torch_version already in the environment is used ($python -m pip install torch)."
}

install_everything() {
    local stamp=$1 pins
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
        fail "$environment has no pip: install pip in it."
    pins=$(mktemp)
    grep -v '^torch==' "$constraints" >"$pins"
    install_torch "$pins"
    echo "torch==$(installed_torch)" >>"$pins" # that very build stays, whatever the rest would like
    say "installing the package and what the demo and the tests need (a minute or two)"
    # As variables these reach the build of this package too: the second is what newer versions of pip read there.
    PIP_CONSTRAINT=$pins PIP_BUILD_CONSTRAINT=$pins pip_install -e ".[demo,test,dev]" ||
        fail "the installation failed, see above: is there a network?"
    rm -f "$pins"
    echo "$stamp" >"$environment/hf-attribution-stamp"
}

choose_environment
stamp=$(wanted_stamp)
if [[ $(cat "$environment/hf-attribution-stamp" 2>/dev/null) != "$stamp" ]]; then
    install_everything "$stamp"
fi
