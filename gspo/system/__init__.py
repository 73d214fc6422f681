"""Deal with processes, signals, files and the console; nothing here knows what is trained."""
