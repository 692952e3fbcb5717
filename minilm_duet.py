"""``minilm-duet PROGRAM``, or ``python -m minilm_duet PROGRAM``: runs a program of the project, from any folder.

``python -m PROGRAM`` looks for modules where the user is first: a ``text/`` or ``export.py`` of the user's own takes
the place of ours. Programs call `begin` before they import one of ours, which helps where the program itself
is found; by the name of this module it always is.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # nothing is imported yet that a file of the user's could be taken for
    from typing import Any

VERSION = "0.1.0"
ROOT = os.path.dirname(os.path.abspath(__file__))
PROGRAMS = {
    "general_distill": "distils a student from a teacher on a folder of text",
    "finetuning": "fine-tunes a model on a task, evaluates it, predicts",
    "finetuning.search": "fine-tunes over a grid of hyperparameters, and tabulates the best",
    "finetuning.augment": "adds variants of its texts to a task's training set",
    "finetuning.download": "fetches tasks' data",
    "export": "ONNX, quantization, prediction, serving, from a fine-tuned model",
    "text.prepare": "prepares a large corpus: splits, cleans, leaves copies out, tokenizes",
    "backends": "says what is installed, and what its devices can do",
    "bench": "measures this project beside other tools",
}


def begin() -> None:
    """What a program does first: it takes the folder that Python put first into its path, the user's or a script's
    own, out of it again, for this process and those that it starts; and Ctrl-C is a line, while modules are imported
    too."""
    sys.excepthook = _excepthook
    if not getattr(sys.flags, "safe_path", False):  # Python 3.10 has no such flag
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"
    if ROOT not in sys.path:
        sys.path.append(ROOT)


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def main() -> int:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = ROOT  # until the program calls `begin`
    elif ROOT not in sys.path:
        sys.path.append(ROOT)
    import runpy
    from functools import partial

    from programs import commandline

    chosen: list[Any] = []
    choose = partial(commandline.choose, sys.argv[1:], "minilm_duet", "programs", PROGRAMS)
    if code := commandline.run(lambda: chosen.extend(choose()), "the same command"):
        return code
    sys.argv[1:] = chosen[1]
    runpy.run_module(chosen[0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
