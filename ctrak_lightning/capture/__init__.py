"""Tracing a data set: at a checkpoint, or inside training steps; the trial before the first one."""
