"""What any room may need: random numbers, memory, processes, names."""
