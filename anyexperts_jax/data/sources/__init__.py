"""Rows of files, folders and object stores: read by number, indexed once, never loaded whole."""
