"""Rows of files, folders and object stores, indexed once and read by index, never loaded as a whole."""
