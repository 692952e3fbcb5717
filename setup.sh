# Sourced by run.sh and tests/run.sh: makes $VENV (.venv) hold what $EXTRAS (torch, paddle or
# torch,paddle,test; see pyproject.toml) need.
#
# The frameworks' wheels come from their own indexes, those for CUDA 12.6 where there is a GPU
# (PyTorch's are the last that hold kernels for V100; its default ones bring gigabytes of CUDA
# to machines without a GPU), and from wherever pip is set up to look where those are out of reach.
VENV=${VENV:-.venv}
die() { echo "error: $*" >&2; exit 2; }

case $EXTRAS in
torch* | paddle*) ;;
*) die "BACKEND=$EXTRAS: must be torch or paddle" ;;
esac

# Paddle has no wheels for Python 3.14.
case $EXTRAS in *paddle*) LATEST=13 ;; *) LATEST=14 ;; esac
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.10 python3.14 python3}; do
        if "$candidate" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $LATEST))" 2>/dev/null; then
            "$candidate" -m venv "$VENV" || die "$candidate cannot make a virtual environment (on Debian: install python3-venv)"
            break
        fi
    done
    [ -x "$VENV/bin/python" ] || die "no Python from 3.10 to 3.$LATEST found, which $EXTRAS needs; install one or name it: PYTHON=/path/to/python"
fi
"$VENV/bin/python" -c "import sys; sys.exit(sys.version_info[1] > $LATEST)" ||
    die "$VENV has a newer Python than $EXTRAS has wheels for (3.$LATEST); name another folder: VENV=.venv-paddle, with PYTHON=python3.$LATEST"
case $EXTRAS in *paddle*)
    "$VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null ||
        die "Paddle needs the system's libgomp.so.1 (on Debian: install libgomp1)" ;;
esac

TORCH_INDEX=https://download.pytorch.org/whl/cpu
if command -v nvidia-smi >/dev/null 2>&1; then
    TORCH_INDEX=https://download.pytorch.org/whl/cu126
    PADDLE_INDEX=https://www.paddlepaddle.org.cn/packages/stable/cu126/
    EXTRAS=$(echo "$EXTRAS" | sed 's/paddle/paddle-gpu/')
fi

STAMP=$VENV/.installed-$(echo "$EXTRAS" | tr , -)
WANTED=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ]; then
    echo "installing into $VENV what $EXTRAS needs ..." >&2
    fetch() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"; }
    case $EXTRAS in *torch*) fetch --retries 0 --extra-index-url "$TORCH_INDEX" torch || die "PyTorch could not be installed" ;; esac
    case $EXTRAS in *paddle-gpu*) fetch --extra-index-url "$PADDLE_INDEX" paddlepaddle-gpu || die "Paddle could not be installed" ;; esac
    fetch -e ".[$EXTRAS]" || die "installation failed; pip's message above says why"
    # On Python 3.13 it does not come with the extra (see pyproject.toml).
    case $EXTRAS in *paddle*) fetch --no-deps paddlenlp || die "paddlenlp could not be installed" ;; esac
    echo "$WANTED" >"$STAMP"
fi
