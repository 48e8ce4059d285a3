"""Devices, mesh axes and processes; nothing else names them."""
