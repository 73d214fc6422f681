"""A page about finished or running runs: read_run.py reads a run's folder, page.py writes the HTML, the other files are
the page's own: its frame, its style, its words in two languages and its scripts. No file of a run is changed."""
