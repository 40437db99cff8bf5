"""The bundle: its manifest, its files, and how both are read, checked and written."""
