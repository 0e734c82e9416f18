"""What several experiments need: finished runs, 04's loop, simulated people, result files."""
