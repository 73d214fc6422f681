"""Run the unit tests of a row on the code that a response holds; the reward is the share that pass.

    ./train.sh --reward_func examples/reward_code.py 'data.train_files=[programs.jsonl]' reward.timeout_s=5

A row has the tests as its ground truth, one assertion a line:
{"prompt": "Write add(a, b).", "ground_truth": "assert add(1, 2) == 3\\nassert add(0, 0) == 0"}

The code runs in the worker process of the reward function. A loop without end, a crash or too much memory costs that
call only: after reward.timeout_s the process is killed, with all it started, and replaced (docs/reward.md). This is no
sandbox: the code has your rights, so run it where that does no harm.
"""

import contextlib
import io
import re

BLOCK = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Return the share of the assertions that hold, and whether all do as `acc`."""
    blocks = BLOCK.findall(solution_str)
    tests = [line for line in ground_truth.splitlines() if line.strip()]
    passed = count_passed(blocks[-1], tests) if blocks else 0
    return {"score": passed / len(tests), "acc": passed == len(tests), "has_code": bool(blocks)}


def count_passed(code, tests):
    """Return how many of the tests hold after the code has run; what the code prints is dropped."""
    names = {"__name__": "solution"}
    passed = 0
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            exec(compile(code, "response", "exec"), names)
        except BaseException:  # a SyntaxError, sys.exit(), whatever it raises
            return 0
        for test in tests:
            with contextlib.suppress(BaseException):
                exec(compile(test, "test", "exec"), dict(names))
                passed += 1
    return passed
