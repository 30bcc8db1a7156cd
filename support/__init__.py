"""What the flat files stand on, and what is not the paper's. To be imported before torch."""
import os

# Read when torch is first imported: threads that wait for each other sleep after so many spins. To spin on, the
# default, is 3 % faster on an idle machine, but beside a script a decoding step takes seven times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
