"""What the paper reports (arXiv 2606.01839): the headlines of its abstract, and values read off its figures (+-0.1)."""

from __future__ import annotations

from collections.abc import Mapping

HEADLINE: Mapping[str, float] = {
    "ttfet_p95_reduction_pct": 51.08,
    "tokens_per_joule_gain_pct": 7.51,
    "heterogeneous_gain_pct": 22.75,
}
"""p95 TTFET and tokens per joule against AMPD at 1.634 conversations/s; the last: decoders capped to 200 W."""

TTFET_P95_NORM: Mapping[str, Mapping[float, float]] = {
    "collocated": {0.5: 1.35, 1.0: 2.4, 1.25: 3.6, 1.5: 4.4, 1.634: 5.6},
    "full-disaggregation": {1.634: 104.0},
    "ampd": {1.634: 8.3},
    "conserve": {0.5: 1.35, 1.0: 2.6, 1.25: 3.5, 1.5: 3.9, 1.634: 4.1},
}
TBT_P95_NORM: Mapping[str, Mapping[float, float]] = {
    "collocated": {1.0: 2.4, 1.634: 7.6},
    "full-disaggregation": {1.634: 2.0},
    "ampd": {1.634: 4.3},
    "conserve": {1.0: 3.0, 1.634: 4.4},
}
E2E_P95_NORM: Mapping[str, Mapping[float, float]] = {
    "collocated": {1.634: 5.6},
    "full-disaggregation": {1.634: 65.0},
    "ampd": {1.634: 7.1},
    "conserve": {1.634: 4.2},
}
TOKENS_PER_JOULE: Mapping[str, Mapping[float, float]] = {
    "collocated": {1.634: 61.3},
    "full-disaggregation": {1.634: 30.3},
    "ampd": {1.634: 57.7},
    "conserve": {1.634: 62.0},
}
TOKENS_PER_JOULE_200W: Mapping[str, float] = {
    "collocated": 70.7,
    "full-disaggregation": 31.0,
    "ampd": 71.9,
    "conserve": 76.2,
}
