"""Settings shared by every test: reproducible Hypothesis runs and a marker-free default."""

from hypothesis import HealthCheck, settings

# Shared machines are slow and uneven: examples are bounded and derandomised, and no example has a deadline.
settings.register_profile(
    "gate",
    derandomize=True,
    deadline=None,
    max_examples=60,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gate")
