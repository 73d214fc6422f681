"""Group Self-Play Preference Optimization. Import it before torch: it sets how CPU threads wait."""

import os

# Threads that spin while they wait lose the processor when anything else runs on the machine: with one busy
# neighbour on two cores a training step was six times slower (docs/decisions.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
