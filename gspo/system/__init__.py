"""Processes, signals, files, the console; nothing here knows what is trained."""
