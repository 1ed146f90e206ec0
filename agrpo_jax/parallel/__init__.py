"""Devices in a mesh, and the processes of a run."""
