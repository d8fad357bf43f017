"""What surrounds a run: its configuration, folder, records, files, device, and the experiment as a whole."""
