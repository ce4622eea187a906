"""What a lesson need not open; README.md says what is where."""

import os

# Before torch is imported: its idle threads then sleep instead of spinning. With other processes on
# the same two cores, a step of SmolLM2 took 4 to 9 seconds so, and 65 to 88 with spinning threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
