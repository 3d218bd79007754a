"""How a run is kept going; imports no run_*, no engine_*."""
