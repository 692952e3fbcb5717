"""``minilm-duet PROGRAM``, or ``python -m minilm_duet PROGRAM``: runs a program of the project, from any folder.

``python -m PROGRAM`` looks for modules where the user is first: a ``text/`` or ``export.py`` of the user's own takes
the place of ours. Programs call `leave_folder` before they import one of ours, which helps where the program itself
is found; by the name of this module it always is.
"""

from __future__ import annotations

import os
import sys

VERSION = "0.1.0"
ROOT = os.path.dirname(os.path.abspath(__file__))
PROGRAMS = {
    "general_distill": "distils a student from a teacher on a folder of text",
    "finetuning": "fine-tunes a model on a task, evaluates it, predicts",
    "finetuning.search": "fine-tunes over a grid of hyperparameters, and tabulates the best",
    "finetuning.download": "fetches tasks' data",
    "export": "ONNX, quantization, prediction, serving, from a fine-tuned model",
    "text.prepare": "prepares a large corpus: splits, cleans, leaves copies out, tokenizes",
    "backends": "says what is installed, and what its devices can do",
    "bench": "measures this project beside other tools",
}


def leave_folder() -> None:
    """Takes the folder that Python put first into its path, the user's or a script's own, out of it again, for this
    process and those that it starts."""
    if not getattr(sys.flags, "safe_path", False):  # Python 3.10 has no such flag
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"
    if ROOT not in sys.path:
        sys.path.append(ROOT)


def main() -> int:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = ROOT  # until the program calls `leave_folder`
    import runpy
    from functools import partial
    from typing import Any

    from training import commandline

    chosen: list[Any] = []
    choose = partial(commandline.choose, sys.argv[1:], "minilm_duet", "programs", PROGRAMS)
    if code := commandline.run(lambda: chosen.extend(choose()), "the same command"):
        return code
    sys.argv[1:] = chosen[1]
    runpy.run_module(chosen[0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
