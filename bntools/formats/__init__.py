"""The file formats: how each is told by its content, read and written, and what it supports."""
