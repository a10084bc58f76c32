"""Runs on disk: files, folders and manifests."""
