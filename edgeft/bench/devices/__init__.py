"""Measuring on other machines: one protocol, one module for each kind of device."""
