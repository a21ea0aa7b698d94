"""What a run leaves on disk, written and read back.

Reading order: folder, log, checkpoint, process, catalog, groups.
"""
