"""Group Self-Play Preference Optimization. Import it before torch: it sets how CPU threads wait."""

import os

# Threads that spin long while they wait lose the processor when anything else runs on the machine; threads that never
# spin are slower on a quiet one. A short spin is good at both (docs/decisions.md has the figures).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
