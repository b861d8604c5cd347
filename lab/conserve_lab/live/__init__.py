"""Runs against engines that answer over HTTP, emulated or real: replays, calibration, energy."""
