"""List the rollout engines by name. A new one is a class like `engine_interface.Engine` and one line here."""

from gspo.errors import UserError
from gspo.rollout.engine_interface import Engine
from gspo.rollout.paged_engine import PagedEngine

ENGINES: dict[str, type[Engine]] = {
    "paged": PagedEngine,  # ours: slots and a paged KV cache, on CPUs and CUDA
}


def engine_class(name: str) -> type[Engine]:
    """Return the engine `rollout.engine` names. Raises UserError where there is none of that name."""
    if name not in ENGINES:
        raise UserError(f"rollout.engine = {name!r} is no engine; choose one of: {', '.join(ENGINES)}.")
    return ENGINES[name]
