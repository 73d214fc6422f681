"""Group Self-Play Preference Optimization. Import it before torch: it sets how threads wait and how CUDA allocates."""

import os
from pathlib import Path

# Threads that spin long while they wait lose the processor when anything else runs on the machine; threads that never
# spin are slower on a quiet one. A short spin is good at both (benchmarks/timings.md has the figures).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# On CUDA the pages of the sampler and the activations of training take turns, in pieces of other sizes each time:
# segments that grow leave no gaps between them.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# The folder kernels/ beside this one is imported as `gspo.kernels`. As an import, `kernels` is a package that Hugging
# Face publishes and transformers imports (integrations/hub_kernels.py): ours must not stand in its place, nor the other
# way round where gspo is installed and both lie in one folder.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))
