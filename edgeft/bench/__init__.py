"""Measuring a package: speed, memory and accuracy in the runtime it ships for."""
