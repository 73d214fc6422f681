"""Runs the Triton kernels on CPU tensors and prints, as JSON, what is too far from float64.

Started as `interpreted_logprob.py STEP` with TRITON_INTERPRET=1: only every STEP-th case. A program of its own: Triton
reads that variable when a kernel is defined (its helpers as well), and the other tests compile the same kernels.
"""

import json
import sys
from types import ModuleType

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from logprob_cases import HEADS, Case, too_far

from gspo.kernels import logprob, logprob_chunk_triton
from gspo.kernels.dispatch import always

SHAPES = [(12, 8, 700), (1, 8, 300), (13, 24, 257)]


def repair_interpreter() -> None:
    """Three faults of Triton 3.6 to 3.9: it truncates float32 to bfloat16, multiplies the bits of bfloat16 in `tl.dot`,
    and 3.6.0 with numpy 2.4 takes no run-time bound in `range`."""
    cast, dot = interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot

    def rounding_cast(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            nearest = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(nearest.view(np.uint16).reshape(source.data.shape), tl.bfloat16)
        return cast(self, source, dtype)

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = np.ascontiguousarray(x.data).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.cast_impl = rounding_cast
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = patch_with_index


def use_triton(operation: ModuleType) -> None:
    """Let the operation's Triton kernel take CPU tensors."""
    operation.IMPLEMENTATIONS = (operation.IMPLEMENTATIONS[0]._replace(serves=always),)


def main() -> None:
    repair_interpreter()
    torch.use_deterministic_algorithms(True)  # which also fills new tensors with NaN
    use_triton(logprob)
    logprob.CHUNK_BYTES["cpu"], logprob.LEAST_WIDTH["cpu"] = 0, 256  # several chunks,
    logprob_chunk_triton.BLOCK = 128  # of several blocks
    cases = [
        Case(*shape, dtype, **head, keep=(None, 0, 10_000)[number % 3])
        for dtype in (torch.float32, torch.bfloat16)
        for shape in SHAPES
        for number, head in enumerate(HEADS[1:5])  # capped or not
    ]
    print(json.dumps({case.name(): too_far(case) for case in cases[:: int(sys.argv[1])]}))


if __name__ == "__main__":
    main()
