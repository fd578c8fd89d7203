"""What any part of the package may need: random numbers, memory, processes, names."""
