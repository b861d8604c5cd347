"""`conserve demo`: the main job, from the agents down to the engines, with every figure observed."""

__all__: list[str] = []
