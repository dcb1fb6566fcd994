"""Settings for every test: quiet libraries, and hypothesis without deadlines on noisy machines."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
# torch's idle threads spin by default. With servers, workers and tests on two cores that turns a
# step of 30 ms into one of seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("house")
